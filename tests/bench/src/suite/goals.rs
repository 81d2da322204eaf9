//! What the project has set itself as goals, and what was measured.
//!
//! Must not: compare across runs. Every figure is a ratio within one document.

use super::{Document, LegResult};
use crate::contender::Contender;
use crate::suite::shape::Shape;
use vmgang_lab::parse_rate;

/// One goal.
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    pub what: String,
    /// At most this, or at least.
    pub limit: f64,
    pub at_most: bool,
    /// `None`: what it needs was not measured.
    pub value: Option<f64>,
}

impl Goal {
    fn at_most(what: impl Into<String>, limit: f64, value: Option<f64>) -> Goal {
        Goal {
            what: what.into(),
            limit,
            at_most: true,
            value,
        }
    }

    pub fn is_met(&self) -> Option<bool> {
        self.value.map(|value| match self.at_most {
            true => value <= self.limit,
            false => value >= self.limit,
        })
    }
}

/// Legs by the names that [`Shape::legs`] gives them.
const AT_100_MBIT: &str = "100 Mbit/s";
const AT_1_GBIT: &str = "1 Gbit/s";
const UNSHAPED: &str = "unshaped";

/// All of them, in a fixed order.
pub fn all(documents: &[Document]) -> Vec<Goal> {
    let leg = |shape: Shape, name: &str| {
        documents
            .iter()
            .find(|document| document.shape == shape.name())
            .and_then(|document| document.leg(name))
    };
    let mixed = leg(Shape::Mixed, AT_1_GBIT);
    let four = leg(Shape::Idle, "4 guests");
    let many = leg(Shape::Idle, "24 guests");
    let worst = leg(Shape::Worst, AT_1_GBIT);
    let mut goals = vec![
        Goal::at_most(
            "bytes, mixed, of the best stock choice",
            0.25,
            mixed.and_then(|leg| to_best(leg, LegResult::bytes)),
        ),
        Goal::at_most(
            "bytes, mixed, of stock as it comes",
            0.065,
            mixed.and_then(|leg| to(leg, Contender::StockParallel, LegResult::bytes)),
        ),
        Goal::at_most(
            "bytes, 24 idle guests, of eliding zero pages only",
            0.06,
            many.and_then(|leg| to(leg, Contender::StockParallel, LegResult::bytes)),
        ),
        Goal::at_most(
            "bytes, 24 idle guests, of 4 of them",
            2.5,
            many.and_then(|leg| leg.bytes(Contender::Vmgang))
                .zip(four.and_then(|leg| leg.bytes(Contender::Vmgang)))
                .map(|(many, four)| many / four),
        ),
    ];
    for (what, limit, leg) in [
        ("100 Mbit/s, mixed", 0.40, leg(Shape::Mixed, AT_100_MBIT)),
        ("1 Gbit/s, busy guests", 0.85, mixed),
        ("1 Gbit/s, 4 idle guests", 0.60, four),
        ("unshaped, mixed", 1.1, leg(Shape::Fast, UNSHAPED)),
    ] {
        goals.push(Goal::at_most(
            format!("time, {what}, of the best stock choice"),
            limit,
            leg.and_then(|leg| to_best(leg, LegResult::seconds)),
        ));
    }
    for (what, leg) in [("mixed", mixed), ("24 idle guests", many)] {
        goals.push(Goal::at_most(
            format!("time, 1 Gbit/s, {what}, prepared, of cold"),
            0.6,
            leg.and_then(|leg| {
                let cold = leg.seconds(Contender::Vmgang)?;
                Some(leg.seconds(Contender::Prepared)? / cold)
            }),
        ));
    }
    let unshaped = leg(Shape::Mixed, UNSHAPED);
    for name in [AT_100_MBIT, AT_1_GBIT, "10 Gbit/s"] {
        goals.push(Goal::at_most(
            format!("time, {name}, mixed, of what QEMU and the link need"),
            1.25,
            leg(Shape::Mixed, name)
                .zip(unshaped)
                .and_then(|(leg, unshaped)| nearness(leg, unshaped)),
        ));
    }
    for (what, leg) in [("mixed", mixed), ("24 idle guests", many)] {
        goals.push(Goal::at_most(
            format!("mean downtime, {what}, of the soonest stock choice"),
            0.8,
            leg.and_then(|leg| to_soonest(leg, LegResult::downtime_mean_ms)),
        ));
        goals.push(Goal::at_most(
            format!("mean downtime, {what}, of the stock choice with the shortest"),
            0.8,
            leg.and_then(|leg| to_best(leg, LegResult::downtime_mean_ms)),
        ));
    }
    let stock = Contender::StockParallel;
    goals.push(Goal::at_most(
        "time, worst case, of stock as it comes",
        1.05,
        worst.and_then(|leg| to(leg, stock, LegResult::seconds)),
    ));
    goals.push(Goal::at_most(
        "bytes, worst case, of stock as it comes",
        1.01,
        worst.and_then(|leg| to(leg, stock, LegResult::bytes)),
    ));
    for (what, leg) in [
        ("mixed", mixed),
        ("databases", leg(Shape::Database, AT_1_GBIT)),
        ("worst case", worst),
    ] {
        goals.push(Goal {
            what: format!("work of guests that is kept, {what}, of the soonest stock choice"),
            limit: 1.0,
            at_most: false,
            value: leg.and_then(|leg| to_soonest(leg, LegResult::work_kept)),
        });
        goals.push(Goal {
            what: format!(
                "work of guests that is kept, {what}, of the stock choice that keeps most"
            ),
            limit: 1.0,
            at_most: false,
            value: leg.and_then(|leg| to_most(leg, LegResult::work_kept)),
        });
    }
    goals
}

