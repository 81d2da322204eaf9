//! What the model is fed with, from the documents of the suite; what these do not tell is taken from
//! docs/benchmarks.md, or assumed.
//!
//! Owns: where each figure is from.
//! Must not: compute times.

use clap::ValueEnum;
use vmgang_lab::parse_rate;

use crate::contender::Contender;
use crate::scaling::fit::{line, slope_within};
use crate::scaling::{
    Costs, GB_A_GIB, Memory, Processors, Qemu, Site, UNDER_WAY, WAYS, Work,
    ZERO_SCAN_GB_PER_SECOND, memory, predict, published,
};
use crate::suite::{Document, LegResult};

/// The link over which mixes are looked at whose guests were always moved together.
const MAIN_LINK: &str = "1gbit";
/// Of the seconds of a move, squared and summed: with less between its links nothing can be told.
const SPREAD_LEAST: f64 = 1.0;
/// What each half of vmgangd carries, GB/s of stream a core: docs/benchmarks.md, "Debian gang".
const REPLAYED_GB: [f64; 2] = [0.82, 1.45];
/// GB/s that the lab's memory is taken to carry, and any other host's unless said.
pub const MEMORY_GB: f64 = 100.0;

const REPLAY: &str = "docs/benchmarks.md, replay: 0.82 and 1.45 GB/s a core";
const WHERE: &str = "docs/benchmarks.md, \"Where the time goes\": libvirtd 0.3 s for four guests; 0.55 s \
     until the first stream, 0.35 s after the last";
const ABLATION: &str = "docs/benchmarks/ablation.md, debian at 1 Gbit/s";
const PREPARED: &str =
    "docs/benchmarks.md, cold in \"Prepared\": four idle guests 58.67 MB, two 58.58 MB";
const MULTIFD: &str = "decision 0023, link unshaped, less the guests' own 0.45 of a core";

/// Where a figure is from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// The measurements that were given.
    Measured(String),
    /// Other measurements of this repository.
    Documented(&'static str),
    /// Nobody has measured it.
    Assumed(&'static str),
}

/// A number that knows where it is from.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    pub value: f64,
    pub source: Source,
}

impl Figure {
    fn documented(value: f64, source: &'static str) -> Figure {
        Figure {
            value,
            source: Source::Documented(source),
        }
    }

    fn assumed(value: f64, why: &'static str) -> Figure {
        Figure {
            value,
            source: Source::Assumed(why),
        }
    }

    /// Takes what was measured, which is never less than nothing.
    fn learn(&mut self, measured: Option<(f64, String)>) {
        if let Some((value, how)) = measured {
            self.value = value.max(0.0);
            self.source = Source::Measured(how);
        }
    }
}

/// Two groups of guests, by what their memory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Idle,
    Mixed,
}

impl Kind {
    pub const ALL: [Kind; 2] = [Kind::Mixed, Kind::Idle];

    /// The shape that it was measured with.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Idle => "idle",
            Kind::Mixed => "mixed",
        }
    }
}

/// Guests of a kind, for each GiB of their memory, in GB; and what moving them costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    pub kind: Kind,
    pub stream: Figure,
    /// Contents that all guests have in common, and those that each has of its own.
    pub common: Figure,
    pub own: Figure,
    /// Seconds of a processor for each GB of stream, both hosts together.
    pub vmgangd: Figure,
    /// What a guest does itself, of one processor. In the lab that is in QEMU's figures.
    pub a_guest: Figure,
    /// Of the daemon beside its window, in MB.
    pub fixed_mb: Figure,
    pub member_mb: Figure,
    /// In the order of [`WAYS`].
    pub ways: [Way; 3],
}

/// What a way to move guests costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Way {
    pub contender: Contender,
    /// GB on the link for each GiB of memory of the first guest, and of each further one.
    pub first: Figure,
    pub further: Figure,
    /// Seconds of a processor for each GB of stream, both hosts together, under emulation.
    pub qemu: Figure,
    /// Seconds of a processor for each guest, both hosts together.
    pub libvirtd: Figure,
    pub fixed_seconds: Figure,
}

impl Mix {
    /// From whichever documents there are.
    pub fn derive(kind: Kind, documents: &[Document]) -> Mix {
        let mut mix = Mix::unmeasured(kind);
        let document = documents
            .iter()
            .find(|document| document.shape == kind.name());
        if let Some(document) = document {
            mix.learn(document);
        }
        mix
    }

