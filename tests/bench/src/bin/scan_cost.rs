//! `make scan-cost`: what periodic scans cost the guests that are scanned, against the same guests
//! not scanned, in one run: one guest that computes and one that writes, both as fast as they can.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use vmgang_bench::table::median;
use vmgang_e2e::{PATIENCE, boot_all, install_tree, vmgang};
use vmgang_lab::{Guest, GuestSpec, Host, Lab, LabOptions, Report};

#[derive(Parser)]
#[command(about = "Measures what periodic scans cost the guests")]
struct Arguments {
    /// Times each is measured, scanned and not.
    #[arg(long, default_value_t = 5)]
    repetitions: usize,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Processor budget of the scans, which follow each other without a pause.
    #[arg(long, default_value_t = 10)]
    percent: u8,
}

/// More than a guest can do.
const ALL_IT_CAN: u64 = 1 << 40;
/// Until the first scan of guests that are found anew.
const SETTLED: Duration = Duration::from_secs(17);
const CONFIGURATION: &str = "/etc/vmgang/vmgang.toml";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    let spec = |name| GuestSpec::new(name).with_memory_mib(512);
    let specs = [
        spec("computes").with_verify_rate(ALL_IT_CAN),
        spec("writes")
            .with_verify_rate(1)
            .with_dirty_rate(ALL_IT_CAN),
    ];
    // By guest, not scanned and scanned.
    let mut rates: [[Vec<f64>; 2]; 2] = Default::default();
    Lab::scope(&options, |lab| {
        let a = lab.host("a")?;
        let guests = boot_all(a, &specs)?;
        vmgang(a, &["gang", "add", "web", "computes", "writes"])?.expect(0)?;
        let configuration = a.read_text(CONFIGURATION).unwrap_or_default();
        for round in 0..arguments.repetitions {
            for turn in 0..2 {
                let scanned = (round + turn) % 2;
                let interval = scanned;
                let scan = format!(
                    "\n[scan]\ninterval_s = {interval}\nprocessor_percent = {}\n",
                    arguments.percent
                );
                a.write_file(CONFIGURATION, configuration.clone() + &scan)?;
                a.vmgangd().restart()?;
                std::thread::sleep(SETTLED);
                let measured = measure(&guests, Duration::from_secs(arguments.seconds))?;
                for (rate, rates) in measured.into_iter().zip(&mut rates) {
                    rates[scanned].push(rate);
                }
                let what = ["not scanned", "scanned"][scanned];
                eprintln!("{what}: {measured:.0?} pages/s, {}", scans(a)?);
            }
        }
        anyhow::Ok(())
    })?;
    println!("| guest | not scanned, pages/s | scanned | slower by |\n|---|--:|--:|--:|");
    for (name, [without, with]) in ["computes", "writes"].into_iter().zip(rates) {
        let (without, with) = (median(without), median(with));
        let slower = (1.0 - with / without) * 100.0;
        println!("| {name} | {without:.0} | {with:.0} | {slower:.1} % |");
    }
    Ok(())
}

/// Pages a second that each guest has checked, or written.
fn measure(guests: &[Guest], time: Duration) -> Result<[f64; 2]> {
    let work: [fn(&Report) -> u64; 2] = [|report| report.checked, |report| report.dirtied];
    let next = |guest: &Guest, work: fn(&Report) -> u64| -> Result<(Instant, u64)> {
        let before = guest.report()?.map_or(0, |report| work(&report));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = guest.report()?.map_or(0, |report| work(&report));
            if now != before {
                return Ok((Instant::now(), now));
            }
            ensure!(
                Instant::now() < deadline,
                "guest {} stands still",
                guest.name()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let both = || -> Result<Vec<(Instant, u64)>> {
        guests
            .iter()
            .zip(work)
            .map(|(guest, work)| next(guest, work))
            .collect()
    };
    let before = both()?;
    std::thread::sleep(time);
    let after = both()?;
    let rates: Vec<f64> = before
        .iter()
        .zip(&after)
        .map(|((begun, from), (ended, to))| (to - from) as f64 / (*ended - *begun).as_secs_f64())
        .collect();
    rates.try_into().ok().context("two guests")
}

/// How many scans the daemon of this run has made, as far as an estimate tells.
fn scans(host: &Host) -> Result<String> {
    let estimate = vmgang(host, &["estimate", "--json", "web"])?.expect(0)?;
    let estimate: serde_json::Value = serde_json::from_str(&estimate.stdout)?;
    Ok(format!("{} scans", estimate["members"][0]["scans"]))
}
