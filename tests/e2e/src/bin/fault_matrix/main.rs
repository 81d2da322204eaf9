//! `make fault-matrix`: a gang of real guests migrates, and in each phase everything that can break
//! does, once; a table of what became of the guests, and a failure if any was lost that need not
//! have been.
//!
//! Owns: which cells are run, and in which order. One lab serves for all of them: the gang goes to
//! and fro, and only a guest that was lost is booted again.

mod cell;
mod checks;
mod faults;
mod gang;
mod phases;
mod table;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use vmgang_lab::{Host, Lab};

use faults::Fault;
use gang::{GUESTS, LINK, Way};
use phases::Phase;
use table::{Cell, Origin};

#[derive(Parser)]
#[command(about = "Breaks everything in every phase of a migration")]
struct Arguments {
    /// Only these cells: `FAULT`, `:PHASE` or `FAULT:PHASE`, separated by commas.
    #[arg(long, value_delimiter = ',')]
    cells: Vec<String>,
    /// Keep the results here, one line of JSON a cell.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Keep the results that are there already; those of cells that are run are replaced.
    #[arg(long, requires = "results")]
    resume: bool,
    /// Where the page is written once every cell has a result.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/fault-matrix.md"))]
    page: PathBuf,
    /// Write the page without running anything.
    #[arg(long, requires = "resume")]
    page_only: bool,
}

/// How often a cell is tried whose phase was over before the fault.
const ATTEMPTS: usize = 3;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let chosen = chosen(&arguments.cells)?;
    let mut cells = match (&arguments.results, arguments.resume) {
        (Some(path), true) => table::load(path)?,
        _ => Vec::new(),
    };
    let options = gang::options()?;
    let origin = Lab::scope(&options, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let origin = origin(a)?;
        if arguments.page_only {
            return Ok(origin);
        }
        gang::start_daemons(lab)?;
        gang::boot(a, &GUESTS)?;
        let mut way = Way {
            lab,
            from: a,
            to: b,
        };
        for (number, &(fault, phase)) in chosen.iter().enumerate() {
            let started = Instant::now();
            for attempt in 1..=ATTEMPTS {
                let title = format!("{}, {}", fault.title(), phase.title());
                let (cell, next) = cell::attempt(way, fault, phase).context(title)?;
                way = next;
                say(number + 1, chosen.len(), &cell, started);
                let again = cell.missed && cell.broken.is_empty() && attempt < ATTEMPTS;
                table::put(&mut cells, cell);
                if let Some(path) = &arguments.results {
                    table::store(path, &cells)?;
                }
                if !again {
                    break;
                }
            }
        }
        anyhow::Ok(origin)
    })?;
    let page = table::page(&cells, &origin);
    if cells.len() == Fault::ALL.len() * Phase::ALL.len() {
        std::fs::write(&arguments.page, &page)
            .with_context(|| format!("cannot write {}", arguments.page.display()))?;
    } else {
        println!("{page}");
    }
    let broken = cells.iter().filter(|cell| !cell.broken.is_empty()).count();
    ensure!(broken == 0, "{broken} cells broke what must hold");
    Ok(())
}

fn say(number: usize, of: usize, cell: &Cell, started: Instant) {
    eprintln!(
        "{number}/{of} {}, {}: {} source, {} moved, {} lost, {} paused; job {} {:.1} s after; [{}]{}{} ({:.0} s)",
        cell.fault.title(),
        cell.phase.title(),
        cell.source,
        cell.moved,
        cell.lost.len(),
        cell.paused.len(),
        cell.job,
        cell.seconds,
        cell.moment,
        cell.note
            .as_ref()
            .map(|note| format!(" {note}"))
            .unwrap_or_default(),
        if cell.missed { " over before" } else { "" },
        started.elapsed().as_secs_f64(),
    );
    if let Some(sentence) = &cell.sentence {
        eprintln!("    {sentence}");
    }
    for broken in &cell.broken {
        eprintln!("    BROKEN: {broken}");
    }
}

/// The cells that the filter allows, a fault after the other.
fn chosen(filter: &[String]) -> Result<Vec<(Fault, Phase)>> {
    let parse = |text: &str| -> Result<(Option<Fault>, Option<Phase>)> {
        let (fault, phase) = text.split_once(':').unwrap_or((text, ""));
        let wrong =
            |text: &str, known: Vec<String>| format!("{text:?} is none of {}", known.join(", "));
        let fault = match fault {
            "" => None,
            text => match Fault::from_str(text, true) {
                Ok(fault) => Some(fault),
                Err(_) => bail!(wrong(text, names::<Fault>())),
            },
        };
        let phase = match phase {
            "" => None,
            text => match Phase::from_str(text, true) {
                Ok(phase) => Some(phase),
                Err(_) => bail!(wrong(text, names::<Phase>())),
            },
        };
        Ok((fault, phase))
    };
    let filter = filter
        .iter()
        .map(|text| parse(text))
        .collect::<Result<Vec<_>>>()?;
    let every = Fault::ALL
        .into_iter()
        .flat_map(|fault| Phase::ALL.map(|phase| (fault, phase)));
    Ok(every
        .filter(|(fault, phase)| {
            filter.is_empty()
                || filter.iter().any(|(wanted_fault, wanted_phase)| {
                    wanted_fault.is_none_or(|wanted| wanted == *fault)
                        && wanted_phase.is_none_or(|wanted| wanted == *phase)
                })
        })
        .collect())
}

fn names<T: ValueEnum>() -> Vec<String> {
    T::value_variants()
        .iter()
        .filter_map(|value| Some(value.to_possible_value()?.get_name().to_owned()))
        .collect()
}

fn origin(host: &Host) -> Result<Origin> {
    let line = |words: &[&str]| -> Result<String> {
        let text = host.run(words)?;
        Ok(text.lines().next().unwrap_or_default().trim().to_owned())
    };
    Ok(Origin {
        date: line(&["date", "-u", "+%F"])?,
        versions: vec![
            line(&["vmgang", "--version"])?,
            line(&["libvirtd", "--version"])?,
            line(&["qemu-system-x86_64", "--version"])?,
            format!("Linux {}", line(&["uname", "-r"])?),
        ],
        gang: format!(
            "`large` (160 MiB, all pages unique), `small` (96 MiB, idle) and `busy` (96 MiB, 50 pages \
             dirtied a second), filled from seeds derived from their names, under software emulation, on \
             a link of {} Mbit/s; no scans, and nothing kept from earlier migrations.",
            LINK / 1_000_000
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_names_a_row_a_column_or_a_cell() {
        let count = |filter: &[&str]| {
            let filter: Vec<String> = filter.iter().map(|text| (*text).to_owned()).collect();
            chosen(&filter).map(|cells| cells.len())
        };
        assert_eq!(count(&[]).expect("all"), 65);
        assert_eq!(count(&["loss"]).expect("a row"), 5);
        assert_eq!(count(&[":barrier"]).expect("a column"), 13);
        assert_eq!(count(&["loss:barrier", "link-cut"]).expect("six"), 6);
        assert!(count(&["no-such-fault"]).is_err());
        assert!(count(&["loss:later"]).is_err());
    }
}
