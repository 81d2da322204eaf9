//! What a guest says on its serial port, read back. Parsing only.

/// One report of a guest about its own memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub id: String,
    /// Complete checks of all managed memory since the guest started.
    pub pass: u64,
    /// Pages checked since the guest started.
    pub checked: u64,
    /// Pages found damaged.
    pub bad: u64,
    /// Pages rewritten.
    pub dirtied: u64,
    /// Pages the guest manages.
    pub pages: u64,
    /// Touches of pages that took 250 microseconds or more, and how long in all: not of guests with a
    /// role.
    pub slow: u64,
    pub slow_us: u64,
    /// The role of a Debian guest; empty for other guests, as the numbers down to the latencies
    /// are zero.
    pub role: String,
    /// Requests of the load that were answered since the guest started.
    pub served: u64,
    /// Requests that were answered since the report before this one.
    pub interval_served: u64,
    /// The time since the report before this one.
    pub interval_ms: u64,
    /// How long those requests took.
    pub latency_mean_us: u64,
    pub latency_max_us: u64,
    /// The longest time between two ticks of the guest's own clock, in milliseconds.
    pub gap_max_ms: u64,
    /// The age of the guest's init by the guest's own clock.
    pub uptime_ms: u64,
}

/// What one line of the serial port means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Report(Report),
    /// A damaged page, or a guest that could not do its work.
    Fault(String),
    /// The kernel talking.
    Other,
}

const MARK: &str = "vmgang-guest ";
/// Numbers in the report of every guest.
const FIELDS: usize = 7;
/// Numbers that a guest without a role adds.
const MEMORY_FIELDS: usize = 2;
/// Numbers that a guest with a role adds.
const ROLE_FIELDS: usize = 5;

impl Line {
    pub fn parse(line: &str) -> Line {
        let Some((_, rest)) = line.split_once(MARK) else {
            return if line.contains("Kernel panic") {
                Line::Fault(line.trim().to_owned())
            } else {
                Line::Other
            };
        };
        if rest.starts_with("BAD ") || rest.starts_with("error=") {
            return Line::Fault(rest.trim().to_owned());
        }
        let mut report = Report::default();
        let mut fields = 0;
        for word in rest.split_whitespace() {
            let Some((key, value)) = word.split_once('=') else {
                continue;
            };
            match key {
                "id" => report.id = value.to_owned(),
                "role" => report.role = value.to_owned(),
                _ => {}
            }
            let target = match key {
                "pass" => &mut report.pass,
                "checked" => &mut report.checked,
                "bad" => &mut report.bad,
                "dirtied" => &mut report.dirtied,
                "pages" => &mut report.pages,
                "slow" => &mut report.slow,
                "slow_us" => &mut report.slow_us,
                "served" => &mut report.served,
                "interval_served" => &mut report.interval_served,
                "interval_ms" => &mut report.interval_ms,
                "latency_mean_us" => &mut report.latency_mean_us,
                "latency_max_us" => &mut report.latency_max_us,
                "gap_max_ms" => &mut report.gap_max_ms,
                "uptime_ms" => &mut report.uptime_ms,
                _ => continue,
            };
            if let Ok(number) = value.parse() {
                *target = number;
                fields += 1;
            }
        }
        // A migration may cut a line in two; half a report is none.
        let due = match report.role.is_empty() {
            true => FIELDS + MEMORY_FIELDS,
            false => FIELDS + ROLE_FIELDS,
        };
        if fields == due {
            Line::Report(report)
        } else {
            Line::Other
        }
    }
}

/// The last complete report in a serial log, and every fault.
pub(crate) fn read_log(text: &str) -> (Option<Report>, Vec<String>) {
    // The last line may still be in the making.
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let (mut last, mut faults) = (None, Vec::new());
    for line in complete.lines() {
        match Line::parse(line) {
            Line::Report(report) => last = Some(report),
            Line::Fault(fault) => faults.push(fault),
            Line::Other => {}
        }
    }
    (last, faults)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "vmgang-guest id=g1 pass=3 checked=12345 bad=0 dirtied=678 pages=4000 \
                        slow=2 slow_us=900 gap_max_ms=12 uptime_ms=99000";

    #[test]
    fn reads_a_report() {
        let Line::Report(report) = Line::parse(GOOD) else {
            panic!("{GOOD}");
        };
        assert_eq!((report.id.as_str(), report.pass), ("g1", 3));
        assert_eq!((report.checked, report.dirtied), (12345, 678));
        assert_eq!((report.pages, report.uptime_ms), (4000, 99_000));
        assert_eq!((report.slow, report.slow_us), (2, 900));
    }

    #[test]
    fn reads_what_a_role_adds() {
        let line = GOOD.replace(
            " slow=2 slow_us=900 gap_max_ms",
            " role=redis served=900 interval_served=50 interval_ms=1004 latency_mean_us=1500 \
             latency_max_us=9000 gap_max_ms",
        );
        let Line::Report(report) = Line::parse(&line) else {
            panic!("{line}");
        };
        assert_eq!((report.role.as_str(), report.served), ("redis", 900));
        assert_eq!((report.interval_served, report.interval_ms), (50, 1004));
        assert_eq!(
            (report.latency_mean_us, report.latency_max_us),
            (1500, 9000)
        );
        assert_eq!(report.uptime_ms, 99_000);
        let cut = line.replace("interval_ms=1004 ", "");
        assert_eq!(Line::parse(&cut), Line::Other);
    }

    #[test]
    fn half_a_report_and_the_kernel_are_none() {
        for end in [0, 20, 60] {
            assert_eq!(Line::parse(&GOOD[..end]), Line::Other);
        }
        assert_eq!(Line::parse("[ 0.1] Linux version 6.1"), Line::Other);
    }

    #[test]
    fn damage_errors_and_panics_are_faults() {
        for line in [
            "vmgang-guest BAD id=g1 kind=same index=7 offset=9 generation=0 pass=1",
            "vmgang-guest error=fill: unknown kind",
            "[ 1.0] Kernel panic - not syncing: Attempted to kill init!",
        ] {
            assert!(matches!(Line::parse(line), Line::Fault(_)), "{line}");
        }
    }

    #[test]
    fn the_unfinished_last_line_is_left_alone() {
        let log = format!("{GOOD}\r\n{}", GOOD.replace("pass=3", "pass=4"));
        let (report, faults) = read_log(&log);
        assert_eq!(report.map(|report| report.pass), Some(3));
        assert!(faults.is_empty());
    }
}
