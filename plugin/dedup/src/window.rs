//! The page window of the destination: contents that references may still need.
//!
//! Owns: memory up to the agreed budget, taken as it fills and kept to the end.
//! Must not: decide what stays; it obeys the defines of the source.

use memmap2::{MmapMut, MmapOptions};

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
const CHUNK_SLOTS: usize = 512;

/// Contents by slot.
pub struct PageWindow {
    /// Not there until one of its slots is filled.
    chunks: Vec<Option<MmapMut>>,
    defined: Vec<u64>,
    slots: u32,
    sparse: bool,
}

impl PageWindow {
    /// A window of `slots` empty slots. It takes memory as it fills, 2 MiB at a time.
    pub fn new(slots: u32) -> Self {
        let chunks = (slots as usize).div_ceil(CHUNK_SLOTS);
        Self {
            chunks: (0..chunks).map(|_| None).collect(),
            defined: vec![0; (slots as usize).div_ceil(64)],
            slots,
            sparse: false,
        }
    }

    /// The same for slots of which few are filled: it takes memory page by page.
    pub fn sparse(slots: u32) -> Self {
        Self {
            sparse: true,
            ..Self::new(slots)
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
        let (number, place) = (index / CHUNK_SLOTS, index % CHUNK_SLOTS);
        let slots = (self.slots as usize - number * CHUNK_SLOTS).min(CHUNK_SLOTS);
        let chunk = &mut self.chunks[number];
        let memory = match chunk {
            Some(memory) => memory,
            None => chunk.insert(anonymous(slots * PAGE_BYTES, !self.sparse)?),
        };
        memory[place * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
        self.defined[index / 64] |= 1 << (index % 64);
        Ok(())
    }

    /// Empties a slot. For the source's copy of a window, where nothing needs it any more.
    pub fn forget(&mut self, slot: Slot) {
        let index = slot.0 as usize;
        if let Some(defined) = self.defined.get_mut(index / 64) {
            *defined &= !(1 << (index % 64));
        }
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
            .as_ref()
            .and_then(|memory| memory.get(index % CHUNK_SLOTS * PAGE_BYTES..))
            .and_then(|rest| rest.first_chunk())
            .ok_or(WindowError::Undefined(slot))
    }
}

/// Memory; `all` of it at once: one call instead of a page fault for each slot.
fn anonymous(bytes: usize, all: bool) -> Result<MmapMut, WindowError> {
    let mut options = MmapOptions::new();
    options.len(bytes);
    if all {
        options.populate();
    }
    options.map_anon().map_err(|_| WindowError::NoMemory)
}
