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
/// The first one about so much; each window after that is twice as long as the one before.
const WINDOW_FIRST: Duration = Duration::from_millis(25);
/// One wait counts for no more than this: a gang that is held writes nothing for long.
const WAIT_MAX: Duration = Duration::from_millis(20);
/// The link is the bottleneck when the writer waits for it for more than this, in percent.
const LINK_BOUND: u64 = 60;
/// The strongest compression is for links that are slower still. Changing between the two
/// streams costs all that the one before remembers: the choice is made when the stream begins, and
/// changed once at most.
const LINK_SLOW: u64 = 85;
/// And surely not when it is less than this.
const LINK_FREE: u64 = 30;
/// Sealing is the bottleneck when it takes more than this.
const WORK_BOUND: u64 = 50;
/// Frames are cheap, and bytes are everybody's: a lighter one is taken only for a link that has
/// nothing to do while the workers do nothing but build, and given up as soon as it has more.
const LINK_IDLE: u64 = 3;
const LINK_EASY: u64 = 15;
const WORK_ONLY: u64 = 95;
/// A rung that was left for being too slow is not tried again for so long at first.
const AVOID_FIRST: Duration = Duration::from_millis(200);
/// And at most.
const AVOID_MAX: Duration = Duration::from_secs(8);

/// Processors with less of their time left than this, in percent, are what everything waits for: what
/// a writer waits then is as much for a processor as for the link.
const SPARE_MUCH: u64 = 8;

/// In percent of their time, workers that hardly keep up are busier than this.
const WORK_MUCH: u64 = 50;
/// Payloads of which frames of their own leave more than this are not worth the stream.
const SHRUNK_ENOUGH: u32 = 950;
/// What the session's stream compresses at most.
const STREAM_BYTES_PER_S: f64 = 250e6;
/// What the kernel copies into a socket.
const COPIED_BYTES_PER_S: f64 = 1.5e9;
/// A worker has a good part of its time left for stream that comes more slowly than this.
const BUSY_BYTES_PER_S: f64 = 150e6;

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
    /// The processors have no time for what saves little.
    scarce: AtomicBool,
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
            // Until the link has shown that it is slow: what is copied for bases is not given back.
            scarce: AtomicBool::new(true),
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

    /// Whether the link is not what the session waits for, or so fast that the processors hardly
    /// keep up, so that what saves little is to be left out. Techniques that were chosen one by one are used, whatever they cost.
    pub(crate) fn scarce(&self) -> bool {
        self.adaptive && self.scarce.load(Relaxed)
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

/// One frame's way through the writer.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct FrameWay {
    /// The writer waited for it.
    pub waited: Duration,
    pub sealed: Duration,
    /// From there into the socket.
    pub written: Duration,
    pub stream_bytes: usize,
    /// Of its payload before compression.
    pub payload_bytes: usize,
    pub wire_bytes: usize,
}

/// What a decision is made about.
#[derive(Debug, Default)]
struct Sums {
    /// All of the time, however long a wait was.
    elapsed: Duration,
    waited: Duration,
    sealed: Duration,
    written: Duration,
    stream_bytes: u64,
    payload_bytes: u64,
}

impl Sums {
    fn add(&mut self, way: &FrameWay) {
        self.elapsed += way.waited + way.sealed + way.written;
        self.waited += way.waited.min(WAIT_MAX);
        self.sealed += way.sealed;
        // What the kernel takes to copy it is not the link's.
        let copied = way.wire_bytes as f64 / COPIED_BYTES_PER_S;
        self.written += way.written.saturating_sub(Duration::from_secs_f64(copied));
        self.stream_bytes += way.stream_bytes as u64;
        self.payload_bytes += way.payload_bytes as u64;
    }

    fn counted(&self) -> Duration {
        self.waited + self.sealed + self.written
    }

    fn percent(&self, part: Duration) -> u64 {
        micros(part) * 100 / micros(self.counted()).max(1)
    }

    fn per_second(&self, bytes: u64) -> f64 {
        bytes as f64 / self.elapsed.as_secs_f64().max(1e-6)
    }
}

