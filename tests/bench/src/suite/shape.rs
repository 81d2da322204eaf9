//! The shapes that the published tables have: which guests, over which link, moved by whom.
//!
//! Must not: measure. Everything here is decided before the first guest boots.

use clap::ValueEnum;
use vmgang_lab::{GuestSpec, Role};

use crate::contender::Contender;
use crate::gang::{Mix, RedisData};

/// How often guests report, so that what they do during a short move can be told.
const REPORT_MS: u64 = 250;
/// In which idle guests check all that they hold: what they do all the time is to be little.
const IDLE_CHECK_SECONDS: u64 = 100;
/// Of what congests a link, as in the papers.
const CONGESTION_PERCENT: u64 = 70;

/// A group of guests that is booted once and then moved many times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// One idle guest, of different sizes.
    One,
    /// Idle guests, 3 to 24 of them.
    Idle,
    /// Databases under load.
    Database,
    /// Four servers with different things to do, over different links.
    Mixed,
    /// The same, over links that are no limit, where QEMU's multifd without compression counts as well.
    Fast,
    /// Random data, rewritten at random: nothing can be saved.
    Worst,
    /// The mixed guests, on a link that somebody else fills.
    Congested,
}

/// Some of a shape's guests, over one link, by some contenders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leg {
    pub name: String,
    /// As `parse_rate` takes it.
    pub link: &'static str,
    /// Other traffic, in percent of the link.
    pub congestion_percent: Option<u64>,
    /// The first of the shape's guests and how many.
    pub guests: std::ops::Range<usize>,
    pub contenders: Vec<Contender>,
}

use Contender::{
    Oc, Ofd, OfdRh, OfdRhDelta, Prepared, Relay, StockMultifd, StockParallel, StockParallelZstd,
    StockSequential, StockXbzrle, Vmgang,
};

const SHORT: [Contender; 3] = [StockParallel, StockParallelZstd, Vmgang];
const USUAL: [Contender; 5] = [
    StockSequential,
    StockParallel,
    StockParallelZstd,
    Relay,
    Vmgang,
];
/// The paper's modes as well.
const MODES: [Contender; 8] = [
    StockSequential,
    StockParallel,
    StockParallelZstd,
    Oc,
    Ofd,
    OfdRh,
    OfdRhDelta,
    Vmgang,
];

