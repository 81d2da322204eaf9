//! The published tables, run again: each shape of guests, moved by every contender in turn, several
//! times, in one run.
//!
//! Owns: the order of a run, and what is kept of it. Tables, goals and pictures are made from what was
//! kept alone ([`report`], [`goals`], [`picture`]), so that they can be made again.
//! Must not: compare figures of different runs, or leave one out because of what it says.

pub mod goals;
pub mod picture;
pub mod report;
pub mod shape;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use vmgang_e2e::{boot_all, verify_all, vmgang};
use vmgang_lab::{GuestSpec, Host, Lab, parse_rate};

use crate::contender::Contender;
use crate::gang::GANG;
use crate::measure::{Circumstances, Move, there_and_back};
use crate::table::median;
use shape::{Leg, Shape};

/// Guests that boot at the same time; more would wait for processors for too long.
const BOOTING: usize = 4;
/// From the last one's first report to the first move.
const CALM: Duration = Duration::from_secs(10);

/// Everything that was measured with one shape.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Document {
    pub shape: String,
    pub title: String,
    /// Year, month and day.
    pub date: String,
    pub machine: Machine,
    pub repetitions: usize,
    pub guests: Vec<GuestText>,
    pub legs: Vec<LegResult>,
}

/// Where it was measured, and with what.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    pub processors: usize,
    pub processor: String,
    pub memory_bytes: u64,
    pub kernel: String,
    /// As `virsh version` and `vmgang --version` tell on the hosts.
    pub versions: Vec<String>,
}

/// A guest, as it was made. Its seed is derived from its name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestText {
    pub name: String,
    pub recipe: String,
}

/// What was measured in one leg. Moves of one contender are together, in the order of the rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LegResult {
    pub name: String,
    /// As `parse_rate` takes it.
    pub link: String,
    pub congestion_percent: Option<u64>,
    pub guests: Vec<String>,
    pub moves: Vec<Move>,
}

impl Document {
    /// All that were ever kept in a directory, in the order of the shapes.
    pub fn all_in(dir: &Path) -> Result<Vec<Document>> {
        let paths = Shape::value_variants()
            .iter()
            .map(|shape| dir.join(format!("{}.json", shape.name())));
        paths
            .filter(|path| path.exists())
            .map(|path| {
                let text =
                    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                serde_json::from_slice(&text)
                    .with_context(|| format!("{} holds no measurements", path.display()))
            })
            .collect()
    }

    pub fn leg(&self, name: &str) -> Option<&LegResult> {
        self.legs.iter().find(|leg| leg.name == name)
    }
}

impl From<&GuestSpec> for GuestText {
    fn from(spec: &GuestSpec) -> Self {
        Self {
            name: spec.name().to_owned(),
            recipe: spec.recipe(),
        }
    }
}

impl LegResult {
    /// Without a move. `names`: of all guests of the shape.
    fn begin(leg: &Leg, names: &[&str]) -> Self {
        let guests = names[leg.guests.clone()].iter();
        Self {
            name: leg.name.clone(),
            link: leg.link.to_owned(),
            congestion_percent: leg.congestion_percent,
            guests: guests.map(|name| (*name).to_owned()).collect(),
            moves: Vec::new(),
        }
    }

    /// The contenders, in the order of the table.
    pub fn contenders(&self) -> Vec<Contender> {
        let mut found = Vec::new();
        for contender in self.moves.iter().map(|one| &one.contender) {
            // A file may be older than a contender's title.
            if let Some(contender) = Contender::by_title(contender)
                && !found.contains(&contender)
            {
                found.push(contender);
            }
        }
        found
    }

    pub fn of(&self, contender: Contender) -> impl Iterator<Item = &Move> {
        let title = contender.title();
        self.moves.iter().filter(move |one| one.contender == title)
    }

    /// The median of a figure; `None` if it was not measured.
    pub fn median(
        &self,
        contender: Contender,
        figure: impl Fn(&Move) -> Option<f64>,
    ) -> Option<f64> {
        let mut figures = self.of(contender).filter_map(figure).peekable();
        figures.peek()?;
        Some(median(figures))
    }

    pub fn seconds(&self, contender: Contender) -> Option<f64> {
        self.median(contender, |one| Some(one.seconds))
    }

    pub fn bytes(&self, contender: Contender) -> Option<f64> {
        self.median(contender, |one| Some(one.link_bytes as f64))
    }

    pub fn downtime_mean_ms(&self, contender: Contender) -> Option<f64> {
        self.median(contender, |one| Some(one.downtime_mean_ms()))
    }

    /// What is left of the guests' work while they are moved.
    pub fn work_kept(&self, contender: Contender) -> Option<f64> {
        self.median(contender, |one| Some(one.load.as_ref()?.kept()))
    }

