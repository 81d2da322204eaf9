//! The threads that hash, build, compress and verify: one set for all sessions of a daemon.
//!
//! Must not: run anything that waits, or that takes longer than a frame does, on these; what
//! blocks has threads of tokio's.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use tokio::sync::oneshot;

/// A set of threads; clones are the same set.
#[derive(Debug, Clone)]
pub struct Workers(Set);

#[derive(Debug, Clone)]
enum Set {
    Threads(Arc<rayon::ThreadPool>),
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
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .thread_name(|index| format!("worker-{index}"))
            // A panic is a bug; what it leaves undone ends its session, and nothing else.
            .panic_handler(|_| tracing::error!("a worker panicked; its session ends"))
            .build()
            .map_err(io::Error::other)?;
        Ok(Workers(Set::Threads(Arc::new(pool))))
    }

    /// As many as there are processors.
    pub fn per_processor() -> io::Result<Workers> {
        Workers::new(std::thread::available_parallelism()?)
    }

    /// None: all work, also what blocks, is done where it is decided.
    pub fn given(execute: Arc<dyn Execute>) -> Workers {
        Workers(Set::Given(execute))
    }

    /// How many there are.
    pub fn threads(&self) -> usize {
        match &self.0 {
            Set::Threads(pool) => pool.current_num_threads(),
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
            Set::Threads(pool) => pool.spawn(work),
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
