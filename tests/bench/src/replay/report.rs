//! Measurements as Markdown: one table of what a run costs, one of what each technique saved.
//!
//! Must not: hide anything: of several repetitions the times are medians with their range, bytes
//! the median.

use std::fmt::Write;

use super::run::Measurement;
use crate::floor::Floor;
use crate::table::median;

/// All runs of one set over one link.
pub fn markdown(measurements: &[Measurement], floor: Option<&Floor>) -> String {
    let rows = group(measurements);
    let relay = rows
        .iter()
        .find(|row| row[0].counters.is_none())
        .map(|row| median_of(row, |m| m.seconds));
    let mut out = String::from(
        "| | wire | to the stream | to the floor | time | to the relay | GB/s a core: source | \
         destination | peak memory: source | destination |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for row in &rows {
        let wire = median_of(row, |m| m.wire_bytes as f64);
        let stream = row[0].stream_bytes as f64;
        let seconds = median_of(row, |m| m.seconds);
        let ratio = |to: Option<f64>, value: f64| {
            to.map_or_else(|| "-".to_owned(), |to| format!("{:.3}", value / to))
        };
        let speed = |cpu: f64| format!("{:.2}", stream / cpu / 1e9);
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "| {} | {:.2} MB | {:.4} | {} | {seconds:.2} s{} | {} | {} | {} | {:.0} MB | {:.0} MB |",
            row[0].contender,
            wire / 1e6,
            wire / stream,
            ratio(floor.map(|floor| floor.bytes as f64), wire),
            range(row),
            ratio(relay, seconds),
            speed(median_of(row, |m| m.source.cpu_seconds)),
            speed(median_of(row, |m| m.destination.cpu_seconds)),
            median_of(row, |m| m.source.peak_memory_bytes as f64) / 1e6,
            median_of(row, |m| m.destination.peak_memory_bytes as f64) / 1e6,
        );
    }
    out
}

/// What each technique saved, in MB; of the first repetition.
pub fn savings(measurements: &[Measurement]) -> String {
    let rows: Vec<&Measurement> = group(measurements).iter().map(|row| row[0]).collect();
    let Some(first) = rows.iter().find_map(|row| row.counters.as_ref()) else {
        return String::new();
    };
    let names: Vec<&str> = first.saved.iter().map(|(name, _)| name.as_str()).collect();
    let mut out = format!(
        "| saved, MB | {} | all | stream less wire |\n|---|{}\n",
        names.join(" | "),
        "--:|".repeat(names.len() + 2)
    );
    for row in rows {
        let Some(counters) = &row.counters else {
            continue;
        };
        let _ = write!(out, "| {} |", row.contender);
        let all = counters.saved_total();
        let difference = row.stream_bytes as i64 - row.wire_bytes as i64;
        for bytes in counters
            .saved
            .iter()
            .map(|(_, bytes)| *bytes)
            .chain([all, difference])
        {
            let _ = write!(out, " {:.2} |", bytes as f64 / 1e6);
        }
        out.push('\n');
    }
    out
}

/// Repetitions of the same, together, in order of first appearance.
fn group(measurements: &[Measurement]) -> Vec<Vec<&Measurement>> {
    let mut rows: Vec<Vec<&Measurement>> = Vec::new();
    for measurement in measurements {
        match rows
            .iter_mut()
            .find(|row| row[0].contender == measurement.contender)
        {
            Some(row) => row.push(measurement),
            None => rows.push(vec![measurement]),
        }
    }
    rows
}

fn median_of(row: &[&Measurement], figure: impl Fn(&Measurement) -> f64) -> f64 {
    median(row.iter().map(|measurement| figure(measurement)))
}

fn range(row: &[&Measurement]) -> String {
    if row.len() < 2 {
        return String::new();
    }
    let seconds = row.iter().map(|measurement| measurement.seconds);
    let min = seconds.clone().fold(f64::INFINITY, f64::min);
    let max = seconds.fold(0.0, f64::max);
    format!(" ({min:.2}-{max:.2})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::floor::Method;
    use crate::replay::half::{Counters, HalfEnd};

    fn measurement(contender: &str, seconds: f64, saved: Option<i64>) -> Measurement {
        let half = |cpu_seconds| HalfEnd {
            cpu_seconds,
            peak_memory_bytes: 50_000_000,
            wire_bytes: 0,
            counters: None,
        };
        Measurement {
            contender: contender.to_owned(),
            link_bits_per_second: None,
            stream_bytes: 1_000_000_000,
            wire_bytes: 1_000_000_000 - saved.unwrap_or(0) as u64,
            link_bytes: None,
            seconds,
            source: half(2.0),
            destination: half(0.5),
            counters: saved.map(|bytes| Counters {
                stream_bytes: 1_000_000_000,
                literal_bytes: 0,
                saved: vec![("zero".to_owned(), bytes)],
            }),
        }
    }

    #[test]
    fn rows_have_medians_speeds_and_ratios_to_relay_and_floor() {
        let measurements = [
            measurement("plain relay", 2.0, None),
            measurement("all", 3.0, Some(900_000_000)),
            measurement("plain relay", 4.0, None),
            measurement("all", 6.0, Some(900_000_000)),
        ];
        let floor = Floor {
            digest: String::new(),
            method: Method::FLOOR,
            page_records: 0,
            distinct_pages: 0,
            bytes: 50_000_000,
            seconds: 0.0,
        };
        let table = markdown(&measurements, Some(&floor));
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| plain relay | 1000.00 MB | 1.0000 | 20.000 | 3.00 s (2.00-4.00) | 1.000 | 0.50 | 2.00 | 50 MB | 50 MB |",
                "| all | 100.00 MB | 0.1000 | 2.000 | 4.50 s (3.00-6.00) | 1.500 | 0.50 | 2.00 | 50 MB | 50 MB |",
            ]
        );
        assert_eq!(
            savings(&measurements).lines().last(),
            Some("| all | 900.00 | 900.00 | 900.00 |")
        );
    }
}
