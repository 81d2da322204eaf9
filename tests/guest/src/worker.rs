//! The guest's work: fill memory, then for ever dirty some pages, check some pages and say so.
//!
//! Owns the order of the work and its pace. Content is `page`'s, the mapping is `memory`'s.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use crate::memory::Memory;
use crate::page::{self, Page, Seeds, WORDS, Xorshift};
use crate::recipe::Recipe;

const TICK: Duration = Duration::from_millis(10);
const IDLE_TICK: Duration = Duration::from_millis(20);
/// Work inside one tick stops here, so that the ticks keep coming on a slow machine.
const TICK_WORK_MAX: Duration = Duration::from_millis(5);
/// A page that is there is touched in far less.
const SLOW_TOUCH: Duration = Duration::from_micros(250);
/// A guest with broken memory says so this often, then only counts.
const BAD_LINES_MAX: u64 = 50;

pub struct Worker<'a, W> {
    recipe: &'a Recipe,
    seeds: Seeds,
    memory: Memory,
    /// How often each page was rewritten; the content depends on it.
    generations: Vec<u32>,
    random: Xorshift,
    console: W,
    started: Instant,
    next_checked: usize,
    pass: u64,
    checked: u64,
    bad: u64,
    dirtied: u64,
    gap_max: Duration,
    /// Touches of pages that took long: how many, and how long all together, in microseconds. Where
    /// pages are fetched from another host, these are those that were not there yet.
    slow: u64,
    slow_us: u64,
}

impl<'a, W: Write> Worker<'a, W> {
    pub fn new(recipe: &'a Recipe, memory: Memory, started: Instant, console: W) -> Self {
        let seeds = Seeds {
            group: recipe.group,
            guest: page::mix(recipe.seed, 0, 0),
        };
        Worker {
            recipe,
            seeds,
            generations: vec![0; memory.len()],
            memory,
            random: Xorshift::new(page::mix(recipe.seed, 1, 0)),
            console,
            started,
            next_checked: 0,
            pass: 0,
            checked: 0,
            bad: 0,
            dirtied: 0,
            gap_max: Duration::ZERO,
            slow: 0,
            slow_us: 0,
        }
    }

    /// Gives every page its first content.
    pub fn fill(&mut self) {
        for (index, page) in self.memory.pages_mut().iter_mut().enumerate() {
            let index = index as u64;
            page::write(self.recipe.fill.kind(index), self.seeds, index, 0, page);
        }
    }

    /// Works for ever; returns only when the console is gone.
    pub fn run(&mut self) -> io::Result<()> {
        self.report()?;
        let mut last_tick = Instant::now();
        let mut last_report = last_tick;
        let (mut dirty_due, mut verify_due) = (0.0_f64, 0.0_f64);
        loop {
            let settled = self.recipe.idle && self.pass > 0;
            let tick = if settled { IDLE_TICK } else { TICK };
            std::thread::sleep(match self.recipe.stamp_ms {
                0 => tick,
                stamp_ms => tick.min(Duration::from_millis(stamp_ms)),
            });
            let now = Instant::now();
            if self.recipe.stamp_ms > 0 {
                let line = format!("vmgang-stamp {}\n", self.started.elapsed().as_millis());
                self.console.write_all(line.as_bytes())?;
                self.console.flush()?;
            }
            let gap = now - last_tick;
            last_tick = now;
            self.gap_max = self.gap_max.max(gap);

            // A guest that was starved does not try to catch up with more than a second of work.
            let seconds = gap.as_secs_f64().min(1.0);
            dirty_due += seconds * self.recipe.dirty_pages_per_second as f64;
            verify_due += seconds * self.recipe.verify_pages_per_second as f64;
            while dirty_due >= 1.0 && now.elapsed() < TICK_WORK_MAX {
                self.dirty_one();
                dirty_due -= 1.0;
            }
            while verify_due >= 1.0 && now.elapsed() < TICK_WORK_MAX * 2 {
                self.verify_one()?;
                verify_due -= 1.0;
            }
            dirty_due = dirty_due.min(self.recipe.dirty_pages_per_second as f64);
            verify_due = verify_due.min(self.recipe.verify_pages_per_second as f64);

            if last_report.elapsed() >= Duration::from_millis(self.recipe.report_ms) {
                last_report = Instant::now();
                self.report()?;
            }
        }
    }

