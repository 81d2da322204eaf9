//! The model's figures as Markdown: what it says, what it was fed with, and how far off it is.
//!
//! Must not: compute anything but ratios and units.

use std::fmt::Write;

use crate::contender::Contender;
use crate::scaling::check::{self, Check};
use crate::scaling::derive::{Figure, Kind, Mix, Source};
use crate::scaling::{Processors, Qemu, Site, UNDER_WAY, WAYS, predict};
use crate::suite::Document;

/// What the tables are about.
#[derive(Debug, Clone)]
pub struct Question {
    pub guests: Vec<u32>,
    /// Of each guest.
    pub memory_gib: f64,
    pub gigabits: Vec<f64>,
    /// Of each host, for the migration.
    pub cores: f64,
    /// GB/s of each host.
    pub memory_gb: f64,
    /// Free on each host beside the guests.
    pub available_gib: f64,
}

impl Question {
    pub fn site(&self, gigabits: f64, cores: f64) -> Site {
        Site {
            link: Some(gigabits * 1e9),
            processors: Processors::Each(cores),
            memory_gb: self.memory_gb,
            under_way: UNDER_WAY,
        }
    }

    /// The number of guests in tables with one only, and in the pictures.
    pub fn some_guests(&self) -> f64 {
        let middle = self.guests.len() / 2;
        self.guests
            .get(middle)
            .map_or(1.0, |guests| f64::from(*guests))
    }
}

/// How tables call a contender.
pub fn short(contender: Contender) -> &'static str {
    match contender {
        Contender::StockParallel => "stock",
        Contender::StockParallelZstd => "stock, multifd + zstd",
        _ => "vmgang",
    }
}

/// How tables call a host.
fn host(qemu: Qemu) -> &'static str {
    match qemu {
        Qemu::Published => "KVM, QEMU's costs as published",
        Qemu::Measured => "QEMU's costs as measured here, under software emulation",
    }
}

/// All of it.
pub fn text(question: &Question, documents: &[Document]) -> String {
    let mixes = Kind::ALL.map(|kind| Mix::derive(kind, documents));
    let checks = check::all(documents);
    let mut out = format!(
        "Made by `make scaling`; what it means, and what it leaves out, is in \
         [scaling.md](../scaling.md).\n\n{}\n\n\
         Guests of {} GiB, as full as those measured; {} cores of each host for the migration, memory of {} \
         GB/s, {UNDER_WAY} members under way at once. Each time has beside it what it waits for.\n\n\
         ![times by link](times.svg)\n",
        given(documents),
        question.memory_gib,
        question.cores,
        question.memory_gb,
    );
    put_short(&mut out, question, &mixes);
    match check::off(&checks) {
        Some((middle, most)) => {
            // Writing to a string cannot fail, here and below.
            let _ = writeln!(
                out,
                "\nTimes that were measured and not fed to the model are {middle:.2} times off in the median, \
                 {most:.2} times at most ([below](#predicted-and-measured))."
            );
        }
        None => out.push_str("\nNothing was measured yet that the model could be checked by.\n"),
    }
    for mix in &mixes {
        for qemu in Qemu::ALL {
            put_times(&mut out, question, mix, qemu);
        }
        put_cores(&mut out, question, mix);
        put_memory(&mut out, question, mix);
    }
    put_crossings(&mut out, question, &mixes);
    put_checks(&mut out, &checks);
    put_figures(&mut out, &mixes);
    out
}

fn given(documents: &[Document]) -> String {
    let names = |documents: &[Document]| {
        let names = documents.iter().map(|one| {
            let times = match one.repetitions {
                1 => "one repetition".to_owned(),
                times => format!("{times} repetitions"),
            };
            format!("{}.json of {}, {times}", one.shape, one.date)
        });
        names.collect::<Vec<_>>().join("; ")
    };
    let mut text = match documents.is_empty() {
        true => "No measurements of the suite were there.".to_owned(),
        false => format!("Measurements: {}.", names(documents)),
    };
    for kind in Kind::ALL {
        if !documents.iter().any(|one| one.shape == kind.name()) {
            let _ = write!(
                text,
                " **`{}` was not measured**: what is said of it is documented elsewhere or assumed.",
                kind.name()
            );
        }
    }
    text
}

