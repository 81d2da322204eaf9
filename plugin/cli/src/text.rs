//! Numbers, tables and sentences as people read them at 80 columns: sizes, durations, aligned columns, bars.
//! Must not know what any of them is about.

use std::borrow::Cow;

use crate::paint;
use console::{Alignment, Term, measure_text_width, pad_str, truncate_str};

/// 1536 becomes "1.5 KiB".
pub fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// 1234 becomes "1.2 s", 300 "300 ms".
pub fn milliseconds(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..120_000 => format!("{:.1} s", ms as f64 / 1000.0),
        _ => format!("{} min {:02} s", ms / 60_000, ms / 1000 % 60),
    }
}

/// 3 significant digits at most, and never wider than 10 columns: "118 MiB/s".
pub fn rate(bytes_per_s: u64) -> String {
    const UNITS: [&str; 5] = ["B/s", "KiB/s", "MiB/s", "GiB/s", "TiB/s"];
    let mut number = bytes_per_s as f64;
    let mut unit = 0;
    while number >= 999.5 && unit + 1 < UNITS.len() {
        number /= 1024.0;
        unit += 1;
    }
    match number {
        _ if unit == 0 => format!("{number:.0} {}", UNITS[unit]),
        0.0..9.995 => format!("{number:.2} {}", UNITS[unit]),
        9.995..99.95 => format!("{number:.1} {}", UNITS[unit]),
        _ => format!("{number:.0} {}", UNITS[unit]),
    }
}

/// A time that is only estimated, in 6 columns at most: "4 s", "12 min", "3 h".
pub fn about(ms: u64) -> String {
    match ms.div_ceil(1000) {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds @ 100..6000 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{} h", (seconds / 3600).min(9999)),
    }
}

/// How much of `whole` a part is, in percent; nothing of nothing is 0.
pub fn percent(part: u64, whole: u64) -> u64 {
    let percent = u128::from(part) * 100;
    let percent = percent.checked_div(u128::from(whole)).unwrap_or(0);
    u64::try_from(percent).unwrap_or(u64::MAX)
}

/// A bar of at most `columns`: what `part` is of `whole`. What is there at all is seen.
pub fn bar(part: u64, whole: u64, columns: u64) -> String {
    let full = u128::from(part.min(whole)) * u128::from(columns);
    let full = full.checked_div(u128::from(whole)).unwrap_or(0);
    "=".repeat(full.max(u128::from(part > 0)) as usize)
}

/// What others have named, without what a terminal would obey.
pub fn plain(name: &str) -> String {
    let shown = |letter: char| if letter.is_control() { '?' } else { letter };
    name.chars().map(shown).collect()
}

/// The host that a libvirt URI leads to, which is what differs between them.
pub fn host(uri: &str) -> &str {
    let behind = uri.split_once("://").map_or(uri, |(_, behind)| behind);
    let host = behind.split(['/', '?']).next().unwrap_or_default();
    host.rsplit_once('@').map_or(host, |(_, host)| host)
}

/// Exactly so many columns; what does not fit is cut, and seen to be.
pub fn cell(text: &str, columns: usize) -> String {
    let cut = truncate_str(text, columns, "~");
    pad_str(&cut, columns, Alignment::Left, None).into_owned()
}

/// Columns of the terminal that standard output is; `None` if it is none.
pub fn columns() -> Option<usize> {
    let size = Term::stdout().size_checked();
    size.map(|(_, columns)| usize::from(columns).max(40))
}

/// Columns as wide as their widest cell, no trailing blanks. On a terminal it fits: the widest columns
/// are cut.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    table_within(columns(), header, rows)
}

/// What parts the columns of a table.
const GAP: usize = 2;
/// A column of words is not cut further.
const COLUMN_MIN: usize = 8;

fn table_within(columns: Option<usize>, header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| measure_text_width(cell)).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(measure_text_width(cell));
        }
    }
    while let Some(columns) = columns
        && widths.iter().map(|width| width + GAP).sum::<usize>() > columns + GAP
        && let Some(widest) = widths.iter_mut().max()
        && *widest > COLUMN_MIN
    {
        *widest -= 1;
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut row = String::new();
        for (text, width) in cells.zip(&widths) {
            row.push_str(&cell(text, *width));
            row.push_str(&" ".repeat(GAP));
        }
        text.push_str(row.trim_end());
        text.push('\n');
    };
    line(&mut header.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// Columns that people's terminals have at least.
const COLUMNS: usize = 80;

/// What went wrong, on standard error: after the program's name, in lines that fit a terminal.
pub fn complaint(sentence: &str) -> String {
    const NAME: &str = "vmgang:";
    let name = paint::complaint(NAME);
    match Term::stderr().features().is_attended() {
        true => paragraph(&name, NAME.len() + 1, sentence)
            .trim_end()
            .to_owned(),
        false => format!("{name} {sentence}"),
    }
}

/// A sentence as it is, or in lines that fit if standard output is a terminal.
pub fn sentence(text: &str) -> Cow<'_, str> {
    match columns() {
        Some(_) => paragraph("", 0, text).trim_end().to_owned().into(),
        None => text.into(),
    }
}

