//! `make bench`: the published tables, run again: each shape of guests in a lab of its own, all
//! contenders interleaved, several times. Writes the measurements as JSON, tables as Markdown and a
//! picture of each shape.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use vmgang_bench::contender::Contender;
use vmgang_bench::suite::shape::Shape;
use vmgang_bench::suite::{Document, Wish, measure, picture, report};
use vmgang_e2e::install_tree;
use vmgang_lab::{Lab, LabOptions};

#[derive(Parser)]
#[command(about = "Moves gangs of guests with every contender, interleaved")]
struct Arguments {
    /// Which groups of guests; all when not given.
    #[arg(long, value_enum, value_delimiter = ',')]
    shape: Vec<Shape>,
    /// Times each contender moves them.
    #[arg(long, default_value_t = 5)]
    repetitions: usize,
    /// Only over links like these, such as 100mbit or none.
    #[arg(long, value_delimiter = ',')]
    link: Vec<String>,
    /// Only the parts of a shape with this name, such as "24 guests"; may be given several times.
    #[arg(long)]
    leg: Vec<String>,
    /// Only these contenders.
    #[arg(long, value_enum, value_delimiter = ',')]
    contenders: Vec<Contender>,
    /// Where the files go: DIR/SHAPE.json, DIR/SHAPE.svg and DIR/README.md.
    #[arg(long, value_name = "DIR", default_value = "docs/benchmarks/tables")]
    out: PathBuf,
    /// Measure nothing; make tables and pictures again from the JSON files.
    #[arg(long)]
    from_files: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let out = &arguments.out;
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    if !arguments.from_files {
        run(&arguments)?;
    }
    let documents = Document::all_in(out)?;
    ensure!(
        !documents.is_empty(),
        "{} holds no measurements",
        out.display()
    );
    for document in &documents {
        let path = out.join(format!("{}.svg", document.shape));
        write(&path, &picture::svg(document)?)?;
    }
    let text = report::text(&documents);
    write(&out.join("README.md"), &text)?;
    println!("{text}");
    Ok(())
}

fn run(arguments: &Arguments) -> Result<()> {
    let shapes = match arguments.shape.is_empty() {
        true => Shape::value_variants(),
        false => &arguments.shape[..],
    };
    let wish = Wish {
        repetitions: arguments.repetitions,
        links: arguments.link.clone(),
        legs: arguments.leg.clone(),
        contenders: arguments.contenders.clone(),
    };
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    let start = Instant::now();
    for shape in shapes {
        let path = arguments.out.join(format!("{}.json", shape.name()));
        let mut keep = |document: &Document| write(&path, &serde_json::to_string_pretty(document)?);
        let mut say = |line: &str| eprintln!("{:5.0} s  {line}", start.elapsed().as_secs_f64());
        Lab::scope(&options, |lab| {
            measure(lab, *shape, &wish, &mut keep, &mut say)
        })?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
