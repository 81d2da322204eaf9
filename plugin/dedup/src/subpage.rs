//! Sub-page dedup: blocks of a page that some page in the window has.
//!
//! Owns: the keyed hashes of a page's blocks ([`BlockHasher`]) and where a block was seen
//! ([`SubPageTable`]).
//! Must not: keep contents, or trust a hash: what it returns was compared with the window.
//!
//! Memory: 16 B a slot and block: 32 B a slot for blocks of 2048 bytes, 64 B for 1024, 128 B
//! for 512.

use crate::block_hash::{BlockKey, spread};
use crate::slot_cache::{Entry, SlotCache};
use crate::{ContentTag, DedupMap, DigestKey, PAGE_BYTES, Page, PageWindow, Slot};

/// Blocks a page has at most.
pub const BLOCKS_MAX: usize = 8;
/// Low bits of an entry's tag that hold the number of the block.
const INDEX_MASK: u32 = BLOCKS_MAX as u32 - 1;

/// How pages are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockSize {
    B512,
    B1024,
    B2048,
}

impl BlockSize {
    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::B512 => 512,
            Self::B1024 => 1024,
            Self::B2048 => 2048,
        }
    }

    /// Blocks of a page.
    pub fn blocks(self) -> usize {
        PAGE_BYTES / self.bytes()
    }

    /// The size with so many bytes, if there is one.
    pub fn of_bytes(bytes: usize) -> Option<Self> {
        [Self::B512, Self::B1024, Self::B2048]
            .into_iter()
            .find(|size| size.bytes() == bytes)
    }
}

/// A block of a page in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockReference {
    pub slot: Slot,
    /// Which block of that page, from 0.
    pub index: u8,
}

/// Hashes of a page's blocks; those of a smaller number of blocks come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockHashes([u64; BLOCKS_MAX]);

/// Hashes blocks. It does not change, so channels can each have a clone.
#[derive(Debug, Clone)]
pub struct BlockHasher {
    key: BlockKey,
    size: BlockSize,
}

impl BlockHasher {
    pub fn new(key: &DigestKey, size: BlockSize) -> Self {
        Self {
            key: BlockKey::new(key, "sub-page"),
            size,
        }
    }

    /// The hashes of a page's blocks.
    pub fn hashes(&self, page: &Page) -> BlockHashes {
        let mut hashes = BlockHashes::default();
        let blocks = page.chunks_exact(self.size.bytes());
        for (hash, block) in hashes.0.iter_mut().zip(blocks) {
            *hash = spread(self.key.hash(block, 0));
        }
        hashes
    }
}

/// What was found for each block of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockMatches {
    blocks: [Option<BlockReference>; BLOCKS_MAX],
    matched: usize,
}

impl BlockMatches {
    /// One for each block of a page; those beyond its number of blocks are `None`.
    pub fn blocks(&self) -> &[Option<BlockReference>; BLOCKS_MAX] {
        &self.blocks
    }

    /// Blocks that were found.
    pub fn matched(&self) -> usize {
        self.matched
    }
}

/// Where blocks were seen.
#[derive(Debug)]
pub struct SubPageTable {
    cache: SlotCache,
    size: BlockSize,
}

impl SubPageTable {
    /// A table for a window of `slots` slots.
    pub fn new(slots: u32, size: BlockSize) -> Self {
        Self {
            cache: SlotCache::new(u64::from(slots) * size.blocks() as u64),
            size,
        }
    }

    /// How pages are cut.
    pub fn size(&self) -> BlockSize {
        self.size
    }

    /// Bytes of memory the table may take.
    pub fn memory_bytes(&self) -> usize {
        self.cache.memory_bytes()
    }

    /// Remembers the blocks of a page that `slot` has from now on.
    pub fn insert(&mut self, hashes: &BlockHashes, slot: Slot, tag: ContentTag) {
        for (index, hash) in hashes.0[..self.size.blocks()].iter().enumerate() {
            let tag = (tag.0 & !INDEX_MASK) | index as u32;
            self.cache.insert(*hash, 1, Entry { slot, tag });
        }
    }

    /// Finds the blocks of `page`. `window` is the source's copy of the peer's window, as it
    /// is now: what is found is equal. Ask before the map gives the page a slot: blocks of
    /// the content that is replaced may be used, as the new content comes after all of them.
    pub fn find(
        &self,
        hashes: &BlockHashes,
        page: &Page,
        map: &DedupMap,
        window: &PageWindow,
    ) -> BlockMatches {
        let mut matches = BlockMatches::default();
        let mut before: Option<BlockReference> = None;
        let blocks = page.chunks_exact(self.size.bytes());
        for (number, block) in blocks.enumerate() {
            // The block after the last one found comes first: it costs no look-up here, and
            // nothing on the wire.
            let next = before.and_then(|last| {
                let index = last.index + 1;
                (usize::from(index) < self.size.blocks())
                    .then_some(BlockReference { index, ..last })
            });
            let found = next
                .filter(|next| self.is_equal(*next, block, window))
                .or_else(|| self.look_up(hashes.0[number], block, map, window));
            before = found;
            matches.matched += usize::from(found.is_some());
            matches.blocks[number] = found;
        }
        matches
    }

    fn look_up(
        &self,
        hash: u64,
        block: &[u8],
        map: &DedupMap,
        window: &PageWindow,
    ) -> Option<BlockReference> {
        self.cache.find(hash).find_map(|entry| {
            // The tag tells most entries that are not current without reading a page.
            let tag = map.tag(entry.slot)?;
            if (tag.0 ^ entry.tag) & !INDEX_MASK != 0 {
                return None;
            }
            let reference = BlockReference {
                slot: entry.slot,
                index: (entry.tag & INDEX_MASK) as u8,
            };
            self.is_equal(reference, block, window).then_some(reference)
        })
    }

    fn is_equal(&self, reference: BlockReference, block: &[u8], window: &PageWindow) -> bool {
        let start = usize::from(reference.index) * self.size.bytes();
        window
            .get(reference.slot)
            .is_ok_and(|page| page.get(start..start + self.size.bytes()) == Some(block))
    }
}
