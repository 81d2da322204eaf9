//! Keyed BLAKE3 of several pages side by side.
//!
//! Owns: which nodes of the pages' hash trees are computed in one call.
//! Must not: give any other result than [`blake3::keyed_hash`] of each page.
//!
//! A page has four chunks, so alone it fills four lanes of a vector unit that may have
//! sixteen. Here a lane is a page. The crate's stable interface takes one input at a time;
//! `platform` is its hidden module of vector kernels. It may change without notice: then this
//! does not compile or the tests, which compare with `keyed_hash`, fail.

use blake3::platform::{MAX_SIMD_DEGREE, Platform, words_from_le_bytes_32};
use blake3::{BLOCK_LEN, CHUNK_LEN, IncrementCounter, OUT_LEN};

use crate::{DigestKey, PAGE_BYTES, Page};

/// Pages in one call at most.
const PAGES_MAX: usize = if MAX_SIMD_DEGREE > PAGES_MIN {
    MAX_SIMD_DEGREE
} else {
    PAGES_MIN
};
/// A page alone fills as many lanes as fewer pages than this would.
const PAGES_MIN: usize = 4;

const CHUNKS: usize = PAGE_BYTES / CHUNK_LEN;
// The tree below is that of four chunks: two parents and a root.
const _: () = assert!(CHUNKS == 4 && BLOCK_LEN == 2 * OUT_LEN);

/// Node flags of the BLAKE3 specification, section 2.2.
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;

type Value = [u8; OUT_LEN];

/// Calls `sink` with the hash of each page, in order.
pub(crate) fn keyed_hashes(key: &DigestKey, pages: &[&Page], mut sink: impl FnMut(&Value)) {
    let kernel = Kernel {
        platform: Platform::detect(),
        key: words_from_le_bytes_32(&key.0),
    };
    for batch in pages.chunks(PAGES_MAX) {
        let (side_by_side, alone) = batch.split_at(batch.len() - batch.len() % PAGES_MIN);
        if !side_by_side.is_empty() {
            let mut roots = [[0; OUT_LEN]; PAGES_MAX];
            let roots = &mut roots[..side_by_side.len()];
            kernel.roots(side_by_side, roots);
            roots.iter().for_each(&mut sink);
        }
        for page in alone {
            sink(blake3::keyed_hash(&key.0, *page).as_bytes());
        }
    }
}

struct Kernel {
    platform: Platform,
    key: [u32; 8],
}

impl Kernel {
    /// The hash of each of up to [`PAGES_MAX`] pages.
    fn roots(&self, pages: &[&Page], roots: &mut [Value]) {
        // For each page its two parents' blocks: the values of their chunks.
        let mut blocks = [[0; BLOCK_LEN]; 2 * PAGES_MAX];
        let blocks = &mut blocks[..2 * pages.len()];
        let mut values = [[0; OUT_LEN]; 2 * PAGES_MAX];
        for number in 0..CHUNKS {
            let values = &mut values[..pages.len()];
            self.chunks(pages, number, values);
            for (of_page, value) in blocks.chunks_exact_mut(2).zip(values) {
                of_page[number / 2].as_chunks_mut().0[number % 2] = *value;
            }
        }
        let values = &mut values[..blocks.len()];
        self.parents(blocks, 0, values);
        self.parents(values.as_flattened().as_chunks().0, ROOT, roots);
    }

    /// The values of one chunk of each page.
    fn chunks(&self, pages: &[&Page], number: usize, values: &mut [Value]) {
        let inputs: [&[u8; CHUNK_LEN]; PAGES_MAX] = std::array::from_fn(|lane| {
            let page = pages[lane.min(pages.len() - 1)];
            &page.as_chunks().0[number]
        });
        self.platform.hash_many(
            &inputs[..pages.len()],
            &self.key,
            number as u64,
            IncrementCounter::No,
            KEYED_HASH,
            CHUNK_START,
            CHUNK_END,
            values.as_flattened_mut(),
        );
    }

    fn parents(&self, blocks: &[[u8; BLOCK_LEN]], root: u8, values: &mut [Value]) {
        let inputs: [&[u8; BLOCK_LEN]; 2 * PAGES_MAX] =
            std::array::from_fn(|lane| &blocks[lane.min(blocks.len() - 1)]);
        self.platform.hash_many(
            &inputs[..blocks.len()],
            &self.key,
            0,
            IncrementCounter::No,
            KEYED_HASH | PARENT | root,
            0,
            0,
            values.as_flattened_mut(),
        );
    }
}
