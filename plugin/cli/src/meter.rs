//! How fast a job goes, and when it is expected to be through: reckoned from snapshots of the last seconds.
//! Pure: the time is the snapshots'. Where nothing can be expected it says so, and never guesses.

use std::collections::VecDeque;

use crate::snapshot::{Member, Snapshot};

/// What is looked back at.
const WINDOW_MS: u64 = 5000;
/// Less says nothing about a rate.
const STRETCH_MS: u64 = 900;

/// Where a member, or all of them, stood.
#[derive(Debug, Clone, Copy)]
struct Point {
    at_ms: u64,
    wire_bytes: u64,
    remaining_bytes: u64,
    /// A new pass has other pages to send.
    pass: u64,
}

/// How one of them goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// Over the wire.
    pub bytes_per_s: Option<u64>,
    /// Until every page of this pass was sent.
    pub left_ms: Option<u64>,
}

#[derive(Debug, Default)]
struct Track(VecDeque<Point>);

impl Track {
    fn push(&mut self, point: Point) {
        if self.0.back().is_some_and(|last| last.pass != point.pass) {
            // The rate goes on; what remains does not.
            for old in &mut self.0 {
                (old.remaining_bytes, old.pass) = (0, point.pass);
            }
        }
        self.0.push_back(point);
        while self.0.len() > 2 && point.at_ms.saturating_sub(self.0[1].at_ms) >= WINDOW_MS {
            self.0.pop_front();
        }
    }

    fn pace(&self) -> Pace {
        let (Some(first), Some(last)) = (self.0.front(), self.0.back()) else {
            return Pace::default();
        };
        let per_s =
            |bytes: u64, ms: u64| (ms >= STRETCH_MS).then(|| bytes.saturating_mul(1000) / ms);
        let sent = last.wire_bytes.saturating_sub(first.wire_bytes);
        let bytes_per_s = per_s(sent, last.at_ms.saturating_sub(first.at_ms));
        // libvirt tells what remains once a second: from change to change.
        let known = |point: &&Point| point.remaining_bytes > last.remaining_bytes;
        let left_ms = self.0.iter().find(known).and_then(|from| {
            let done = from.remaining_bytes - last.remaining_bytes;
            let done_per_s = per_s(done, last.at_ms.saturating_sub(from.at_ms))?;
            last.remaining_bytes
                .saturating_mul(1000)
                .checked_div(done_per_s)
        });
        Pace {
            bytes_per_s,
            left_ms,
        }
    }
}

/// Watches one job.
#[derive(Debug, Default)]
pub struct Meter {
    gang: Track,
    members: Vec<Track>,
}

impl Meter {
    pub fn look(&mut self, snapshot: &Snapshot) {
        let at_ms = snapshot.elapsed_ms;
        self.members
            .resize_with(snapshot.members.len(), Track::default);
        for (track, member) in self.members.iter_mut().zip(&snapshot.members) {
            track.push(Point {
                at_ms,
                wire_bytes: member.wire_bytes,
                remaining_bytes: member.remaining_bytes,
                pass: member.iterations,
            });
        }
        self.gang.push(Point {
            at_ms,
            wire_bytes: snapshot.wire_bytes,
            remaining_bytes: 0,
            pass: 0,
        });
    }

    /// A member that is held, or is through, has nothing to wait for that could be reckoned.
    pub fn member(&self, at: usize, member: &Member) -> Pace {
        let pace = self.members.get(at).map_or(Pace::default(), Track::pace);
        match member.state.as_str() {
            "copying" if member.dirtied_per_s == 0 => pace,
            "copying" | "held" | "switching" => Pace {
                left_ms: None,
                ..pace
            },
            _ => Pace::default(),
        }
    }

    /// The gang is through when the slowest of those that copy is; not to be said while others wait for
    /// their turn, or one does not converge.
    pub fn gang(&self, snapshot: &Snapshot) -> Pace {
        let members = snapshot.members.iter().enumerate();
        let copying = members.filter(|(_, member)| {
            !matches!(member.state.as_str(), "held" | "switching" | "migrated")
        });
        let left: Option<Vec<u64>> = copying
            .map(|(at, member)| self.member(at, member).left_ms)
            .collect();
        Pace {
            bytes_per_s: self.gang.pace().bytes_per_s,
            left_ms: left.and_then(|left| left.into_iter().max()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(state: &str, remaining_bytes: u64, iterations: u64, wire_bytes: u64) -> Member {
        Member {
            state: state.into(),
            total_bytes: 10_000,
            remaining_bytes,
            iterations,
            wire_bytes,
            ..Member::default()
        }
    }

    fn at(elapsed_ms: u64, members: &[Member]) -> Snapshot {
        Snapshot {
            elapsed_ms,
            wire_bytes: members.iter().map(|member| member.wire_bytes).sum(),
            members: members.to_vec(),
            ..Snapshot::default()
        }
    }

    fn told<const N: usize>(snapshots: [Snapshot; N]) -> (Meter, Snapshot) {
        let mut meter = Meter::default();
        for snapshot in &snapshots {
            meter.look(snapshot);
        }
        (meter, snapshots.last().expect("one").clone())
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let fast = |ms: u64, wire| at(ms, &[member("copying", 0, 1, wire)]);
        let (meter, last) = told([fast(0, 0), fast(1000, 900_000), fast(6000, 905_000)]);
        assert_eq!(meter.gang(&last).bytes_per_s, Some(1000));
        let (meter, last) = told([fast(0, 0), fast(100, 900)]);
        assert_eq!(meter.gang(&last).bytes_per_s, None, "too short to tell");
    }

    #[test]
    fn the_gang_waits_for_its_slowest() {
        let both = |ms, a, b| {
            at(
                ms,
                &[member("copying", a, 1, 0), member("copying", b, 1, 0)],
            )
        };
        let (meter, last) = told([both(0, 9000, 9000), both(1000, 8000, 6000)]);
        assert_eq!(meter.member(0, &last.members[0]).left_ms, Some(8000));
        assert_eq!(meter.member(1, &last.members[1]).left_ms, Some(2000));
        assert_eq!(meter.gang(&last).left_ms, Some(8000));
    }

    #[test]
    fn nothing_is_expected_that_cannot_be_known() {
        let one = |ms, state: &str, left, pass| at(ms, &[member(state, left, pass, 0)]);
        // A new pass begins with more than the last one had left.
        let (meter, last) = told([one(0, "copying", 500, 1), one(1000, "copying", 400, 2)]);
        assert_eq!(meter.gang(&last).left_ms, None);
        let (meter, last) = told([one(0, "copying", 500, 1), one(1000, "held", 400, 1)]);
        assert_eq!(meter.member(0, &last.members[0]).left_ms, None);
        assert_eq!(meter.gang(&last).left_ms, None);
        let waits = |ms, left| {
            at(
                ms,
                &[member("copying", left, 1, 0), member("waiting", 0, 0, 0)],
            )
        };
        let (meter, last) = told([waits(0, 500), waits(1000, 400)]);
        assert_eq!(meter.gang(&last).left_ms, None, "another has not begun");
    }
}
