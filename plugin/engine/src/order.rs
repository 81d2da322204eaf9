//! What moves in one order over all channels of a session: sequence numbers, the joint dedup
//! map, and everything that must agree with what the peer's window holds at that moment.
//!
//! Owns: the source's copy of the peer's page window and the tables that find bases in it.
//! Must not: hash, compute a delta or compress: its lock is held once for each chunk, and
//! copies what is needed for that.
//!
//! Memory: a session that looks for bases keeps contents of the window here as well (those that may
//! be bases, or all if they are to outlive the session), and up to
//! 16 B a slot for history, 16 B for each signature of a page, and 32 to 128 B for its blocks.

use std::collections::HashMap;
use std::sync::Arc;

use vmgang_dedup::{
    BlockHashes, BlockMatches, Census, Content, DedupMap, Member, PAGE_BYTES, Page, PageDigest,
    PageHistory, PageState, PageWindow, Signatures, SimilarityTable, Slot, Snapshot, SubPageTable,
    Verdict,
};

use crate::Techniques;

/// What a page is known by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub digest: PageDigest,
    /// What a scan found in its place, if that has changed.
    pub was: Option<PageDigest>,
    pub signatures: Option<Signatures>,
    pub blocks: Option<BlockHashes>,
    /// Bases are looked for, and it is kept to be one.
    pub near: bool,
}

/// How a page is to be sent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Judgement {
    /// The peer has it.
    Reference { slot: Slot, first_sender: Member },
    /// It goes into a slot, in full, as a delta to one of the bases, or made of blocks.
    Define {
        slot: Slot,
        /// In [`Bases`]: the first, and how many.
        bases: (usize, usize),
        blocks: BlockMatches,
    },
    /// The window takes nothing.
    Send,
}

/// Pages of the window that deltas may be made to, copied while they are what they are.
#[derive(Debug, Default)]
pub(crate) struct Bases {
    slots: Vec<Slot>,
    pages: Vec<u8>,
}

impl Bases {
    pub(crate) fn clear(&mut self) {
        self.slots.clear();
        self.pages.clear();
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.pages.capacity()
    }

    fn push(&mut self, slot: Slot, page: &Page) {
        self.slots.push(slot);
        self.pages.extend_from_slice(page);
    }

    /// The bases of one page.
    pub(crate) fn of(&self, (first, count): (usize, usize)) -> impl Iterator<Item = (Slot, &Page)> {
        let slots = self.slots.get(first..first + count).unwrap_or(&[]);
        let pages = self.pages.get(first * PAGE_BYTES..).unwrap_or(&[]);
        let pages = pages
            .chunks_exact(PAGE_BYTES)
            .filter_map(<[u8]>::first_chunk);
        slots.iter().copied().zip(pages)
    }
}

/// Contents that a session leaves behind on its source, each once.
#[derive(Default)]
pub struct Remains {
    contents: HashMap<PageDigest, Slot>,
    window: Option<PageWindow>,
}

/// What it takes to find pages that are nearly known.
#[derive(Default)]
struct Near {
    window: Option<PageWindow>,
    history: Option<PageHistory>,
    similar: Option<SimilarityTable>,
    blocks: Option<SubPageTable>,
}

/// The order of one session.
pub(crate) struct SessionOrder {
    map: DedupMap,
    near: Near,
    /// Whatever gets a slot is kept here as well, for when the session is over.
    keeps_all: bool,
    /// By member: references made to its pages, and by its pages, since it last asked.
    earned: Vec<u32>,
    next_sequence: u64,
}

impl SessionOrder {
    /// `keeps_all`: not only what is looked for as a base.
    pub(crate) fn new(window_slots: u32, techniques: &Techniques, keeps_all: bool) -> Self {
        let mut near = Near::default();
        if techniques.needs_window() {
            near = Near {
                window: Some(match keeps_all {
                    true => PageWindow::new(window_slots),
                    false => PageWindow::sparse(window_slots),
                }),
                history: techniques
                    .delta
                    .then(|| PageHistory::new(u64::from(window_slots))),
                similar: techniques
                    .similar
                    .map(|parameters| SimilarityTable::new(window_slots, parameters)),
                blocks: techniques
                    .sub_page
                    .map(|size| SubPageTable::new(window_slots, size)),
            };
        }
        Self {
            map: DedupMap::new(window_slots),
            near,
            keeps_all,
            earned: Vec::new(),
            next_sequence: 0,
        }
    }

