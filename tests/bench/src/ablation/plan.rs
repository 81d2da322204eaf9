//! What is run: rows, links, how often, and with which sets.
//!
//! Must not: know a technique by more than its name on the command line.

use serde::{Deserialize, Serialize};
use vmgang_engine::Techniques;

use crate::replay::Contender;

/// The set with nothing to save: what vmgang costs at worst.
pub const WORST_CASE: &str = "unique";
/// Fewer runs than these do not tell a few percent of time.
const WORST_CASE_REPETITIONS: usize = 3;

/// Why a row is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// Without vmgang.
    Relay,
    /// vmgang with nothing on.
    Nothing,
    /// One technique, with what it needs; or dedup and compression without the rest.
    Alone,
    /// Everything but one technique.
    AllBut,
    /// Everything, with compression fixed at one rung.
    Fixed,
    /// Everything, and compression adapts itself; if it is not the default.
    Everything,
    /// What users get who choose nothing.
    Default,
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    pub class: Class,
    pub title: String,
    /// As `--technique` takes them; of no meaning for the relay.
    pub techniques: String,
}

impl Row {
    fn new(class: Class, title: &str, techniques: &str) -> Self {
        Self {
            class,
            title: title.to_owned(),
            techniques: techniques.to_owned(),
        }
    }

    pub fn contender(&self) -> Contender {
        match self.class {
            Class::Relay => Contender::Relay,
            _ => Contender::Vmgang(self.techniques.clone()),
        }
    }
}

/// A link of the plan.
#[derive(Debug, Clone)]
pub struct PlannedLink {
    /// As `--link` takes it.
    pub rate: String,
    /// `None`: loopback as fast as it is.
    pub bits_per_second: Option<u64>,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub links: Vec<PlannedLink>,
    pub repetitions: usize,
    /// Run every row over every link. Otherwise single techniques and what is left without one
    /// are run over the first link only: what they send does not depend on the link, and over
    /// a slow one it takes as long as its bytes.
    pub every_row: bool,
}

/// Dedup alone, with what `page` needs to be all of it.
const DEDUP: &str = "page,rehash";
/// Dedup and compression without any difference of pages.
pub const DEDUP_AND_ZSTD: &str = "dedup and zstd";
/// What users get.
pub const DEFAULT: &str = "default";

impl Plan {
    /// The rows of a set, in the order of the table.
    pub fn rows(&self, set: &str) -> Vec<Row> {
        let mut rows = vec![
            Row::new(Class::Relay, "plain relay", ""),
            Row::new(Class::Nothing, "none", "none"),
        ];
        if set != WORST_CASE {
            rows.extend(alone());
            rows.extend(all_but());
            rows.extend(fixed());
        }
        if Techniques::default() != Techniques::ALL {
            rows.push(Row::new(Class::Everything, "all", "all"));
        }
        let default = Techniques::default().to_string();
        rows.push(Row::new(Class::Default, DEFAULT, &default));
        // A default that is another row already is shown as the default.
        let same = |row: &Row| {
            matches!(row.class, Class::Alone | Class::AllBut)
                && row.techniques.parse::<Techniques>() == Ok(Techniques::default())
        };
        rows.retain(|row| !same(row));
        rows
    }

    /// Whether a row is run over the link at that place.
    pub fn runs_over(&self, row: &Row, place: usize) -> bool {
        let everywhere = match row.class {
            Class::Relay | Class::Nothing => true,
            Class::Fixed | Class::Everything | Class::Default => true,
            Class::Alone => row.title == DEDUP_AND_ZSTD,
            Class::AllBut => false,
        };
        everywhere || self.every_row || place == 0
    }

    pub fn repetitions_of(&self, set: &str) -> usize {
        match set {
            WORST_CASE => self.repetitions.max(WORST_CASE_REPETITIONS),
            _ => self.repetitions,
        }
    }
}

/// Names of everything there is; parameters included.
fn names() -> Vec<String> {
    let all = Techniques::ALL.to_string();
    all.split(',').map(str::to_owned).collect()
}

