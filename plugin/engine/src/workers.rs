//! The threads that hash, build, compress and verify: one set for all sessions of a daemon.
//!
//! Must not: run anything that waits, or that takes longer than a frame does.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;

use tokio::sync::oneshot;

/// A set of threads; clones are the same set.
#[derive(Debug, Clone)]
pub struct Workers(Arc<rayon::ThreadPool>);

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
        Ok(Workers(Arc::new(pool)))
    }

    /// As many as there are processors.
    pub fn per_processor() -> io::Result<Workers> {
        Workers::new(std::thread::available_parallelism()?)
    }

    /// How many there are.
    pub fn threads(&self) -> usize {
        self.0.current_num_threads()
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
        self.0.spawn(work);
    }
}