    /// The next place in the session: a frame must be sent for it.
    pub(crate) fn next_sequence(&mut self) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        sequence
    }

    /// Counts what is to be sent of each content, from what the members' pages were when they
    /// were scanned.
    pub(crate) fn expect(&mut self, census: &Census) {
        for content in census.contents() {
            self.map.expect(content.digest, content.pages);
        }
    }

    /// The same for contents that are to be staged; no others are expected.
    pub(crate) fn want(&mut self, contents: &[Content]) {
        let held: Vec<PageDigest> = self.map.contents().map(|(digest, _)| digest).collect();
        for digest in held {
            self.map.expect(digest, 0);
        }
        for content in contents {
            self.map.expect(content.digest, content.pages);
        }
    }

    /// The members have sent their pages once: what they send now nobody has counted.
    pub(crate) fn clear_expectations(&mut self) {
        self.map.clear_expectations();
    }

    /// Whether the peer has a content.
    pub(crate) fn has(&self, digest: &PageDigest) -> bool {
        self.map.has(digest)
    }

    /// See [`DedupMap::adopt`].
    pub(crate) fn adopt(&mut self, digests: &[PageDigest]) {
        self.map.adopt(digests);
    }

    /// See [`DedupMap::offer`].
    pub(crate) fn offer(&mut self, digest: PageDigest) -> Option<Slot> {
        self.map.offer(digest)
    }

    /// See [`DedupMap::answered`].
    pub(crate) fn answered(&mut self, slot: Slot, has: bool) -> bool {
        self.map.answered(slot, has)
    }

    /// The slot for a page that is staged, if there is any use in that: the peer does not have it,
    /// and the window has room.
    pub(crate) fn stage(&mut self, identity: &Identity, page: &Page) -> Option<Slot> {
        if self.map.has(&identity.digest) {
            return None;
        }
        match self.map.admit(identity.digest, Member::STAGED) {
            Verdict::Define { slot } => {
                self.near.define(&self.map, slot, identity, page);
                Some(slot)
            }
            Verdict::Send | Verdict::Reference { .. } => None,
        }
    }

    /// What was staged becomes the beginning of a session: `snapshots`, by member, say what each
    /// page was, so that its next content can be a delta to that.
    pub(crate) fn begin(&mut self, snapshots: &[Option<Arc<Snapshot>>]) {
        self.next_sequence = 0;
        self.earned.clear();
        let Self { map, near, .. } = self;
        if near.history.is_none() {
            return;
        }
        for (member, snapshot) in snapshots.iter().enumerate() {
            let blocks = snapshot.iter().flat_map(|snapshot| snapshot.blocks());
            // The stream does not tell blocks apart; the largest is what counts.
            let Some(block) = blocks.max_by_key(|block| block.pages()) else {
                continue;
            };
            for page in 0..block.pages() {
                if let PageState::Content(digest) = block.state(page)
                    && let Some(slot) = map.slot(&digest)
                {
                    near.record(map, Member(member as u16), Some(page as u64), slot);
                }
            }
        }
    }

    /// What the peer had at the end, and this side has as well.
    pub(crate) fn into_remains(self) -> Option<Remains> {
        let window = self.near.window?;
        let contents = self.map.contents();
        let here = contents.filter(|(_, slot)| window.get(*slot).is_ok());
        Some(Remains {
            contents: here.collect(),
            window: Some(window),
        })
    }

    /// How many references were made by or to this member's pages since the last call.
    pub(crate) fn take_earned(&mut self, member: Member) -> u32 {
        let index = usize::from(member.0);
        if index >= self.earned.len() {
            self.earned.resize(index + 1, 0);
        }
        std::mem::take(&mut self.earned[index])
    }

    /// Judges the next page of the session; `page_number` is where the member has it.
    pub(crate) fn judge(
        &mut self,
        member: Member,
        page_number: Option<u64>,
        identity: &Identity,
        page: &Page,
        bases: &mut Bases,
    ) -> Judgement {
        let keep = identity.near;
        let keeps_all = self.keeps_all;
        let Self {
            map, near, earned, ..
        } = self;
        if let Some(was) = identity.was {
            map.retract(was);
        }
        if let Some(Verdict::Reference { slot, first_sender }) = map.refer(&identity.digest) {
            for of in [Some(member), Some(first_sender).filter(|of| *of != member)] {
                if let Some(earned) = of.and_then(|of| earned.get_mut(usize::from(of.0))) {
                    *earned += 1;
                }
            }
            if keep {
                near.record(map, member, page_number, slot);
            }
            return Judgement::Reference { slot, first_sender };
        }
        let first = bases.slots.len();
        let blocks = match keep {
            true => near.find(map, member, page_number, identity, page, bases),
            false => BlockMatches::default(),
        };
        let count = bases.slots.len() - first;
        match map.admit(identity.digest, member) {
            Verdict::Define { slot } => {
                if keep {
                    near.define(map, slot, identity, page);
                    near.record(map, member, page_number, slot);
                } else {
                    near.replace(slot, page, keeps_all);
                }
                Judgement::Define {
                    slot,
                    bases: (first, count),
                    blocks,
                }
            }
            // `admit` comes after `refer` found nothing.
            Verdict::Send | Verdict::Reference { .. } => Judgement::Send,
        }
    }
}

