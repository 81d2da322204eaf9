//! What was measured as Markdown: the goals, then a table for each leg.
//!
//! Must not: hide anything. Figures are medians, times have their range beside them.

use std::fmt::Write;

use super::goals::{self, Goal};
use super::{Document, LegResult};
use crate::contender::Contender;
use crate::table::spread;

/// All documents.
pub fn text(documents: &[Document]) -> String {
    let mut out = String::from(
        "Made by `make bench` from the JSON files beside it; what it means is in \
         [benchmarks.md](../../benchmarks.md).\n\n## Goals\n\n",
    );
    out.push_str(&goals_table(&goals::all(documents)));
    for document in documents {
        put_document(&mut out, document);
    }
    out
}

fn goals_table(goals: &[Goal]) -> String {
    let mut out = String::from("| | goal | measured | |\n|---|--:|--:|---|\n");
    for goal in goals {
        let sign = if goal.at_most { "≤" } else { "≥" };
        let value = goal
            .value
            .map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        let verdict = match goal.is_met() {
            Some(true) => "met",
            Some(false) => "**missed**",
            None => "not measured",
        };
        // Writing to a string cannot fail, here and below.
        let _ = writeln!(
            out,
            "| {} | {sign} {} | {value} | {verdict} |",
            goal.what, goal.limit
        );
    }
    out
}

fn put_document(out: &mut String, document: &Document) {
    let machine = &document.machine;
    let _ = write!(
        out,
        "\n## {}: {}\n\n{}; {} processors ({}), {:.0} GiB, Linux {}; {}. Repetitions: {}.\n\n",
        document.shape,
        document.title,
        document.date,
        machine.processors,
        machine.processor,
        machine.memory_bytes as f64 / f64::from(1 << 30),
        machine.kernel,
        machine.versions.join(", "),
        document.repetitions,
    );
    // Two dozen guests that differ in their names need one line.
    let shown = document.guests.iter().take(4);
    for guest in shown {
        let _ = writeln!(out, "- `{}`: `{}`", guest.name, guest.recipe);
    }
    if document.guests.len() > 4 {
        let _ = writeln!(out, "- and {} more like these", document.guests.len() - 4);
    }
    let _ = writeln!(out, "\n![{}]({}.svg)", document.title, document.shape);
    for leg in &document.legs {
        let _ = write!(out, "\n### {}, {}\n\n", document.shape, leg.name);
        out.push_str(&leg_table(leg));
    }
}

fn leg_table(leg: &LegResult) -> String {
    let mut out = String::from(
        "| | time, s | | link, MB | | mean downtime, ms | longest | daemons, s of a processor: \
         vmgangd | libvirtd | QEMU | vmgangd's memory, MB: source | destination | guests' work kept \
         |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let contenders = leg.contenders();
    let first = contenders.first().copied();
    for contender in contenders {
        let seconds: Vec<f64> = leg.of(contender).map(|one| one.seconds).collect();
        let ratio = |figure: fn(&LegResult, Contender) -> Option<f64>, digits: usize| {
            let to = first.and_then(|first| figure(leg, first));
            let both = figure(leg, contender).zip(to);
            both.map_or_else(String::new, |(value, to)| {
                format!("{:.digits$}", value / to)
            })
        };
        let number = |figure: &dyn Fn(&crate::measure::Move) -> f64, digits: usize| {
            let value = leg.median(contender, |one| Some(figure(one)));
            value.map_or_else(String::new, |value| format!("{value:.digits$}"))
        };
        let _ = writeln!(
            out,
            "| {} | {}{} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            contender.title(),
            number(&|one| one.seconds, 1),
            spread(&seconds),
            ratio(LegResult::seconds, 2),
            number(&|one| one.link_bytes as f64 / 1e6, 1),
            ratio(LegResult::bytes, 3),
            number(&crate::measure::Move::downtime_mean_ms, 0),
            number(&|one| one.downtime_max_ms() as f64, 0),
            number(&|one| one.cost.vmgangd_seconds, 1),
            number(&|one| one.cost.libvirtd_seconds, 1),
            number(&|one| one.cost.qemu_seconds, 1),
            number(&|one| one.cost.vmgangd_peak_bytes[0] as f64 / 1e6, 0),
            number(&|one| one.cost.vmgangd_peak_bytes[1] as f64 / 1e6, 0),
            leg.work_kept(contender)
                .map_or_else(|| "-".to_owned(), |kept| format!("{kept:.2}")),
        );
    }
    let seconds = leg.median(Contender::Prepared, |one| {
        Some(one.prepared.as_ref()?.seconds)
    });
    let megabytes = leg.median(Contender::Prepared, |one| {
        Some(one.prepared.as_ref()?.link_bytes as f64 / 1e6)
    });
    if let (Some(seconds), Some(megabytes)) = (seconds, megabytes) {
        let _ = writeln!(
            out,
            "\nPreparing took {seconds:.1} s and {megabytes:.1} MB on the link."
        );
    }
    let delivered: Vec<String> = leg
        .contenders()
        .into_iter()
        .filter_map(|contender| {
            let share = leg.median(contender, |one| Some(one.congestion.as_ref()?.share()))?;
            Some(format!("{} {:.1} %", contender.title(), share * 100.0))
        })
        .collect();
    if !delivered.is_empty() {
        let _ = write!(
            out,
            "\nOf the other traffic arrived beside {}.\n",
            delivered.join(", ")
        );
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::Preparation;
    use crate::suite::shape::Shape;
    use crate::suite::testing::{document, moved};

    #[test]
    fn every_contender_has_its_row_and_every_goal_its_verdict() {
        let moves = vec![
            moved(Contender::StockParallel, 10.0, 1_000_000, 100),
            moved(Contender::StockParallel, 12.0, 1_000_000, 100),
            moved(Contender::Vmgang, 5.5, 70_000, 20),
        ];
        let text = text(&[document(Shape::Mixed, &[("1 Gbit/s", "1gbit", moves)])]);
        assert!(text.contains("| virsh, in parallel | 11.0 (10.0-12.0) | 1.00 | 1.0 | 1.000 |"));
        assert!(
            text.contains("| vmgang | 5.5 | 0.50 | 0.1 | 0.070 | 20 | 20 |"),
            "{text}"
        );
        let missed = "| bytes, mixed, of stock as it comes | ≤ 0.065 | 0.070 | **missed** |";
        assert!(text.contains(missed), "{text}");
        assert!(text.contains("not measured"));
    }

    #[test]
    fn what_preparing_took_is_told_where_somebody_prepared() {
        let mut prepared = moved(Contender::Prepared, 3.0, 5_000_000, 20);
        prepared.prepared = Some(Preparation {
            seconds: 7.5,
            link_bytes: 68_900_000,
        });
        let told = |moves| text(&[document(Shape::Mixed, &[("1 Gbit/s", "1gbit", moves)])]);
        let sentence = "\n\nPreparing took 7.5 s and 68.9 MB on the link.\n";
        let with = told(vec![prepared]);
        assert!(with.contains(sentence), "{with}");
        let without = told(vec![moved(Contender::Vmgang, 5.5, 70_000, 20)]);
        assert!(!without.contains("Preparing"), "{without}");
    }
}