/// The writer's view, which decides.
#[derive(Debug)]
pub(crate) struct LinkWatch {
    lowest: Rung,
    highest: Rung,
    /// The one that compresses in the session's stream.
    stream: Rung,
    /// It was used.
    begun: bool,
    window: Duration,
    sums: Sums,
    /// Percent of the time that was spent on the link, smoothed.
    link_lately: Option<u64>,
    /// Percent of the processors' time that nobody used, smoothed; `None` until it is known.
    spare_lately: Option<u64>,
    /// Payload bytes a second when the link was what frames of their own waited for, lately.
    framed: Option<f64>,
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
            begun: false,
            window: WINDOW_FIRST,
            sums: Sums::default(),
            link_lately: None,
            spare_lately: None,
            framed: None,
            avoid: [(Duration::ZERO, Duration::ZERO); Rung::ALL.len()],
        }
    }

    /// Takes note of one frame, and decides when it is time to. `spare`: the share of the host's
    /// processors' time that nobody has used since it was asked for last, in percent, if known.
    pub(crate) fn frame(
        &mut self,
        ladder: &Ladder,
        way: &FrameWay,
        spare: impl FnOnce() -> Option<u64>,
    ) {
        self.sums.add(way);
        if self.sums.counted() >= self.window {
            let sums = std::mem::take(&mut self.sums);
            if let Some(spare) = spare() {
                let before = self.spare_lately.unwrap_or(spare);
                self.spare_lately = Some((before + spare) / 2);
            }
            self.decide(ladder, &sums);
            self.window = (self.window * 2).min(WINDOW);
        }
    }

    fn decide(&mut self, ladder: &Ladder, sums: &Sums) {
        for (ban, _) in &mut self.avoid {
            *ban = ban.saturating_sub(sums.counted());
        }
        let (link, sealing) = (sums.percent(sums.written), sums.percent(sums.sealed));
        let workers = ladder.workers.get();
        let worked = ladder.worked_us.swap(0, Relaxed);
        let building = worked * 100 / (micros(sums.elapsed) * u64::from(workers)).max(1);
        // Stream that comes faster than this leaves the workers no time, whatever the link does.
        let busy = sums.per_second(sums.stream_bytes) > f64::from(workers) * BUSY_BYTES_PER_S;
        // Where guests leave no processor alone, the link may still be what all wait for.
        let all_busy =
            self.spare_lately.is_some_and(|spare| spare < SPARE_MUCH) && link < LINK_SLOW;
        if busy || all_busy || (link < LINK_FREE && building > WORK_MUCH) {
            ladder.scarce.store(true, Relaxed);
        } else if self.window == WINDOW && (link > LINK_BOUND || building < WORK_MUCH / 2) {
            ladder.scarce.store(false, Relaxed);
        }

        // Stretches of a stream that take no wire at all come and go.
        let before = self.link_lately.unwrap_or(link);
        let lately = (before * 3 + link) / 4;
        self.link_lately = Some(lately);
        let rung = ladder.rung();
        let payload_rate = sums.per_second(sums.payload_bytes);
        if rung == Rung::Frame && link > LINK_BOUND {
            self.framed = Some(payload_rate);
        }
        // A stream that is slow itself may still be faster than frames over a slow link.
        let slower = self.framed.is_none_or(|framed| payload_rate < framed);
        let climb = if rung < Rung::Frame {
            lately > LINK_EASY
        } else {
            link > LINK_BOUND && !all_busy
        };
        if climb && rung < self.highest {
            let pays = payload_rate < STREAM_BYTES_PER_S
                && ladder.shrunk_permille.load(Relaxed) < SHRUNK_ENOUGH;
            self.climb(ladder, rung, link, pays);
        } else if link < LINK_FREE && rung > self.lowest {
            let given_up = match rung {
                Rung::None => false,
                Rung::Quick => building > WORK_ONLY && lately < LINK_IDLE,
                Rung::Frame => building > WORK_ONLY && lately < LINK_IDLE,
                Rung::Long | Rung::Hard => sealing > WORK_BOUND && (slower || all_busy),
            };
            if given_up {
                self.step_down(ladder, rung);
            }
        }
    }

    fn climb(&mut self, ladder: &Ladder, rung: Rung, link: u64, stream_pays: bool) {
        let up = match rung {
            Rung::Frame if !self.begun && link > LINK_SLOW => self.highest,
            Rung::Frame => self.stream,
            _ => Rung::ALL[rung as usize + 1],
        };
        let enough = match up {
            Rung::Hard if self.stream == Rung::Long => link > LINK_SLOW,
            _ => true,
        };
        let possible = stream_pays || !up.streams();
        if enough && possible && self.avoid[up as usize].0.is_zero() {
            if up.streams() {
                self.stream = up;
                self.begun = true;
            }
            tracing::debug!(from = ?rung, to = ?up, "the link is slow");
            ladder.rung.store(up as u8, Relaxed);
        }
    }

    fn step_down(&mut self, ladder: &Ladder, rung: Rung) {
        let (ban, last) = &mut self.avoid[rung as usize];
        *last = (*last * 2).clamp(AVOID_FIRST, AVOID_MAX);
        *ban = *last;
        let down = match rung {
            // The stream goes on where it was when it is climbed to again.
            Rung::Hard if self.lowest < Rung::Long => Rung::Frame,
            _ => Rung::ALL[rung as usize - 1],
        };
        tracing::debug!(from = ?rung, to = ?down, "compression is slow");
        ladder.rung.store(down as u8, Relaxed);
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unknown() -> Option<u64> {
        None
    }

    const MS: Duration = Duration::from_millis(1);

    fn way(wait: u32, seal: u32, write: u32) -> FrameWay {
        FrameWay {
            waited: MS * wait,
            sealed: MS * seal,
            written: MS * write,
            // As much as a slow link takes.
            payload_bytes: 1000 * write as usize,
            ..FrameWay::default()
        }
    }

    fn run(watch: &mut LinkWatch, ladder: &Ladder, wait: u32, seal: u32, write: u32) -> Rung {
        for _ in 0..100 {
            watch.frame(ladder, &way(wait, seal, write), unknown);
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
            watch.frame(&ladder, &way(9, 0, 1), unknown);
        }
        assert_eq!(ladder.rung(), Rung::Frame);
        // All of both, for a link that has nothing to do.
        let mut rungs = vec![ladder.rung()];
        for _ in 0..100 {
            ladder.worked(MS * 76);
            let way = FrameWay {
                written: MS / 4,
                ..way(38, 0, 0)
            };
            watch.frame(&ladder, &way, unknown);
            rungs.push(ladder.rung());
        }
        rungs.dedup();
        assert_eq!(rungs, [Rung::Frame, Rung::Quick, Rung::None]);
        assert!(ladder.scarce());
        // It has more to do than it seemed.
        assert_eq!(run(&mut watch, &ladder, 8, 0, 2), Rung::Frame);
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
        let ladder = Ladder::new(Rung::Frame, true, 1);
        let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
        let window = |watch: &mut LinkWatch, seal, write| {
            watch.frame(&ladder, &way(0, seal, write), unknown);
            ladder.rung()
        };
        assert_eq!(window(&mut watch, 30, 70), Rung::Long);
        assert_eq!(window(&mut watch, 100, 0), Rung::Frame);
        let mut windows = 0;
        while window(&mut watch, 30, 70) == Rung::Frame {
            windows += 1;
        }
        assert_eq!(windows, 1, "200 ms");
        assert_eq!(window(&mut watch, 100, 0), Rung::Frame);
        let mut windows = 0;
        while window(&mut watch, 30, 70) == Rung::Frame {
            windows += 1;
        }
        assert_eq!(windows, 3, "twice that");
    }

    #[test]
    fn a_slow_stream_stays_while_frames_would_be_slower_still() {
        let ladder = Ladder::new(Rung::Frame, true, 1);
        let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
        let window = |watch: &mut LinkWatch, seal, write, payload_bytes| {
            let way = FrameWay {
                payload_bytes,
                ..way(0, seal, write)
            };
            watch.frame(&ladder, &way, unknown);
            ladder.rung()
        };
        // Over this link frames of their own get 5 MB through in a window.
        assert_eq!(window(&mut watch, 5, 95, 5_000_000), Rung::Hard);
        assert_eq!(window(&mut watch, 100, 0, 6_000_000), Rung::Hard);
        assert_eq!(window(&mut watch, 100, 0, 4_000_000), Rung::Frame);
    }

    #[test]
    fn a_slow_link_gets_the_strongest_stream_from_its_start() {
        let ladder = Ladder::new(Rung::Frame, true, 1);
        let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
        watch.frame(&ladder, &way(0, 5, 95), unknown);
        assert_eq!(ladder.rung(), Rung::Hard);
    }

    #[test]
    fn a_stream_that_could_not_keep_up_is_not_begun() {
        let after = |payload_bytes| {
            let ladder = Ladder::new(Rung::Frame, true, 1);
            let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
            for _ in 0..10 {
                let way = FrameWay {
                    payload_bytes,
                    ..way(0, 5, 95)
                };
                watch.frame(&ladder, &way, unknown);
            }
            ladder.rung()
        };
        // In 100 ms.
        assert_eq!(after(24_000_000), Rung::Hard);
        assert_eq!(after(26_000_000), Rung::Frame);
    }

    #[test]
    fn a_link_that_takes_more_than_the_workers_give_is_not_slow() {
        let scarce = |stream_bytes, workers| {
            let ladder = Ladder::new(Rung::Frame, true, workers);
            let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
            let way = FrameWay {
                stream_bytes,
                ..way(0, 5, 95)
            };
            for _ in 0..10 {
                watch.frame(&ladder, &way, unknown);
            }
            ladder.scarce()
        };
        // In 100 ms.
        assert!(!scarce(29_000_000, 2));
        assert!(scarce(31_000_000, 2));
        assert!(!scarce(31_000_000, 4));
    }

    #[test]
    fn processors_that_nobody_leaves_alone_are_not_given_more_to_do() {
        let after = |spare, written| {
            let ladder = Ladder::new(Rung::Frame, true, 2);
            let mut watch = LinkWatch::new(Rung::None, Rung::Hard);
            for _ in 0..40 {
                watch.frame(&ladder, &way(100 - written, 0, written), || spare);
            }
            (ladder.rung(), ladder.scarce())
        };
        assert_eq!(after(Some(40), 70), (Rung::Long, false));
        assert_eq!(after(Some(2), 70), (Rung::Frame, true));
        // Guests that use all there is do not make a slow link fast.
        assert_eq!(after(Some(2), 95), (Rung::Hard, false));
        assert_eq!(after(None, 70), (Rung::Long, false));
    }

    #[test]
    fn a_fixed_rung_stays() {
        let ladder = Ladder::new(Rung::Frame, false, 1);
        let mut watch = LinkWatch::new(Rung::Frame, Rung::Frame);
        assert_eq!(run(&mut watch, &ladder, 0, 1, 9), Rung::Frame);
        assert_eq!(run(&mut watch, &ladder, 0, 9, 1), Rung::Frame);
    }
}
