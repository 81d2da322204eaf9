//! The threads that hash, build, compress and verify: one set for all sessions of a daemon.
//!
//! Must not: run anything that waits, or that takes longer than a frame does, on these; what
//! blocks has threads of tokio's.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use crate::processors::Processors;

/// A set of threads; clones are the same set.
#[derive(Debug, Clone)]
pub struct Workers(Set);

#[derive(Debug, Clone)]
enum Set {
    Threads(Arc<Threads>),
    Given(Arc<dyn Execute>),
}

/// Does work without threads of its own, where it is to be decided what is done when.
pub trait Execute: Send + Sync + fmt::Debug + 'static {
    /// Does it, now or later.
    fn execute(&self, work: Box<dyn FnOnce() + Send>);
    /// As many threads as it plays.
    fn threads(&self) -> usize;
}

/// What was to be done panicked.
#[derive(Debug)]
pub(crate) struct Lost;

impl Workers {
    /// Starts `threads` of them.
    pub fn new(threads: NonZeroUsize) -> io::Result<Workers> {
        let threads = Threads::start(threads)?;
        Ok(Workers(Set::Threads(Arc::new(threads))))
    }

    /// As many as there are processors.
    pub fn per_processor() -> io::Result<Workers> {
        Workers::new(std::thread::available_parallelism()?)
    }

    /// None: all work, also what blocks, is done where it is decided.
    pub fn given(execute: Arc<dyn Execute>) -> Workers {
        Workers(Set::Given(execute))
    }

    /// The processors that these threads run on; what others play is on none.
    pub(crate) fn processors(&self) -> Processors {
        match &self.0 {
            Set::Threads(_) => Processors::of_this_host(),
            Set::Given(_) => Processors::unknown(),
        }
    }

    /// How many there are.
    pub fn threads(&self) -> usize {
        match &self.0 {
            Set::Threads(threads) => threads.number.get(),
            Set::Given(execute) => execute.threads(),
        }
    }

    /// Has something done. The receiver fails only if it panicked.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (done, result) = oneshot::channel();
        self.start(move || {
            // Nobody waits for it if the session has ended.
            let _ = done.send(work());
        });
        result
    }

    /// Has something done that nobody waits for.
    pub(crate) fn start(&self, work: impl FnOnce() + Send + 'static) {
        match &self.0 {
            Set::Threads(threads) => threads.waiting.put(Box::new(work)),
            Set::Given(execute) => execute.execute(Box::new(work)),
        }
    }

    /// Has something done that blocks, or takes its time.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Lost> {
        match &self.0 {
            Set::Threads(_) => tokio::task::spawn_blocking(work).await.map_err(|_| Lost),
            Set::Given(_) => self.run(work).await.map_err(|_| Lost),
        }
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// Threads that take work in the order in which it came. A thread that has none sleeps at once: the
/// processor it would look for work on is wanted by QEMU and by guests.
#[derive(Debug)]
struct Threads {
    number: NonZeroUsize,
    waiting: Arc<Waiting>,
}

/// Work that nobody has taken yet.
#[derive(Default)]
struct Waiting {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    closed: bool,
}

impl Threads {
    fn start(number: NonZeroUsize) -> io::Result<Threads> {
        // Dropped, and so ended, if one of them cannot be started.
        let threads = Threads {
            number,
            waiting: Arc::default(),
        };
        for index in 0..number.get() {
            let waiting = threads.waiting.clone();
            thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || waiting.serve())?;
        }
        Ok(threads)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.waiting.lock().closed = true;
        self.waiting.changed.notify_all();
    }
}

impl Waiting {
    /// Nothing that panics is done while it is held.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, work: Work) {
        self.lock().work.push_back(work);
        self.changed.notify_one();
    }

    /// The next piece; `None` when there will be no more.
    fn take(&self) -> Option<Work> {
        let mut queue = self.lock();
        loop {
            if let Some(work) = queue.work.pop_front() {
                return Some(work);
            }
            if queue.closed {
                return None;
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn serve(&self) {
        while let Some(work) = self.take() {
            // A panic is a bug; what it leaves undone ends its session, and nothing else.
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                tracing::error!("a worker panicked; its session ends");
            }
        }
    }
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;

    /// Far longer than any of this takes.
    const SOON: Duration = Duration::from_secs(10);

    fn two() -> Workers {
        Workers::new(NonZeroUsize::new(2).expect("not zero")).expect("they start")
    }

    #[test]
    fn all_work_is_done_on_as_many_threads_as_were_asked_for() {
        let workers = two();
        let (there, arrived) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        // Each takes one of two threads until it is let go, and only then is the third begun.
        for number in 0..3 {
            let (there, wait) = (there.clone(), wait.clone());
            workers.start(move || {
                there
                    .send((number, thread::current().name().map(str::to_owned)))
                    .expect("a test");
                if number < 2 {
                    wait.lock().expect("lock").recv().expect("a test");
                }
            });
        }
        let mut first: Vec<_> = (0..2)
            .map(|_| arrived.recv_timeout(SOON).expect("begun"))
            .collect();
        first.sort();
        assert_eq!((first[0].0, first[1].0), (0, 1));
        assert_ne!(first[0].1, first[1].1);
        assert!(arrived.try_recv().is_err());
        go.send(()).expect("waits");
        assert_eq!(arrived.recv_timeout(SOON).expect("begun").0, 2);
        go.send(()).expect("waits");
    }

    #[test]
    fn a_panic_loses_one_result_and_no_thread() {
        let workers = two();
        // As many as there are threads.
        for _ in 0..2 {
            let lost = workers.run(|| panic!("on purpose"));
            assert!(lost.blocking_recv().is_err());
        }
        let (there, arrived) = mpsc::channel();
        workers.start(move || there.send(7).expect("a test"));
        assert_eq!(arrived.recv_timeout(SOON), Ok(7));
    }

    #[test]
    fn threads_end_with_the_last_handle_when_everything_is_done() {
        let workers = two();
        let alive = Arc::new(());
        let (done, finished) = mpsc::channel();
        for number in 0..10 {
            let (alive, done) = (alive.clone(), done.clone());
            workers.start(move || {
                let _alive = alive;
                done.send(number).expect("a test");
            });
        }
        let waiting = match &workers.0 {
            Set::Threads(threads) => Arc::downgrade(&threads.waiting),
            Set::Given(_) => unreachable!("it has threads"),
        };
        drop(workers);
        drop(done);
        assert_eq!(finished.iter().count(), 10);
        // Each of them holds it while it runs.
        let deadline = Instant::now() + SOON;
        while waiting.strong_count() > 0 {
            assert!(Instant::now() < deadline, "threads that do not end");
            thread::yield_now();
        }
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}
