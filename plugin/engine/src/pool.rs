//! Things that go round: filled by one task, emptied by another, and used again.
//!
//! Must not: hold more than [`KEPT_MAX`] of them; what is in use is bounded by credit, backlog
//! and workers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// As many as a full backlog of small frames has.
const KEPT_MAX: usize = 64;

/// A pool; clones are the same pool.
#[derive(Debug)]
pub(crate) struct Pool<T>(Arc<Mutex<Vec<T>>>);

impl<T> Pool<T> {
    fn free(&self) -> MutexGuard<'_, Vec<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that is free, if there is.
    pub(crate) fn take(&self) -> Option<T> {
        self.free().pop()
    }

    /// Gives one back.
    pub(crate) fn give(&self, one: T) {
        let mut free = self.free();
        if free.len() < KEPT_MAX {
            free.push(one);
        }
    }
}

impl<T> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}
