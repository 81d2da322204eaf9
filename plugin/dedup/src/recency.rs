//! Which slot was used longest ago, in each class of slots.
//!
//! Owns: doubly linked lists through one vector of links, one list a class.
//! Must not: know what a slot holds, or why it is in its class.

/// No slot: end of a list.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    newer: u32,
    older: u32,
}

/// Bytes a slot takes.
pub(crate) const LINK_BYTES: usize = size_of::<Link>();

/// `CLASSES` lists of slots. A slot is in one of them; the caller knows in which.
#[derive(Debug)]
pub(crate) struct Recency<const CLASSES: usize> {
    links: Vec<Link>,
    newest: [u32; CLASSES],
    oldest: [u32; CLASSES],
}

impl<const CLASSES: usize> Recency<CLASSES> {
    pub(crate) fn new() -> Self {
        Self {
            links: Vec::new(),
            newest: [NONE; CLASSES],
            oldest: [NONE; CLASSES],
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.links.capacity()
    }

    pub(crate) fn reserve_exact(&mut self, more: usize) {
        self.links.reserve_exact(more);
    }

    /// Adds the slot after the last one, as the newest of a class.
    pub(crate) fn push(&mut self, class: usize) {
        let slot = self.links.len() as u32;
        self.links.push(Link {
            newer: NONE,
            older: NONE,
        });
        self.link_newest(slot, class);
    }

    /// The slot of a class that was used longest ago.
    pub(crate) fn oldest(&self, class: usize) -> Option<u32> {
        Some(self.oldest[class]).filter(|slot| *slot != NONE)
    }

    /// Makes a slot the newest of a class, whichever it was in.
    pub(crate) fn renew(&mut self, slot: u32, from: usize, to: usize) {
        if from != to || self.newest[to] != slot {
            self.unlink(slot, from);
            self.link_newest(slot, to);
        }
    }

    /// Puts all slots of a class before the oldest of another, in their order.
    pub(crate) fn append_as_older(&mut self, from: usize, to: usize) {
        let (newest, oldest) = (self.newest[from], self.oldest[from]);
        if newest == NONE {
            return;
        }
        match self.oldest[to] {
            NONE => self.newest[to] = newest,
            end => {
                self.links[end as usize].older = newest;
                self.links[newest as usize].newer = end;
            }
        }
        self.oldest[to] = oldest;
        self.newest[from] = NONE;
        self.oldest[from] = NONE;
    }

    fn unlink(&mut self, slot: u32, class: usize) {
        let Link { newer, older } = self.links[slot as usize];
        match newer {
            NONE => self.newest[class] = older,
            newer => self.links[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest[class] = newer,
            older => self.links[older as usize].newer = newer,
        }
    }

    fn link_newest(&mut self, slot: u32, class: usize) {
        self.links[slot as usize] = Link {
            newer: NONE,
            older: self.newest[class],
        };
        match self.newest[class] {
            NONE => self.oldest[class] = slot,
            newest => self.links[newest as usize].newer = slot,
        }
        self.newest[class] = slot;
    }
}
