//! A member's own earlier content: which slot held what a page of it was when it was last
//! sent. The best base of a dirtied page is what it was before.
//!
//! Owns: the table from (member, page number in the stream) to slot.
//! Must not: keep contents. An entry whose slot was redefined since is recognised by its
//! content's tag and not returned, but for one in 2^32, which costs a useless delta. So does
//! an entry of another RAM block with the same address.
//!
//! Memory: 16 B an entry. With one entry a slot every page whose content is still in the
//! window has room, but for pages that share theirs.

use crate::block_hash::spread;
use crate::slot_cache::{Entry, SlotCache};
use crate::{ContentTag, DedupMap, Member, Slot};

/// Slots by the page whose content they got.
#[derive(Debug)]
pub struct PageHistory {
    cache: SlotCache,
}

impl PageHistory {
    /// A table for about `entries` pages: at least as many as the window has slots, at most
    /// as many as the members have pages.
    pub fn new(entries: u64) -> Self {
        Self {
            cache: SlotCache::new(entries),
        }
    }

    /// Bytes of memory the table may take.
    pub fn memory_bytes(&self) -> usize {
        self.cache.memory_bytes()
    }

    /// Remembers that a page has the content of `slot` now, whether it was just defined or
    /// referred to.
    pub fn record(&mut self, member: Member, page_number: u64, slot: Slot, tag: ContentTag) {
        let entry = Entry { slot, tag: tag.0 };
        self.cache.insert(hash(member, page_number), 1, entry);
    }

    /// The slot that still has what the page was last. Ask before the map gives the page a
    /// slot: it may get this one.
    pub fn find(&self, member: Member, page_number: u64, map: &DedupMap) -> Option<Slot> {
        self.cache
            .find(hash(member, page_number))
            .find(|entry| map.tag(entry.slot) == Some(ContentTag(entry.tag)))
            .map(|entry| entry.slot)
    }
}

/// Page numbers have 52 bits at most. Page number 0 of member 0 must not be hash 0 by chance
/// only: any value will do.
fn hash(member: Member, page_number: u64) -> u64 {
    spread(page_number ^ u64::from(member.0).rotate_right(12)).wrapping_add(1)
}
