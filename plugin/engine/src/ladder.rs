//! Which rung of compression suits the link and the processor right now, and what else is
//! worth its time.
//!
//! The writer of a session and the workers that feed it tell where their time goes. A writer
//! that mostly waits for the link could do with fewer bytes: one rung up. A link that waits for
//! compression could do with less of it: one rung down. If both wait for QEMU nothing is gained
//! either way, and fewer bytes are kinder to everybody else: no change.
//!
//! Must not: compress, or read a clock; times are given.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use vmgang_dedup::PAGE_BYTES;

use crate::compression::Rung;

/// A decision is made about so much time at once.
const WINDOW: Duration = Duration::from_millis(100);
/// One wait counts for no more than this: a gang that is held writes nothing for long.
const WAIT_MAX: Duration = Duration::from_millis(20);
/// The link is the bottleneck when the writer waits for it for more than this, in percent.
const LINK_BOUND: u64 = 60;
/// The strongest compression is for links that are slower still: changing between the two
/// streams costs all that the one before remembers, so it is done once.
const LINK_SLOW: u64 = 85;
/// And surely not when it is less than this.
const LINK_FREE: u64 = 30;
/// Sealing is the bottleneck when it takes more than this.
const WORK_BOUND: u64 = 50;
/// So are the workers when they are busy for more than this.
const WORKERS_BOUND: u64 = 70;
/// Frames are cheap: level 1 is given up only for a link that has little to do, and quick ones
/// only for one that has nothing to do while the workers do nothing but build.
const LINK_EASY: u64 = 15;
const WORK_ONLY: u64 = 85;
const LINK_IDLE: u64 = 5;
/// A rung that was left for being too slow is not tried again for so long at first.
const AVOID_FIRST: Duration = Duration::from_millis(200);
/// And at most.
const AVOID_MAX: Duration = Duration::from_secs(8);

/// Shorter payloads tell nothing about pages.
const SHRUNK_BYTES_MIN: usize = 16 * 1024;
/// So short a delta is always better than a page.
const DELTA_MIN: usize = 64;

/// The rung of a session.
#[derive(Debug)]
pub(crate) struct Ladder {
    rung: AtomicU8,
    /// Rungs are chosen, not given.
    adaptive: bool,
    /// The writer mostly waits for the link.
    link_bound: AtomicBool,
    /// What is left of payloads after compression, lately.
    shrunk_permille: AtomicU32,
    workers: NonZeroU32,
    /// How long they have worked for this session, in microseconds.
    worked_us: AtomicU64,
}

/// What another way to send a page has to beat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Worth {
    /// A longer delta is no better than the page in full, compressed.
    pub delta_max: usize,
    pub scarce: bool,
}

impl Ladder {
    /// `workers`: the threads that build.
    pub(crate) fn new(rung: Rung, adaptive: bool, workers: usize) -> Ladder {
        Ladder {
            rung: AtomicU8::new(rung as u8),
            adaptive,
            link_bound: AtomicBool::new(true),
            shrunk_permille: AtomicU32::new(500),
            workers: u32::try_from(workers)
                .ok()
                .and_then(NonZeroU32::new)
                .unwrap_or(NonZeroU32::MIN),
            worked_us: AtomicU64::new(0),
        }
    }

    pub(crate) fn worth(&self) -> Worth {
        let page = PAGE_BYTES * self.shrunk_permille.load(Relaxed) as usize / 1000;
        Worth {
            // It is compressed itself, but hardly shrinks.
            delta_max: (page * 3 / 4).clamp(DELTA_MIN, PAGE_BYTES / 2),
            scarce: self.scarce(),
        }
    }

    /// Whether the link is not what the session waits for, so that what saves little is to be
    /// left out. Techniques that were chosen one by one are used, whatever they cost.
    pub(crate) fn scarce(&self) -> bool {
        self.adaptive && !self.link_bound.load(Relaxed)
    }

    /// A payload was compressed, or not. For the writer alone.
    pub(crate) fn shrunk(&self, raw_len: usize, len: usize) {
        if raw_len >= SHRUNK_BYTES_MIN {
            let sample = (len.min(raw_len) * 1000 / raw_len) as u32;
            let before = self.shrunk_permille.load(Relaxed);
            self.shrunk_permille
                .store((before * 7 + sample) / 8, Relaxed);
        }
    }

