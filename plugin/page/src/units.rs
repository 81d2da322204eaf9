//! Numbers as the page shows them, and steps for axes. Knows nothing of jobs.

/// 3 digits and a unit: "151 MiB".
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut number = bytes as f64;
    let mut unit = 0;
    while number >= 999.5 && unit + 1 < UNITS.len() {
        number /= 1024.0;
        unit += 1;
    }
    let digits = match number {
        _ if unit == 0 => 0,
        0.0..9.995 => 2,
        9.995..99.95 => 1,
        _ => 0,
    };
    format!("{number:.digits$}\u{a0}{}", UNITS[unit])
}

pub(crate) fn time(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms}\u{a0}ms"),
        1000..120_000 => format!("{:.1}\u{a0}s", ms as f64 / 1000.0),
        _ => format!("{}\u{a0}min {:02}\u{a0}s", ms / 60_000, ms / 1000 % 60),
    }
}

pub(crate) fn percent_of(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 * 100.0 / whole as f64
}

/// Times to write at an axis that ends at `end_ms`: five at most, at round numbers.
pub(crate) fn ticks(end_ms: u64) -> Vec<u64> {
    let steps = [1, 2, 5].into_iter().cycle();
    let powers = (0..12).flat_map(|power| [10u64.pow(power); 3]);
    let step = steps
        .zip(powers)
        .map(|(step, power)| step * power)
        .find(|step| end_ms / step <= 5)
        .unwrap_or(end_ms)
        .max(1);
    (0..=end_ms / step).map(|tick| tick * step).collect()
}

/// What an axis is labelled with: without digits that say nothing.
pub(crate) fn tick(ms: u64) -> String {
    match ms {
        0 => "0".into(),
        ms if ms % 1000 == 0 => format!("{}\u{a0}s", ms / 1000),
        ms if ms < 1000 => format!("{ms}\u{a0}ms"),
        ms => format!("{:.1}\u{a0}s", ms as f64 / 1000.0),
    }
}

/// A round number of bytes, at least this many: the top of an axis.
pub(crate) fn top(bytes: u64) -> u64 {
    let mut unit = 1u64;
    while bytes / unit >= 1024 && unit < 1 << 50 {
        unit *= 1024;
    }
    let steps = [1, 2, 4, 5, 10, 20, 40, 50, 100, 200, 400, 500, 1024];
    let fits = steps
        .into_iter()
        .map(|step| step * unit)
        .find(|step| *step >= bytes);
    fits.unwrap_or(bytes).max(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_few_and_round_numbers() {
        assert_eq!(ticks(5300), [0, 1000, 2000, 3000, 4000, 5000]);
        assert_eq!(ticks(900), [0, 200, 400, 600, 800]);
        assert_eq!(ticks(1), [0, 1]);
        for end in [1, 7, 99, 1234, 600_000, u64::MAX / 2] {
            assert!(ticks(end).len() <= 6, "{end}");
        }
        assert_eq!([top(0), top(3 << 20), top(1 << 40)], [2, 4 << 20, 1 << 40]);
        assert_eq!(
            [tick(0), tick(2000), tick(250)],
            ["0", "2\u{a0}s", "250\u{a0}ms"]
        );
    }
}