fn put_short(out: &mut String, question: &Question, mixes: &[Mix]) {
    let _ = write!(
        out,
        "\n## In short\n\n\
         {} guests on KVM hosts. What would be waited for next, were there more of the first, is beside it with the \
         time that it would take.\n\n\
         | guests like | Gbit/s | vmgang | waits for | next | of stock | of multifd + zstd |\n\
         |---|--:|--:|---|---|--:|--:|\n",
        question.some_guests()
    );
    for mix in mixes {
        for gigabits in &question.gigabits {
            let of = |way| {
                let work = mix.work(way, question.some_guests(), question.memory_gib);
                let site = question.site(*gigabits, question.cores);
                predict(&work, &mix.costs(way, Qemu::Published), &site)
            };
            let ours = of(Contender::Vmgang);
            let (next, next_seconds) = ours.next();
            let to = |way| ours.seconds() / of(way).seconds();
            let _ = writeln!(
                out,
                "| `{}` | {gigabits} | {} | {} | {}, {} | {:.2} | {:.2} |",
                mix.kind.name(),
                time(ours.seconds()),
                ours.bottleneck().0.title(),
                next.title(),
                time(next_seconds + ours.fixed_seconds),
                to(Contender::StockParallel),
                to(Contender::StockParallelZstd),
            );
        }
    }
}

fn put_times(out: &mut String, question: &Question, mix: &Mix, qemu: Qemu) {
    let name = mix.kind.name();
    let _ = write!(out, "\n## Time, guests like `{name}`, {}\n\n", host(qemu));
    put_head(out, "| guests | |", &question.gigabits, " Gbit/s");
    for guests in &question.guests {
        for way in WAYS {
            let work = mix.work(way, f64::from(*guests), question.memory_gib);
            let _ = write!(out, "| {guests} | {} |", short(way));
            for gigabits in &question.gigabits {
                let site = question.site(*gigabits, question.cores);
                let prediction = predict(&work, &mix.costs(way, qemu), &site);
                let (term, _) = prediction.bottleneck();
                let _ = write!(out, " {}, {} |", time(prediction.seconds()), term.title());
            }
            out.push('\n');
        }
    }
}

fn put_cores(out: &mut String, question: &Question, mix: &Mix) {
    let name = mix.kind.name();
    let _ = write!(
        out,
        "\n## Cores for the link to be what is waited for, guests like `{name}`\n\n\
         Source / destination, {} guests. What else is waited for no core helps against.\n\n",
        question.some_guests()
    );
    put_head(out, "| QEMU | |", &question.gigabits, " Gbit/s");
    for qemu in Qemu::ALL {
        for way in WAYS {
            let word = match qemu {
                Qemu::Published => "KVM",
                Qemu::Measured => "emulated",
            };
            let _ = write!(out, "| {word} | {} |", short(way));
            let work = mix.work(way, question.some_guests(), question.memory_gib);
            for gigabits in &question.gigabits {
                let site = question.site(*gigabits, question.cores);
                let prediction = predict(&work, &mix.costs(way, qemu), &site);
                let [source, destination] = prediction.cores.unwrap_or_default();
                let _ = write!(out, " {} / {} |", number(source), number(destination));
            }
            out.push('\n');
        }
    }
}

fn put_memory(out: &mut String, question: &Question, mix: &Mix) {
    let _ = write!(
        out,
        "\n## Memory of vmgangd, guests like `{}`\n\n\
         In GB. The window is what the budget's rules give where {} GiB are available on each host beside the \
         guests.\n\n\
         | guests | all contents, each once | window for nothing in common to be sent twice | window given | | \
         source: window, map, buffers | destination: window, buffers |\n|--:|--:|--:|--:|---|--:|--:|\n",
        mix.kind.name(),
        question.available_gib,
    );
    for guests in &question.guests {
        let memory = mix.memory(
            f64::from(*guests),
            question.memory_gib,
            question.available_gib,
        );
        let _ = writeln!(
            out,
            "| {guests} | {} | {} | {} | {} | {} | {} |",
            number(memory.contents_gb),
            number(memory.needed_gb),
            number(memory.granted_gb),
            match memory.is_enough() {
                true => "enough",
                false => "**too little**: more crosses than is said here",
            },
            number(memory.source_gb),
            number(memory.destination_gb),
        );
    }
}

