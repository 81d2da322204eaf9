//! What was sent of a gang's streams and what each technique saved of them, as bars that are read at a
//! glance. For the result of a job and for an estimate. Must not reckon: the figures are the daemon's.

use std::collections::BTreeMap;

use crate::text;

/// Bytes by technique, as vmgangd names them.
pub type Saved = BTreeMap<String, i64>;

const BAR: u64 = 30;

/// In the order of the journey, with the words that people see.
const TECHNIQUES: [(&str, &str); 9] = [
    ("zero", "zero pages"),
    ("uniform", "uniform pages"),
    ("intra_vm", "from itself"),
    ("cross_vm", "from others"),
    ("staged", "prepared"),
    ("destination", "was there"),
    ("sub_page", "parts of pages"),
    ("delta", "differences"),
    ("compression", "compression"),
];

/// One line each for the streams, what saved anything, and the wire.
pub fn table(qemu_stream: u64, wire: u64, saved: &Saved) -> String {
    let row = |name: &str, bytes: u64| {
        vec![
            name.to_owned(),
            text::bytes(bytes),
            format!("{:>4}%", text::percent(bytes, qemu_stream)),
            text::bar(bytes, qemu_stream, BAR),
        ]
    };
    let mut rows = vec![row("streams", qemu_stream)];
    for (key, words) in TECHNIQUES {
        if let Some(bytes) = saved.get(key).filter(|bytes| **bytes > 0) {
            rows.push(row(&format!("- {words}"), bytes.unsigned_abs()));
        }
    }
    rows.push(row("over the wire", wire));
    let table = text::table(&["", "BYTES", "", ""], &rows);
    // Nobody needs to be told that these are bytes.
    table
        .split_once('\n')
        .map_or(String::new(), |(_, rows)| rows.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_saved_nothing_is_not_in_the_way() {
        let saved = Saved::from([
            ("cross_vm".to_owned(), 500),
            ("zero".to_owned(), 400),
            ("compression".to_owned(), -10),
            ("delta".to_owned(), 0),
        ]);
        let table = table(1000, 110, &saved);
        let words: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(words[0][..4], ["streams", "1000", "B", "100%"]);
        assert_eq!(words[1][..6], ["-", "zero", "pages", "400", "B", "40%"]);
        assert_eq!(words[2][6].len(), 15, "half of the bar: {table}");
        assert_eq!(words[3][..5], ["over", "the", "wire", "110", "B"]);
        assert_eq!(words.len(), 4, "{table}");
    }
}