    /// What can be had without vmgang, by one figure: the contender with the least of it.
    pub fn best_stock(
        &self,
        figure: impl Fn(&Self, Contender) -> Option<f64>,
    ) -> Option<(Contender, f64)> {
        Contender::STOCK
            .into_iter()
            .filter_map(|contender| Some((contender, figure(self, contender)?)))
            .min_by(|one, other| one.1.total_cmp(&other.1))
    }
}

/// What a user asked for.
#[derive(Debug, Clone)]
pub struct Wish {
    pub repetitions: usize,
    /// Only legs over these links; all when empty.
    pub links: Vec<String>,
    /// Only legs with these names; all when empty.
    pub legs: Vec<String>,
    /// Only these; each leg's own when empty.
    pub contenders: Vec<Contender>,
}

impl Wish {
    fn legs(&self, shape: Shape) -> Vec<Leg> {
        let mut legs = shape.legs();
        legs.retain(|leg| {
            let link = self.links.is_empty() || self.links.iter().any(|link| link == leg.link);
            let name = self.legs.is_empty() || self.legs.contains(&leg.name);
            link && name
        });
        for leg in &mut legs {
            if !self.contenders.is_empty() {
                leg.contenders.clone_from(&self.contenders);
            }
        }
        legs
    }
}

/// Runs a shape in a lab of its own. `keep` gets everything so far after every round, `say` hears
/// about every move.
pub fn measure(
    lab: &Lab,
    shape: Shape,
    wish: &Wish,
    keep: &mut dyn FnMut(&Document) -> Result<()>,
    say: &mut dyn FnMut(&str),
) -> Result<Document> {
    let legs = wish.legs(shape);
    ensure!(
        !legs.is_empty() && wish.repetitions > 0,
        "there is nothing to measure of `{}`",
        shape.name()
    );
    let specs = shape.guests();
    let names: Vec<&str> = specs.iter().map(GuestSpec::name).collect();
    let a = lab.host("a")?;
    let mut document = Document {
        shape: shape.name().to_owned(),
        title: shape.title().to_owned(),
        date: today(a)?,
        machine: Machine::of(a)?,
        repetitions: 0,
        guests: Vec::new(),
        legs: Vec::new(),
    };
    // Legs with the same guests take turns. Guests of later ones do not run yet: idle ones, too, use
    // processors.
    for legs in legs.chunk_by(|one, next| one.guests.end == next.guests.end) {
        let booted = document.guests.len();
        let more = specs.get(booted..legs[0].guests.end).unwrap_or_default();
        boot(a, more)?;
        document.guests.extend(more.iter().map(GuestText::from));
        let first = document.legs.len();
        document
            .legs
            .extend(legs.iter().map(|leg| LegResult::begin(leg, &names)));
        for round in 0..wish.repetitions {
            for (leg, result) in legs.iter().zip(&mut document.legs[first..]) {
                let what = format!("{}, {}, round {}", shape.name(), leg.name, round + 1);
                let mut say = |line: &str| say(&format!("{what}, {line}"));
                play(lab, leg, round, shape.has_load(), result, &mut say)
                    .with_context(|| what.clone())?;
            }
            document.repetitions = round + 1;
            keep(&document)?;
        }
    }
    verify_all(a, &names[..document.guests.len()])?;
    Ok(document)
}

/// One round of a leg: every contender once.
fn play(
    lab: &Lab,
    leg: &Leg,
    round: usize,
    watch: bool,
    result: &mut LegResult,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    let guests: Vec<&str> = result.guests.iter().map(String::as_str).collect();
    let link = parse_rate(leg.link)?;
    let congestion = leg
        .congestion_percent
        .and_then(|percent| Some(link? * percent / 100));
    let circumstances = Circumstances {
        link,
        congestion,
        watch,
    };
    for turn in 0..leg.contenders.len() {
        // Each round begins with another one: nobody is always first.
        let contender = leg.contenders[(round + turn) % leg.contenders.len()];
        // A check takes longer than a move; guests tell of damage at any time.
        let verify = round == 0 && contender == Contender::Vmgang;
        let moved = there_and_back(lab, &guests, contender, circumstances, verify)
            .with_context(|| contender.title())?;
        say(&format!(
            "{}: {:.1} s, {:.1} MB, {:.0} ms",
            contender.title(),
            moved.seconds,
            moved.link_bytes as f64 / 1e6,
            moved.downtime_mean_ms(),
        ));
        result.moves.push(moved);
    }
    let order = |one: &Move| {
        let mut titles = leg.contenders.iter().map(|contender| contender.title());
        titles.position(|title| title == one.contender)
    };
    result.moves.sort_by_key(order);
    Ok(())
}

