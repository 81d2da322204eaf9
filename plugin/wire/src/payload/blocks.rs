//! A page made of blocks: which come out of the window, and the bytes of the others.
//!
//! Owns: that such a page is well-formed: whole blocks of an allowed size, a source for each.
//! Must not: read the window.

use super::PAGE_BYTES;

/// Blocks a page has at most.
pub const BLOCKS_MAX: usize = 8;
/// Block sizes, as powers of two.
pub(super) const BLOCK_LOG2: std::ops::RangeInclusive<u8> = 9..=11;

/// A block of a page in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockReference {
    pub slot: u32,
    /// Which block of that page, from 0.
    pub index: u8,
}

/// Where a block's bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block<'a> {
    Literal(&'a [u8]),
    Reference(BlockReference),
}

/// The blocks of one page, in their order.
#[derive(Debug, Clone, Copy)]
pub struct PageBlocks<'a> {
    log2: u8,
    sources: [Option<BlockReference>; BLOCKS_MAX],
    bytes: &'a [u8],
    /// `bytes` are the whole page, not its literal blocks only.
    whole: bool,
}

impl<'a> PageBlocks<'a> {
    /// A page to be sent: for each of its blocks a source, or `None` where the bytes of `page`
    /// are to be sent. `None` for a size that is not 512, 1024 or 2048, a source beyond the
    /// last block, or an index that no block has.
    pub fn of_page(
        block_bytes: usize,
        sources: [Option<BlockReference>; BLOCKS_MAX],
        page: &'a [u8; PAGE_BYTES],
    ) -> Option<Self> {
        let log2 = BLOCK_LOG2
            .into_iter()
            .find(|log2| 1 << log2 == block_bytes)?;
        let count = PAGE_BYTES >> log2;
        let indexes = sources.iter().flatten().map(|source| source.index);
        (sources[count..].iter().all(Option::is_none)
            && indexes.into_iter().all(|index| usize::from(index) < count))
        .then_some(Self {
            log2,
            sources,
            bytes: page,
            whole: true,
        })
    }

    /// A page that was read: the caller has checked the sources and that `literals` has
    /// exactly the blocks without one.
    pub(super) fn of_parts(
        log2: u8,
        sources: [Option<BlockReference>; BLOCKS_MAX],
        literals: &'a [u8],
    ) -> Self {
        Self {
            log2,
            sources,
            bytes: literals,
            whole: false,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        1 << self.log2
    }

    pub(super) fn log2(&self) -> u8 {
        self.log2
    }

    /// The blocks, [`PAGE_BYTES`] in total.
    pub fn iter(&self) -> impl Iterator<Item = Block<'a>> + use<'a> {
        let Self {
            log2,
            sources,
            bytes,
            whole,
        } = *self;
        let mut literals = bytes.chunks_exact(1 << log2);
        (0..PAGE_BYTES >> log2).map(move |number| {
            let source = sources[number];
            // In a whole page a block that is referred to has bytes as well.
            let literal = (whole || source.is_none())
                .then(|| literals.next())
                .flatten();
            match source {
                Some(reference) => Block::Reference(reference),
                None => Block::Literal(literal.unwrap_or_default()),
            }
        })
    }
}

impl PartialEq for PageBlocks<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.log2 == other.log2 && self.iter().eq(other.iter())
    }
}

impl Eq for PageBlocks<'_> {}

/// Numbers of blocks in the window, for sending them as differences: `slot * blocks of a page
/// + index`. Both ends follow the same sequence.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct NextBlock {
    /// The block after the last one referred to, in blocks of the smallest size.
    position: u64,
}

impl NextBlock {
    /// Its number among blocks of this size.
    pub(super) fn number(self, log2: u8) -> u64 {
        self.position >> (log2 - *BLOCK_LOG2.start())
    }

    /// `number` is referred to, and with it the `count - 1` blocks behind it.
    pub(super) fn advance(&mut self, log2: u8, number: u64, count: usize) {
        self.position = (number + count as u64) << (log2 - *BLOCK_LOG2.start());
    }
}

pub(super) fn block_number(log2: u8, reference: BlockReference) -> u64 {
    u64::from(reference.slot) * (PAGE_BYTES as u64 >> log2) + u64::from(reference.index)
}

/// `None` beyond the last slot there can be.
pub(super) fn block_at(log2: u8, number: u64) -> Option<BlockReference> {
    let blocks = PAGE_BYTES as u64 >> log2;
    Some(BlockReference {
        slot: u32::try_from(number / blocks).ok()?,
        index: (number % blocks) as u8,
    })
}
