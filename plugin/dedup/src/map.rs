//! The joint dedup map: which content sits in which slot of the peer's page window.
//!
//! Owns: the source's decision what to reference, what to define where, and what to evict:
//! first what will not be sent again, then what was used longest ago, last what is known to
//! be sent again. Slots that were offered to the peer are nobody's until it has answered.
//! Must not: keep page contents, or grow beyond the slots it was given.
//!
//! Memory a unique page: 16 B digest, 8 B list links, 2 B member and 1 B of expected sends,
//! grown by a thirty-second at a time, and 5 B of hash table at 44 to 88 % load: at most 40 B,
//! but for small maps. Expectations of contents that have no slot come on top, see
//! [`DedupMap::expect`].

use hashbrown::HashTable;

use crate::expectation::Expectations;
use crate::recency::{LINK_BYTES, Recency};
use crate::{ContentTag, PageDigest, Slot};

/// A member of the gang, by its index in the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member(pub u16);

impl Member {
    /// Stands for nobody: the content was staged before the members migrated.
    pub const STAGED: Member = Member(u16::MAX);
    /// Stands for nobody: the peer had the content already.
    pub const DESTINATION: Member = Member(u16::MAX - 1);
}

/// What to do with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The peer has this content: refer to it. `first_sender` sent it first.
    Reference { slot: Slot, first_sender: Member },
    /// Send the content; the peer keeps it in `slot`, forgetting what was there.
    Define { slot: Slot },
    /// Send the content; the window has no room for it.
    Send,
}

/// A slot number no window has.
const NONE: u32 = u32::MAX;

/// Classes of slots, in the order in which they are given up.
const SPENT: usize = 0;
const PLAIN: usize = 1;
const EXPECTED: usize = 2;
/// No content: given up before all others.
const FREE: usize = 3;
/// Offered to the peer: never given up.
const OFFERED: usize = 4;
const CLASSES: usize = 5;

/// What is known of a slot's future: 0 nothing, 1 that its content is not sent again, else how
/// often it is, plus one. What does not fit stays with the expectations. The last two values
/// are those of slots without a content.
type Future = u8;
const UNKNOWN: Future = 0;
const NEVER: Future = 1;
const NO_CONTENT: Future = Future::MAX;
const ON_OFFER: Future = Future::MAX - 1;
const SENDS_MAX: u32 = (ON_OFFER - 1 - NEVER) as u32;

fn class(future: Future) -> usize {
    match future {
        UNKNOWN => PLAIN,
        NEVER => SPENT,
        NO_CONTENT => FREE,
        ON_OFFER => OFFERED,
        _ => EXPECTED,
    }
}

/// Source-side index of the page window.
#[derive(Debug)]
pub struct DedupMap {
    capacity: u32,
    table: HashTable<u32>,
    digests: Vec<PageDigest>,
    recency: Recency<CLASSES>,
    senders: Vec<Member>,
    futures: Vec<Future>,
    expectations: Expectations,
}

impl DedupMap {
    /// A map for a window of `slots` slots (see [`crate::slots_in`]).
    pub fn new(slots: u32) -> Self {
        let capacity = slots.min(NONE - 1);
        Self {
            capacity,
            table: HashTable::new(),
            digests: Vec::new(),
            recency: Recency::new(),
            senders: Vec::new(),
            futures: Vec::new(),
            expectations: Expectations::new(capacity),
        }
    }

    /// Contents the peer has now.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether the peer has no contents yet.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Whether the peer has this content.
    pub fn has(&self, digest: &PageDigest) -> bool {
        self.slot_of(digest).is_some()
    }

    /// Where the peer has this content.
    pub fn slot(&self, digest: &PageDigest) -> Option<Slot> {
        self.slot_of(digest).map(Slot)
    }

    /// The contents that the peer has, with their slots, in no order.
    pub fn contents(&self) -> impl Iterator<Item = (PageDigest, Slot)> {
        let slot = |slot: &u32| (self.digests[*slot as usize], Slot(*slot));
        self.table.iter().map(slot)
    }

    /// The peer has these contents in its first slots, before anything was sent.
    pub fn adopt(&mut self, digests: &[PageDigest]) {
        let room = self.capacity as usize - self.digests.len();
        for digest in digests.iter().take(room) {
            match self.has(digest) {
                // Its second slot is of no use.
                true => {
                    self.push(*digest, Member::DESTINATION, NO_CONTENT);
                }
                false => {
                    let slot = self.push(*digest, Member::DESTINATION, UNKNOWN);
                    self.insert(*digest, slot);
                }
            }
        }
    }