    pub(crate) fn rung(&self) -> Rung {
        let index = usize::from(self.rung.load(Relaxed));
        Rung::ALL.get(index).copied().unwrap_or(Rung::None)
    }

    /// A worker has worked for so long.
    pub(crate) fn worked(&self, worked: Duration) {
        self.worked_us.fetch_add(micros(worked), Relaxed);
    }
}

/// The writer's view, which decides.
#[derive(Debug)]
pub(crate) struct LinkWatch {
    lowest: Rung,
    highest: Rung,
    /// The one that compresses in the session's stream.
    stream: Rung,
    /// Percent of the time that was spent on the link, smoothed.
    link_lately: Option<u64>,
    /// All of the time, however long a wait was.
    elapsed: Duration,
    waited: Duration,
    sealed: Duration,
    written: Duration,
    /// By rung: not to be climbed to for so long, and how long the last ban was.
    avoid: [(Duration, Duration); Rung::ALL.len()],
}

impl LinkWatch {
    /// Moves between two rungs; the same twice: not at all.
    pub(crate) fn new(lowest: Rung, highest: Rung) -> LinkWatch {
        LinkWatch {
            lowest,
            highest,
            stream: Rung::Long.min(highest),
            link_lately: None,
            elapsed: Duration::ZERO,
            waited: Duration::ZERO,
            sealed: Duration::ZERO,
            written: Duration::ZERO,
            avoid: [(Duration::ZERO, Duration::ZERO); Rung::ALL.len()],
        }
    }

