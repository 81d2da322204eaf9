//! `simulate`: runs seeds until one shows that something is wrong, or one seed with its trace.
//! `SEEDS` is how many, `FROM` the first one, `SEED` the one; `JOBS` threads share them.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use vmgang_simulation::{Outcome, run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn show(outcome: &Outcome) {
    println!("{:#?}", outcome.plan);
    for line in &outcome.trace {
        println!("{line}");
    }
    println!("{:?}", outcome.ending);
    for finding in &outcome.findings {
        println!("FINDING: {finding}");
    }
    println!(
        "seed {}: {} steps, trace {:016x}",
        outcome.seed, outcome.steps, outcome.hash
    );
}

fn main() -> ExitCode {
    if let Some(seed) = number("SEED") {
        let outcome = run(seed, true);
        show(&outcome);
        return match outcome.findings.is_empty() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        };
    }
    let (from, seeds) = (
        number("FROM").unwrap_or(0),
        number("SEEDS").unwrap_or(100_000),
    );
    let next = AtomicU64::new(from);
    let failed = AtomicU64::new(0);
    let most = number("FAILURES").unwrap_or(1);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..number("JOBS").unwrap_or(1).max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= from + seeds || failed.load(Relaxed) >= most {
                        return;
                    }
                    let outcome = run(seed, false);
                    if let Some(finding) = outcome.findings.first() {
                        failed.fetch_add(1, Relaxed);
                        println!("seed {seed}: {finding}");
                        println!("  replay: SEED={seed} make simulate-sessions");
                    }
                    let done = seed - from + 1;
                    if done.is_multiple_of(10_000) {
                        println!("{done} seeds, {} s", began.elapsed().as_secs());
                    }
                }
            });
        }
    });
    match failed.load(Relaxed) {
        0 => {
            println!(
                "{seeds} seeds, {} s: nothing wrong",
                began.elapsed().as_secs()
            );
            ExitCode::SUCCESS
        }
        _ => ExitCode::FAILURE,
    }
}