/// The slowest link over which the best stock choice is as soon as vmgang, in Gbit/s.
pub fn crossing(mix: &Mix, qemu: Qemu, question: &Question, cores: f64) -> Option<f64> {
    const STEP: f64 = 1.02;
    let mut gigabits = 0.1;
    while gigabits <= 400.0 {
        let of = |way| {
            let work = mix.work(way, question.some_guests(), question.memory_gib);
            let site = question.site(gigabits, cores);
            predict(&work, &mix.costs(way, qemu), &site).seconds()
        };
        let stock = of(Contender::StockParallel).min(of(Contender::StockParallelZstd));
        if stock <= of(Contender::Vmgang) {
            return Some(gigabits);
        }
        gigabits *= STEP;
    }
    None
}

fn put_crossings(out: &mut String, question: &Question, mixes: &[Mix]) {
    let _ = write!(
        out,
        "\n## From which link on stock is as soon\n\n\
         The slowest link, in Gbit/s, over which stock or multifd + zstd takes no longer than vmgang; {} \
         guests, by cores of each host for the migration.\n\n",
        question.some_guests()
    );
    const CORES: [f64; 6] = [2.0, 4.0, 8.0, 16.0, 32.0, 64.0];
    put_head(out, "| guests like | QEMU |", &CORES, " cores");
    for mix in mixes {
        for qemu in Qemu::ALL {
            let _ = write!(out, "| `{}` | {} |", mix.kind.name(), host(qemu));
            for cores in CORES {
                let crossing = crossing(mix, qemu, question, cores);
                let text = crossing.map_or_else(|| "none up to 400".to_owned(), number);
                let _ = write!(out, " {text} |");
            }
            out.push('\n');
        }
    }
}

fn put_checks(out: &mut String, checks: &[Check]) {
    out.push_str(
        "\n## Predicted and measured\n\n\
         With the processors of the lab, which both hosts and all guests share. Idle guests beyond 9 are predicted \
         from those up to 9, `mixed` from its leg over 1 Gbit/s. Of the other shapes bytes are given, and the time is \
         predicted with the costs of `mixed`.\n\n",
    );
    if checks.is_empty() {
        out.push_str("Nothing was measured yet that the model was not fed with.\n");
        return;
    }
    out.push_str(
        "| | | predicted, MB | measured | predicted, s | measured | predicted to measured |\n\
         |---|---|--:|--:|--:|--:|--:|\n",
    );
    for check in checks {
        let [foretold, measured] = check.seconds;
        let mb = |place: usize| {
            check
                .mb
                .map_or_else(|| "-".to_owned(), |mb| number(mb[place]))
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {foretold:.1} | {measured:.1} | {:.2} |",
            check.leg,
            short(check.contender),
            mb(0),
            mb(1),
            foretold / measured
        );
    }
    out.push_str(
        "\nvmgangd's memory at its most, MB. The source's has in it what it keeps for the way back of earlier moves, \
         which the model leaves out.\n\n\
         | | source, predicted | measured | destination, predicted | measured |\n|---|--:|--:|--:|--:|\n",
    );
    for check in checks {
        if let Some(memory) = check.memory_mb {
            let [source, source_peak, destination, destination_peak] = memory.map(number);
            let _ = writeln!(
                out,
                "| {} | {source} | {source_peak} | {destination} | {destination_peak} |",
                check.leg
            );
        }
    }
}

fn put_figures(out: &mut String, mixes: &[Mix]) {
    for mix in mixes {
        let _ = write!(
            out,
            "\n## What it was fed with, `{}`\n\n| | | from |\n|---|--:|---|\n",
            mix.kind.name()
        );
        let mut put = |what: &str, figure: &Figure| {
            let _ = writeln!(
                out,
                "| {what} | {} | {} |",
                number(figure.value),
                from(figure)
            );
        };
        put("QEMU's stream, GB for each GiB of memory", &mix.stream);
        put("of it contents that all have in common", &mix.common);
        put("contents that each has of its own", &mix.own);
        put(
            "vmgangd, both hosts, s of a core for each GB of stream",
            &mix.vmgangd,
        );
        put("a guest's own work, of a core", &mix.a_guest);
        put("vmgangd's memory beside its window, MB", &mix.fixed_mb);
        put("the same for each member under way", &mix.member_mb);
        for way in &mix.ways {
            let name = short(way.contender);
            put(
                &format!("{name}: link, first guest, GB for each GiB"),
                &way.first,
            );
            put(&format!("{name}: link, each further one"), &way.further);
            put(
                &format!("{name}: QEMU, emulated, both hosts, s for each GB"),
                &way.qemu,
            );
            put(
                &format!("{name}: libvirtd, both hosts, s for each guest"),
                &way.libvirtd,
            );
            put(&format!("{name}: fixed time, s"), &way.fixed_seconds);
        }
    }
}

