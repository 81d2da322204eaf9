//! `make replay`: recorded or synthetic streams through both halves of the engine, a row for each
//! choice of techniques, and one for a plain relay of the same bytes.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{ArgGroup, Parser};
use serde::Serialize;
use vmgang_bench::ablation::plan::{Class, Plan};
use vmgang_bench::floor::{Floor, Method};
use vmgang_bench::replay::{Contender, Measurement, Settings, half, report, run, this_program};
use vmgang_bench::streams::StreamSet;
use vmgang_bench::synthetic::Kind;
use vmgang_engine::Techniques;
use vmgang_lab::parse_rate;

#[derive(Parser)]
#[command(about = "Replays migration streams through both halves of the engine")]
#[command(group(ArgGroup::new("set").required(true).args(["streams", "synthetic"])))]
struct Arguments {
    /// A directory that `record` has filled.
    #[arg(long, value_name = "DIR")]
    streams: Option<PathBuf>,
    /// Made-up streams instead.
    #[arg(long, value_enum, value_name = "KIND")]
    synthetic: Option<Kind>,
    /// Memory of each synthetic guest in MiB.
    #[arg(long, default_value_t = 128, requires = "synthetic")]
    size: u64,
    /// How many members side by side: all that were recorded, or 4 synthetic ones.
    #[arg(long)]
    members: Option<usize>,
    /// A row with these techniques, as `vmgang migrate --technique` takes them; may be repeated.
    /// `default` when none is given.
    #[arg(long, value_name = "LIST")]
    technique: Vec<String>,
    /// Rows with none, each technique alone, all but each, and all.
    #[arg(long)]
    ablation: bool,
    /// No row for the plain relay.
    #[arg(long)]
    no_relay: bool,
    /// What the link between the halves carries, such as 100mbit or 1gbit, or none for loopback
    /// as fast as it is; may be repeated.
    #[arg(long, value_name = "RATE", default_value = "none")]
    link: Vec<String>,
    /// The page window, in bytes or with KiB, MiB or GiB.
    #[arg(long, value_name = "BYTES", default_value = "512MiB", value_parser = parse_bytes)]
    window: u64,
    /// Times every row is run, interleaved.
    #[arg(long, default_value_t = 1)]
    repetitions: usize,
    /// Mutual TLS 1.3 between the halves, as vmgangd does by default. The relay has none.
    #[arg(long, conflicts_with = "plain")]
    tls: bool,
    /// No TLS: what is measured is vmgang's own work. The default.
    #[arg(long)]
    plain: bool,
    /// Threads of each half; as many as there are processors when not given.
    #[arg(long)]
    workers: Option<usize>,
    /// TCP connections of a session, 1 to 16.
    #[arg(long, default_value = "1")]
    connections: NonZeroUsize,
    /// zstd level of the floor; it takes minutes and is kept beside recorded streams. Without
    /// it, 19 for recorded streams and no floor for synthetic ones.
    #[arg(long, value_name = "LEVEL")]
    floor_level: Option<i32>,
    /// Do without the floor.
    #[arg(long, conflicts_with = "floor_level")]
    no_floor: bool,
    /// Write the single measurements here, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What `--json` writes.
#[derive(Serialize)]
struct Document<'a> {
    set: &'a str,
    members: Vec<&'a str>,
    window_bytes: u64,
    tls: bool,
    workers: usize,
    connections: NonZeroUsize,
    floor: Option<&'a Floor>,
    runs: &'a [Measurement],
}

const SYNTHETIC_MEMBERS: usize = 4;

