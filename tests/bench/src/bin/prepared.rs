//! `make prepared`: what preparing saves, what is saved on the way back, and what by members that are
//! there already; each beside a cold migration in the same run.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use serde::Serialize;
use vmgang_bench::contender::Contender;
use vmgang_bench::gang::{GANG, Mix, RedisData};
use vmgang_bench::measure::{Circumstances, there};
use vmgang_bench::table::median;
use vmgang_e2e::{boot_all, install_tree, uri, verify_all, vmgang};
use vmgang_lab::{GuestSpec, Host, Lab, LabOptions, Role, parse_rate};

#[derive(Parser)]
#[command(
    about = "Compares prepared migrations, ways back and joining members with cold migrations"
)]
struct Arguments {
    /// Times each is done.
    #[arg(long, default_value_t = 3)]
    repetitions: usize,
    /// Link between the hosts, such as 100mbit or 1gbit, or none.
    #[arg(long, default_value = "1gbit")]
    link: String,
    /// Which guests.
    #[arg(long, value_enum, default_value_t = Guests::Mix)]
    guests: Guests,
    /// Memory of each guest in MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// Write the single measurements here, as JSON.
    #[arg(long, overrides_with = "json")]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Guests {
    /// Four Debian guests with nothing to do.
    Idle,
    /// The Debian mix: idle, and three servers under load.
    Mix,
}

impl Guests {
    fn specs(self, memory_mib: u64) -> Vec<GuestSpec> {
        match self {
            Guests::Idle => ["idle1", "idle2", "idle3", "idle4"]
                .map(|name| GuestSpec::debian(name, Role::Idle).with_memory_mib(memory_mib))
                .into(),
            Guests::Mix => Mix::Debian.guests(memory_mib, RedisData::default()),
        }
    }
}

/// One measured migration.
#[derive(Debug, Serialize)]
struct Measured {
    what: &'static str,
    seconds: f64,
    /// Both directions on the interface of the host that is left.
    link_bytes: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let link = parse_rate(&arguments.link)?;
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    let specs = arguments.guests.specs(arguments.memory);
    let names: Vec<&str> = specs.iter().map(GuestSpec::name).collect();
    let mut all = Vec::new();
    Lab::scope(&options, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        boot_all(a, &specs)?;
        verify_all(a, &names)?;
        vmgang(a, &[&["gang", "add", GANG], &names[..]].concat())?.expect(0)?;
        let mut measured = |what: &'static str, seconds: f64, link_bytes: u64| {
            eprintln!("{what}: {seconds:.2} s, {:.2} MB", link_bytes as f64 / 1e6);
            all.push(Measured {
                what,
                seconds,
                link_bytes,
            });
        };
        let circumstances = Circumstances {
            link,
            ..Circumstances::default()
        };
        let there = |guests: &[&str], contender| there(lab, guests, contender, circumstances);
        for round in 0..arguments.repetitions {
            let verify = round == 0;
            // Each round begins with the other one.
            for turn in 0..2 {
                let contender = match (round + turn) % 2 == 0 {
                    true => Contender::Vmgang,
                    false => Contender::Prepared,
                };
                let moved = there(&names, contender)?;
                if let Some(prepared) = &moved.prepared {
                    measured("preparing", prepared.seconds, prepared.link_bytes);
                }
                let what = match contender {
                    Contender::Prepared => "prepared",
                    _ => "cold",
                };
                measured(what, moved.seconds, moved.link_bytes);
                if verify {
                    verify_all(b, &names)?;
                }
                stock_back(lab, &names)?;
            }
            // There, and back at once.
            let moved = there(&names, Contender::Vmgang)?;
            measured("there", moved.seconds, moved.link_bytes);
            let before = b.net_counters()?;
            let start = std::time::Instant::now();
            vmgang(b, &["migrate", "--quiet", GANG, &uri(a)])?.expect(0)?;
            let seconds = start.elapsed().as_secs_f64();
            let counted = b.net_counters()?.since(&before);
            measured("back", seconds, counted.tx_bytes + counted.rx_bytes);
            if verify {
                verify_all(a, &names)?;
            }
            // Only the first two, to a host without the others and to one with them.
            let (first, others) = names.split_at(2);
            forget(b)?;
            let moved = there(first, Contender::Vmgang)?;
            measured("two, alone", moved.seconds, moved.link_bytes);
            stock_back(lab, first)?;
            Contender::StockParallel.migrate(others, a, b)?;
            forget(b)?;
            vmgang(b, &["estimate", "--json", GANG])?.expect(0)?;
            let moved = there(first, Contender::Vmgang)?;
            measured("two, to others", moved.seconds, moved.link_bytes);
            if verify {
                verify_all(b, &names)?;
            }
            stock_back(lab, &names)?;
            for host in [a, b] {
                forget(host)?;
            }
        }
        anyhow::Ok(())
    })?;
    if let Some(path) = arguments.json {
        std::fs::write(&path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    print!("{}", table(&all));
    Ok(())
}

/// A daemon that has just started has kept nothing.
fn forget(host: &Host) -> Result<()> {
    Ok(host.vmgangd().restart()?)
}

/// Back to where the next one starts, without vmgang.
fn stock_back(lab: &Lab, names: &[&str]) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    lab.shape(None)?;
    let mut there = b.domains()?;
    there.retain(|name| names.contains(&name.as_str()));
    let there: Vec<&str> = there.iter().map(String::as_str).collect();
    Contender::StockParallel.migrate(&there, b, a).map(drop)
}

fn table(all: &[Measured]) -> String {
    let of = |what: &str, value: &dyn Fn(&Measured) -> f64| {
        median(all.iter().filter(|one| one.what == what).map(value))
    };
    let mut text =
        String::from("| | MB | of its cold one | s | of its cold one |\n|---|---|---|---|---|\n");
    for (what, cold) in [
        ("cold", "cold"),
        ("preparing", "cold"),
        ("prepared", "cold"),
        ("there", "there"),
        ("back", "there"),
        ("two, alone", "two, alone"),
        ("two, to others", "two, alone"),
    ] {
        let bytes = |one: &Measured| one.link_bytes as f64 / 1e6;
        let seconds = |one: &Measured| one.seconds;
        text.push_str(&format!(
            "| {what} | {:.2} | {:.3} | {:.2} | {:.2} |\n",
            of(what, &bytes),
            of(what, &bytes) / of(cold, &bytes),
            of(what, &seconds),
            of(what, &seconds) / of(cold, &seconds),
        ));
    }
    text
}
