//! What the pages of a chunk are known by: the repeated byte of uniform ones, the digest of
//! the others, from the last scan if they are what they were then, and what finds pages like them.
//!
//! Owns: which techniques pay for one stream. Must not: look at anything but the chunk: chunks
//! of a stream are identified side by side.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmgang_dedup::{
    BlockHasher, DigestKey, HashSimilarityDetector, PAGE_BYTES, Page, PageDigest, uniform_byte,
};

use vmgang_wire::payload::Place;

use crate::Techniques;
use crate::chunk::{Chunk, Piece};
use crate::order::Identity;
use crate::scanned::{ScannedPages, Told};
use crate::trial::{HashTrial, NearTrial, ScanTrial, Trial};

/// Pages that are hashed side by side.
const BATCH_PAGES: usize = 16;

/// Pages waiting to be.
struct Batch<'a> {
    pages: [&'a Page; BATCH_PAGES],
    /// Their places among the identities.
    places: [usize; BATCH_PAGES],
    len: usize,
}

impl<'a> Batch<'a> {
    fn push(&mut self, page: &'a Page, place: usize) {
        if self.len < BATCH_PAGES {
            self.pages[self.len] = page;
            self.places[self.len] = place;
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
            places: [0; BATCH_PAGES],
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
    pub scan: ScanTrial,
}

/// Identifies the pages of one stream.
pub(crate) struct Identifier {
    techniques: Techniques,
    key: DigestKey,
    detector: Option<HashSimilarityDetector>,
    hasher: Option<BlockHasher>,
    scanned: Option<ScannedPages>,
    trials: Mutex<Trials>,
}

impl Identifier {
    pub(crate) fn new(
        key: DigestKey,
        techniques: Techniques,
        scanned: Option<ScannedPages>,
    ) -> Self {
        Self {
            scanned,
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
        // What is written to once is written to again.
        let mut scanned = self.scanned.as_ref().filter(|_| hashes && chunk.first_pass);
        if hashes {
            let mut trials = self.trials();
            scanned = scanned.filter(|_| trials.scan.on());
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
        let mut hash_batch = |batch: &mut Batch<'_>, identities: &mut Vec<Identity>| {
            digests.clear();
            PageDigest::of_many(&self.key, batch.pages(), digests);
            for (place, digest) in batch.places.iter().zip(&*digests) {
                identities[*place].digest = *digest;
            }
            batch.len = 0;
        };
        let identity = |page: &Page| {
            let signatures = detector.map(|detector| detector.signatures(page));
            Identity {
                digest: PageDigest([0; 16]),
                was: None,
                signatures,
                blocks: hasher.map(|hasher| hasher.hashes(page)),
                near: match near {
                    Near::All => true,
                    Near::Samples => signatures.is_some_and(|found| found.is_sample()),
                    Near::None => false,
                },
            }
        };
        // Pages that a scan was asked about, and those that it told.
        let mut told = (0, 0);
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
            if !*known {
                continue;
            }
            let mut identity = identity(page);
            if let (Some(scanned), Place::Record { address }) = (scanned, *place) {
                told.0 += 1;
                match scanned.tell(address / PAGE_BYTES as u64, page) {
                    Told::Same(digest) => {
                        told.1 += 1;
                        identity.digest = digest;
                        identities.push(identity);
                        continue;
                    }
                    Told::Was(digest) => identity.was = Some(digest),
                    Told::Nothing => {}
                }
            }
            batch.push(page, identities.len());
            identities.push(identity);
            if batch.len == BATCH_PAGES {
                hash_batch(&mut batch, identities);
            }
        }
        hash_batch(&mut batch, identities);
        if told.0 > 0 {
            self.trials().scan.count(told.0, told.1);
        }
    }
}
