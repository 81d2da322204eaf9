//! Which rung of compression suits the link and the processor right now.
//!
//! The writer of a session and the channels that feed it tell where their time goes. A writer
//! that mostly waits for the link could do with fewer bytes: one rung up. A link that waits for
//! compression could do with less of it: one rung down. If both wait for QEMU nothing is gained
//! either way, and fewer bytes are kinder to everybody else: no change.
//!
//! Must not: compress, or read a clock; times are given.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::compression::Rung;

/// A decision is made about so much time at once.
const WINDOW: Duration = Duration::from_millis(100);
/// One wait counts for no more than this: a gang that is held writes nothing for long.
const WAIT_MAX: Duration = Duration::from_millis(20);
/// The link is the bottleneck when the writer waits for it for more than this, in percent.
const LINK_BOUND: u64 = 60;
/// And surely not when it is less than this.
const LINK_FREE: u64 = 30;
/// Sealing, or building, is the bottleneck when it takes more than this.
const WORK_BOUND: u64 = 50;
/// Quick frames are so cheap that they are given up only if building is all there is to do,
/// and the link has nothing to do.
const WORK_ONLY: u64 = 80;
const LINK_IDLE: u64 = 5;
/// A rung that was left for being too slow is not tried again for so long at first.
const AVOID_FIRST: Duration = Duration::from_millis(200);
/// And at most.
const AVOID_MAX: Duration = Duration::from_secs(8);

/// The rung of a session.
#[derive(Debug)]
pub(crate) struct Ladder {
    rung: AtomicU8,
    /// How long channels have worked on chunks, and how long they have waited for QEMU, in
    /// microseconds.
    channels_worked_us: AtomicU64,
    channels_waited_us: AtomicU64,
}

impl Ladder {
    pub(crate) fn new(rung: Rung) -> Ladder {
        Ladder {
            rung: AtomicU8::new(rung as u8),
            channels_worked_us: AtomicU64::new(0),
            channels_waited_us: AtomicU64::new(0),
        }
    }

    pub(crate) fn rung(&self) -> Rung {
        let index = usize::from(self.rung.load(Relaxed));
        Rung::ALL.get(index).copied().unwrap_or(Rung::None)
    }

    /// A channel has read and built a chunk.
    pub(crate) fn channel(&self, waited: Duration, worked: Duration) {
        self.channels_waited_us
            .fetch_add(micros(waited.min(WAIT_MAX)), Relaxed);
        self.channels_worked_us.fetch_add(micros(worked), Relaxed);
    }
}

/// The writer's view, which decides.
#[derive(Debug)]
pub(crate) struct LinkWatch {
    lowest: Rung,
    highest: Rung,
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
        let worked = ladder.channels_worked_us.swap(0, Relaxed);
        let starved = ladder.channels_waited_us.swap(0, Relaxed);
        let building = worked * 100 / (worked + starved).max(1);
        (self.waited, self.sealed, self.written) = Default::default();

        let rung = ladder.rung();
        let index = rung as usize;
        if link > LINK_BOUND && rung < self.highest {
            let up = index + 1;
            if self.avoid[up].0.is_zero() {
                ladder.rung.store(up as u8, Relaxed);
            }
        } else if link < LINK_FREE && rung > self.lowest {
            let slow = if rung.streams() { sealing } else { building };
            let given_up = rung > Rung::Quick || (slow > WORK_ONLY && link < LINK_IDLE);
            if slow > WORK_BOUND && given_up {
                let (ban, last) = &mut self.avoid[index];
                *last = (*last * 2).clamp(AVOID_FIRST, AVOID_MAX);
                *ban = *last;
                ladder.rung.store((index - 1) as u8, Relaxed);
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
        let ladder = Ladder::new(Rung::Long);
        let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
        assert_eq!(run(&mut watch, &ladder, 0, 1, 9), Rung::Hard);
        // Sealing takes all the time: back to frames, which are built elsewhere.
        assert_eq!(run(&mut watch, &ladder, 1, 8, 1), Rung::Frame);
        // Nobody says that building is slow: the link waits for QEMU.
        assert_eq!(run(&mut watch, &ladder, 9, 0, 1), Rung::Frame);
        for _ in 0..100 {
            ladder.channel(MS * 3, MS * 7);
            watch.frame(&ladder, MS * 9, Duration::ZERO, MS);
        }
        assert_eq!(ladder.rung(), Rung::Quick);
        for _ in 0..100 {
            ladder.channel(MS, MS * 9);
            watch.frame(&ladder, MS * 19, Duration::ZERO, MS / 2);
        }
        assert_eq!(ladder.rung(), Rung::None);
    }

    #[test]
    fn a_rung_that_was_too_slow_is_left_alone_for_a_while() {
        let ladder = Ladder::new(Rung::Long);
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
        let ladder = Ladder::new(Rung::Frame);
        let mut watch = LinkWatch::new(Rung::Frame, Rung::Frame);
        assert_eq!(run(&mut watch, &ladder, 0, 1, 9), Rung::Frame);
        assert_eq!(run(&mut watch, &ladder, 0, 9, 1), Rung::Frame);
    }
}