impl Shape {
    pub fn name(self) -> &'static str {
        match self {
            Shape::One => "one",
            Shape::Idle => "idle",
            Shape::Database => "database",
            Shape::Mixed => "mixed",
            Shape::Fast => "fast",
            Shape::Worst => "worst",
            Shape::Congested => "congested",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Shape::One => "one idle guest",
            Shape::Idle => "idle guests",
            Shape::Database => "databases under load",
            Shape::Mixed => "mixed servers under load",
            Shape::Fast => "mixed servers under load, fast links",
            Shape::Worst => "worst case: random data rewritten at random",
            Shape::Congested => "mixed servers on a congested link",
        }
    }

    /// Whether its guests have something to do that can be counted.
    pub fn has_load(self) -> bool {
        !matches!(self, Shape::One | Shape::Idle)
    }

    /// All its guests.
    pub fn guests(self) -> Vec<GuestSpec> {
        let guests: Vec<GuestSpec> = match self {
            Shape::One => [512, 2048, 4096]
                .map(|mib| idle(&format!("idle{mib}")).with_memory_mib(mib))
                .into(),
            Shape::Idle => (1..=24)
                .map(|number| {
                    let guest = idle(&format!("idle{number}")).with_memory_mib(384);
                    guest.with_check_seconds(IDLE_CHECK_SECONDS)
                })
                .collect(),
            Shape::Database => {
                let redis = |name| {
                    let spec = GuestSpec::debian(name, Role::Redis);
                    spec.with_data_mib(64).with_request_rate(100)
                };
                let sqlite = |name| {
                    let spec = GuestSpec::debian(name, Role::Sqlite);
                    spec.with_data_mib(32).with_request_rate(40)
                };
                vec![
                    redis("redis1"),
                    redis("redis2"),
                    sqlite("sqlite1"),
                    sqlite("sqlite2"),
                ]
            }
            Shape::Mixed | Shape::Fast | Shape::Congested => {
                Mix::Debian.guests(1024, RedisData::default())
            }
            Shape::Worst => (1..=4)
                .map(|number| {
                    GuestSpec::new(&format!("random{number}"))
                        .with_memory_mib(544)
                        .with_fill("unique:100")
                        .with_dirty_rate(500)
                })
                .collect(),
        };
        let report_ms = match self.has_load() {
            true => REPORT_MS,
            false => 1000,
        };
        guests
            .into_iter()
            .map(|guest| guest.with_report_ms(report_ms))
            .collect()
    }

    /// What is done with them.
    pub fn legs(self) -> Vec<Leg> {
        let leg = |name: &str, link, guests, contenders: &[Contender]| Leg {
            name: name.to_owned(),
            link,
            congestion_percent: None,
            guests,
            contenders: contenders.to_vec(),
        };
        match self {
            Shape::One => (0..3)
                .map(|place| {
                    let name = ["0.5 GiB", "2 GiB", "4 GiB"][place];
                    leg(name, "1gbit", place..place + 1, &SHORT)
                })
                .collect(),
            Shape::Idle => [3, 4, 6, 9, 15, 24]
                .map(|count| {
                    // Many guests take many minutes by every way more: the paper's modes are told
                    // apart by few of them.
                    let contenders = match count {
                        4 => MODES.to_vec(),
                        24 => [&SHORT[..], &[OfdRhDelta, Prepared]].concat(),
                        _ => SHORT.to_vec(),
                    };
                    leg(&format!("{count} guests"), "1gbit", 0..count, &contenders)
                })
                .into(),
            Shape::Database => {
                let contenders = [&USUAL[..], &[Prepared, StockXbzrle]].concat();
                vec![leg("1 Gbit/s", "1gbit", 0..4, &contenders)]
            }
            Shape::Mixed => {
                let all = [&MODES[..], &[Prepared, Relay, StockXbzrle]].concat();
                let slow = [&SHORT[..], &[Prepared]].concat();
                vec![
                    leg("100 Mbit/s", "100mbit", 0..4, &slow),
                    leg("1 Gbit/s", "1gbit", 0..4, &all),
                    leg("10 Gbit/s", "10gbit", 0..4, &SHORT),
                    leg("unshaped", "none", 0..4, &USUAL),
                ]
            }
            Shape::Fast => {
                let contenders = [
                    StockParallel,
                    StockMultifd,
                    StockParallelZstd,
                    Relay,
                    Vmgang,
                ];
                vec![
                    leg("10 Gbit/s", "10gbit", 0..4, &contenders),
                    leg("unshaped", "none", 0..4, &contenders),
                ]
            }
            Shape::Worst => {
                let contenders = [&USUAL[..], &[StockXbzrle]].concat();
                vec![leg("1 Gbit/s", "1gbit", 0..4, &contenders)]
            }
            Shape::Congested => {
                let mut leg = leg("250 Mbit/s, 70 % taken", "250mbit", 0..4, &SHORT);
                leg.congestion_percent = Some(CONGESTION_PERCENT);
                vec![leg]
            }
        }
    }
}

fn idle(name: &str) -> GuestSpec {
    GuestSpec::debian(name, Role::Idle)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmgang_lab::parse_rate;

    #[test]
    fn every_leg_can_be_run() {
        for shape in Shape::value_variants() {
            let guests = shape.guests();
            for guest in &guests {
                assert!(guest.domain_xml().is_ok(), "{guest:?}");
            }
            for leg in shape.legs() {
                assert!(leg.guests.end <= guests.len() && !leg.guests.is_empty());
                assert!(parse_rate(leg.link).is_ok(), "{leg:?}");
                // What is prepared is the whole gang.
                let whole = leg.guests == (0..guests.len());
                assert!(whole || !leg.contenders.contains(&Prepared), "{leg:?}");
                assert!(leg.contenders.contains(&Vmgang), "{leg:?}");
            }
        }
    }
}