impl Remains {
    /// Contents there are.
    pub fn len(&self) -> usize {
        self.contents.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.contents.is_empty()
    }

    /// Bytes of memory they take.
    pub fn memory_bytes(&self) -> u64 {
        (self.contents.len() * (PAGE_BYTES + 2 * size_of::<(PageDigest, Slot)>())) as u64
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&PageDigest, &Page)> {
        let window = self.window.as_ref();
        let page = move |slot: &Slot| window?.get(*slot).ok();
        let contents = self.contents.iter();
        contents.filter_map(move |(digest, slot)| Some((digest, page(slot)?)))
    }

    /// The page with this digest.
    pub fn get(&self, digest: &PageDigest) -> Option<&Page> {
        let slot = self.contents.get(digest)?;
        self.window.as_ref()?.get(*slot).ok()
    }
}

impl std::fmt::Debug for Remains {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remains")
            .field("contents", &self.len())
            .finish_non_exhaustive()
    }
}

impl Near {
    /// Finds what the page may be made of, as the window is before the page gets its slot.
    fn find(
        &self,
        map: &DedupMap,
        member: Member,
        page_number: Option<u64>,
        identity: &Identity,
        page: &Page,
        bases: &mut Bases,
    ) -> BlockMatches {
        let Some(window) = &self.window else {
            return BlockMatches::default();
        };
        let first = bases.slots.len();
        let own = match (&self.history, page_number) {
            (Some(history), Some(number)) => history.find(member, number, map),
            _ => None,
        };
        let similar = match (&self.similar, &identity.signatures) {
            (Some(table), Some(signatures)) => Some(table.candidates(signatures, map)),
            _ => None,
        };
        for slot in own.into_iter().chain(similar.into_iter().flatten()) {
            if !bases.slots[first..].contains(&slot)
                && let Ok(base) = window.get(slot)
            {
                bases.push(slot, base);
            }
        }
        match (&self.blocks, &identity.blocks) {
            (Some(table), Some(hashes)) => table.find(hashes, page, map, window),
            _ => BlockMatches::default(),
        }
    }

    /// The slot has another content, which nobody looks for as a base.
    fn replace(&mut self, slot: Slot, page: &Page, keep: bool) {
        let Some(window) = &mut self.window else {
            return;
        };
        // Where there is no memory for it, it is only not kept.
        if !keep || window.define(slot, page).is_err() {
            window.forget(slot);
        }
    }

    fn define(&mut self, map: &DedupMap, slot: Slot, identity: &Identity, page: &Page) {
        let (Some(window), Some(tag)) = (&mut self.window, map.tag(slot)) else {
            return;
        };
        if let Err(error) = window.define(slot, page) {
            tracing::warn!(%error, "deltas and sub-page dedup are off for the rest of this job");
            *self = Near::default();
            return;
        }
        if let (Some(table), Some(signatures)) = (&mut self.similar, &identity.signatures) {
            table.insert(signatures, slot, tag);
        }
        if let (Some(table), Some(hashes)) = (&mut self.blocks, &identity.blocks) {
            table.insert(hashes, slot, tag);
        }
    }

    fn record(&mut self, map: &DedupMap, member: Member, page_number: Option<u64>, slot: Slot) {
        if let (Some(history), Some(number), Some(tag)) =
            (&mut self.history, page_number, map.tag(slot))
        {
            history.record(member, number, slot, tag);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also of pages that nobody has the time to compare with others.
    #[test]
    fn what_gets_a_slot_remains_if_it_is_to() {
        for keeps_all in [true, false] {
            let mut order = SessionOrder::new(2, &Techniques::DEFAULT, keeps_all);
            for content in 1..=3 {
                let identity = Identity {
                    digest: PageDigest([content; 16]),
                    was: None,
                    signatures: None,
                    blocks: None,
                    near: content == 2,
                };
                let page = [content; PAGE_BYTES];
                order.judge(Member(0), Some(1), &identity, &page, &mut Bases::default());
            }
            let remains = order.into_remains().expect("it has a window");
            let content = |content: u8| remains.get(&PageDigest([content; 16])).map(|page| page[0]);
            assert_eq!(content(1), None, "it has given way");
            assert_eq!(content(2), Some(2), "it may be a base");
            assert_eq!(content(3), keeps_all.then_some(3));
        }
    }
}