    /// What is known without a document.
    fn unmeasured(kind: Kind) -> Mix {
        // Four guests of 1 GiB: 293,059 records of pages in 1209.9 MB, 85,965 of them distinct, 388 MB of one
        // repeated byte. What is left is taken to be a copy of something that all four have.
        let distinct = 0.3521;
        let common = (1.2004 - 0.3882 - distinct) / 3.0;
        let own = (distinct - common) / 4.0;
        let ratio = 0.0805 / distinct;
        let ablation = |value| Figure::documented(value, ABLATION);
        let prepared = |value| Figure::documented(value, PREPARED);
        let way = |contender: Contender| {
            let (first, further) = match (kind, contender) {
                (Kind::Mixed, Contender::Vmgang) => {
                    (ablation((common + own) * ratio), ablation(own * ratio))
                }
                (Kind::Idle, Contender::Vmgang) => {
                    let why = "two more guests made less difference than two runs, 2.1 MB";
                    (prepared(0.0586), Figure::assumed(0.001, why))
                }
                (Kind::Mixed, Contender::StockParallelZstd) => {
                    (ablation(0.2433 / 4.0), ablation(0.2433 / 4.0))
                }
                (Kind::Idle, Contender::StockParallelZstd) => {
                    let as_one = "as much as vmgang sends of one guest";
                    let figure = Figure::assumed(0.0586, as_one);
                    (figure.clone(), figure)
                }
                (Kind::Mixed, _) => (ablation(0.3025), ablation(0.3025)),
                (Kind::Idle, _) => {
                    let figure = Figure::assumed(
                        0.3025 - own,
                        "as the mixed guests, less what these have of their own",
                    );
                    (figure.clone(), figure)
                }
            };
            let (qemu, own_share) = match contender {
                Contender::StockParallel => (7.2, 4.1 * 0.45),
                Contender::StockParallelZstd => (5.7, 3.3 * 0.45),
                _ => (5.3, 4.5 * 0.45),
            };
            Way {
                contender,
                first,
                further,
                qemu: Figure::documented((qemu - own_share) / 1.21, MULTIFD),
                libvirtd: Figure::documented(0.075, WHERE),
                fixed_seconds: Figure::documented(0.9, WHERE),
            }
        };
        let (stream, common, own) = match kind {
            Kind::Mixed => (ablation(0.3025), ablation(common), ablation(own)),
            Kind::Idle => {
                let why = "as the mixed guests, which have this in common";
                (
                    Figure::assumed(0.3025 - own, why),
                    Figure::assumed(common, why),
                    Figure::assumed(0.003, "as that is to what crosses of it"),
                )
            }
        };
        Mix {
            kind,
            stream,
            common,
            own,
            vmgangd: Figure::documented(
                REPLAYED_GB.iter().map(|rate| 1.0 / rate).sum::<f64>(),
                REPLAY,
            ),
            a_guest: Figure::documented(0.45 / 4.0, "decision 0023: 0.45 of a core for four"),
            fixed_mb: Figure::assumed(10.0, "an idle vmgangd has less"),
            member_mb: Figure::assumed(10.0, "what is in flight of a member"),
            ways: WAYS.map(way),
        }
    }

    fn learn(&mut self, document: &Document) {
        let points = points(document);
        let Some(sample) = Sample::of(document, &points) else {
            return;
        };
        self.stream.learn(sample.each(|one| one.stream_gb));
        let (common, own) = sample.shared();
        self.common.learn(common);
        self.own.learn(own);
        // Where links differ, a move that takes longer for its link shows what guests do meanwhile.
        let mut over_links: Vec<Vec<(f64, f64)>> = Vec::new();
        for contender in Contender::value_variants() {
            let group = points_of(&document.legs, *contender, sample.points[0].leg);
            over_links.push(group);
        }
        let work = slope_within(&over_links, SPREAD_LEAST);
        let guests = sample.points[0].guests;
        self.a_guest.learn(work.map(|slope| {
            let how = format!(
                "{}.json: QEMU's over the time, across links",
                document.shape
            );
            (slope / guests, how)
        }));
        if work.is_none() {
            self.a_guest =
                Figure::assumed(0.0, "cannot be told from one link: it is in QEMU's figures");
        }
        self.vmgangd.learn(
            sample.marginal(|one| Some((one.stream_gb?, one.leg.vmgangd(Contender::Vmgang)?))),
        );
        self.learn_memory(&sample);
        let a_guest = self.a_guest.value;
        for place in 0..WAYS.len() {
            self.learn_way(place, &sample, a_guest);
        }
        for (place, way) in WAYS.into_iter().enumerate() {
            let rest = sample.points.iter().filter_map(|one| {
                let measured = one.leg.seconds(way)?;
                let work = self.work(way, one.guests, one.guest_gib);
                let costs = Costs {
                    fixed_seconds: 0.0,
                    ..self.costs(way, Qemu::Measured)
                };
                let site = self.lab(document, one.leg);
                Some(measured - predict(&work, &costs, &site).seconds())
            });
            let rest: Vec<f64> = rest.collect();
            if !rest.is_empty() {
                let middle = crate::table::median(rest);
                let how = format!("{}: what nothing else explains", sample.legs());
                self.ways[place].fixed_seconds.learn(Some((middle, how)));
            }
        }
    }

