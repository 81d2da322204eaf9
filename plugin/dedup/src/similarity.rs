//! Similar pages: HashSimilarityDetector(k, s, c) of Difference Engine (Gupta et al., OSDI
//! 2008, section 4.2), which the gang migration of HPDC 2011 uses to find bases for deltas.
//!
//! Owns: the fixed positions and the signatures of a page ([`HashSimilarityDetector`]), and
//! which slot had such a signature ([`SimilarityTable`]).
//! Must not: keep contents, or promise similarity. A candidate is a guess; a wrong one costs
//! the time of a delta that does not fit its limit.
//!
//! A candidate whose slot was redefined since is recognised by its content's tag and not
//! returned, but for one in 2^32, which is one wrong guess more.
//!
//! Memory: 16 B a slot and signature: 16 B a slot with (1,1,1), 32 B with (2,1,1).

use crate::block_hash::{BlockKey, spread};
use crate::slot_cache::{Entry, SlotCache};
use crate::{ContentTag, DedupMap, DigestKey, PAGE_BYTES, Page, Slot};

/// Bytes hashed at a position.
const SAMPLE_BYTES: usize = 64;
const SAMPLES_IN_PAGE: usize = PAGE_BYTES / SAMPLE_BYTES;
const SAMPLE_WORDS: usize = SAMPLE_BYTES / 8;

/// Signatures a page may have.
pub const SIGNATURES_MAX: usize = 4;
/// Hashes a signature may consist of.
pub const SAMPLES_MAX: usize = 8;
/// Candidates a signature may have.
pub const CANDIDATES_MAX: usize = 4;

/// k, s and c: how many signatures a page has, of how many hashes each, and how many pages
/// are remembered for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimilarityParameters {
    signatures: usize,
    samples: usize,
    candidates: usize,
}

impl SimilarityParameters {
    /// (1,1,1), the choice of HPDC 2011: nearly the savings of (2,1,1) in less time (its
    /// table 1).
    pub const HPDC_2011: Self = Self {
        signatures: 1,
        samples: 1,
        candidates: 1,
    };
    /// (2,1,1), the choice of Difference Engine: a second independent block helps, more
    /// blocks or candidates hardly do.
    pub const DIFFERENCE_ENGINE: Self = Self {
        signatures: 2,
        samples: 1,
        candidates: 1,
    };

    /// `None` for a zero or more than the maximum of each.
    pub fn new(signatures: usize, samples: usize, candidates: usize) -> Option<Self> {
        ((1..=SIGNATURES_MAX).contains(&signatures)
            && (1..=SAMPLES_MAX).contains(&samples)
            && (1..=CANDIDATES_MAX).contains(&candidates))
        .then_some(Self {
            signatures,
            samples,
            candidates,
        })
    }

    /// k.
    pub fn signatures(&self) -> usize {
        self.signatures
    }

    /// s.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// c.
    pub fn candidates(&self) -> usize {
        self.candidates
    }
}

/// The signatures of one page. 0: none, the sampled blocks say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Signatures([u64; SIGNATURES_MAX]);

/// One in so many signatures is a sample.
const SAMPLED: u64 = 16;

impl Signatures {
    /// Whether this page is among those that stand for all of them. Pages that share a signature
    /// are samples together, so similar ones are found among samples as often as among all.
    pub fn is_sample(&self) -> bool {
        // The bits that say where a signature has its place in the table are others.
        (self.0[0] >> 32) % SAMPLED == 1
    }
}

/// Takes signatures of pages. It does not change, so channels can each have a clone.
#[derive(Debug, Clone)]
pub struct HashSimilarityDetector {
    parameters: SimilarityParameters,
    /// Which samples of a page are hashed; the first `k * s` count.
    positions: [u8; SIGNATURES_MAX * SAMPLES_MAX],
    key: BlockKey,
}

impl HashSimilarityDetector {
    /// Positions and hash follow from the seed.
    pub fn new(seed: &DigestKey, parameters: SimilarityParameters) -> Self {
        // The first places of a shuffled list: each position at most once.
        let mut samples: [u8; SAMPLES_IN_PAGE] = std::array::from_fn(|index| index as u8);
        let mut stream = blake3::Hasher::new_keyed(&seed.0)
            .update(b"similarity positions")
            .finalize_xof();
        let mut positions = [0; SIGNATURES_MAX * SAMPLES_MAX];
        for (at, position) in positions.iter_mut().enumerate() {
            let mut random = [0; 8];
            stream.fill(&mut random);
            let left = (SAMPLES_IN_PAGE - at) as u64;
            samples.swap(at, at + (u64::from_le_bytes(random) % left) as usize);
            *position = samples[at];
        }
        Self {
            parameters,
            positions,
            key: BlockKey::new(seed, "similarity"),
        }
    }

    /// What the detector was made with.
    pub fn parameters(&self) -> SimilarityParameters {
        self.parameters
    }

    /// Offsets of the sampled blocks in a page.
    pub fn positions(&self) -> impl Iterator<Item = usize> + '_ {
        let used = self.parameters.signatures * self.parameters.samples;
        self.positions[..used]
            .iter()
            .map(|position| usize::from(*position) * SAMPLE_BYTES)
    }

    /// The signatures of a page.
    pub fn signatures(&self, page: &Page) -> Signatures {
        let mut signatures = Signatures::default();
        let (samples, _) = page.as_chunks::<SAMPLE_BYTES>();
        let groups = self.positions.chunks(self.parameters.samples);
        let wanted = signatures.0[..self.parameters.signatures].iter_mut();
        for (number, (signature, group)) in wanted.zip(groups).enumerate() {
            let mut hash = spread(number as u64);
            let mut says_something = false;
            for (index, position) in group.iter().enumerate() {
                let sample = &samples[usize::from(*position)];
                says_something |= sample[8..] != sample[..SAMPLE_BYTES - 8];
                hash = hash.wrapping_add(self.key.hash(sample, index * SAMPLE_WORDS));
            }
            if says_something {
                *signature = spread(hash).max(1);
            }
        }
        signatures
    }
}

/// Which slots had pages with which signatures.
#[derive(Debug)]
pub struct SimilarityTable {
    cache: SlotCache,
    candidates: usize,
}

impl SimilarityTable {
    /// A table for a window of `slots` slots.
    pub fn new(slots: u32, parameters: SimilarityParameters) -> Self {
        Self {
            cache: SlotCache::new(u64::from(slots) * parameters.signatures as u64),
            candidates: parameters.candidates,
        }
    }

    /// Bytes of memory the table may take.
    pub fn memory_bytes(&self) -> usize {
        self.cache.memory_bytes()
    }

    /// Remembers a page that `slot` has from now on.
    pub fn insert(&mut self, signatures: &Signatures, slot: Slot, tag: ContentTag) {
        for signature in signatures.0.iter().filter(|signature| **signature != 0) {
            let entry = Entry { slot, tag: tag.0 };
            self.cache.insert(*signature, self.candidates, entry);
        }
    }

    /// Slots with pages that may be similar, at most k times c. A slot comes once for each
    /// signature it shares. Ask before the map gives the page a slot: the best base may sit
    /// in the slot that is replaced.
    pub fn candidates<'a>(
        &'a self,
        signatures: &'a Signatures,
        map: &'a DedupMap,
    ) -> impl Iterator<Item = Slot> + 'a {
        let known = signatures.0.iter().filter(|signature| **signature != 0);
        known
            .flat_map(|signature| self.cache.find(*signature))
            .filter(|entry| map.tag(entry.slot) == Some(ContentTag(entry.tag)))
            .map(|entry| entry.slot)
    }
}
