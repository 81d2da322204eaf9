//! Byte buffers that go round.
//!
//! Must not: know what they hold.

use crate::pool::Pool;

/// A larger one is not kept: few are needed.
const KEPT_BYTES_MAX: usize = 640 * 1024;

/// A pool of byte buffers; clones are the same pool.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffers(Pool<Vec<u8>>);

impl Buffers {
    /// An empty buffer, with memory already if there was one.
    pub(crate) fn take(&self) -> Vec<u8> {
        self.0.take().unwrap_or_default()
    }

    /// Gives a buffer back.
    pub(crate) fn give(&self, mut buffer: Vec<u8>) {
        if buffer.capacity() <= KEPT_BYTES_MAX {
            buffer.clear();
            self.0.give(buffer);
        }
    }
}