    fn dirty_one(&mut self) {
        let pages = self.memory.len().max(1) as u64;
        let hot = match self.recipe.hot_pages {
            0 => pages,
            hot => hot.min(pages),
        };
        let index = (self.random.next() % hot) as usize;
        let (Some(generation), Some(page)) = (
            self.generations.get_mut(index),
            self.memory.pages_mut().get_mut(index),
        ) else {
            return;
        };
        *generation = generation.wrapping_add(1);
        let before = Instant::now();
        std::hint::black_box(page[0]);
        let took = before.elapsed();
        if took >= SLOW_TOUCH {
            self.slow += 1;
            self.slow_us += took.as_micros() as u64;
        }
        let kind = self.recipe.fill.kind(index as u64);
        page::write(kind, self.seeds, index as u64, *generation, page);
        self.dirtied += 1;
    }

    fn verify_one(&mut self) -> io::Result<()> {
        let index = self.next_checked;
        let kind = self.recipe.fill.kind(index as u64);
        let generation = self.generations[index];
        let mut expected: Page = [0; WORDS];
        page::write(kind, self.seeds, index as u64, generation, &mut expected);
        if let Some(offset) = page::first_difference(&expected, &self.memory.pages()[index]) {
            self.bad += 1;
            if self.bad <= BAD_LINES_MAX {
                writeln!(
                    self.console,
                    "vmgang-guest BAD id={} kind={} index={index} offset={offset} \
                     generation={generation} pass={}",
                    self.recipe.id,
                    kind.name(),
                    self.pass,
                )?;
            }
        }
        self.checked += 1;
        self.next_checked += 1;
        if self.next_checked == self.memory.len() {
            self.next_checked = 0;
            self.pass += 1;
            self.report()?;
        }
        Ok(())
    }

    fn report(&mut self) -> io::Result<()> {
        let line = format!(
            "vmgang-guest id={} pass={} checked={} bad={} dirtied={} pages={} slow={} \
             slow_us={} gap_max_ms={} uptime_ms={}\n",
            self.recipe.id,
            self.pass,
            self.checked,
            self.bad,
            self.dirtied,
            self.memory.len(),
            self.slow,
            self.slow_us,
            self.gap_max.as_millis(),
            self.started.elapsed().as_millis(),
        );
        // One write, so that a migration cannot cut a line in two more often than it must.
        self.console.write_all(line.as_bytes())?;
        self.console.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker<'a>(recipe: &'a Recipe, console: &'a mut Vec<u8>) -> Worker<'a, &'a mut Vec<u8>> {
        let memory = Memory::map(256).expect("a small mapping");
        let mut worker = Worker::new(recipe, memory, Instant::now(), console);
        worker.fill();
        worker
    }

    fn verify_all<W: Write>(worker: &mut Worker<'_, W>) {
        for _ in 0..worker.memory.len() {
            worker.verify_one().expect("the console is a vector");
        }
    }

    #[test]
    fn dirtied_memory_still_verifies() {
        let recipe = Recipe::parse("vmgang.id=t vmgang.seed=4").expect("a recipe");
        let mut console = Vec::new();
        let mut worker = worker(&recipe, &mut console);
        for _ in 0..2000 {
            worker.dirty_one();
        }
        verify_all(&mut worker);
        assert_eq!((worker.bad, worker.pass, worker.checked), (0, 1, 256));
    }

    #[test]
    fn only_hot_pages_are_dirtied() {
        let recipe = Recipe::parse("vmgang.id=t vmgang.hot=3").expect("a recipe");
        let mut console = Vec::new();
        let mut worker = worker(&recipe, &mut console);
        for _ in 0..100 {
            worker.dirty_one();
        }
        let (hot, cold) = worker.generations.split_at(3);
        assert!(hot.iter().all(|generation| *generation > 0));
        assert!(cold.iter().all(|generation| *generation == 0));
    }

    #[test]
    fn one_flipped_byte_is_reported_with_its_place() {
        let recipe = Recipe::parse("vmgang.id=t vmgang.seed=4").expect("a recipe");
        let mut console = Vec::new();
        let mut worker = worker(&recipe, &mut console);
        worker.memory.pages_mut()[77][3] ^= 0x0100;
        verify_all(&mut worker);
        assert_eq!(worker.bad, 1);
        drop(worker);
        let text = String::from_utf8(console).expect("plain text");
        assert!(text.contains("BAD id=t"), "{text}");
        assert!(text.contains("index=77 offset=25"), "{text}");
    }

    #[test]
    fn a_lost_write_is_reported() {
        let recipe = Recipe::parse("vmgang.fill=unique:100").expect("a recipe");
        let mut console = Vec::new();
        let mut worker = worker(&recipe, &mut console);
        let before = worker.memory.pages()[9];
        worker.generations[9] += 1;
        worker.memory.pages_mut()[9] = before;
        verify_all(&mut worker);
        assert_eq!(worker.bad, 1);
    }
}