    /// A slot for a content that the peer is asked about: one that was never filled. It is
    /// neither referred to nor given up until [`answered`](Self::answered). `None` for a content
    /// that the peer has, and if no such slot is left.
    pub fn offer(&mut self, digest: PageDigest) -> Option<Slot> {
        if self.has(&digest) {
            return None;
        }
        let slot = if let Some(free) = self.recency.oldest(FREE) {
            self.set_future(free, ON_OFFER);
            self.digests[free as usize] = digest;
            self.senders[free as usize] = Member::DESTINATION;
            free
        } else if (self.digests.len() as u32) < self.capacity {
            self.push(digest, Member::DESTINATION, ON_OFFER)
        } else {
            return None;
        };
        Some(Slot(slot))
    }

    /// The peer has answered: the content of a slot on offer is in it or not. Returns whether it
    /// can be referred to there; not if it was sent meanwhile.
    pub fn answered(&mut self, slot: Slot, has: bool) -> bool {
        let index = slot.0 as usize;
        if self.futures.get(index) != Some(&ON_OFFER) {
            return false;
        }
        let digest = self.digests[index];
        let takes = has && !self.has(&digest);
        if takes {
            let future = match self.expectations.take(&digest, SENDS_MAX) {
                None => UNKNOWN,
                Some(sends) => NEVER + sends as Future,
            };
            self.set_future(slot.0, future);
            self.insert(digest, slot.0);
        } else {
            self.set_future(slot.0, NO_CONTENT);
        }
        takes
    }

    /// Bytes of memory the map holds.
    pub fn memory_bytes(&self) -> usize {
        self.table.allocation_size()
            + self.digests.capacity() * size_of::<PageDigest>()
            + self.recency.capacity() * LINK_BYTES
            + self.senders.capacity() * size_of::<Member>()
            + self.futures.capacity() * size_of::<Future>()
            + self.expectations.memory_bytes()
    }

    /// Says that a content is to be sent `sends` more times, the first one included if the
    /// peer does not have it. It is kept until then as far as the window reaches, and is the
    /// first to go afterwards. Contents that nothing was said about are in between, the least
    /// recently used of them first.
    ///
    /// At most as many contents without a slot are remembered as there are slots, for at most
    /// 30 B each.
    pub fn expect(&mut self, digest: PageDigest, sends: u32) {
        if self.capacity == 0 {
            return;
        }
        match self.slot_of(&digest) {
            Some(slot) => {
                let here = sends.min(SENDS_MAX);
                self.expectations.set(&digest, sends - here);
                self.set_future(slot, NEVER + here as Future);
            }
            None => self.expectations.set(&digest, sends),
        }
    }

    /// Says that a content is sent once less than was expected: a page that had it has
    /// changed. Nothing happens to contents without an expectation.
    pub fn retract(&mut self, digest: PageDigest) {
        match self.slot_of(&digest) {
            Some(slot) => self.count_down(slot),
            None => {
                // A content that nobody sends any more is as good as an unknown one.
                self.expectations.take(&digest, 1);
            }
        }
    }

    /// Forgets all expectations: from here on the least recently used content goes first. For
    /// when counts have become old. Takes time in proportion to the slots.
    pub fn clear_expectations(&mut self) {
        self.expectations.clear();
        for future in &mut self.futures {
            if class(*future) < FREE {
                *future = UNKNOWN;
            }
        }
        self.recency.append_as_older(SPENT, PLAIN);
        self.recency.append_as_older(PLAIN, EXPECTED);
        self.recency.append_as_older(EXPECTED, PLAIN);
    }

    /// Decides about a page that `member` sends now. A [`Verdict::Define`] must reach the
    /// peer, in the order of these calls, for later references to hold.
    pub fn judge(&mut self, digest: PageDigest, member: Member) -> Verdict {
        match self.refer(&digest) {
            Some(verdict) => verdict,
            None => self.admit(digest, member),
        }
    }

    /// The first half of [`judge`](Self::judge): a [`Verdict::Reference`] if the peer has the
    /// content. If not, look for bases now, while all slots are as they were, and then
    /// [`admit`](Self::admit) it.
    pub fn refer(&mut self, digest: &PageDigest) -> Option<Verdict> {
        let slot = self.slot_of(digest)?;
        match self.futures[slot as usize] {
            // One more than was expected: nothing is known of it any more.
            NEVER => self.set_future(slot, UNKNOWN),
            UNKNOWN => self.recency.renew(slot, PLAIN, PLAIN),
            _ => self.count_down(slot),
        }
        Some(Verdict::Reference {
            slot: Slot(slot),
            first_sender: self.senders[slot as usize],
        })
    }