fn main() -> Result<()> {
    if half::serve_if_asked() {
        return Ok(());
    }
    let arguments = Arguments::parse();
    let contenders = contenders(&arguments)?;
    let links = arguments
        .link
        .iter()
        .map(|rate| Ok(parse_rate(rate)?))
        .collect::<Result<Vec<_>>>()?;
    let settings = Settings {
        window_bytes: arguments.window,
        tls: arguments.tls,
        workers: match arguments.workers {
            Some(workers) => workers.max(1),
            None => std::thread::available_parallelism()?.get(),
        },
        connections: arguments.connections,
        program: this_program()?,
    };
    let set = load(&arguments)?;
    println!(
        "{}: {} members, {:.1} MB of stream, window {} MiB, {}",
        set.title,
        set.members.len(),
        set.stream_bytes() as f64 / 1e6,
        settings.window_bytes >> 20,
        if settings.tls { "TLS" } else { "plain" }
    );
    let floor = floor(&arguments, &set)?;
    if let Some(floor) = &floor {
        println!(
            "floor: {} page records, {} distinct, {:.2} MB by {} (found in {:.0} s)",
            floor.page_records,
            floor.distinct_pages,
            floor.bytes as f64 / 1e6,
            floor.method,
            floor.seconds
        );
    }
    let mut runs = Vec::new();
    for (rate, link) in arguments.link.iter().zip(&links) {
        let from = runs.len();
        for round in 0..arguments.repetitions {
            for turn in 0..contenders.len() {
                // Each round begins with another one: nobody is always first.
                let contender = &contenders[(round + turn) % contenders.len()];
                let measured = run(&set, contender, *link, &settings)?;
                eprintln!(
                    "{rate}, round {}, {}: {:.2} s, {:.2} MB",
                    round + 1,
                    measured.contender,
                    measured.seconds,
                    measured.wire_bytes as f64 / 1e6
                );
                runs.push(measured);
            }
        }
        let place = |title: &str| contenders.iter().position(|c| c.title() == title);
        runs[from..].sort_by_key(|measured| place(&measured.contender));
        println!(
            "\nlink: {rate}\n\n{}",
            report::markdown(&runs[from..], floor.as_ref())
        );
        println!("{}", report::savings(&runs[from..]));
    }
    if let Some(path) = &arguments.json {
        let document = Document {
            set: &set.title,
            members: set.members.iter().map(|m| m.name.as_str()).collect(),
            window_bytes: settings.window_bytes,
            tls: settings.tls,
            workers: settings.workers,
            connections: settings.connections,
            floor: floor.as_ref(),
            runs: &runs,
        };
        std::fs::write(path, serde_json::to_vec_pretty(&document)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn contenders(arguments: &Arguments) -> Result<Vec<Contender>> {
    let mut contenders = Vec::new();
    if !arguments.no_relay {
        contenders.push(Contender::Relay);
    }
    if arguments.ablation {
        let plan = Plan {
            links: Vec::new(),
            repetitions: 1,
            every_row: true,
        };
        let rows = plan.rows("");
        let lists = rows.into_iter().filter(|row| row.class != Class::Relay);
        contenders.extend(lists.map(|row| Contender::Vmgang(row.techniques)));
    }
    for list in &arguments.technique {
        // Refused here, not in the middle of the runs.
        list.parse::<Techniques>()?;
        contenders.push(Contender::Vmgang(list.clone()));
    }
    if arguments.technique.is_empty() && !arguments.ablation {
        contenders.push(Contender::Vmgang("default".to_owned()));
    }
    let mut seen: Vec<Contender> = Vec::new();
    contenders.retain(|contender| {
        let new = !seen.contains(contender);
        seen.push(contender.clone());
        new
    });
    Ok(contenders)
}

fn load(arguments: &Arguments) -> Result<StreamSet> {
    match (&arguments.streams, arguments.synthetic) {
        (Some(dir), _) => StreamSet::recorded(dir, arguments.members),
        (None, Some(kind)) => {
            let members = arguments.members.unwrap_or(SYNTHETIC_MEMBERS);
            ensure!(
                (1..=vmgang_engine::MEMBERS_MAX).contains(&members) && arguments.size > 0,
                "a set has at least one member with some memory"
            );
            Ok(StreamSet::synthetic(kind, members, arguments.size))
        }
        // clap asks for one of them.
        (None, None) => anyhow::bail!("no streams were named"),
    }
}

fn floor(arguments: &Arguments, set: &StreamSet) -> Result<Option<Floor>> {
    let level = match arguments.floor_level {
        Some(level) => level,
        None if arguments.no_floor || arguments.synthetic.is_some() => return Ok(None),
        None => Method::FLOOR.level,
    };
    Floor::of(set, Method { level, long: true }).map(Some)
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let (number, shift) = units
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))
        .unwrap_or((text, 0));
    number
        .trim()
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("`{text}` is not a size; write for example 512MiB"))
}
