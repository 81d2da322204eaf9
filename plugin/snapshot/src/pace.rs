//! How fast a scan may go.
//!
//! Must not: be asked more often than for a few hundred pages: it asks the clock.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

/// Decides when a scan goes on.
pub trait Pace {
    /// Waits as long as it likes. `busy` is the processor time the scan has taken since the last
    /// call; [`ControlFlow::Break`] ends the scan.
    fn pause(&mut self, busy: Duration) -> ControlFlow<()>;
}

/// As fast as it can, to the end.
#[derive(Debug, Default)]
pub struct Unpaced;

impl Pace for Unpaced {
    fn pause(&mut self, _busy: Duration) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// No sleep is shorter: waking up costs as well.
const SLEEP_MIN: Duration = Duration::from_millis(5);

/// Keeps to a share of one processor, and stops when it is told to.
#[derive(Debug)]
pub struct Budget {
    /// Time asleep for each second of processor time.
    idle_for_busy: f64,
    owed: Duration,
    stop: Arc<AtomicBool>,
}

impl Budget {
    /// `share` of one processor, more than 0 and at most 1.
    pub fn new(share: f64, stop: Arc<AtomicBool>) -> Self {
        let share = share.clamp(0.001, 1.0);
        Self {
            idle_for_busy: 1.0 / share - 1.0,
            owed: Duration::ZERO,
            stop,
        }
    }
}

impl Pace for Budget {
    fn pause(&mut self, busy: Duration) -> ControlFlow<()> {
        self.owed += busy.mul_f64(self.idle_for_busy);
        if self.owed >= SLEEP_MIN {
            std::thread::sleep(std::mem::take(&mut self.owed));
        }
        match self.stop.load(Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// Lets the calling thread run only when nobody else wants the processor.
pub fn idle_priority() -> io::Result<()> {
    // SAFETY: a plain struct of integers, all of which may be 0.
    let parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: 0 is the calling thread; the kernel reads the struct and keeps nothing of it.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Processor time the calling thread has had.
pub(crate) fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_owes_sleep_for_work_and_stops_when_told() {
        let stop = Arc::new(AtomicBool::new(false));
        let mut budget = Budget::new(0.25, stop.clone());
        let (before, busy) = (std::time::Instant::now(), Duration::from_millis(10));
        assert!(budget.pause(busy).is_continue());
        assert!(before.elapsed() >= busy * 3);
        stop.store(true, Relaxed);
        assert!(budget.pause(Duration::ZERO).is_break());
    }

    #[test]
    fn a_thread_can_give_way_to_all_others() {
        let given_way = std::thread::spawn(|| {
            idle_priority().expect("lowering it is allowed");
            // SAFETY: 0 is the calling thread.
            unsafe { libc::sched_getscheduler(0) }
        });
        assert_eq!(given_way.join().expect("it ran"), libc::SCHED_IDLE);
    }
}
