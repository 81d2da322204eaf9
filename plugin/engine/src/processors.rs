//! How much time this host's processors have left, as the kernel counts it.
//!
//! Must not: know what that is used for.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The kernel's count for all processors together is the first line of it.
const COUNTS: &str = "/proc/stat";

/// What was idle since it was asked last.
#[derive(Debug)]
pub(crate) struct Processors {
    file: Option<File>,
    before: Option<Counts>,
}

/// Clock ticks since the host started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counts {
    idle: u64,
    all: u64,
}

impl Processors {
    /// Of which nothing can be told.
    pub(crate) fn unknown() -> Processors {
        Processors {
            file: None,
            before: None,
        }
    }

    pub(crate) fn of_this_host() -> Processors {
        let mut processors = Processors {
            file: File::open(COUNTS).ok(),
            before: None,
        };
        processors.before = processors.read();
        processors
    }

    /// The share of all processors' time that nobody used since the last call, in percent; `None`
    /// where that cannot be told.
    pub(crate) fn spare_percent(&mut self) -> Option<u64> {
        let now = self.read()?;
        let before = self.before.replace(now)?;
        let all = now.all.checked_sub(before.all).filter(|all| *all > 0)?;
        Some(now.idle.saturating_sub(before.idle) * 100 / all)
    }

    fn read(&self) -> Option<Counts> {
        let mut line = [0; 256];
        let length = self.file.as_ref()?.read_at(&mut line, 0).ok()?;
        counts(line.get(..length)?)
    }
}

/// `cpu`, then user, nice, system, idle, iowait, irq, softirq, steal; what comes after is in these.
fn counts(line: &[u8]) -> Option<Counts> {
    let line = line.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .take(8)
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    Some(Counts {
        idle: ticks.get(3)? + ticks.get(4)?,
        all: ticks.iter().sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let line = b"cpu  10 1 20 300 4 2 3 5 7 8\ncpu0 1 2 3\n";
        let expected = Counts {
            idle: 304,
            all: 345,
        };
        assert_eq!(counts(line), Some(expected));
        for wrong in [&b"cpu0 1 2 3 4 5"[..], b"cpu  1 2", b"cpu  x", b""] {
            assert_eq!(counts(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn no_share_is_more_than_all() {
        assert_eq!(Processors::unknown().spare_percent(), None);
        let mut processors = Processors::of_this_host();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let spare = processors.spare_percent().expect("this is Linux");
        assert!(spare <= 100, "{spare}");
    }
}
