//! `make postcopy`: busy guests moved by post-copy, by stock virsh and by vmgang: how many pages the
//! guests had to wait for at the destination, and how long for each.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use vmgang_bench::contender::{self, Contender};
use vmgang_bench::gang::GANG;
use vmgang_bench::table::median;
use vmgang_e2e::{boot_all, expect_running, install_tree, uri, verify_all, vmgang};
use vmgang_lab::{GuestSpec, Host, Lab, LabOptions, parse_rate};

#[derive(Parser)]
#[command(about = "Measures how long guests wait for pages after a switch to post-copy")]
struct Arguments {
    /// Times each way moves the gang.
    #[arg(long, default_value_t = 5)]
    repetitions: usize,
    /// Link between the hosts, such as 100mbit or 1gbit, or none.
    #[arg(long, default_value = "1gbit")]
    link: String,
    /// Memory of each guest in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// Pages that each guest rewrites a second.
    #[arg(long, default_value_t = 2000)]
    dirty: u64,
    /// Pages among which it chooses them.
    #[arg(long, default_value_t = 16_000)]
    hot: u64,
    /// Write the single measurements here, as JSON.
    #[arg(long, overrides_with = "json")]
    json: Option<PathBuf>,
}

const GUESTS: [&str; 2] = ["one", "two"];
/// What is still on its way when the command has returned is there by then.
const SETTLE_TIME: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Stock,
    Vmgang,
}

impl Way {
    const ALL: [Way; 2] = [Way::Stock, Way::Vmgang];

    fn title(self) -> &'static str {
        match self {
            Way::Stock => "virsh --postcopy --postcopy-after-precopy, in parallel",
            Way::Vmgang => "vmgang --postcopy",
        }
    }

    fn migrate(self, from: &Host, to: &Host) -> Result<()> {
        match self {
            Way::Stock => {
                let words = ["--postcopy", "--postcopy-after-precopy"];
                contender::parallel(&GUESTS, from, to, &words)
            }
            Way::Vmgang => {
                let words = ["migrate", "--json", "--postcopy", GANG, &uri(to)];
                let job = vmgang(from, &words)?.expect(0)?.job()?;
                ensure!(job.state == "completed", "{job:?}");
                Ok(())
            }
        }
    }
}

/// One move, and as much time without one: what a busy machine makes slow by itself.
#[derive(Debug, Serialize)]
struct Measured {
    way: &'static str,
    seconds: f64,
    /// Touches of pages that took 250 microseconds or more, of all guests.
    faults: u64,
    mean_ms: f64,
    /// The same in as much time just before.
    faults_before: u64,
    mean_before_ms: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let link = parse_rate(&arguments.link)?;
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    let mut measured = Vec::new();
    Lab::scope(&options, |lab| {
        let a = lab.host("a")?;
        let busy = |name: &&str| {
            GuestSpec::new(name)
                .with_memory_mib(arguments.memory)
                .with_fill("zero:20,same:30,compressible:20,unique:30")
                .with_dirty_rate(arguments.dirty)
                .with_hot_pages(arguments.hot)
                .with_verify_rate(500)
        };
        boot_all(a, &GUESTS.iter().map(busy).collect::<Vec<_>>())?;
        vmgang(a, &[&["gang", "add", GANG], &GUESTS[..]].concat())?.expect(0)?;
        for round in 0..arguments.repetitions {
            for turn in 0..Way::ALL.len() {
                let way = Way::ALL[(round + turn) % Way::ALL.len()];
                let one = there_and_back(lab, way, link)?;
                eprintln!("round {}: {one:.2?}", round + 1);
                measured.push(one);
            }
        }
        verify_all(a, &GUESTS)
    })?;
    if let Some(path) = arguments.json {
        std::fs::write(&path, serde_json::to_vec_pretty(&measured)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}", table(&measured));
    Ok(())
}

/// Slow touches of all guests so far, and the milliseconds they took.
fn slow(host: &Host) -> Result<(u64, f64)> {
    let mut sum = (0, 0.0);
    for guest in GUESTS {
        let report = host.guest(guest).report()?.context("a report")?;
        sum = (sum.0 + report.slow, sum.1 + report.slow_us as f64 / 1e3);
    }
    Ok(sum)
}

fn there_and_back(lab: &Lab, way: Way, link: Option<u64>) -> Result<Measured> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    lab.shape(link)?;
    let first = slow(a)?;
    std::thread::sleep(SETTLE_TIME);
    let before = slow(a)?;
    let start = Instant::now();
    way.migrate(a, b)?;
    let seconds = start.elapsed().as_secs_f64();
    std::thread::sleep(SETTLE_TIME);
    expect_running(b, &GUESTS)?;
    let after = slow(b)?;
    lab.shape(None)?;
    Contender::StockParallel.migrate(&GUESTS, b, a)?;
    std::thread::sleep(SETTLE_TIME);
    let mean = |from: (u64, f64), to: (u64, f64)| match to.0 - from.0 {
        0 => 0.0,
        faults => (to.1 - from.1) / faults as f64,
    };
    Ok(Measured {
        way: way.title(),
        seconds,
        faults: after.0 - before.0,
        mean_ms: mean(before, after),
        faults_before: before.0 - first.0,
        mean_before_ms: mean(first, before),
    })
}

fn table(moves: &[Measured]) -> String {
    let mut lines =
        "| | time | waits for a page | mean wait | all waits |\n|---|--:|--:|--:|--:|\n".to_owned();
    for way in Way::ALL {
        let of: Vec<&Measured> = moves.iter().filter(|m| m.way == way.title()).collect();
        let median = |value: &dyn Fn(&Measured) -> f64| median(of.iter().map(|m| value(m)));
        lines.push_str(&format!(
            "| {} | {:.1} s | {:.0} | {:.2} ms | {:.0} ms |\n",
            way.title(),
            median(&|m| m.seconds),
            median(&|m| m.faults as f64),
            median(&|m| m.mean_ms),
            median(&|m| m.faults as f64 * m.mean_ms),
        ));
    }
    lines
}
