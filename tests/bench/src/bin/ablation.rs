//! `make ablation`: every technique alone, all but each and all, fixed rungs of compression beside
//! the adaptive default, on recorded and made-up streams over several links, in one run. Writes
//! the measurements as JSON, tables as Markdown and a picture.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use vmgang_bench::ablation::plan::{Plan, PlannedLink};
use vmgang_bench::ablation::{Document, measure, picture, report};
use vmgang_bench::replay::{Settings, half, this_program};
use vmgang_bench::streams::{Recording, StreamSet};
use vmgang_bench::synthetic::Kind;
use vmgang_lab::parse_rate;

#[derive(Parser)]
#[command(about = "Measures what each technique is worth, on every mix and link")]
struct Arguments {
    /// The directory with the sets that `record` has kept, one below it for each mix. Sets that
    /// are not there are left out.
    #[arg(long, value_name = "DIR")]
    recorded: Option<PathBuf>,
    /// Which sets: names of directories below --recorded, and unique, near-copies, mixed.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "debian,demo,unique,near-copies,mixed"
    )]
    sets: Vec<String>,
    /// What the link between the halves carries, or none for loopback as fast as it is.
    #[arg(long, value_delimiter = ',', default_value = "none,1gbit,100mbit")]
    link: Vec<String>,
    /// Times every row is run, interleaved; rows of the set unique at least 3 times.
    #[arg(long, default_value_t = 1)]
    repetitions: usize,
    /// Single techniques over every link, not only over the first one.
    #[arg(long)]
    every_row: bool,
    /// Memory of each of the four synthetic guests in MiB.
    #[arg(long, default_value_t = 64)]
    size: u64,
    /// The page window in MiB.
    #[arg(long, default_value_t = 512)]
    window: u64,
    /// Mutual TLS 1.3 between the halves, as vmgangd does by default. The relay has none.
    #[arg(long)]
    tls: bool,
    /// Threads of each half; as many as there are processors when not given.
    #[arg(long)]
    workers: Option<usize>,
    /// Where the tables, the measurements and the picture go: DIR/ablation.md, .json and .svg.
    #[arg(long, value_name = "DIR", default_value = "docs/benchmarks")]
    out: PathBuf,
    /// Where the picture goes instead.
    #[arg(long, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// Measure nothing; make tables and picture again from the measurements in this file.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

const SYNTHETIC_MEMBERS: usize = 4;

fn main() -> Result<()> {
    if half::serve_if_asked() {
        return Ok(());
    }
    let arguments = Arguments::parse();
    let start = Instant::now();
    let document = match &arguments.from {
        Some(file) => {
            let text =
                std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            serde_json::from_slice(&text)
                .with_context(|| format!("{} holds no measurements", file.display()))?
        }
        None => measure_all(&arguments, start)?,
    };
    keep(&arguments, &document)?;
    println!("{}", report::text(&document));
    eprintln!("took {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn measure_all(arguments: &Arguments, start: Instant) -> Result<Document> {
    ensure!(arguments.repetitions > 0, "no repetitions, no measurements");
    let plan = Plan {
        links: arguments
            .link
            .iter()
            .map(|rate| {
                Ok(PlannedLink {
                    rate: rate.clone(),
                    bits_per_second: parse_rate(rate)?,
                })
            })
            .collect::<Result<_>>()?,
        repetitions: arguments.repetitions,
        every_row: arguments.every_row,
    };
    let processors = std::thread::available_parallelism()?.get();
    let settings = Settings {
        window_bytes: arguments.window << 20,
        tls: arguments.tls,
        workers: arguments.workers.unwrap_or(processors).max(1),
        connections: std::num::NonZeroUsize::MIN,
        program: this_program()?,
    };
    let sets = arguments
        .sets
        .iter()
        .map(|name| Ok((name.as_str(), find(arguments, name)?)))
        .collect::<Result<Vec<_>>>()?;
    let mut document = Document {
        window_bytes: settings.window_bytes,
        tls: settings.tls,
        workers: settings.workers,
        processors,
        mixes: Vec::new(),
    };
    for (name, found) in sets {
        // One set at a time is in memory.
        let set = match found {
            Found::Recorded(dir) => StreamSet::recorded(&dir, None)?,
            Found::Synthetic(kind) => StreamSet::synthetic(kind, SYNTHETIC_MEMBERS, arguments.size),
            Found::Missing => {
                eprintln!("{name}: not recorded; left out");
                continue;
            }
        };
        let mut say = |line: &str| eprintln!("{:5.0} s  {line}", start.elapsed().as_secs_f64());
        let measured = measure(&plan, name, &set, &settings, &mut say)?;
        document.mixes.push(measured);
        // What was measured is kept even if the next set fails.
        keep(arguments, &document)?;
    }
    ensure!(!document.mixes.is_empty(), "none of the sets is there");
    Ok(document)
}

/// Where a set comes from.
enum Found {
    Recorded(PathBuf),
    Synthetic(Kind),
    Missing,
}

fn find(arguments: &Arguments, name: &str) -> Result<Found> {
    if let Ok(kind) = <Kind as clap::ValueEnum>::from_str(name, false) {
        ensure!(arguments.size > 0, "synthetic guests have some memory");
        return Ok(Found::Synthetic(kind));
    }
    let plain = !name.is_empty() && Path::new(name).components().count() == 1;
    ensure!(
        plain,
        "`{name}` is neither a synthetic set nor a directory's name"
    );
    let Some(dir) = arguments.recorded.as_ref().map(|dir| dir.join(name)) else {
        return Ok(Found::Missing);
    };
    if !dir.exists() {
        return Ok(Found::Missing);
    }
    // Damage is found before the first set is measured.
    Recording::load(&dir)?;
    Ok(Found::Recorded(dir))
}

fn keep(arguments: &Arguments, document: &Document) -> Result<()> {
    let out = &arguments.out;
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let write = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    if arguments.from.is_none() {
        let json = serde_json::to_string_pretty(document)?;
        write(&out.join("ablation.json"), &json)?;
    }
    write(&out.join("ablation.md"), &report::text(document))?;
    let beside = out.join("ablation.svg");
    let path = arguments.picture.as_ref().unwrap_or(&beside);
    write(path, &picture::svg(document)?)
}
