//! What the gang has already sent: page identity, the source's joint dedup map, the page
//! window that both ends keep equal, and ways to send a page that is nearly known.
//!
//! Owns: deciding that a page is known ([`DedupMap`]), keeping known contents
//! ([`PageWindow`]), finding pages and blocks that may serve a new page ([`PageHistory`],
//! [`SimilarityTable`], [`SubPageTable`]), and the difference of two pages ([`delta`]).
//! Must not: do I/O, know a clock or a thread, or draw random numbers (keys are given).
//!
//! Invariant: the source decides what enters and leaves a slot, the destination obeys. A
//! slot is referenced only after the define that filled it, in session order.

mod block_hash;
mod byte_mask;
mod census;
pub mod delta;
mod digest_batch;
mod expectation;
mod history;
mod map;
mod page;
mod recency;
mod similarity;
mod slot_cache;
mod snapshot;
mod subpage;
mod window;

pub use census::{Census, Content, PlaceOf, Shares};
pub use history::PageHistory;
pub use map::{DedupMap, Member, Verdict};
pub use page::{ContentTag, DigestKey, PageDigest, uniform_byte};
pub use similarity::{
    CANDIDATES_MAX, HashSimilarityDetector, SAMPLES_MAX, SIGNATURES_MAX, Signatures,
    SimilarityParameters, SimilarityTable,
};
pub use snapshot::{BlockSnapshot, Fingerprinter, PageState, Snapshot};
pub use subpage::{
    BLOCKS_MAX, BlockHasher, BlockHashes, BlockMatches, BlockReference, BlockSize, SubPageTable,
};
pub use window::{PageWindow, WindowError};

/// Bytes of a page, and of a window slot.
pub const PAGE_BYTES: usize = 4096;

/// The content of one page.
pub type Page = [u8; PAGE_BYTES];

/// A place in the page window, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// How many slots fit into a budget of bytes.
pub fn slots_in(budget_bytes: u64) -> u32 {
    // The last value is kept free as a list terminator of the map.
    u32::try_from(budget_bytes / PAGE_BYTES as u64)
        .unwrap_or(u32::MAX)
        .min(u32::MAX - 1)
}
