//! `make bench`: all contenders, interleaved, several times; raw JSON and a table.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use vmgang_bench::contender::Contender;
use vmgang_bench::gang::{self, Mix};
use vmgang_bench::measure::there_and_back;
use vmgang_bench::table::markdown;
use vmgang_e2e::install_tree;
use vmgang_lab::{Lab, LabOptions, parse_rate};

#[derive(Parser)]
#[command(about = "Moves one gang with every contender, interleaved")]
struct Arguments {
    /// Times each contender moves the gang.
    #[arg(long, default_value_t = 5)]
    repetitions: usize,
    /// Link between the hosts, such as 100mbit or 1gbit, or none.
    #[arg(long, default_value = "1gbit")]
    link: String,
    /// Which guests.
    #[arg(long, value_enum, default_value_t = Mix::Demo)]
    mix: Mix,
    /// Memory of each guest in MiB; 512, or 1024 of the Debian mix, when not given.
    #[arg(long)]
    memory: Option<u64>,
    /// Write the single measurements here, as JSON.
    #[arg(long, overrides_with = "json")]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let link = parse_rate(&arguments.link)?;
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    let mut moves = Vec::new();
    Lab::scope(&options, |lab| {
        let mix = arguments.mix;
        let memory_mib = arguments.memory.unwrap_or(mix.default_memory_mib());
        gang::boot(lab.host("a")?, mix, memory_mib)?;
        for round in 0..arguments.repetitions {
            // Each round begins with another contender: nobody is always first.
            for turn in 0..Contender::ALL.len() {
                let contender = Contender::ALL[(round + turn) % Contender::ALL.len()];
                // Once for each contender: a check takes longer than a move.
                let moved = there_and_back(lab, &mix.names(), contender, link, round == 0)?;
                eprintln!(
                    "round {} {}: {:.1} s, {:.0} MB, downtimes {:?} ms",
                    round + 1,
                    contender.title(),
                    moved.seconds,
                    moved.link_bytes as f64 / 1e6,
                    moved.downtime_ms
                );
                moves.push(moved);
            }
        }
        anyhow::Ok(())
    })?;
    let order = |title: &str| Contender::ALL.iter().position(|c| c.title() == title);
    moves.sort_by_key(|moved| order(&moved.contender));
    if let Some(path) = arguments.json {
        std::fs::write(&path, serde_json::to_vec_pretty(&moves)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}", markdown(&moves));
    Ok(())
}
