//! The page window of the destination: contents that references may still need.
//!
//! Owns: memory up to the agreed budget, taken as it fills and kept to the end.
//! Must not: decide what stays; it obeys the defines of the source.

use crate::{PAGE_BYTES, Page, Slot};

/// What a peer can get wrong about the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowError {
    /// A slot beyond the agreed budget.
    OutOfBudget(Slot),
    /// A reference to a slot that nothing was put into.
    Undefined(Slot),
    /// This host has no memory left for the window, less than was agreed.
    NoMemory,
}

impl std::fmt::Display for WindowError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OutOfBudget(slot) => {
                write!(f, "page window slot {} is beyond the agreed budget", slot.0)
            }
            Self::Undefined(slot) => {
                write!(f, "page window slot {} was never filled", slot.0)
            }
            Self::NoMemory => f.write_str("this host has no memory left for the page window"),
        }
    }
}

impl std::error::Error for WindowError {}

/// Slots that get their memory together.
const CHUNK_SLOTS: usize = 256;

/// Contents by slot.
pub struct PageWindow {
    /// Empty until one of its slots is filled.
    chunks: Vec<Vec<u8>>,
    defined: Vec<u64>,
    slots: u32,
}

impl PageWindow {
    /// A window of `slots` empty slots. It takes memory as it fills, a MiB at a time.
    pub fn new(slots: u32) -> Self {
        Self {
            chunks: vec![Vec::new(); (slots as usize).div_ceil(CHUNK_SLOTS)],
            defined: vec![0; (slots as usize).div_ceil(64)],
            slots,
        }
    }

    /// Slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Puts a content into a slot, replacing what was there.
    pub fn define(&mut self, slot: Slot, page: &Page) -> Result<(), WindowError> {
        if slot.0 >= self.slots {
            return Err(WindowError::OutOfBudget(slot));
        }
        let index = slot.0 as usize;
        let chunk = &mut self.chunks[index / CHUNK_SLOTS];
        if chunk.is_empty() {
            let bytes = CHUNK_SLOTS * PAGE_BYTES;
            chunk
                .try_reserve_exact(bytes)
                .map_err(|_| WindowError::NoMemory)?;
            chunk.resize(bytes, 0);
        }
        chunk[index % CHUNK_SLOTS * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
        self.defined[index / 64] |= 1 << (index % 64);
        Ok(())
    }

    /// The content of a slot.
    pub fn get(&self, slot: Slot) -> Result<&Page, WindowError> {
        if slot.0 >= self.slots {
            return Err(WindowError::OutOfBudget(slot));
        }
        let index = slot.0 as usize;
        if self.defined[index / 64] & (1 << (index % 64)) == 0 {
            return Err(WindowError::Undefined(slot));
        }
        self.chunks[index / CHUNK_SLOTS]
            .get(index % CHUNK_SLOTS * PAGE_BYTES..)
            .and_then(|rest| rest.first_chunk())
            .ok_or(WindowError::Undefined(slot))
    }
}