/// Boots all of them, a few at a time, and puts them into one gang once they are calm. What they hold
/// is checked after the first move by vmgang and at the end.
fn boot(host: &Host, specs: &[GuestSpec]) -> Result<()> {
    if specs.is_empty() {
        return Ok(());
    }
    for some in specs.chunks(BOOTING) {
        boot_all(host, some)?;
    }
    let names: Vec<&str> = specs.iter().map(GuestSpec::name).collect();
    std::thread::sleep(CALM);
    vmgang(host, &[&["gang", "add", GANG], &names[..]].concat())?.expect(0)?;
    Ok(())
}

fn today(host: &Host) -> Result<String> {
    Ok(host.run(&["date", "+%Y-%m-%d"])?.trim().to_owned())
}

impl Machine {
    fn of(host: &Host) -> Result<Machine> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
        let after = |text: &str, key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key));
            let value = line
                .unwrap_or_default()
                .trim_start_matches([' ', '\t', ':']);
            value.trim().to_owned()
        };
        let kib = after(&read("/proc/meminfo")?, "MemTotal");
        let kib = kib.split_whitespace().next().unwrap_or_default();
        let mut versions: Vec<String> = host
            .virsh(&["version"])?
            .lines()
            // Not the one about the programming interface.
            .filter(|line| !line.starts_with("Using API"))
            .filter_map(|line| Some(line.split_once(':')?.1.trim().to_owned()))
            .collect();
        versions.push(
            vmgang(host, &["--version"])?
                .expect(0)?
                .stdout
                .trim()
                .to_owned(),
        );
        versions.dedup();
        Ok(Machine {
            processors: std::thread::available_parallelism()?.get(),
            processor: after(&read("/proc/cpuinfo")?, "model name"),
            memory_bytes: kib.parse::<u64>().unwrap_or(0) << 10,
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            versions,
        })
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Documents as a run leaves them.

    use super::*;
    use crate::cost::Cost;
    use crate::load::Load;

    pub fn moved(contender: Contender, seconds: f64, link_bytes: u64, downtime_ms: u64) -> Move {
        Move {
            contender: contender.title().to_owned(),
            seconds,
            link_bytes,
            downtime_ms: vec![downtime_ms],
            cost: Cost::default(),
            load: Some(Load {
                before: 10.0,
                during: 5.0,
                after: 10.0,
            }),
            congestion: None,
            prepared: None,
            job: None,
        }
    }

    pub fn document(shape: Shape, legs: &[(&str, &str, Vec<Move>)]) -> Document {
        Document {
            shape: shape.name().to_owned(),
            title: shape.title().to_owned(),
            date: "2026-01-02".to_owned(),
            machine: Machine {
                processors: 2,
                processor: "some".to_owned(),
                memory_bytes: 24 << 30,
                kernel: "6".to_owned(),
                versions: vec!["QEMU 10".to_owned()],
            },
            repetitions: 1,
            guests: Vec::new(),
            legs: legs
                .iter()
                .map(|(name, link, moves)| LegResult {
                    name: (*name).to_owned(),
                    link: (*link).to_owned(),
                    congestion_percent: None,
                    guests: vec!["g".to_owned()],
                    moves: moves.clone(),
                })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{document, moved};
    use super::*;

    #[test]
    fn figures_are_medians_of_one_contender() {
        let moves = vec![
            moved(Contender::StockParallel, 4.0, 100, 30),
            moved(Contender::StockParallel, 9.0, 300, 10),
            moved(Contender::StockParallel, 5.0, 200, 20),
            moved(Contender::StockParallelZstd, 6.0, 90, 99),
            moved(Contender::Vmgang, 1.0, 10, 5),
        ];
        let document = document(Shape::Mixed, &[("1 Gbit/s", "1gbit", moves)]);
        let leg = document.leg("1 Gbit/s").expect("it is there");
        assert_eq!(leg.seconds(Contender::StockParallel), Some(5.0));
        assert_eq!(leg.bytes(Contender::Relay), None);
        let best = leg.best_stock(LegResult::seconds);
        assert_eq!(best, Some((Contender::StockParallel, 5.0)));
        // Another one by another figure; vmgang is not stock.
        let best = leg.best_stock(LegResult::bytes);
        assert_eq!(best, Some((Contender::StockParallelZstd, 90.0)));
        assert_eq!(leg.work_kept(Contender::Vmgang), Some(0.5));
        assert_eq!(leg.contenders().len(), 3);
    }

    #[test]
    fn a_wish_leaves_out_what_is_not_wanted() {
        let wish = Wish {
            repetitions: 1,
            links: vec!["1gbit".to_owned()],
            legs: Vec::new(),
            contenders: vec![Contender::Vmgang],
        };
        let legs = wish.legs(Shape::Mixed);
        assert_eq!(legs.len(), 1);
        assert_eq!(legs[0].contenders, [Contender::Vmgang]);
    }
}