/// Without its parameters.
fn short(name: &str) -> &str {
    name.split('=').next().unwrap_or(name)
}

fn alone() -> Vec<Row> {
    let row = |title: &str, list: &str| Row::new(Class::Alone, title, list);
    let mut rows = Vec::new();
    for name in names() {
        match short(&name) {
            "page" => {
                rows.push(row("page", "page"));
            }
            "rehash" => rows.push(row("page, rehash", DEDUP)),
            short @ ("delta" | "similar" | "sub-page") => {
                let title = format!("page, rehash, {short}");
                rows.push(row(&title, &format!("{DEDUP},{name}")));
            }
            short => rows.push(row(short, &name)),
        }
    }
    let list = format!("uniform,{DEDUP},zstd");
    rows.push(row(DEDUP_AND_ZSTD, &list));
    rows
}

fn all_but() -> Vec<Row> {
    let names = names();
    let mut rows = Vec::new();
    for left_out in &names {
        let without = |gone: &dyn Fn(&str) -> bool| {
            let rest: Vec<&str> = names.iter().map(String::as_str).collect();
            let rest: Vec<&str> = rest.into_iter().filter(|name| !gone(name)).collect();
            rest.join(",")
        };
        // What is built on page dedup goes with it.
        let (title, list) = match left_out.as_str() {
            "page" => (
                "uniform, zstd".to_owned(),
                without(&|name| !matches!(short(name), "uniform" | "zstd")),
            ),
            _ => (
                format!("all but {}", short(left_out)),
                without(&|name| name == left_out),
            ),
        };
        rows.push(Row::new(Class::AllBut, &title, &list));
    }
    rows
}

fn fixed() -> Vec<Row> {
    ["zstd-quick", "zstd-frame", "zstd-long", "zstd-hard"]
        .into_iter()
        .map(|rung| {
            let mut names = names();
            names.retain(|name| short(name) != "zstd");
            names.push(rung.to_owned());
            let title = format!("all, {rung}");
            Row::new(Class::Fixed, &title, &names.join(","))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(every_row: bool) -> Plan {
        let link = |rate: &str, bits_per_second| PlannedLink {
            rate: rate.to_owned(),
            bits_per_second,
        };
        Plan {
            links: vec![link("none", None), link("1gbit", Some(1_000_000_000))],
            repetitions: 1,
            every_row,
        }
    }

    #[test]
    fn every_row_can_be_had_and_no_two_are_the_same() {
        let rows = plan(false).rows("debian");
        for row in &rows {
            if row.class != Class::Relay {
                assert!(row.techniques.parse::<Techniques>().is_ok(), "{row:?}");
            }
            let same = |other: &&Row| {
                other.title == row.title
                    || other.class != Class::Relay
                        && row.class != Class::Relay
                        && other.techniques.parse::<Techniques>() == row.techniques.parse()
            };
            assert_eq!(rows.iter().filter(same).count(), 1, "{row:?}");
        }
        let all_but = rows.iter().filter(|row| row.class == Class::AllBut).count();
        // One of them may be the default.
        let missing = usize::from(Techniques::default() != Techniques::ALL);
        assert!(all_but + missing >= names().len(), "{all_but} of {rows:?}");
    }

    #[test]
    fn slow_links_have_the_rows_that_need_them() {
        let over = |every_row, place| {
            let plan = plan(every_row);
            let rows = plan.rows("debian");
            rows.iter().filter(|row| plan.runs_over(row, place)).count()
        };
        // Relay, none, dedup and zstd, four rungs, the default.
        assert!((8..=9).contains(&over(false, 1)));
        assert_eq!(over(false, 0), plan(false).rows("debian").len());
        assert_eq!(over(true, 1), over(true, 0));
    }

    #[test]
    fn the_worst_case_is_run_often_enough_to_tell() {
        let plan = plan(false);
        assert_eq!(plan.rows(WORST_CASE).len(), 4);
        assert_eq!(plan.repetitions_of(WORST_CASE), WORST_CASE_REPETITIONS);
        assert_eq!(plan.repetitions_of("mixed"), 1);
    }
}
