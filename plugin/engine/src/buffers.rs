//! Buffers that go round: filled by one task, emptied by another, and used again.
//!
//! Must not: hold more than [`KEPT_MAX`] buffers; what is in use is bounded by credit and
//! backlog.

use std::sync::{Arc, Mutex, PoisonError};

/// As many as a full backlog of small frames has.
const KEPT_MAX: usize = 64;

/// A pool of byte buffers; clones are the same pool.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// An empty buffer, with memory already if there was one.
    pub(crate) fn take(&self) -> Vec<u8> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.pop().unwrap_or_default()
    }

    /// Gives a buffer back.
    pub(crate) fn give(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < KEPT_MAX {
            free.push(buffer);
        }
    }
}
