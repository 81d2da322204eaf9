//! The joint dedup map: which content sits in which slot of the peer's page window.
//!
//! Owns: the source's decision what to reference, what to define where, and what to evict
//! (least recently used).
//! Must not: keep page contents, or grow beyond the slots it was given.
//!
//! Memory a unique page: 16 B digest, 8 B list links and 2 B member, grown by a sixteenth at
//! a time, and 5 B of hash table at 44 to 88 % load: at most 40 B, but for small maps.

use hashbrown::HashTable;

use crate::{PageDigest, Slot};

/// A member of the gang, by its index in the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(pub u16);

/// What to do with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The peer has this content: refer to it. `first_sender` sent it first.
    Reference { slot: Slot, first_sender: Member },
    /// Send the content; the peer keeps it in `slot`, forgetting what was there.
    Define { slot: Slot },
    /// Send the content; the window has no room for it at all.
    Send,
}

/// No slot: end of the list.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    newer: u32,
    older: u32,
}

/// Source-side index of the page window, with least-recently-used eviction.
#[derive(Debug)]
pub struct DedupMap {
    capacity: u32,
    table: HashTable<u32>,
    digests: Vec<PageDigest>,
    links: Vec<Link>,
    senders: Vec<Member>,
    newest: u32,
    oldest: u32,
}

impl DedupMap {
    /// A map for a window of `slots` slots (see [`crate::slots_in`]).
    pub fn new(slots: u32) -> Self {
        Self {
            capacity: slots.min(NONE - 1),
            table: HashTable::new(),
            digests: Vec::new(),
            links: Vec::new(),
            senders: Vec::new(),
            newest: NONE,
            oldest: NONE,
        }
    }

    /// Contents the peer has now.
    pub fn len(&self) -> usize {
        self.digests.len()
    }

    /// Whether the peer has no contents yet.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Bytes of memory the map holds.
    pub fn memory_bytes(&self) -> usize {
        self.table.allocation_size()
            + self.digests.capacity() * size_of::<PageDigest>()
            + self.links.capacity() * size_of::<Link>()
            + self.senders.capacity() * size_of::<Member>()
    }

    /// Decides about a page that `member` sends now. A [`Verdict::Define`] must reach the
    /// peer, in the order of these calls, for later references to hold.
    pub fn judge(&mut self, digest: PageDigest, member: Member) -> Verdict {
        let hash = digest.table_hash();
        let digests = &self.digests;
        if let Some(&slot) = self
            .table
            .find(hash, |slot| digests[*slot as usize] == digest)
        {
            self.touch(slot);
            return Verdict::Reference {
                slot: Slot(slot),
                first_sender: self.senders[slot as usize],
            };
        }
        if self.capacity == 0 {
            return Verdict::Send;
        }
        let slot = if (self.digests.len() as u32) < self.capacity {
            self.grow();
            self.digests.push(digest);
            self.links.push(Link {
                newer: NONE,
                older: NONE,
            });
            self.senders.push(member);
            (self.digests.len() - 1) as u32
        } else {
            let victim = self.oldest;
            self.unlink(victim);
            let gone = self.digests[victim as usize].table_hash();
            if let Ok(entry) = self.table.find_entry(gone, |slot| *slot == victim) {
                entry.remove();
            }
            self.digests[victim as usize] = digest;
            self.senders[victim as usize] = member;
            victim
        };
        self.link_newest(slot);
        let digests = &self.digests;
        self.table
            .insert_unique(hash, slot, |slot| digests[*slot as usize].table_hash());
        Verdict::Define { slot: Slot(slot) }
    }

    /// Makes room for one more slot. Doubling, as vectors do by themselves, would waste up to
    /// half of the memory.
    fn grow(&mut self) {
        let len = self.digests.len();
        if len == self.digests.capacity() {
            let more = (len / 16).max(1024).min(self.capacity as usize - len);
            self.digests.reserve_exact(more);
            self.links.reserve_exact(more);
            self.senders.reserve_exact(more);
        }
    }

    fn touch(&mut self, slot: u32) {
        if self.newest != slot {
            self.unlink(slot);
            self.link_newest(slot);
        }
    }

    fn unlink(&mut self, slot: u32) {
        let Link { newer, older } = self.links[slot as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.links[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
    }

    fn link_newest(&mut self, slot: u32) {
        self.links[slot as usize] = Link {
            newer: NONE,
            older: self.newest,
        };
        match self.newest {
            NONE => self.oldest = slot,
            newest => self.links[newest as usize].newer = slot,
        }
        self.newest = slot;
    }
}
