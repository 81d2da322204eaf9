//! The page window of the destination: contents that references may still need.
//!
//! Owns: the memory of the agreed budget, allocated once, touched only where filled.
//! Must not: decide what stays; it obeys the defines of the source.

use crate::{PAGE_BYTES, Page, Slot};

/// What a peer can get wrong about the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowError {
    /// A slot beyond the agreed budget.
    OutOfBudget(Slot),
    /// A reference to a slot that nothing was put into.
    Undefined(Slot),
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
        }
    }
}

impl std::error::Error for WindowError {}

/// Contents by slot.
pub struct PageWindow {
    contents: Vec<u8>,
    defined: Vec<u64>,
    slots: u32,
}

impl PageWindow {
    /// A window of `slots` empty slots. The memory is reserved now and used as it fills:
    /// zeroed allocations of this size come straight from the kernel, untouched.
    pub fn new(slots: u32) -> Self {
        Self {
            contents: vec![0; slots as usize * PAGE_BYTES],
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
        self.defined[index / 64] |= 1 << (index % 64);
        self.contents[index * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(page);
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
        self.contents[index * PAGE_BYTES..][..PAGE_BYTES]
            .try_into()
            .map_err(|_| WindowError::OutOfBudget(slot))
    }
}
