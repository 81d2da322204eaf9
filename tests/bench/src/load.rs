//! What guests get done while they are moved, by their own count: requests that were answered, and
//! pages rewritten by guests without servers.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vmgang_lab::{Host, Lab, Report};

/// How long guests are watched before a move, and after it.
const CALM: Duration = Duration::from_secs(5);
/// The longest wait for a guest that runs to say so.
const FIRST_REPORT: Duration = Duration::from_secs(30);

/// Pieces of work a second, of all guests together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Load {
    pub before: f64,
    pub during: f64,
    pub after: f64,
}

impl Load {
    /// What is left of the work while the guests are moved.
    pub fn kept(&self) -> f64 {
        self.during / self.before
    }
}

/// What every guest had done at a time.
#[derive(Debug)]
struct Count {
    at: Instant,
    done: HashMap<String, u64>,
}

impl Count {
    fn take(hosts: &[&Host], guests: &[&str]) -> Result<Count> {
        let mut done = HashMap::new();
        let at = Instant::now();
        for guest in guests {
            let reports: Vec<Report> = hosts
                .iter()
                .map(|host| Ok(host.guest(guest).report()?))
                .collect::<Result<Vec<_>>>()?
                .into_iter()
                .flatten()
                .collect();
            let newest = reports.iter().max_by_key(|report| report.uptime_ms);
            let newest = newest.with_context(|| format!("guest {guest} has never reported"))?;
            done.insert((*guest).to_owned(), work(newest));
        }
        Ok(Count { at, done })
    }

    /// Since an earlier count, a second.
    fn rate_since(&self, earlier: &Count) -> f64 {
        let done: u64 = self
            .done
            .iter()
            .map(|(guest, now)| now.saturating_sub(earlier.done.get(guest).copied().unwrap_or(0)))
            .sum();
        done as f64 / (self.at - earlier.at).as_secs_f64()
    }
}

fn work(report: &Report) -> u64 {
    match report.role.is_empty() {
        true => report.dirtied,
        false => report.served,
    }
}

/// Watches guests over a move.
#[derive(Debug)]
pub struct Watch {
    calm: Count,
    start: Count,
}

impl Watch {
    /// Watches them for a while where they are.
    pub fn start(lab: &Lab, guests: &[&str]) -> Result<Watch> {
        let host = lab.host("a")?;
        // Those that have only just come back may not have reported here yet.
        for guest in guests {
            host.guest(guest).wait_for_report(FIRST_REPORT)?;
        }
        let calm = Count::take(&[host], guests)?;
        std::thread::sleep(CALM);
        Ok(Watch {
            calm,
            start: Count::take(&[host], guests)?,
        })
    }

    /// To be called as soon as they have moved; watches them for a while where they are then.
    pub fn finish(self, lab: &Lab, guests: &[&str]) -> Result<Load> {
        // One that has only just arrived may not have reported there yet.
        let both = [lab.host("a")?, lab.host("b")?];
        let end = Count::take(&both, guests)?;
        std::thread::sleep(CALM);
        let after = Count::take(&both, guests)?;
        Ok(Load {
            before: self.start.rate_since(&self.calm),
            during: end.rate_since(&self.start),
            after: after.rate_since(&end),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_all_guests_and_by_time() {
        let at = Instant::now();
        let count = |seconds, done: [u64; 2]| Count {
            at: at + Duration::from_secs(seconds),
            done: HashMap::from([("x".to_owned(), done[0]), ("y".to_owned(), done[1])]),
        };
        let rate = count(4, [120, 50]).rate_since(&count(0, [100, 10]));
        assert_eq!(rate, 15.0);
        let load = Load {
            before: 20.0,
            during: 15.0,
            after: 19.0,
        };
        assert_eq!(load.kept(), 0.75);
    }

    #[test]
    fn servers_count_requests_and_others_pages() {
        let mut report = Report {
            dirtied: 7,
            served: 9,
            ..Report::default()
        };
        assert_eq!(work(&report), 7);
        "redis".clone_into(&mut report.role);
        assert_eq!(work(&report), 9);
    }
}
