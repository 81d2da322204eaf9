//! The pace of a guest's work: requests at a fixed rate, a complete check every so often, a report
//! every second. It sleeps in between, so that several guests share a processor.
//!
//! Owns the numbers in the report. Reports have the same first and last fields as those of
//! `tests/guest`, so that one reader serves both.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::content::Random;
use crate::orders::Orders;
use crate::workload::{Damage, Done, Result, Workload};

const TICK: Duration = Duration::from_millis(20);
/// Without requests. Under emulation every wake-up costs: 24 idle guests would keep two processors busy.
const IDLE_TICK: Duration = Duration::from_millis(100);
/// Requests and checks of one tick stop here, late ones are left for the next.
const TICK_WORK_MAX: Duration = Duration::from_millis(14);
/// Items that are read back at a time.
const CHECK_BATCH: usize = 16;
/// A guest with broken memory says so this often, then only counts.
const BAD_LINES_MAX: u64 = 50;

pub struct Worker<W> {
    orders: Orders,
    workload: Box<dyn Workload>,
    console: W,
    started: Instant,
    random: Random,
    next_checked: usize,
    pass: u64,
    checked: u64,
    bad: u64,
    dirtied: u64,
    served: u64,
    gap_max: Duration,
    interval: Interval,
}

/// What was done since the last report.
struct Interval {
    since: Instant,
    served: u64,
    latency_sum: Duration,
    latency_max: Duration,
}

impl Interval {
    fn new() -> Interval {
        Interval {
            since: Instant::now(),
            served: 0,
            latency_sum: Duration::ZERO,
            latency_max: Duration::ZERO,
        }
    }
}

impl<W: Write> Worker<W> {
    pub fn new(
        orders: &Orders,
        workload: Box<dyn Workload>,
        started: Instant,
        console: W,
    ) -> Worker<W> {
        Worker {
            orders: orders.clone(),
            workload,
            console,
            started,
            random: Random::new(orders.seed),
            next_checked: 0,
            pass: 0,
            checked: 0,
            bad: 0,
            dirtied: 0,
            served: 0,
            gap_max: Duration::ZERO,
            interval: Interval::new(),
        }
    }

    /// Works for ever; returns only with an error.
    pub fn run(&mut self) -> Result<()> {
        self.report()?;
        let requests_per_second = self.orders.rate as f64;
        let checks_per_second = self.workload.items() as f64 / self.orders.check_seconds as f64;
        let (mut requests_due, mut checks_due) = (0.0_f64, 0.0_f64);
        let mut last_tick = Instant::now();
        let tick = match self.orders.rate {
            0 => IDLE_TICK,
            _ => TICK,
        };
        loop {
            std::thread::sleep(tick);
            let now = Instant::now();
            let gap = now - last_tick;
            last_tick = now;
            self.gap_max = self.gap_max.max(gap);

            // A guest that was starved does not try to catch up with more than a second of work.
            let seconds = gap.as_secs_f64();
            requests_due = (requests_due + seconds * requests_per_second).min(requests_per_second);
            checks_due = (checks_due + seconds * checks_per_second)
                .min(checks_per_second.max(CHECK_BATCH as f64));
            while requests_due >= 1.0 && now.elapsed() < TICK_WORK_MAX {
                self.request()?;
                requests_due -= 1.0;
            }
            while checks_due >= CHECK_BATCH as f64 && now.elapsed() < TICK_WORK_MAX {
                checks_due -= self.check()? as f64;
            }
            if self.interval.since.elapsed() >= Duration::from_millis(self.orders.report_ms) {
                self.report()?;
            }
        }
    }

    fn request(&mut self) -> Result<()> {
        let random = self.random.next();
        let before = Instant::now();
        let done = self.workload.request(random)?;
        let latency = before.elapsed();
        self.interval.latency_sum += latency;
        self.interval.latency_max = self.interval.latency_max.max(latency);
        self.interval.served += 1;
        self.served += 1;
        if done == Done::Wrote {
            self.dirtied += 1;
        }
        let damage = self.workload.take_damage();
        self.complain(&damage)
    }