/// A word in front, and the text beside it in lines that begin at column `indent`. A word that is too long
/// for a line has one of its own.
pub fn paragraph(front: &str, indent: usize, text: &str) -> String {
    let mut lines = String::new();
    let mut line = pad_str(front, indent, Alignment::Left, None).into_owned();
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && measure_text_width(&line) + 1 + measure_text_width(word) > COLUMNS {
            lines.push_str(&line);
            lines.push('\n');
            line = " ".repeat(indent);
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    lines.push_str(line.trim_end());
    lines.push('\n');
    lines
}

/// Seconds since 1970 as UTC, to the minute.
pub fn time(unix_s: u64) -> String {
    format!("{} UTC", date(unix_s))
}

/// The same where UTC is said elsewhere.
pub fn date(unix_s: u64) -> String {
    let time = i64::try_from(unix_s)
        .ok()
        .and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok());
    match time {
        Some(time) => format!("{} {:02}:{:02}", time.date(), time.hour(), time.minute()),
        None => "(unknown time)".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(milliseconds(999), "999 ms");
        assert_eq!(milliseconds(1234), "1.2 s");
        assert_eq!(milliseconds(125_000), "2 min 05 s");
        assert_eq!(time(0), "1970-01-01 00:00 UTC");
        assert_eq!(time(951_827_696), "2000-02-29 12:34 UTC");
        assert_eq!(time(1_767_225_599), "2025-12-31 23:59 UTC");
    }

    #[test]
    fn paragraphs_are_wrapped_beside_their_first_word() {
        assert_eq!(paragraph("ok", 4, "a b"), "ok  a b\n");
        let long = "x".repeat(90);
        assert_eq!(paragraph("ok", 4, &long), format!("ok  {long}\n"));
        let wrapped = paragraph("ok", 4, &"word ".repeat(20));
        let lines: Vec<&str> = wrapped.lines().collect();
        assert_eq!(lines.len(), 2, "{wrapped}");
        assert!(lines[0].chars().count() <= 80 && lines[1].starts_with("    word"));
    }

    #[test]
    fn rates_and_estimated_times_are_short() {
        let rates = [999, 1000, 10_239, 150 << 20, 1023 << 20, u64::MAX].map(rate);
        let short = [
            "999 B/s",
            "0.98 KiB/s",
            "10.0 KiB/s",
            "150 MiB/s",
            "1.00 GiB/s",
            "16777216 TiB/s",
        ];
        assert_eq!(rates, short);
        assert_eq!(
            [1, 99_000, 99_001, 7_300_000].map(about),
            ["1 s", "99 s", "2 min", "2 h"]
        );
        assert_eq!(
            [percent(1, 3), percent(7, 0), percent(u64::MAX, 1)],
            [33, 0, u64::MAX]
        );
    }

    #[test]
    fn bars_show_what_is_there() {
        let bars = [
            bar(0, 10, 10),
            bar(1, 1000, 10),
            bar(5, 10, 10),
            bar(11, 10, 10),
        ];
        assert_eq!(bars, ["", "=", "=====", "=========="]);
    }

    #[test]
    fn a_table_on_a_terminal_fits_it() {
        let rows = [vec!["x".repeat(60), "y".repeat(50), "short".to_owned()]];
        let header = ["A", "B", "C"];
        let fits = table_within(Some(80), &header, &rows);
        assert!(
            fits.lines().all(|line| line.chars().count() <= 80),
            "{fits}"
        );
        assert!(
            fits.contains("x~") && fits.contains("y~") && fits.contains("short"),
            "{fits}"
        );
        assert!(table_within(None, &header, &rows).contains(&"x".repeat(60)));
        // Colours have no width.
        let red = console::style("a").red().force_styling(true).to_string();
        let coloured = table_within(Some(80), &["A", "B"], &[vec![red.clone(), "b".into()]]);
        assert_eq!(coloured, format!("A  B\n{red}  b\n"));
    }

    #[test]
    fn hosts_of_uris() {
        let uris = [
            "qemu+tls://b/system",
            "qemu+ssh://root@b.c:22/system?x",
            "b",
        ];
        assert_eq!(uris.map(host), ["b", "b.c:22", "b"]);
    }

    #[test]
    fn names_cannot_command_a_terminal() {
        assert_eq!(plain("a\u{1b}[2Jb\u{9b}c"), "a?[2Jb?c");
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["web".to_owned(), "2".to_owned()],
            vec!["a".into(), String::new()],
        ];
        assert_eq!(table(&["GANG", "N"], &rows), "GANG  N\nweb   2\na\n");
    }
}