    fn learn_way(&mut self, place: usize, sample: &Sample, a_guest: f64) {
        let way = &mut self.ways[place];
        let contender = way.contender;
        let bytes = |one: &Point| Some(one.leg.bytes(contender)? / 1e9);
        let (first, further) = match contender {
            Contender::Vmgang => sample.growth(bytes, self.common.value, self.own.value),
            // Nobody has anything in common with others.
            _ => sample.growth(bytes, 0.0, 1.0),
        };
        way.first.learn(first);
        way.further.learn(further);
        way.qemu.learn(sample.marginal(|one| {
            let seconds = one
                .leg
                .median(contender, |one| Some(one.cost.qemu_seconds))?;
            let own = a_guest * one.guests * one.leg.seconds(contender)?;
            Some((one.stream_gb?, (seconds - own).max(0.0)))
        }));
        way.libvirtd.learn(sample.marginal(|one| {
            let seconds = one
                .leg
                .median(contender, |one| Some(one.cost.libvirtd_seconds));
            Some((one.guests, seconds?))
        }));
    }

    fn learn_memory(&mut self, sample: &Sample) {
        let mut beside: Vec<(f64, f64)> = Vec::new();
        for one in &sample.points {
            let peak = one.leg.median(Contender::Vmgang, |one| {
                // The source's has what it keeps for the way back of earlier moves in it.
                Some(one.cost.vmgangd_peak_bytes[1] as f64)
            });
            if let Some((peak, distinct)) = peak.zip(one.distinct_gb)
                && peak > 0.0
            {
                beside.push((one.guests.min(UNDER_WAY), (peak - distinct * 1e9) / 1e6));
            }
        }
        let legs = sample.legs();
        let how = || format!("{legs}: the destination's, less a page for each content");
        if let Some(line) = line(&beside) {
            self.fixed_mb.learn(Some((line.at_zero, how())));
            self.member_mb.learn(Some((line.slope, how())));
        } else if let [(guests, beside), ..] = beside[..] {
            self.fixed_mb = Figure::assumed(0.0, "cannot be told from one number of guests");
            self.member_mb.learn(Some((beside / guests, how())));
        }
    }

    /// What moving `guests` of them is.
    pub fn work(&self, contender: Contender, guests: f64, guest_gib: f64) -> Work {
        let way = self.way(contender);
        Work {
            guests,
            guest_gib,
            stream_gb: self.stream.value * guest_gib * guests,
            wire_gb: (way.first.value + way.further.value * (guests - 1.0)) * guest_gib,
            distinct_gb: (self.common.value + self.own.value * guests) * guest_gib,
        }
    }

