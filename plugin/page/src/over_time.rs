//! What moved over time: how fast, and how much of it never had to be sent.

use maud::{Markup, html};

use crate::lanes::axis;
use crate::record::{Report, Samples, Timeline};
use crate::units;

/// Pixels, above the axis.
const HEIGHT: f64 = 160.0;
/// A band that is lower has no label of its own.
const LABELLED_MIN: f64 = 15.0;

/// A point of a curve: when, and how much.
type Point = (u64, u64);

pub(crate) fn draw(report: &Report, timeline: &Timeline) -> Markup {
    let end_ms = timeline.end_ms(report);
    let samples = &timeline.samples;
    let count = samples.at_ms.len();
    let whole = [
        samples.qemu_stream.len(),
        samples.wire.len(),
        samples.saved.len(),
    ];
    if count < 2 || whole != [count; 3] {
        return html! { p.note { "The job was too short for anything to be seen over time." } };
    }
    html! {
        div.pair { (rates(samples, end_ms)) (savings(samples, end_ms)) }
    }
}

fn rates(samples: &Samples, end_ms: u64) -> Markup {
    let rate = |totals: &[u64]| -> Vec<Point> {
        let times = samples.at_ms.windows(2);
        times
            .zip(totals.windows(2))
            .filter(|(times, _)| times[1] > times[0])
            .flat_map(|(times, totals)| {
                let bytes = totals[1].saturating_sub(totals[0]);
                let per_s = u128::from(bytes) * 1000 / u128::from(times[1] - times[0]);
                let per_s = u64::try_from(per_s).unwrap_or(u64::MAX);
                [(times[0], per_s), (times[1], per_s)]
            })
            .collect()
    };
    let (stream, wire) = (rate(&samples.qemu_stream), rate(&samples.wire));
    let most = stream.iter().chain(&wire).map(|(_, rate)| *rate).max();
    let top = units::top(most.unwrap_or(0));
    html! {
        section {
            h2 { "Bytes a second" }
            ul.legend {
                li { i.swatch.wire {} "over the wire" }
                li { i.swatch.stream {} "written by QEMU" }
            }
            (chart(end_ms, top, "/s", html! {
                path class="stream" d=(area(&stream, end_ms, top)) {}
                path class="wire" d=(area(&wire, end_ms, top)) {}
            }, html! {}))
        }
    }
}

fn savings(samples: &Samples, end_ms: u64) -> Markup {
    // From the wire upwards; what cost more than it saved at some time saved nothing then.
    let mut bands: Vec<(&str, Vec<u64>)> = vec![("over the wire", samples.wire.clone())];
    if let Some(last) = samples.saved.last() {
        for (at, (name, bytes)) in last.parts().into_iter().enumerate() {
            if bytes > 0 {
                let of = |saved: &crate::record::Saved| saved.parts()[at].1.max(0).unsigned_abs();
                bands.push((name, samples.saved.iter().map(of).collect()));
            }
        }
    }
    let mut below = vec![0; samples.at_ms.len()];
    let mut stacked = Vec::new();
    for (name, heights) in bands {
        let above: Vec<u64> = below
            .iter()
            .zip(heights)
            .map(|(below, height)| below + height)
            .collect();
        stacked.push((name, std::mem::replace(&mut below, above.clone()), above));
    }
    let top = units::top(below.iter().copied().max().unwrap_or(0));
    let points = |heights: &[u64]| -> Vec<Point> {
        samples
            .at_ms
            .iter()
            .copied()
            .zip(heights.iter().copied())
            .collect()
    };
    let y = |bytes: u64| HEIGHT * (1.0 - units::percent_of(bytes, top) / 100.0);
    let labels = stacked.iter().filter_map(|(name, from, to)| {
        let (from, to) = (y(*from.last()?), y(*to.last()?));
        (from - to >= LABELLED_MIN).then_some((*name, (from + to) / 2.0))
    });
    html! {
        section {
            h2 { "Sent and saved so far" }
            ul.legend {
                li { i.swatch.wire {} "over the wire" }
                li { i.swatch.stream {} "saved, by how" }
            }
            (chart(end_ms, top, "", html! {
                @for (at, (_, from, to)) in stacked.iter().enumerate() {
                    @let class = if at == 0 { "wire" } else { "band" };
                    path class=(class) data-band=(at) d=(between(&points(from), &points(to), end_ms, top)) {}
                }
            }, html! {
                @for (name, y) in labels {
                    @let class = if name == "over the wire" { "on-wire" } else { "on-band" };
                    text x="98%" y=(format!("{:.1}", y + 14.0)) text-anchor="end" class=(class) { (name) }
                }
            }))
        }
    }
}

/// A picture of two axes; `curves` in a thousand times a thousand, `labels` over it.
fn chart(end_ms: u64, top: u64, unit: &str, curves: Markup, labels: Markup) -> Markup {
    html! {
        svg width="100%" height="194" role="img" {
            @for part in [0u64, 1, 2] {
                @let y = HEIGHT * (1.0 - part as f64 / 2.0) + 10.0;
                line class="grid" x1="0" x2="100%" y1=(y) y2=(y) {}
            }
            svg x="0" y="10" width="100%" height=(HEIGHT) viewBox="0 0 1000 1000" preserveAspectRatio="none" { (curves) }
            (labels)
            @for part in [1u64, 2] {
                @let y = HEIGHT * (1.0 - part as f64 / 2.0) + 10.0;
                text.scale x="2" y=(y + 12.0) { (units::bytes(top / 2 * part)) (unit) }
            }
            (axis(end_ms, 186))
        }
    }
}

fn at((at_ms, bytes): Point, end_ms: u64, top: u64) -> String {
    let x = units::percent_of(at_ms.min(end_ms), end_ms) * 10.0;
    let y = 1000.0 - units::percent_of(bytes, top) * 10.0;
    format!("{x:.1} {y:.1}")
}

/// Between a curve and the axis.
fn area(points: &[Point], end_ms: u64, top: u64) -> String {
    let ground: Vec<Point> = points.iter().map(|(at_ms, _)| (*at_ms, 0)).collect();
    between(&ground, points, end_ms, top)
}

fn between(below: &[Point], above: &[Point], end_ms: u64, top: u64) -> String {
    let there = above.iter().map(|point| at(*point, end_ms, top));
    let back = below.iter().rev().map(|point| at(*point, end_ms, top));
    let points: Vec<String> = there.chain(back).collect();
    format!("M{}Z", points.join("L"))
}