    /// Takes note of one frame: the wait for it, its sealing, and its way into the socket.
    pub(crate) fn frame(
        &mut self,
        ladder: &Ladder,
        waited: Duration,
        sealed: Duration,
        written: Duration,
    ) {
        self.elapsed += waited + sealed + written;
        self.waited += waited.min(WAIT_MAX);
        self.sealed += sealed;
        self.written += written;
        let total = self.waited + self.sealed + self.written;
        if total < WINDOW {
            return;
        }
        for (ban, _) in &mut self.avoid {
            *ban = ban.saturating_sub(total);
        }
        let percent = |part: Duration| micros(part) * 100 / micros(total).max(1);
        let (link, sealing) = (percent(self.written), percent(self.sealed));
        let worked = ladder.worked_us.swap(0, Relaxed);
        let offered = micros(self.elapsed) * u64::from(ladder.workers.get());
        let building = worked * 100 / offered.max(1);
        (self.elapsed, self.waited) = Default::default();
        (self.sealed, self.written) = Default::default();
        if link > LINK_BOUND {
            ladder.link_bound.store(true, Relaxed);
        } else if link < LINK_FREE {
            ladder.link_bound.store(false, Relaxed);
        }

        // Stretches of a stream that take no wire at all come and go.
        let before = self.link_lately.unwrap_or(link);
        let lately = (before * 3 + link) / 4;
        self.link_lately = Some(lately);
        let rung = ladder.rung();
        let index = rung as usize;
        let climb = if rung < Rung::Frame {
            lately > LINK_FREE
        } else {
            link > LINK_BOUND
        };
        if climb && rung < self.highest {
            let up = match rung {
                Rung::Frame => self.stream,
                _ => Rung::ALL[index + 1],
            };
            let enough = up != Rung::Hard || self.stream == up || link > LINK_SLOW;
            if enough && self.avoid[up as usize].0.is_zero() {
                if up.streams() {
                    self.stream = up;
                }
                ladder.rung.store(up as u8, Relaxed);
            }
        } else if link < LINK_FREE && rung > self.lowest {
            let given_up = match rung {
                Rung::None => false,
                Rung::Quick => building > WORK_ONLY && lately < LINK_IDLE,
                Rung::Frame => building > WORKERS_BOUND && lately < LINK_EASY,
                Rung::Long | Rung::Hard => sealing > WORK_BOUND,
            };
            if given_up {
                let (ban, last) = &mut self.avoid[index];
                *last = (*last * 2).clamp(AVOID_FIRST, AVOID_MAX);
                *ban = *last;
                let down = match rung {
                    // The stream goes on where it was when it is climbed to again.
                    Rung::Hard if self.lowest < Rung::Long => Rung::Frame,
                    _ => Rung::ALL[index - 1],
                };
                ladder.rung.store(down as u8, Relaxed);
            }
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn run(watch: &mut LinkWatch, ladder: &Ladder, wait: u32, seal: u32, write: u32) -> Rung {
        for _ in 0..100 {
            watch.frame(ladder, MS * wait, MS * seal, MS * write);
        }
        ladder.rung()
    }

    #[test]
    fn a_slow_link_gets_the_strongest_and_a_slow_processor_the_lightest() {
        let ladder = Ladder::new(Rung::Long, true, 2);
        let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
        assert_eq!(run(&mut watch, &ladder, 0, 1, 9), Rung::Hard);
        assert!(!ladder.scarce());
        // Sealing takes all the time: back to frames, which are built elsewhere.
        assert_eq!(run(&mut watch, &ladder, 1, 8, 1), Rung::Frame);
        // Nobody says that building is slow: the link waits for QEMU.
        assert_eq!(run(&mut watch, &ladder, 9, 0, 1), Rung::Frame);
        for _ in 0..100 {
            // One of two workers.
            ladder.worked(MS * 10);
            watch.frame(&ladder, MS * 9, Duration::ZERO, MS);
        }
        assert_eq!(ladder.rung(), Rung::Frame);
        for _ in 0..100 {
            ladder.worked(MS * 16);
            watch.frame(&ladder, MS * 9, Duration::ZERO, MS);
        }
        assert_eq!(ladder.rung(), Rung::Quick);
        for _ in 0..100 {
            ladder.worked(MS * 38);
            watch.frame(&ladder, MS * 19, Duration::ZERO, MS / 2);
        }
        assert_eq!(ladder.rung(), Rung::None);
        assert!(ladder.scarce());
    }

    #[test]
    fn techniques_that_were_chosen_are_used() {
        let ladder = Ladder::new(Rung::None, false, 1);
        let mut watch = LinkWatch::new(Rung::None, Rung::None);
        run(&mut watch, &ladder, 9, 0, 1);
        assert!(!ladder.scarce());
    }

    #[test]
    fn a_delta_has_to_beat_what_is_left_of_a_page() {
        let ladder = Ladder::new(Rung::Long, true, 1);
        let after = |raw_len, len| {
            (0..100).for_each(|_| ladder.shrunk(raw_len, len));
            ladder.worth().delta_max
        };
        assert_eq!(after(100_000, 100_000), 2048);
        assert_eq!(after(100_000, 20_000), 4096 / 5 * 3 / 4);
        assert_eq!(after(1000, 1000), 4096 / 5 * 3 / 4, "too short to tell");
        assert_eq!(after(100_000, 100), 64);
    }

    #[test]
    fn a_rung_that_was_too_slow_is_left_alone_for_a_while() {
        let ladder = Ladder::new(Rung::Long, true, 1);
        let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
        let window = |watch: &mut LinkWatch, seal, write| {
            watch.frame(&ladder, Duration::ZERO, MS * seal, MS * write);
            ladder.rung()
        };
        assert_eq!(window(&mut watch, 100, 0), Rung::Frame);
        let mut windows = 0;
        while window(&mut watch, 0, 100) == Rung::Frame {
            windows += 1;
        }
        assert_eq!(windows, 1, "200 ms");
        assert_eq!(window(&mut watch, 100, 0), Rung::Frame);
        let mut windows = 0;
        while window(&mut watch, 0, 100) == Rung::Frame {
            windows += 1;
        }
        assert_eq!(windows, 3, "twice that");
    }

    #[test]
    fn a_fixed_rung_stays() {
        let ladder = Ladder::new(Rung::Frame, false, 1);
        let mut watch = LinkWatch::new(Rung::Frame, Rung::Frame);
        assert_eq!(run(&mut watch, &ladder, 0, 1, 9), Rung::Frame);
        assert_eq!(run(&mut watch, &ladder, 0, 9, 1), Rung::Frame);
    }
}
