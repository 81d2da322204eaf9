//! Numbers and tables as people read them: sizes, durations, aligned columns.

use std::fmt::Write;

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

/// Columns as wide as their widest cell, no trailing blanks.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut row = String::new();
        for (cell, width) in cells.zip(&widths) {
            let _ = write!(row, "{cell:width$}  ");
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

/// A word in front, and the text beside it in lines that begin at column `indent`. A word that is too long
/// for a line has one of its own.
pub fn paragraph(front: &str, indent: usize, text: &str) -> String {
    let mut lines = String::new();
    let mut line = format!("{front:indent$}");
    let mut empty = true;
    for word in text.split_whitespace() {
        if !empty && line.chars().count() + 1 + word.chars().count() > COLUMNS {
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
    let time = i64::try_from(unix_s)
        .ok()
        .and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok());
    match time {
        Some(time) => format!(
            "{} {:02}:{:02} UTC",
            time.date(),
            time.hour(),
            time.minute()
        ),
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
    fn columns_line_up() {
        let rows = [
            vec!["web".to_owned(), "2".to_owned()],
            vec!["a".into(), String::new()],
        ];
        assert_eq!(table(&["GANG", "N"], &rows), "GANG  N\nweb   2\na\n");
    }
}
