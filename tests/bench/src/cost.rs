//! What a move costs beside time and bytes: processor time of daemons and QEMU on both hosts, and
//! the daemons' memory.
//!
//! Everything is read from /proc, from outside of what is measured. What ends meanwhile (a QEMU that
//! was left, multifd's threads with it) counts as it was last seen, at most [`INTERVAL`] earlier.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use vmgang_lab::{Host, Lab};

/// How often the processes are looked at.
const INTERVAL: Duration = Duration::from_millis(200);
/// Clock ticks a second of /proc/PID/stat, on every Linux that runs this.
const TICKS: f64 = 100.0;

/// Seconds of one processor, of both hosts together, and memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    pub vmgangd_seconds: f64,
    pub libvirtd_seconds: f64,
    /// The emulated guests' own work included.
    pub qemu_seconds: f64,
    /// The daemon's own memory on the source and on the destination at its most, in bytes; guests'
    /// memory that it looks at is not its own.
    pub vmgangd_peak_bytes: [u64; 2],
}

/// Who is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Vmgangd,
    Libvirtd,
    Qemu,
}

impl Kind {
    fn of(command: &str) -> Option<Kind> {
        match command {
            "vmgangd" => Some(Kind::Vmgangd),
            "libvirtd" => Some(Kind::Libvirtd),
            name if name.starts_with("qemu-system") => Some(Kind::Qemu),
            _ => None,
        }
    }
}

/// A process as it was first and last seen.
#[derive(Debug, Clone, Copy)]
struct Seen {
    kind: Kind,
    host: usize,
    /// Clock ticks; of a process that came later, nothing.
    first: u64,
    last: u64,
    peak_bytes: u64,
}

/// Looks at the hosts' processes from its start to its finish.
#[derive(Debug)]
pub struct Meter {
    stop: Arc<AtomicBool>,
    looking: JoinHandle<Result<Cost>>,
}

impl Meter {
    /// Hosts a and b are source and destination.
    pub fn start(lab: &Lab) -> Result<Meter> {
        let hosts = [lab.host("a")?.clone(), lab.host("b")?.clone()];
        let stop = Arc::new(AtomicBool::new(false));
        let mut processes = HashMap::new();
        look(&hosts, &mut processes, true)?;
        let looking = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    std::thread::park_timeout(INTERVAL);
                    look(&hosts, &mut processes, false)?;
                }
                Ok(sum(&processes))
            }
        });
        Ok(Meter { stop, looking })
    }

    pub fn finish(self) -> Result<Cost> {
        self.stop.store(true, Ordering::Relaxed);
        self.looking.thread().unpark();
        self.looking
            .join()
            .map_err(|_| anyhow!("looking at processes panicked"))?
    }
}

/// `None`: a process that is of no interest.
type Processes = HashMap<u32, Option<Seen>>;

fn look(hosts: &[Host; 2], processes: &mut Processes, first: bool) -> Result<()> {
    for (place, host) in hosts.iter().enumerate() {
        for id in host.processes()? {
            // One that has ended meanwhile has no files any more, here and below.
            let seen = processes.entry(id).or_insert_with(|| {
                let command = fs::read_to_string(format!("/proc/{id}/comm")).ok()?;
                let kind = Kind::of(command.trim())?;
                let first = match first {
                    true => ticks(&fs::read_to_string(format!("/proc/{id}/stat")).ok()?)?,
                    false => 0,
                };
                Some(Seen {
                    kind,
                    host: place,
                    first,
                    last: first,
                    peak_bytes: 0,
                })
            });
            let Some(seen) = seen else { continue };
            let stat = fs::read_to_string(format!("/proc/{id}/stat"));
            if let Some(now) = stat.ok().and_then(|text| ticks(&text)) {
                seen.last = seen.last.max(now);
            }
            if seen.kind == Kind::Vmgangd {
                let status = fs::read_to_string(format!("/proc/{id}/status"));
                let own = status.ok().and_then(|text| own_bytes(&text));
                seen.peak_bytes = seen.peak_bytes.max(own.unwrap_or(0));
            }
        }
    }
    Ok(())
}

fn sum(processes: &Processes) -> Cost {
    let mut cost = Cost::default();
    for seen in processes.values().flatten() {
        let seconds = seen.last.saturating_sub(seen.first) as f64 / TICKS;
        match seen.kind {
            Kind::Vmgangd => {
                cost.vmgangd_seconds += seconds;
                let peak = &mut cost.vmgangd_peak_bytes[seen.host];
                *peak = (*peak).max(seen.peak_bytes);
            }
            Kind::Libvirtd => cost.libvirtd_seconds += seconds,
            Kind::Qemu => cost.qemu_seconds += seconds,
        }
    }
    cost
}

/// User and system time in /proc/PID/stat, whose second field may hold anything but a last bracket.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Memory in /proc/PID/status that belongs to no file and to nobody else.
fn own_bytes(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let stat = "77 (a) b (c) S 1 77 77 0 -1 4194560 2000 0 0 0 120 34 5 6 20 0 1 0 9 9 9";
        assert_eq!(ticks(stat), Some(154));
        assert_eq!(ticks("77 (cut) S 1"), None);
        let status = "VmRSS:\t  900 kB\nRssAnon:\t    512 kB\nRssFile:\t 300 kB\n";
        assert_eq!(own_bytes(status), Some(512 << 10));
    }

    #[test]
    fn what_was_there_before_counts_from_then_on() {
        let seen = |kind, host, first, last, peak_bytes| {
            Some(Seen {
                kind,
                host,
                first,
                last,
                peak_bytes,
            })
        };
        let processes = HashMap::from([
            (1, seen(Kind::Vmgangd, 0, 100, 250, 7)),
            (2, seen(Kind::Vmgangd, 1, 0, 50, 9)),
            (3, seen(Kind::Qemu, 1, 0, 300, 0)),
            (4, seen(Kind::Qemu, 0, 1000, 1100, 0)),
            (5, None),
        ]);
        let cost = sum(&processes);
        assert_eq!((cost.vmgangd_seconds, cost.qemu_seconds), (2.0, 4.0));
        assert_eq!(cost.vmgangd_peak_bytes, [7, 9]);
    }
}