    pub fn costs(&self, contender: Contender, qemu: Qemu) -> Costs {
        let way = self.way(contender);
        let is_ours = contender == Contender::Vmgang;
        let halves = REPLAYED_GB.map(|rate| 1.0 / rate);
        let source = halves[0] / (halves[0] + halves[1]);
        let split = |whole: f64, source: f64| [whole * source, whole * (1.0 - source)];
        // Decision 0023: processor time of the QEMUs that leave, less the guests' own, of all of them.
        let leaving = match contender {
            Contender::StockParallel => 0.085,
            Contender::StockParallelZstd => 0.38,
            _ => 0.30,
        };
        Costs {
            vmgangd: match is_ours {
                true => split(self.vmgangd.value, source),
                false => [0.0; 2],
            },
            qemu: match qemu {
                Qemu::Measured => split(way.qemu.value, leaving),
                Qemu::Published => published(contender),
            },
            scan: match qemu {
                // It is in what was measured.
                Qemu::Measured => 0.0,
                Qemu::Published => GB_A_GIB / ZERO_SCAN_GB_PER_SECOND,
            },
            libvirtd: way.libvirtd.value,
            fixed_seconds: way.fixed_seconds.value,
            // Read by QEMU, written into a socket, and read there by the network card. Through vmgangd it is read
            // and written some more times, most of them soon after another: in caches. All assumed.
            memory_traffic: if is_ours { 4.0 } else { 3.0 },
            threads: match contender {
                Contender::StockParallel => 1.0,
                _ => 2.0,
            },
            is_ordered: is_ours,
        }
    }

    /// The place where a document was measured.
    pub fn lab(&self, document: &Document, leg: &LegResult) -> Site {
        Site {
            link: parse_rate(&leg.link).ok().flatten().map(|bits| bits as f64),
            processors: Processors::Shared {
                cores: document.machine.processors as f64,
                a_guest: self.a_guest.value,
            },
            memory_gb: MEMORY_GB,
            under_way: UNDER_WAY,
        }
    }

    /// What vmgang keeps on each host.
    pub fn memory(&self, guests: f64, guest_gib: f64, available_gib: f64) -> Memory {
        memory(
            guests,
            guest_gib,
            (self.common.value * guest_gib, self.own.value * guest_gib),
            (self.fixed_mb.value * 1e6, self.member_mb.value * 1e6),
            available_gib,
        )
    }

    pub fn way(&self, contender: Contender) -> &Way {
        let place = WAYS.iter().position(|way| *way == contender);
        &self.ways[place.unwrap_or(0)]
    }
}

/// A leg, and what vmgang told about it.
#[derive(Debug, Clone, Copy)]
pub struct Point<'a> {
    pub leg: &'a LegResult,
    pub guests: f64,
    /// Memory of each, in GiB; of different ones the mean.
    pub guest_gib: f64,
    pub stream_gb: Option<f64>,
    distinct_gb: Option<f64>,
    shared_gb: Option<f64>,
}

/// All legs in which anything was measured.
pub fn points(document: &Document) -> Vec<Point<'_>> {
    let legs = document.legs.iter().filter(|leg| !leg.moves.is_empty());
    let legs = legs.filter(|leg| !leg.guests.is_empty());
    legs.map(|leg| {
        let told = |figure: fn(&crate::measure::Told) -> f64| {
            let gb = leg.median(Contender::Vmgang, |one| one.job.as_ref().map(figure));
            gb.map(|bytes| bytes / 1e9)
        };
        Point {
            leg,
            guests: leg.guests.len() as f64,
            guest_gib: guest_gib(document, leg),
            // Without dedup and compression, all of it crosses.
            stream_gb: told(|told| told.qemu_stream as f64)
                .or(leg.bytes(Contender::StockParallel).map(|bytes| bytes / 1e9)),
            distinct_gb: told(|told| {
                let saved = told.saved_zero
                    + told.saved_uniform
                    + told.saved_intra_vm
                    + told.saved_cross_vm;
                told.qemu_stream as f64 - saved as f64
            }),
            shared_gb: told(|told| told.saved_cross_vm as f64),
        }
    })
    .collect()
}

fn guest_gib(document: &Document, leg: &LegResult) -> f64 {
    let mib = |name: &String| {
        let guest = document.guests.iter().find(|guest| guest.name == *name)?;
        guest.recipe.split_once(" MiB")?.0.parse::<f64>().ok()
    };
    let known: Vec<f64> = leg.guests.iter().filter_map(mib).collect();
    match known.is_empty() {
        true => 1.0,
        false => known.iter().sum::<f64>() / known.len() as f64 / 1024.0,
    }
}

/// Times and QEMU's seconds of one contender in all legs with the same guests.
fn points_of(legs: &[LegResult], contender: Contender, like: &LegResult) -> Vec<(f64, f64)> {
    let legs = legs.iter().filter(|leg| leg.guests == like.guests);
    legs.filter_map(|leg| {
        let qemu = leg.median(contender, |one| Some(one.cost.qemu_seconds))?;
        Some((leg.seconds(contender)?, qemu))
    })
    .collect()
}

