//! `make fault-matrix`: every fault in every phase, on the lab; writes `docs/fault-matrix.md`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use vmgang_e2e::faults::{Cell, Fault, Gang, Phase, markdown};
use vmgang_e2e::install_tree;
use vmgang_lab::{Lab, LabOptions};

#[derive(Parser)]
#[command(about = "Breaks one thing in each phase of a job, and looks what became of the guests")]
struct Arguments {
    /// Only these faults.
    #[arg(long, value_enum)]
    fault: Vec<Fault>,
    /// Only these phases.
    #[arg(long, value_enum)]
    phase: Vec<Phase>,
    /// Write the table here, if it is all of it.
    #[arg(long)]
    markdown: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    let mut cells: Vec<Cell> = Vec::new();
    let mut versions = String::new();
    Lab::scope(&options, |lab| {
        let a = lab.host("a")?;
        let version = a.virsh(&["version"])?;
        let of = |what: &str| {
            let line = version.lines().find(|line| line.starts_with(what));
            line.and_then(|line| line.split_whitespace().last())
                .unwrap_or("?")
                .to_owned()
        };
        versions = format!(
            "QEMU {} and libvirt {}",
            of("Running hypervisor"),
            of("Using library")
        );
        let mut gang = Gang::boot(lab)?;
        for fault in Fault::ALL {
            for phase in Phase::ALL {
                let wanted = (arguments.fault.is_empty() || arguments.fault.contains(&fault))
                    && (arguments.phase.is_empty() || arguments.phase.contains(&phase));
                if !wanted {
                    continue;
                }
                let start = Instant::now();
                let cell = gang.run(fault, phase)?;
                eprintln!(
                    "{}, {}: {} ({:.0} s) {:?}",
                    fault.title(),
                    phase.title(),
                    cell.outcome,
                    start.elapsed().as_secs_f64(),
                    cell.violations
                );
                cells.push(cell);
            }
        }
        anyhow::Ok(())
    })?;
    let date = String::from_utf8(
        std::process::Command::new("date")
            .arg("-I")
            .output()?
            .stdout,
    )?;
    let page = markdown(&cells, &versions, date.trim());
    let all = arguments.fault.is_empty() && arguments.phase.is_empty();
    match &arguments.markdown {
        Some(path) if all => std::fs::write(path, &page)
            .with_context(|| format!("cannot write {}", path.display()))?,
        _ => println!("{page}"),
    }
    let broken = cells
        .iter()
        .filter(|cell| !cell.violations.is_empty())
        .count();
    ensure!(broken == 0, "{broken} cells broke what must hold");
    Ok(())
}