type Figure = fn(&LegResult, Contender) -> Option<f64>;

/// vmgang's figure in relation to somebody's.
fn to(leg: &LegResult, base: Contender, figure: Figure) -> Option<f64> {
    Some(figure(leg, Contender::Vmgang)? / figure(leg, base)?)
}

/// In relation to the least that stock has of it.
fn to_best(leg: &LegResult, figure: Figure) -> Option<f64> {
    Some(figure(leg, Contender::Vmgang)? / leg.best_stock(figure)?.1)
}

/// In relation to the most that stock has of it.
fn to_most(leg: &LegResult, figure: Figure) -> Option<f64> {
    let stock = Contender::STOCK.into_iter();
    let most = stock.filter_map(|contender| figure(leg, contender));
    Some(figure(leg, Contender::Vmgang)? / most.max_by(f64::total_cmp)?)
}

/// In relation to the stock contender that takes the least time.
fn to_soonest(leg: &LegResult, figure: Figure) -> Option<f64> {
    let (soonest, _) = leg.best_stock(LegResult::seconds)?;
    to(leg, soonest, figure)
}

/// vmgang's time in relation to that of QEMU making its streams, as stock in parallel without a limit has
/// it, or of its bytes on this link. (With multifd QEMU is sooner than that: no lower bound.)
fn nearness(leg: &LegResult, unshaped: &LegResult) -> Option<f64> {
    let qemu = unshaped.seconds(Contender::StockParallel)?;
    let rate = parse_rate(&leg.link).ok()??;
    let link = leg.bytes(Contender::Vmgang)? * 8.0 / rate as f64;
    Some(leg.seconds(Contender::Vmgang)? / qemu.max(link))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Move;
    use crate::suite::testing::{document, moved};

    /// The guests' work while they are moved.
    fn keeping(mut moved: Move, during: f64) -> Move {
        if let Some(load) = &mut moved.load {
            load.during = during;
        }
        moved
    }

    #[test]
    fn goals_are_ratios_to_what_they_name() {
        let leg = vec![
            moved(Contender::StockParallel, 10.0, 1000, 40),
            moved(Contender::StockParallelZstd, 4.0, 400, 50),
            moved(Contender::Vmgang, 3.0, 80, 20),
            keeping(moved(Contender::StockXbzrle, 12.0, 1000, 60), 10.0),
        ];
        let unshaped = vec![
            moved(Contender::StockParallel, 2.0, 1000, 100),
            moved(Contender::Vmgang, 2.5, 90, 20),
        ];
        let document = document(
            Shape::Mixed,
            &[(AT_1_GBIT, "1gbit", leg), (UNSHAPED, "none", unshaped)],
        );
        let goals = all(&[document]);
        let value = |what: &str| {
            let found = goals.iter().find(|goal| goal.what == what);
            found.unwrap_or_else(|| panic!("{what}")).value
        };
        assert_eq!(value("bytes, mixed, of the best stock choice"), Some(0.2));
        assert_eq!(value("bytes, mixed, of stock as it comes"), Some(0.08));
        let time = "time, 1 Gbit/s, busy guests, of the best stock choice";
        assert_eq!(value(time), Some(0.75));
        let downtime = "mean downtime, mixed, of the soonest stock choice";
        assert_eq!(value(downtime), Some(0.4));
        let downtime = "mean downtime, mixed, of the stock choice with the shortest";
        assert_eq!(value(downtime), Some(0.5));
        let near = "time, 1 Gbit/s, mixed, of what QEMU and the link need";
        assert_eq!(value(near), Some(1.5));
        let kept = "work of guests that is kept, mixed, of the soonest stock choice";
        assert_eq!(value(kept), Some(1.0));
        let kept = "work of guests that is kept, mixed, of the stock choice that keeps most";
        assert_eq!(value(kept), Some(0.5));
        assert_eq!(value("bytes, 24 idle guests, of 4 of them"), None);
        let met = goals.iter().find(|goal| goal.what == time);
        assert_eq!(met.and_then(Goal::is_met), Some(true));
    }
}
