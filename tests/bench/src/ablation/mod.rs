//! What each technique is worth: every mix with every choice of techniques over every link, in one
//! run, as one document.
//!
//! Owns: which rows there are and which of them are run where ([`plan`]), running them, and what
//! is kept of it. Pictures and text are made from the document alone ([`picture`], [`report`]), so
//! that they can be made again.
//! Must not: leave out a row because of what it says.

pub mod picture;
pub mod plan;
pub mod report;
#[cfg(test)]
mod testing;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::floor::{Floor, Method};
use crate::replay::{Measurement, Settings, run};
use crate::streams::StreamSet;
use plan::{Class, Plan, Row};

/// Everything that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Document {
    pub window_bytes: u64,
    pub tls: bool,
    /// Threads of each half.
    pub workers: usize,
    /// Processors of the machine.
    pub processors: usize,
    pub mixes: Vec<MixResult>,
}

/// What was measured with one set of streams.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MixResult {
    pub name: String,
    pub title: String,
    pub members: Vec<String>,
    pub stream_bytes: u64,
    /// The floor first, then quicker ways; nothing for synthetic sets.
    pub floors: Vec<Floor>,
    /// The rows, in order.
    pub rows: Vec<Row>,
    pub links: Vec<LinkResult>,
}

/// What was measured over one link. `contender` of a measurement is the title of its row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkResult {
    /// As `--link` takes it.
    pub rate: String,
    /// Repetitions of the same row are together.
    pub runs: Vec<Measurement>,
}

impl MixResult {
    /// The row that users get when they choose nothing.
    pub fn default_row(&self) -> Option<&Row> {
        self.rows.iter().find(|row| row.class == Class::Default)
    }

    pub fn row(&self, title: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.title == title)
    }
}

impl LinkResult {
    /// The median of a figure over the repetitions of a row; `None` if it was not run here.
    pub fn median(&self, row: &Row, figure: impl Fn(&Measurement) -> f64) -> Option<f64> {
        let mut figures = self
            .runs
            .iter()
            .filter(|run| run.contender == row.title)
            .map(figure)
            .peekable();
        figures.peek()?;
        Some(crate::table::median(figures))
    }

    pub fn seconds(&self, row: &Row) -> Option<f64> {
        self.median(row, |run| run.seconds)
    }

    pub fn wire_bytes(&self, row: &Row) -> Option<f64> {
        self.median(row, |run| run.wire_bytes as f64)
    }
}

/// Runs everything that is planned for one set. `say` hears about each run.
pub fn measure(
    plan: &Plan,
    name: &str,
    set: &StreamSet,
    settings: &Settings,
    say: &mut dyn FnMut(&str),
) -> Result<MixResult> {
    let mut floors = Vec::new();
    if set.dir.is_some() {
        for method in [&[Method::FLOOR], &Method::QUICK[..]].concat() {
            say(&format!("{name}: distinct pages by {method}"));
            floors.push(Floor::of(set, method)?);
        }
    }
    let rows = plan.rows(name);
    let mut links = Vec::new();
    for (place, link) in plan.links.iter().enumerate() {
        let here: Vec<&Row> = rows
            .iter()
            .filter(|row| plan.runs_over(row, place))
            .collect();
        let mut runs = Vec::new();
        for round in 0..plan.repetitions_of(name) {
            for turn in 0..here.len() {
                // Each round begins with another one: nobody is always first.
                let row = here[(round + turn) % here.len()];
                let mut measured = run(set, &row.contender(), link.bits_per_second, settings)?;
                measured.contender.clone_from(&row.title);
                say(&format!(
                    "{name}, {}, round {}, {}: {:.2} s, {:.2} MB",
                    link.rate,
                    round + 1,
                    row.title,
                    measured.seconds,
                    measured.wire_bytes as f64 / 1e6
                ));
                runs.push(measured);
            }
        }
        let order = |title: &str| rows.iter().position(|row| row.title == title);
        runs.sort_by_key(|run| order(&run.contender));
        links.push(LinkResult {
            rate: link.rate.clone(),
            runs,
        });
    }
    Ok(MixResult {
        name: name.to_owned(),
        title: set.title.clone(),
        members: set.members.iter().map(|m| m.name.clone()).collect(),
        stream_bytes: set.stream_bytes(),
        floors,
        rows,
        links,
    })
}
