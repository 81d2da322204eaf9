//! `make tls-cost`: what TLS costs. The same streams over loopback through both halves of the engine, with
//! TLS and without in turns; processor time for each GB that crosses, and how much crosses in a second.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use vmgang_bench::replay::{Contender, Measurement, Settings, half, run, this_program};
use vmgang_bench::streams::StreamSet;
use vmgang_bench::synthetic::Kind;
use vmgang_bench::table::median;

#[derive(Parser)]
#[command(about = "Measures what TLS costs")]
struct Arguments {
    /// Times each is run, in turns.
    #[arg(long, default_value_t = 7)]
    repetitions: usize,
    /// Memory of each of the four synthetic guests in MiB.
    #[arg(long, default_value_t = 128)]
    size: u64,
    /// TCP connections of a session, 1 to 16.
    #[arg(long, default_value = "1")]
    connections: NonZeroUsize,
    /// Write the single measurements here, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const MEMBERS: usize = 4;
const WINDOW_BYTES: u64 = 512 << 20;
/// Streams, and what is done to them: nothing to be saved, with vmgang's work and without, which is where
/// most crosses and TLS costs most; and something of everything.
const ROWS: [(Kind, &str); 3] = [
    (Kind::Unique, "none"),
    (Kind::Unique, "default"),
    (Kind::Mixed, "default"),
];

/// Runs of one row, plain and with TLS, one of each in a round.
#[derive(Serialize)]
struct Row {
    set: String,
    techniques: &'static str,
    plain: Vec<Measurement>,
    tls: Vec<Measurement>,
}

fn main() -> Result<()> {
    if half::serve_if_asked() {
        return Ok(());
    }
    let arguments = Arguments::parse();
    ensure!(
        arguments.repetitions > 0 && arguments.size > 0,
        "nothing is measured with no repetitions or no memory"
    );
    let plain = Settings {
        window_bytes: WINDOW_BYTES,
        tls: false,
        workers: std::thread::available_parallelism()?.get(),
        connections: arguments.connections,
        program: this_program()?,
    };
    let tls = Settings {
        tls: true,
        ..plain.clone()
    };
    let mut rows = Vec::new();
    for (kind, techniques) in ROWS {
        let set = StreamSet::synthetic(kind, MEMBERS, arguments.size);
        let contender = Contender::Vmgang(techniques.to_owned());
        let mut row = Row {
            set: kind.to_string(),
            techniques,
            plain: Vec::new(),
            tls: Vec::new(),
        };
        for round in 0..arguments.repetitions {
            // Neither is always first.
            for turn in 0..2 {
                let (settings, runs) = match (round + turn) % 2 {
                    0 => (&plain, &mut row.plain),
                    _ => (&tls, &mut row.tls),
                };
                let measured = run(&set, &contender, None, settings)?;
                eprintln!(
                    "{kind}, {techniques}, {}, round {}: {:.2} s",
                    if settings.tls { "TLS" } else { "plain" },
                    round + 1,
                    measured.seconds
                );
                runs.push(measured);
            }
        }
        rows.push(row);
    }
    println!("{}", markdown(&rows));
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_vec_pretty(&rows)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Two lines a row; ratios are medians of each round's own, so that what the machine did meanwhile
/// counts for both.
fn markdown(rows: &[Row]) -> String {
    let mut lines = vec![
        "| streams | techniques | | crosses | time | GB/s | s/GB source | s/GB destination | together, to plain |"
            .to_owned(),
        "|---|---|---|--:|--:|--:|--:|--:|--:|".to_owned(),
    ];
    for row in rows {
        let ratio = median(
            row.plain
                .iter()
                .zip(&row.tls)
                .map(|(plain, tls)| cpu_seconds(tls) / cpu_seconds(plain)),
        );
        for (name, runs, ratio) in [("plain", &row.plain, 1.0), ("TLS", &row.tls, ratio)] {
            let of = |figure: &dyn Fn(&Measurement) -> f64| median(runs.iter().map(figure));
            let gb = of(&|m| m.wire_bytes as f64 / 1e9);
            lines.push(format!(
                "| {} | {} | {name} | {:.0} MB | {:.2} s | {:.2} | {:.2} | {:.2} | {ratio:.2} |",
                row.set,
                row.techniques,
                gb * 1e3,
                of(&|m| m.seconds),
                of(&|m| m.wire_bytes as f64 / 1e9 / m.seconds),
                of(&|m| m.source.cpu_seconds) / gb,
                of(&|m| m.destination.cpu_seconds) / gb,
            ));
        }
    }
    lines.join("\n")
}

fn cpu_seconds(measured: &Measurement) -> f64 {
    measured.source.cpu_seconds + measured.destination.cpu_seconds
}
