//! Medians of several moves, as a Markdown table.

use std::fmt::Write;

use crate::measure::Move;

/// Median; of an even number, the mean of the middle two.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => (values[len / 2 - 1] + values[len / 2]) / 2.0,
    }
}

/// One row a contender, in order of first appearance; ratios are to the first row.
pub fn markdown(moves: &[Move]) -> String {
    let mut titles: Vec<&str> = Vec::new();
    for moved in moves {
        if !titles.contains(&moved.contender.as_str()) {
            titles.push(&moved.contender);
        }
    }
    let of = |title: &str, figure: &dyn Fn(&Move) -> f64| -> Vec<f64> {
        let matching = moves.iter().filter(|moved| moved.contender == title);
        matching.map(figure).collect()
    };
    let mut out = String::from(
        "| | total time | | bytes on the link | | mean downtime | longest downtime |\n\
         |---|--:|--:|--:|--:|--:|--:|\n",
    );
    let base = titles.first().copied().unwrap_or_default();
    let base_seconds = median(of(base, &|m| m.seconds));
    let base_bytes = median(of(base, &|m| m.link_bytes as f64));
    for title in titles {
        let seconds = of(title, &|m| m.seconds);
        let bytes = median(of(title, &|m| m.link_bytes as f64));
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "| {title} | {:.1} s{} | {:.2} | {:.0} MB | {:.3} | {:.0} ms | {:.0} ms |",
            median(seconds.clone()),
            spread(&seconds),
            median(seconds) / base_seconds,
            bytes / 1e6,
            bytes / base_bytes,
            median(of(title, &Move::downtime_mean_ms)),
            median(of(title, &|m| m.downtime_max_ms() as f64)),
        );
    }
    out
}

/// The range of several values, in brackets; nothing of one.
pub fn spread(values: &[f64]) -> String {
    if values.len() < 2 {
        return String::new();
    }
    let min = values.iter().copied().fold(f64::INFINITY, f64::min);
    let max = values.iter().copied().fold(0.0, f64::max);
    format!(" ({min:.1}-{max:.1})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contender::Contender;
    use crate::suite::testing::moved;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn rows_keep_their_order_and_ratios_are_to_the_first() {
        let mut slow = moved(Contender::Vmgang, 10.0, 1000, 10);
        slow.downtime_ms = vec![10, 30];
        let fast = moved(Contender::StockParallel, 5.0, 100, 10);
        let table = markdown(&[slow, fast]);
        let rows: Vec<_> = table.lines().skip(2).collect();
        assert!(rows[0].starts_with("| vmgang | 10.0 s | 1.00 |"), "{table}");
        assert!(
            rows[1].contains("| 0.50 |") && rows[1].contains("| 0.100 |"),
            "{table}"
        );
        assert!(rows[0].contains("| 20 ms | 30 ms |"), "{table}");
    }
}
