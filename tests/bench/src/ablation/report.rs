//! The document as Markdown: a table for each mix and link, what each technique saved, and the
//! comparisons that the project has set itself goals for.
//!
//! Must not: judge. Figures stand beside what they are compared with.

use std::fmt::Write;

use super::plan::{Class, DEDUP_AND_ZSTD, Row, WORST_CASE};
use super::{Document, LinkResult, MixResult};
use crate::replay::report::{markdown, savings};

/// The whole document.
pub fn text(document: &Document) -> String {
    let mut out = format!(
        "{} processors, {} threads a half, page window {} MiB, {} between the halves.\n",
        document.processors,
        document.workers,
        document.window_bytes >> 20,
        if document.tls { "TLS 1.3" } else { "no TLS" },
    );
    for mix in &document.mixes {
        put_mix(&mut out, mix);
    }
    out
}

fn put_mix(out: &mut String, mix: &MixResult) {
    // Writing to a string cannot fail, here and below.
    let _ = write!(
        out,
        "\n## {}\n\n{}; members {}; {:.1} MB of stream.\n",
        mix.name,
        mix.title,
        mix.members.join(", "),
        mix.stream_bytes as f64 / 1e6
    );
    if let Some(floor) = mix.floors.first() {
        let _ = writeln!(
            out,
            "{} page records that are not zero, {} distinct ({:.1} MB). \
             The distinct pages in one stream of zstd:\n",
            floor.page_records,
            floor.distinct_pages,
            floor.distinct_pages as f64 * 4096.0 / 1e6
        );
        out.push_str("| | bytes | to the stream | MB/s of pages |\n|---|--:|--:|--:|\n");
        for (place, floor) in mix.floors.iter().enumerate() {
            let _ = writeln!(
                out,
                "| {}{} | {:.2} MB | {:.4} | {:.0} |",
                floor.method,
                if place == 0 { " (the floor)" } else { "" },
                floor.bytes as f64 / 1e6,
                floor.bytes as f64 / mix.stream_bytes as f64,
                floor.distinct_pages as f64 * 4096.0 / 1e6 / floor.seconds,
            );
        }
    }
    for link in &mix.links {
        let _ = write!(
            out,
            "\n### {}, link: {}\n\n{}\n",
            mix.name,
            link.rate,
            markdown(&link.runs, mix.floors.first())
        );
        for line in comparisons(mix, link) {
            let _ = writeln!(out, "- {line}");
        }
    }
    if let Some(link) = mix.links.first() {
        let _ = write!(out, "\n{}", savings(&link.runs));
    }
}

/// What the default is compared with, a sentence each.
pub fn comparisons(mix: &MixResult, link: &LinkResult) -> Vec<String> {
    let mut lines = Vec::new();
    let Some(default) = mix.default_row() else {
        return lines;
    };
    let (Some(seconds), Some(bytes)) = (link.seconds(default), link.wire_bytes(default)) else {
        return lines;
    };
    let name = &default.title;
    let soonest = |wanted: &dyn Fn(&Row) -> bool| {
        mix.rows
            .iter()
            .filter(|row| wanted(row))
            .filter_map(|row| Some((link.seconds(row)?, row.title.as_str())))
            .min_by(|one, other| one.0.total_cmp(&other.0))
    };
    let rungs = soonest(&|row| row.class == Class::Fixed);
    let choices = soonest(&|row| !matches!(row.class, Class::Relay | Class::Default));
    for (soonest, of) in [(rungs, "fixed rung"), (choices, "other choice")] {
        if let Some((other, title)) = soonest {
            lines.push(format!(
                "{name} took {seconds:.2} s, the soonest {of} (`{title}`) {other:.2} s: {}",
                beyond(seconds, other)
            ));
        }
    }
    let relay = mix.rows.iter().find(|row| row.class == Class::Relay);
    if let Some(relay) = relay.and_then(|row| link.seconds(row))
        && mix.name == WORST_CASE
    {
        lines.push(format!(
            "{name}, bytes beyond QEMU's: {}",
            beyond(bytes, mix.stream_bytes as f64)
        ));
        lines.push(format!(
            "{name}, time beyond the plain relay's: {}",
            beyond(seconds, relay)
        ));
    }
    if let Some(without) = mix.row(DEDUP_AND_ZSTD).and_then(|row| link.wire_bytes(row)) {
        lines.push(format!(
            "{name} sent {:.2} MB, {DEDUP_AND_ZSTD} alone {:.2} MB: {:.3} of it",
            bytes / 1e6,
            without / 1e6,
            bytes / without
        ));
    }
    lines
}

fn beyond(value: f64, base: f64) -> String {
    format!("{:+.2} %", 100.0 * (value / base - 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ablation::plan::DEFAULT;
    use crate::ablation::testing;

    #[test]
    fn the_worst_case_is_told_in_percent_of_stream_and_relay() {
        let mix = testing::mix(
            WORST_CASE,
            &[
                (Class::Relay, "plain relay", 2.0, 1_000_000),
                (Class::Default, DEFAULT, 2.08, 1_003_000),
            ],
        );
        let lines = comparisons(&mix, &mix.links[0]);
        assert_eq!(
            lines,
            [
                "default, bytes beyond QEMU's: +0.30 %",
                "default, time beyond the plain relay's: +4.00 %",
            ]
        );
    }

    #[test]
    fn the_default_is_compared_with_the_soonest_fixed_choice() {
        let mix = testing::mix(
            "debian",
            &[
                (Class::Relay, "plain relay", 0.5, 1_000_000),
                (Class::Alone, DEDUP_AND_ZSTD, 0.9, 200_000),
                (Class::Fixed, "all, zstd-long", 1.2, 100_000),
                (Class::Fixed, "all, zstd-quick", 1.0, 150_000),
                (Class::Default, DEFAULT, 1.1, 120_000),
            ],
        );
        let lines = comparisons(&mix, &mix.links[0]);
        assert!(lines[0].ends_with("fixed rung (`all, zstd-quick`) 1.00 s: +10.00 %"));
        assert!(lines[1].contains("(`dedup and zstd`) 0.90 s: +22.22 %"));
        assert!(lines[2].ends_with(": 0.600 of it"), "{lines:?}");
        let text = text(&testing::document(mix));
        assert!(text.contains("## debian") && text.contains("- default took 1.10 s"));
    }
}