impl LegResult {
    fn vmgangd(&self, contender: Contender) -> Option<f64> {
        self.median(contender, |one| Some(one.cost.vmgangd_seconds))
    }
}

/// The legs that figures are derived from: all over one link, one for each number of guests.
struct Sample<'a> {
    shape: &'a str,
    points: Vec<Point<'a>>,
}

type Learned = Option<(f64, String)>;

impl<'a> Sample<'a> {
    fn of(document: &'a Document, points: &[Point<'a>]) -> Option<Sample<'a>> {
        let main = |point: &&Point| point.leg.link == MAIN_LINK;
        let link = &points.iter().find(main).or(points.last())?.leg.link;
        let same = points.iter().filter(|point| point.leg.link == *link);
        let mut points: Vec<Point> = same.copied().collect();
        points.sort_by(|one, other| one.guests.total_cmp(&other.guests));
        points.dedup_by_key(|point| point.leg.guests.len());
        Some(Sample {
            shape: &document.shape,
            points,
        })
    }

    fn legs(&self) -> String {
        let names: Vec<&str> = self
            .points
            .iter()
            .map(|one| one.leg.name.as_str())
            .collect();
        match names[..] {
            [first, .., last] => format!("{}.json, {first} to {last}", self.shape),
            _ => format!("{}.json, {}", self.shape, names.concat()),
        }
    }

    /// Of a figure, for each GiB of memory.
    fn each(&self, figure: impl Fn(&Point) -> Option<f64>) -> Learned {
        let each: Vec<f64> = self
            .points
            .iter()
            .filter_map(|one| Some(figure(one)? / one.guests / one.guest_gib))
            .collect();
        (!each.is_empty()).then(|| (crate::table::median(each), self.legs()))
    }

    /// What comes with each unit more, or the share of it where there is one point only.
    fn marginal(&self, point: impl Fn(&Point) -> Option<(f64, f64)>) -> Learned {
        let points: Vec<(f64, f64)> = self.points.iter().filter_map(point).collect();
        let sum = points
            .iter()
            .fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        let line = (points.len() > 2).then(|| line(&points)).flatten();
        match line {
            Some(line) if line.slope > 0.0 => Some((line.slope, format!("{}: slope", self.legs()))),
            _ => (sum.0 > 0.0).then(|| (sum.1 / sum.0, self.legs())),
        }
    }

    /// What all guests have in common and what each has of its own, for each GiB.
    fn shared(&self) -> (Learned, Learned) {
        let contents: Vec<(f64, f64)> = self
            .points
            .iter()
            .filter_map(|one| Some((one.guests, one.distinct_gb? / one.guest_gib)))
            .collect();
        if let Some(line) = line(&contents) {
            let how = |what| Some(format!("{}: contents, {what}", self.legs()));
            let own = line.slope.max(0.0);
            return (
                Some(line.at_zero).zip(how("at no guest")),
                Some(own).zip(how("each guest more")),
            );
        }
        let found = self.points.iter().find_map(|one| {
            let (distinct, shared) = (one.distinct_gb?, one.shared_gb?);
            // The first of them that had it has sent it.
            let common = match one.guests > 1.0 {
                true => (shared / (one.guests - 1.0)).min(distinct),
                false => 0.0,
            };
            let own = (distinct - common) / one.guests;
            Some((common / one.guest_gib, own / one.guest_gib))
        });
        let how = || format!("{}: as if what is shared were shared by all", self.legs());
        (
            found.map(|(common, _)| (common, how())),
            found.map(|(_, own)| (own, how())),
        )
    }

    /// What the first guest and each further one are of a figure, for each GiB; of one point as what is
    /// in common is to what each has of its own.
    fn growth(
        &self,
        figure: impl Fn(&Point) -> Option<f64>,
        common: f64,
        own: f64,
    ) -> (Learned, Learned) {
        let points: Vec<(f64, f64)> = self
            .points
            .iter()
            .filter_map(|one| Some((one.guests, figure(one)? / one.guest_gib)))
            .collect();
        if let Some(line) = line(&points) {
            let how = || format!("{}: line through all", self.legs());
            let further = line.slope.max(0.0);
            return (
                Some((line.at_zero + further, how())),
                Some((further, how())),
            );
        }
        let Some((guests, whole)) = points.first() else {
            return (None, None);
        };
        let parts = common + own * guests;
        let ratio = if parts > 0.0 { whole / parts } else { 0.0 };
        (
            Some(((common + own) * ratio, self.legs())),
            Some((own * ratio, self.legs())),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::testing::{idle, mixed};

    fn near(figure: &Figure, wanted: f64) {
        let close = (figure.value - wanted).abs() <= 1e-6 + wanted.abs() * 1e-3;
        assert!(close, "{figure:?}, not {wanted}");
        assert!(matches!(figure.source, Source::Measured(_)), "{figure:?}");
    }

    #[test]
    fn what_idle_guests_were_made_of_is_found_again() {
        let mix = Mix::derive(Kind::Idle, &[mixed(), idle(&[3, 4, 6, 9, 15, 24])]);
        // Guests of half a GiB.
        let ours = mix.way(Contender::Vmgang);
        near(&ours.first, 2.0 * 0.060);
        near(&ours.further, 2.0 * 0.002);
        let stock = mix.way(Contender::StockParallel);
        near(&stock.first, 2.0 * 0.2);
        near(&stock.further, 2.0 * 0.2);
        near(&mix.way(Contender::StockParallelZstd).further, 2.0 * 0.07);
        near(&mix.stream, 2.0 * 0.2);
        near(&mix.common, 2.0 * 0.1);
        near(&mix.own, 2.0 * 0.01);
        near(&mix.vmgangd, 1.9);
        near(&ours.qemu, 1.5);
        near(&ours.libvirtd, 0.06);
        near(&ours.fixed_seconds, 0.8);
        near(&mix.fixed_mb, 20.0);
        near(&mix.member_mb, 5.0);
        assert!(matches!(mix.a_guest.source, Source::Assumed(_)));
    }

    #[test]
    fn one_number_of_guests_is_taken_apart_by_what_they_share() {
        let mix = Mix::derive(Kind::Mixed, &[mixed()]);
        near(&mix.common, 0.15);
        near(&mix.own, 0.05);
        // In proportion: 0.08 of 0.35.
        near(&mix.way(Contender::Vmgang).first, 0.2 * 0.08 / 0.35);
        near(&mix.way(Contender::Vmgang).further, 0.05 * 0.08 / 0.35);
        near(&mix.way(Contender::StockParallelZstd).first, 0.25 / 4.0);
        // The same guests over two links: 0.1 of a core each, and what is left is QEMU's.
        near(&mix.a_guest, 0.1);
        near(&mix.way(Contender::StockParallel).qemu, 2.0);
        let whole = mix.work(Contender::Vmgang, 4.0, 1.0);
        assert!((whole.wire_gb - 0.08).abs() < 1e-9 && (whole.stream_gb - 1.2).abs() < 1e-9);
    }

    #[test]
    fn whatever_is_missing_is_said_to_be() {
        for kind in Kind::ALL {
            let mix = Mix::derive(kind, &[]);
            for way in &mix.ways {
                for figure in [&way.first, &way.further, &way.qemu, &way.libvirtd] {
                    assert!(figure.value > 0.0, "{figure:?}");
                    assert!(!matches!(figure.source, Source::Measured(_)), "{figure:?}");
                }
            }
        }
        // A run that was stopped early, and one in which vmgang was left out.
        let mut cut = mixed();
        cut.legs.iter_mut().for_each(|leg| leg.moves.clear());
        assert_eq!(
            Mix::derive(Kind::Mixed, &[cut]),
            Mix::derive(Kind::Mixed, &[])
        );
        let mut stock = mixed();
        for leg in &mut stock.legs {
            leg.moves.retain(|one| one.contender != "vmgang");
        }
        let mix = Mix::derive(Kind::Mixed, &[stock]);
        near(&mix.stream, 0.3);
        assert_eq!(mix.own, Mix::derive(Kind::Mixed, &[]).own);
        assert!(matches!(mix.vmgangd.source, Source::Documented(_)));
    }

    #[test]
    fn one_leg_of_idle_guests_will_do() {
        let mix = Mix::derive(Kind::Idle, &[idle(&[4])]);
        near(&mix.stream, 2.0 * 0.2);
        assert!(mix.way(Contender::Vmgang).further.value > 0.0);
        assert!(mix.way(Contender::Vmgang).first.value > mix.way(Contender::Vmgang).further.value);
    }
}