    /// Checks the next few items; gives how many.
    fn check(&mut self) -> Result<usize> {
        let count = CHECK_BATCH.min(self.workload.items() - self.next_checked);
        let damage = self.workload.check(self.next_checked, count)?;
        self.complain(&damage)?;
        self.checked += count as u64;
        self.next_checked += count;
        if self.next_checked == self.workload.items() {
            let damage = self.workload.end_of_pass()?;
            self.complain(&damage)?;
            self.next_checked = 0;
            self.pass += 1;
        }
        Ok(count)
    }

    fn complain(&mut self, damage: &[Damage]) -> Result<()> {
        for Damage { item, what } in damage {
            self.bad += 1;
            if self.bad <= BAD_LINES_MAX {
                let line = format!(
                    "vmgang-guest BAD id={} role={} index={item} {what} pass={}\n",
                    self.orders.id,
                    self.orders.role.name(),
                    self.pass,
                );
                self.say(&line)?;
            }
        }
        Ok(())
    }

    fn report(&mut self) -> Result<()> {
        let interval = std::mem::replace(&mut self.interval, Interval::new());
        let mean = interval.latency_sum.as_micros() / u128::from(interval.served.max(1));
        let line = format!(
            "vmgang-guest id={} pass={} checked={} bad={} dirtied={} pages={} role={} served={} \
             interval_served={} interval_ms={} latency_mean_us={mean} latency_max_us={} \
             gap_max_ms={} uptime_ms={}\n",
            self.orders.id,
            self.pass,
            self.checked,
            self.bad,
            self.dirtied,
            self.workload.items(),
            self.orders.role.name(),
            self.served,
            interval.served,
            interval.since.elapsed().as_millis(),
            interval.latency_max.as_micros(),
            self.gap_max.as_millis(),
            self.started.elapsed().as_millis(),
        );
        self.say(&line)
    }

    /// One write, so that a migration cannot cut a line in two more often than it must.
    fn say(&mut self, line: &str) -> Result<()> {
        self.console
            .write_all(line.as_bytes())
            .and_then(|()| self.console.flush())
            .map_err(|error| format!("cannot write to the console: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::idle::Idle;

    fn worker<'a>(root: &std::path::Path, console: &'a mut Vec<u8>) -> Worker<&'a mut Vec<u8>> {
        for number in 0..40 {
            fs::write(root.join(number.to_string()), [number; 10]).expect("a file");
        }
        let orders = Orders::parse("vmgang.id=t").expect("orders");
        let workload = Box::new(Idle::start(root).expect("a tree"));
        Worker::new(&orders, workload, Instant::now(), console)
    }

    #[test]
    fn a_pass_covers_every_item_once() {
        let root = tempfile::tempdir().expect("a directory");
        let mut console = Vec::new();
        let mut worker = worker(root.path(), &mut console);
        let counts: Vec<_> = (0..3).map(|_| worker.check().expect("a check")).collect();
        assert_eq!(counts, [16, 16, 8]);
        assert_eq!((worker.pass, worker.checked, worker.bad), (1, 40, 0));
        worker.request().expect("a request");
        worker.report().expect("a report");
        drop(worker);
        let text = String::from_utf8(console).expect("plain text");
        assert!(text.contains("id=t pass=1 checked=40 bad=0 dirtied=0 pages=40 role=idle"));
        assert!(text.contains(" served=1 interval_served=1 "), "{text}");
    }

    #[test]
    fn damage_is_counted_and_told() {
        let root = tempfile::tempdir().expect("a directory");
        let mut console = Vec::new();
        let mut worker = worker(root.path(), &mut console);
        fs::write(root.path().join("7"), [9; 10]).expect("a file");
        for _ in 0..6 {
            worker.check().expect("a check");
        }
        assert_eq!((worker.pass, worker.bad), (2, 2));
        drop(worker);
        let text = String::from_utf8(console).expect("plain text");
        assert!(
            text.contains("vmgang-guest BAD id=t role=idle index="),
            "{text}"
        );
    }
}
