//! `make scaling`: how long hosts with many guests take to be emptied, computed from what the suite has
//! measured with a few. Writes tables and a picture; docs/scaling.md says what they mean.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use vmgang_bench::scaling::report::{Question, text};
use vmgang_bench::scaling::{derive, picture};
use vmgang_bench::suite::Document;

#[derive(Parser)]
#[command(about = "Computes evacuations of large hosts from what was measured")]
struct Arguments {
    /// Where the suite's JSON files are; those that are missing are done without.
    #[arg(long, value_name = "DIR", default_value = "docs/benchmarks/tables")]
    from: PathBuf,
    /// Where tables.md and times.svg go.
    #[arg(long, value_name = "DIR", default_value = "docs/scaling")]
    out: PathBuf,
    /// Guests of a host.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128, 256, 512])]
    guests: Vec<u32>,
    /// GiB of each guest.
    #[arg(long, default_value_t = 4.0)]
    memory: f64,
    /// Gbit/s of the link.
    #[arg(long, value_delimiter = ',', default_values_t = [1.0, 10.0, 25.0, 40.0, 100.0])]
    link: Vec<f64>,
    /// Cores of each host that the migration may use.
    #[arg(long, default_value_t = 16.0)]
    cores: f64,
    /// GB/s of each host's memory.
    #[arg(long, default_value_t = derive::MEMORY_GB)]
    memory_rate: f64,
    /// GiB that are available on each host beside the guests.
    #[arg(long, default_value_t = 64.0)]
    available: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let question = Question {
        guests: arguments.guests,
        memory_gib: arguments.memory,
        gigabits: arguments.link,
        cores: arguments.cores,
        memory_gb: arguments.memory_rate,
        available_gib: arguments.available,
    };
    let positive = [
        question.memory_gib,
        question.cores,
        question.memory_gb,
        question.available_gib,
    ];
    let all = positive.iter().chain(&question.gigabits);
    ensure!(
        all.copied().all(|one| one.is_finite() && one > 0.0) && !question.guests.contains(&0),
        "everything has to be more than nothing"
    );
    let documents = Document::all_in(&arguments.from)?;
    let out = &arguments.out;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let text = text(&question, &documents);
    write(&out.join("tables.md"), &text)?;
    write(
        &out.join("times.svg"),
        &picture::svg(&question, &documents)?,
    )?;
    println!("{text}");
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
