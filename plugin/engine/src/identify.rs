//! What the pages of a chunk are known by: the repeated byte of uniform ones, the digest of
//! the others, and what finds pages like them.
//!
//! Owns: which techniques pay for one stream. Must not: look at anything but the chunk: chunks
//! of a stream are identified side by side.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmgang_dedup::{
    BlockHasher, DigestKey, HashSimilarityDetector, PAGE_BYTES, Page, PageDigest, uniform_byte,
};

use crate::Techniques;
use crate::chunk::{Chunk, Piece};
use crate::order::Identity;
use crate::trial::{HashTrial, NearTrial, Trial};

/// Pages that are hashed side by side.
const BATCH_PAGES: usize = 16;

/// Pages waiting to be.
struct Batch<'a> {
    pages: [&'a Page; BATCH_PAGES],
    len: usize,
}

impl<'a> Batch<'a> {
    fn push(&mut self, page: &'a Page) {
        if let Some(place) = self.pages.get_mut(self.len) {
            *place = page;
            self.len += 1;
        }
    }

    fn pages(&self) -> &[&'a Page] {
        &self.pages[..self.len]
    }
}

impl Default for Batch<'_> {
    fn default() -> Self {
        Self {
            pages: [&[0; PAGE_BYTES]; BATCH_PAGES],
            len: 0,
        }
    }
}

/// Which pages of a chunk are compared with others, and kept to be compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Near {
    None,
    /// Those that tell whether it would pay for all.
    Samples,
    All,
}

/// Which techniques pay for a stream.
#[derive(Debug, Default)]
pub(crate) struct Trials {
    pub page: HashTrial,
    /// Deltas, and blocks.
    pub near: NearTrial,
    pub sub_page: Trial,
}

/// Identifies the pages of one stream.
pub(crate) struct Identifier {
    techniques: Techniques,
    key: DigestKey,
    detector: Option<HashSimilarityDetector>,
    hasher: Option<BlockHasher>,
    trials: Mutex<Trials>,
}

impl Identifier {
    pub(crate) fn new(key: DigestKey, techniques: Techniques) -> Self {
        Self {
            detector: techniques
                .similar
                .map(|parameters| HashSimilarityDetector::new(&key, parameters)),
            hasher: techniques.sub_page.map(|size| BlockHasher::new(&key, size)),
            key,
            techniques,
            trials: Mutex::default(),
        }
    }

    pub(crate) fn trials(&self) -> MutexGuard<'_, Trials> {
        self.trials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills in uniform pieces and identities. A chunk without them is as good, but larger.
    pub(crate) fn identify(&self, chunk: &mut Chunk, scarce: bool) {
        chunk.identities.clear();
        chunk.sought = false;
        if chunk.pages == 0 {
            return;
        }
        let techniques = &self.techniques;
        let hashes = techniques.page && (techniques.rehash || chunk.first_pass);
        let mut samples_only = false;
        // Deltas to what a page was before are tried where time is no matter; it may be
        // written to later.
        let mut near = Near::None;
        let mut hasher = None;
        if hashes {
            let mut trials = self.trials();
            samples_only = scarce && trials.page.samples_only();
            let similar = match &self.detector {
                None => Near::None,
                Some(_) if scarce && trials.near.samples_only() => Near::Samples,
                Some(_) => Near::All,
            };
            let tries_blocks = self.hasher.is_some()
                && similar != Near::Samples
                && trials.sub_page.on(chunk.pages, scarce);
            hasher = self.hasher.as_ref().filter(|_| tries_blocks);
            near = if tries_blocks || !scarce {
                Near::All
            } else {
                similar
            };
            chunk.sought = similar != Near::None;
        }
        let detector = self.detector.as_ref().filter(|_| near != Near::None);
        let Chunk {
            bytes,
            pieces,
            identities,
            digests,
            ..
        } = chunk;
        let mut batch = Batch::default();
        let mut identify_batch = |batch: &mut Batch<'_>| {
            digests.clear();
            PageDigest::of_many(&self.key, batch.pages(), digests);
            let pages = batch.pages().iter().zip(&*digests);
            identities.extend(pages.map(|(page, digest)| {
                let signatures = detector.map(|detector| detector.signatures(page));
                Identity {
                    digest: *digest,
                    signatures,
                    blocks: hasher.map(|hasher| hasher.hashes(page)),
                    near: match near {
                        Near::All => true,
                        Near::Samples => signatures.is_some_and(|found| found.is_sample()),
                        Near::None => false,
                    },
                }
            }));
            batch.len = 0;
        };
        for piece in pieces {
            let Piece::Page {
                start,
                place,
                known,
            } = piece
            else {
                continue;
            };
            let page = Chunk::page(bytes, *start);
            if techniques.uniform
                && let Some(fill) = uniform_byte(page)
            {
                *piece = Piece::Uniform {
                    place: *place,
                    fill,
                };
                continue;
            }
            *known = hashes && (!samples_only || HashTrial::samples(page));
            if *known {
                batch.push(page);
            }
            if batch.len == BATCH_PAGES {
                identify_batch(&mut batch);
            }
        }
        identify_batch(&mut batch);
    }
}
