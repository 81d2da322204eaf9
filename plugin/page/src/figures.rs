//! The result in numbers: a few that matter most, where the bytes went, and each member's.

use maud::{Markup, html};

use crate::record::Report;
use crate::units;

pub(crate) fn tiles(report: &Report) -> Markup {
    let bytes = &report.bytes;
    let saved = 100.0 - units::percent_of(bytes.wire, bytes.qemu_stream);
    let longest = report
        .domains
        .iter()
        .filter_map(|domain| domain.downtime_ms)
        .max();
    let migrated = report
        .domains
        .iter()
        .filter(|domain| domain.state == "migrated")
        .count();
    let mut tiles = vec![
        (
            "members migrated",
            format!("{migrated} of {}", report.domains.len()),
        ),
        ("in all", units::time(report.elapsed_ms)),
    ];
    tiles.extend(longest.map(|ms| ("longest pause", units::time(ms))));
    tiles.extend(
        report
            .switchover_spread_ms
            .map(|ms| ("first to last switchover", units::time(ms))),
    );
    tiles.push(("over the wire", units::bytes(bytes.wire)));
    if bytes.qemu_stream > 0 {
        tiles.push(("saved", format!("{saved:.0}\u{a0}%")));
    }
    html! {
        dl.tiles {
            @for (name, value) in tiles { div { dt { (name) } dd { (value) } } }
        }
    }
}

pub(crate) fn where_the_bytes_went(report: &Report) -> Markup {
    let stream = report.bytes.qemu_stream;
    if stream == 0 {
        return html! {};
    }
    let parts = report.bytes.saved.parts();
    let saved = parts.into_iter().filter(|(_, bytes)| *bytes > 0);
    let saved = saved.map(|(name, bytes)| (name, bytes.unsigned_abs()));
    html! {
        section {
            h2 { "Where the bytes went" }
            p.quiet { "Of " (units::bytes(stream)) " that QEMU wrote" }
            table.parts {
                @for (name, bytes) in saved.chain([("over the wire", report.bytes.wire)]) {
                    @let share = units::percent_of(bytes, stream);
                    tr data-wire[name == "over the wire"] {
                        th scope="row" { (name) }
                        td.number { (units::bytes(bytes)) }
                        td.number { (format!("{share:.0}\u{a0}%")) }
                        td.bar { i style=(format!("width:{:.1}%", share.min(100.0))) {} }
                    }
                }
            }
        }
    }
}

pub(crate) fn members(report: &Report) -> Markup {
    let count = |number: Option<u64>| number.map_or("-".into(), |number| number.to_string());
    html! {
        section {
            h2 { "Members" }
            table.members {
                thead { tr {
                    @for name in ["Member", "Now", "Time", "Pause", "Passes", "Stream", "Wire"] { th scope="col" { (name) } }
                } }
                @for domain in &report.domains {
                    tr {
                        th scope="row" { (domain.name) }
                        td data-label="Now" data-state=(domain.state) { (domain.state) }
                        td data-label="Time" { (units::time(domain.elapsed_ms)) }
                        td data-label="Pause" { (domain.downtime_ms.map_or("-".into(), units::time)) }
                        td data-label="Passes" { (count(domain.iterations)) }
                        td data-label="Stream" { (units::bytes(domain.qemu_stream_bytes)) }
                        td data-label="Wire" { (units::bytes(domain.wire_bytes)) }
                    }
                    @if let Some(error) = &domain.error { tr.why { td colspan="7" { (error) } } }
                }
            }
        }
    }
}