    /// The second half of [`judge`](Self::judge): decides about a content that the peer does
    /// not have. With [`Verdict::Define`] the slot's old content, if any, is gone: its
    /// [`tag`](Self::tag) is the new one's.
    pub fn admit(&mut self, digest: PageDigest, member: Member) -> Verdict {
        // This send is one of those expected.
        let future = match self.expectations.take(&digest, SENDS_MAX) {
            None => UNKNOWN,
            Some(sends) => NEVER + (sends - 1) as Future,
        };
        let room = (self.digests.len() as u32) < self.capacity;
        let slot = if room && self.recency.oldest(FREE).is_none() {
            self.push(digest, member, future)
        } else {
            let Some(victim) = self.victim(class(future)) else {
                return Verdict::Send;
            };
            self.evict(victim);
            let old = std::mem::replace(&mut self.futures[victim as usize], future);
            self.recency.renew(victim, class(old), class(future));
            self.digests[victim as usize] = digest;
            self.senders[victim as usize] = member;
            victim
        };
        self.insert(digest, slot);
        Verdict::Define { slot: Slot(slot) }
    }

    /// What tells the content of a slot from others it had; `None` for a slot that was never
    /// filled. Side tables keep it with their entries, and so find out which are not current.
    pub fn tag(&self, slot: Slot) -> Option<ContentTag> {
        let future = self.futures.get(slot.0 as usize)?;
        (class(*future) < FREE).then(|| self.digests[slot.0 as usize].tag())
    }

    /// Counts a use of a slot's content that is no reference, such as being a base.
    pub fn touch(&mut self, slot: Slot) {
        if let Some(future) = self.futures.get(slot.0 as usize) {
            let class = class(*future);
            self.recency.renew(slot.0, class, class);
        }
    }

    fn slot_of(&self, digest: &PageDigest) -> Option<u32> {
        self.table
            .find(digest.table_hash(), |slot| {
                self.digests[*slot as usize] == *digest
            })
            .copied()
    }

    fn insert(&mut self, digest: PageDigest, slot: u32) {
        let digests = &self.digests;
        self.table.insert_unique(digest.table_hash(), slot, |slot| {
            digests[*slot as usize].table_hash()
        });
    }

    /// One more slot.
    fn push(&mut self, digest: PageDigest, member: Member, future: Future) -> u32 {
        self.grow();
        self.digests.push(digest);
        self.recency.push(class(future));
        self.senders.push(member);
        self.futures.push(future);
        (self.digests.len() - 1) as u32
    }

    /// Which slot a content of this class may replace: no content makes room for one that is
    /// less wanted, but those that nothing was said about.
    fn victim(&self, newcomer: usize) -> Option<u32> {
        let mut victim = self.recency.oldest(FREE);
        victim = victim.or_else(|| self.recency.oldest(SPENT));
        victim = victim.or_else(|| self.recency.oldest(PLAIN));
        if newcomer == EXPECTED {
            victim = victim.or_else(|| self.recency.oldest(EXPECTED));
        }
        victim
    }

    /// Forgets the content of a slot, but not how often it is still to be sent.
    fn evict(&mut self, slot: u32) {
        let digest = self.digests[slot as usize];
        if let Ok(entry) = self
            .table
            .find_entry(digest.table_hash(), |other| *other == slot)
        {
            entry.remove();
        }
        let future = self.futures[slot as usize];
        if class(future) == EXPECTED {
            let here = u32::from(future - NEVER);
            let more = self.expectations.take(&digest, u32::MAX).unwrap_or(0);
            self.expectations.set(&digest, here.saturating_add(more));
        }
    }

    /// One of the expected sends of a slot's content is done, if any was.
    fn count_down(&mut self, slot: u32) {
        let future = self.futures[slot as usize];
        if class(future) != EXPECTED {
            return;
        }
        let mut left = future - 1;
        if left == NEVER {
            let digest = self.digests[slot as usize];
            let more = self.expectations.take(&digest, SENDS_MAX).unwrap_or(0);
            left += more as Future;
        }
        self.set_future(slot, left);
    }

    fn set_future(&mut self, slot: u32, future: Future) {
        let old = std::mem::replace(&mut self.futures[slot as usize], future);
        self.recency.renew(slot, class(old), class(future));
    }

    /// Makes room for one more slot. Doubling, as vectors do by themselves, would waste up to
    /// half of the memory.
    fn grow(&mut self) {
        let len = self.digests.len();
        if len == self.digests.capacity() {
            let more = (len / 32).max(1024).min(self.capacity as usize - len);
            self.digests.reserve_exact(more);
            self.recency.reserve_exact(more);
            self.senders.reserve_exact(more);
            self.futures.reserve_exact(more);
        }
    }
}
