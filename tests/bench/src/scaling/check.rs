//! The model beside measurements that it was not fed with.
//!
//! Owns: which measurements those are.
//! Must not: feed the model with what it is checked by.

use vmgang_lab::parse_rate;

use crate::contender::Contender;
use crate::scaling::derive::{Kind, Mix, Point, points};
use crate::scaling::{Qemu, WAYS, Work, predict};
use crate::suite::Document;
use crate::suite::shape::Shape;
use crate::table::median;

/// Idle guests of which figures for larger gangs are foretold, at most.
const FEW: usize = 9;

/// A leg by one contender.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    pub leg: String,
    pub contender: Contender,
    /// Foretold and measured, in MB; `None` where the model was given the bytes.
    pub mb: Option<[f64; 2]>,
    pub seconds: [f64; 2],
    /// vmgangd's memory in MB: foretold and measured on the source, the same on the destination.
    pub memory_mb: Option<[f64; 4]>,
}

/// All of them.
pub fn all(documents: &[Document]) -> Vec<Check> {
    let mut checks = Vec::new();
    let of = |shape: Shape| documents.iter().find(|one| one.shape == shape.name());
    if let Some(idle) = of(Shape::Idle) {
        let mut few = idle.clone();
        few.legs.retain(|leg| leg.guests.len() <= FEW);
        if few.legs.iter().any(|leg| !leg.moves.is_empty()) {
            let mix = Mix::derive(Kind::Idle, &[few]);
            let more = |point: &&Point| point.leg.guests.len() > FEW;
            for point in points(idle).iter().filter(more) {
                put(&mut checks, idle, point, &mix, true);
            }
        }
    }
    let mixed = Mix::derive(Kind::Mixed, documents);
    if let Some(document) = of(Shape::Mixed) {
        // The one it was derived from is told by its name in the figures' source.
        let points = points(document);
        let fed = points.iter().find(|point| point.leg.link == "1gbit");
        let fed = fed.or(points.last()).map(|point| point.leg.name.as_str());
        for point in points
            .iter()
            .filter(|one| Some(one.leg.name.as_str()) != fed)
        {
            put(&mut checks, document, point, &mixed, true);
        }
    }
    for shape in [Shape::One, Shape::Database, Shape::Worst] {
        if let Some(document) = of(shape) {
            for point in points(document) {
                put(&mut checks, document, &point, &mixed, false);
            }
        }
    }
    checks
}

/// `with_bytes`: what is moved is foretold as well, and not only how long it takes.
fn put(checks: &mut Vec<Check>, document: &Document, point: &Point, mix: &Mix, with_bytes: bool) {
    for contender in WAYS {
        let (leg, guests) = (point.leg, point.guests);
        let (Some(seconds), Some(bytes)) = (leg.seconds(contender), leg.bytes(contender)) else {
            continue;
        };
        let foretold = mix.work(contender, guests, point.guest_gib);
        let work = match (with_bytes, point.stream_gb) {
            (false, Some(stream_gb)) => Work {
                stream_gb,
                wire_gb: bytes / 1e9,
                ..foretold
            },
            _ => foretold,
        };
        let costs = mix.costs(contender, Qemu::Measured);
        let prediction = predict(&work, &costs, &mix.lab(document, leg));
        let memory = (with_bytes && contender == Contender::Vmgang).then(|| {
            let foretold = mix.memory(guests, point.guest_gib, f64::from(u32::MAX));
            let peak = |host: usize| {
                leg.median(contender, |one| {
                    Some(one.cost.vmgangd_peak_bytes[host] as f64 / 1e6)
                })
            };
            let [source, destination] = [foretold.source_gb, foretold.destination_gb];
            Some([source * 1e3, peak(0)?, destination * 1e3, peak(1)?])
        });
        checks.push(Check {
            leg: format!(
                "{}, {}{}",
                document.shape,
                leg.name,
                link(&leg.name, &leg.link)
            ),
            contender,
            mb: with_bytes.then_some([work.wire_gb * 1e3, bytes / 1e6]),
            seconds: [prediction.seconds(), seconds],
            memory_mb: memory.flatten(),
        });
    }
}

/// The link, unless the leg is called by it.
fn link(name: &str, link: &str) -> String {
    match parse_rate(link) {
        Ok(Some(bits)) if !name.contains("bit/s") => format!(", {} Gbit/s", bits as f64 / 1e9),
        _ => String::new(),
    }
}

/// Median and largest of how far off times are, as factors of at least 1.
pub fn off(checks: &[Check]) -> Option<(f64, f64)> {
    let off = |check: &Check| {
        let [foretold, measured] = check.seconds;
        (foretold / measured).max(measured / foretold)
    };
    let off: Vec<f64> = checks.iter().map(off).collect();
    let most = off.iter().copied().fold(0.0, f64::max);
    (!off.is_empty()).then(|| (median(off), most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::testing::{idle, mixed};

    #[test]
    fn what_the_model_made_is_foretold_by_it() {
        let checks = all(&[idle(&[3, 4, 6, 9, 15, 24])]);
        assert_eq!(checks.len(), 2 * 3);
        for check in &checks {
            let [foretold, measured] = check.mb.expect("bytes");
            assert!((foretold / measured - 1.0).abs() < 0.01, "{check:?}");
            if let Some([.., foretold, measured]) = check.memory_mb {
                assert!((foretold / measured - 1.0).abs() < 0.01, "{check:?}");
            }
        }
        let ours = |check: &&Check| check.memory_mb.is_some();
        assert_eq!(checks.iter().filter(ours).count(), 2);
        let (middle, most) = off(&checks).expect("something was checked");
        assert!(middle < 1.02 && most < 1.1, "{checks:?}");
    }

    #[test]
    fn legs_that_fed_it_check_nothing() {
        let names = |documents: &[Document]| {
            let checks = all(documents);
            checks
                .into_iter()
                .map(|check| check.leg)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&[mixed()]), ["mixed, 10 Gbit/s"; 3]);
        assert!(names(&[idle(&[3, 9])]).is_empty());
        assert!(names(&[idle(&[15])]).is_empty() && off(&[]).is_none());
        // Another shape's bytes are given.
        let mut other = mixed();
        other.shape = Shape::Database.name().to_owned();
        let checks = all(&[other]);
        assert!(checks.len() == 6 && checks.iter().all(|check| check.mb.is_none()));
    }
}