fn from(figure: &Figure) -> String {
    match &figure.source {
        Source::Measured(how) => how.clone(),
        Source::Documented(place) => format!("not in the documents; {place}"),
        Source::Assumed(why) => format!("**assumed**; {why}"),
    }
}

fn put_head(out: &mut String, first: &str, columns: &[f64], unit: &str) {
    out.push_str(first);
    for column in columns {
        let _ = write!(out, " {column}{unit} |");
    }
    let _ = writeln!(out, "\n|---|---|{}", "--:|".repeat(columns.len()));
}

/// As people say it.
pub fn time(seconds: f64) -> String {
    match seconds {
        _ if seconds < 10.0 => format!("{seconds:.1} s"),
        _ if seconds < 600.0 => format!("{seconds:.0} s"),
        _ => format!("{:.0} min", seconds / 60.0),
    }
}

/// Three digits, or as many as it has before its point.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.9995 => 2,
        size if size >= 0.0995 || size == 0.0 => 3,
        size if size >= 0.00995 => 4,
        _ => 5,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::scaling::testing::{idle, mixed};

    pub fn question() -> Question {
        Question {
            guests: vec![64, 128, 256, 512],
            memory_gib: 4.0,
            gigabits: vec![1.0, 10.0, 25.0, 40.0, 100.0],
            cores: 16.0,
            memory_gb: 100.0,
            available_gib: 64.0,
        }
    }

    #[test]
    fn every_number_of_guests_has_its_row_for_every_way_and_host() {
        let text = text(&question(), &[mixed(), idle(&[3, 4, 6, 9, 15, 24])]);
        for guests in [64, 128, 256, 512] {
            for way in WAYS {
                let row = format!("| {guests} | {} | ", short(way));
                assert_eq!(text.matches(&row).count(), 2 * 2, "{row}");
            }
            let memory = format!("\n| {guests} | ");
            // Three rows of times in each of four tables, and one in each of two of memory.
            assert_eq!(text.matches(&memory).count(), 4 * 3 + 2);
        }
        for row in ["| KVM | vmgang |", "| emulated | stock |"] {
            assert_eq!(text.matches(row).count(), 2, "{row}");
        }
        assert!(
            text.contains("| idle, 24 guests, 1 Gbit/s | vmgang |"),
            "{text}"
        );
        assert!(text.contains("| mixed, 10 Gbit/s | stock |"));
        assert!(text.contains("idle.json of 2026-01-02, one repetition"));
        assert!(!text.contains("was not measured") && !text.contains("NaN"));
    }

    #[test]
    fn what_was_not_measured_is_said() {
        let text = text(&question(), &[]);
        assert!(text.contains("`mixed` was not measured") && text.contains("`idle` was not"));
        assert!(text.contains("Nothing was measured yet") && text.contains("**assumed**"));
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn stock_catches_up_on_links_that_are_fast_for_the_cores() {
        let mix = Mix::derive(Kind::Mixed, &[mixed()]);
        let at = |cores| crossing(&mix, Qemu::Published, &question(), cores).expect("a link");
        assert!(at(2.0) < at(4.0), "{} {}", at(2.0), at(4.0));
        assert!(at(2.0) > 1.0, "{}", at(2.0));
    }

    #[test]
    fn figures_are_short() {
        for (value, wanted) in [
            (1234.5, "1234"),
            (43.21, "43.2"),
            (0.0, "0.000"),
            (0.012, "0.0120"),
        ] {
            assert_eq!(number(value), wanted);
        }
        assert_eq!(
            (time(3.21), time(71.4), time(1200.0)),
            ("3.2 s".into(), "71 s".into(), "20 min".into())
        );
    }
}
