//! Deltas and pages of blocks through the destination's decoder: invariants 1, 3 and 5. The
//! source half here is a small one of its own: it drives map, side tables and window as a
//! session does, and checks both windows against each other.

use proptest::prelude::*;
use vmgang_dedup::{
    BLOCKS_MAX, BlockHasher, BlockSize, DedupMap, DigestKey, HashSimilarityDetector, Member,
    PAGE_BYTES, Page, PageDigest, PageHistory, PageWindow, SimilarityParameters, SimilarityTable,
    Slot, SubPageTable, Verdict, delta,
};
use vmgang_wire::Data;
use vmgang_wire::payload::{BlockReference, Content, Costs, Encoder, PageBlocks, Place};

use super::{DecodeError, Decoder, WindowError};
use crate::buffers::Buffers;
use crate::frame_digest::FrameDigest;

const KEY: DigestKey = DigestKey([6; 32]);
/// Longer deltas are not worth it.
const DELTA_LIMIT: usize = PAGE_BYTES / 2;

/// Pages of few different blocks, changed at a few places: something for every technique.
fn page(content: u16) -> Page {
    let mut page = [0; PAGE_BYTES];
    for (index, block) in page.as_chunks_mut::<512>().0.iter_mut().enumerate() {
        let mut state = (u64::from(content) / 8 + index as u64 * u64::from(content % 2)) % 13 + 1;
        for byte in block {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
    }
    let at = usize::from(content) * 61 % (PAGE_BYTES - 2);
    page[at..at + 2].copy_from_slice(&content.to_le_bytes());
    page
}

struct Source {
    map: DedupMap,
    window: PageWindow,
    history: PageHistory,
    detector: HashSimilarityDetector,
    similar: SimilarityTable,
    hasher: BlockHasher,
    blocks: SubPageTable,
    sequence: u64,
}

impl Source {
    fn new(slots: u32, size: BlockSize) -> Self {
        let parameters = SimilarityParameters::DIFFERENCE_ENGINE;
        Self {
            map: DedupMap::new(slots),
            window: PageWindow::new(slots),
            history: PageHistory::new(slots.into()),
            detector: HashSimilarityDetector::new(&KEY, parameters),
            similar: SimilarityTable::new(slots, parameters),
            hasher: BlockHasher::new(&KEY, size),
            blocks: SubPageTable::new(slots, size),
            sequence: 0,
        }
    }

    fn page(&mut self, payload: &mut Encoder, place: Place, member: Member, page: &Page) {
        let number = match place {
            Place::Record { address } => address / PAGE_BYTES as u64,
            Place::Body => 0,
        };
        let digest = PageDigest::of(&KEY, page);
        let tag = digest.tag();
        if let Some(Verdict::Reference { slot, .. }) = self.map.refer(&digest) {
            self.history.record(member, number, slot, tag);
            let content = Content::Reference {
                slot: slot.0,
                group: 0,
            };
            payload.page(place, content);
            return;
        }
        let signatures = self.detector.signatures(page);
        let hashes = self.hasher.hashes(page);
        let found = self.blocks.find(&hashes, page, &self.map, &self.window);
        let bases: Vec<(Slot, Page)> = self
            .history
            .find(member, number, &self.map)
            .into_iter()
            .chain(self.similar.candidates(&signatures, &self.map))
            .map(|slot| {
                (
                    slot,
                    *self.window.get(slot).expect("a base is in the window"),
                )
            })
            .collect();
        let Verdict::Define { slot } = self.map.admit(digest, member) else {
            payload.page(place, Content::Literal(page));
            return;
        };
        self.window.define(slot, page).expect("within the budget");
        self.history.record(member, number, slot, tag);
        self.similar.insert(&signatures, slot, tag);
        self.blocks.insert(&hashes, slot, tag);
        let slot = slot.0;
        for (base, before) in bases {
            let mut out = Vec::new();
            if delta::encode(page, &before, DELTA_LIMIT, &mut out) {
                let content = Content::Delta {
                    slot,
                    base: base.0,
                    delta: &out,
                };
                payload.page(place, content);
                return;
            }
        }
        let mut sources = [None; BLOCKS_MAX];
        for (source, block) in sources.iter_mut().zip(found.blocks()) {
            *source = block.map(|block| BlockReference {
                slot: block.slot.0,
                index: block.index,
            });
        }
        let size = self.blocks.size().bytes();
        let content = match PageBlocks::of_page(size, sources, page) {
            Some(blocks) if found.matched() > 0 => Content::Blocks { slot, blocks },
            _ => Content::Define { slot, page },
        };
        payload.page(place, content);
    }

    /// One frame of pages, and the bytes it stands for.
    fn frame(
        &mut self,
        pages: &[(Option<u64>, Member, u16)],
        decode: impl FnOnce(&Data<'_>),
    ) -> (Vec<u8>, Costs) {
        let mut stream = Vec::new();
        let mut payload = Encoder::default();
        for (number, member, content) in pages {
            let content = page(*content);
            let place = match number {
                Some(number) => Place::Record {
                    address: number * PAGE_BYTES as u64,
                },
                None => Place::Body,
            };
            if let Place::Record { address } = place {
                vmgang_stream::rebuild::page_header(&mut stream, address);
            }
            stream.extend_from_slice(&content);
            self.page(&mut payload, place, *member, &content);
        }
        let mut bytes = Vec::new();
        let costs = payload.finish(&mut bytes);
        decode(&Data {
            sequence: self.sequence,
            stream_len: stream.len() as u32,
            digest: FrameDigest::new(&KEY).of(&stream),
            compression: vmgang_wire::Compression::None,
            payload: &bytes,
        });
        self.sequence += 1;
        (stream, costs)
    }
}

fn sizes() -> impl Strategy<Value = BlockSize> {
    prop_oneof![
        Just(BlockSize::B512),
        Just(BlockSize::B1024),
        Just(BlockSize::B2048)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn windows_are_equal_and_bytes_exact_with_every_operation(
        slots in 0u32..20,
        size in sizes(),
        frames in prop::collection::vec(
            prop::collection::vec((prop::option::of(0u64..12), 0u16..3, 0u16..200), 1..40),
            1..8,
        ),
    ) {
        let mut source = Source::new(slots, size);
        let mut decoder = Decoder::new(&KEY, u64::from(slots) * PAGE_BYTES as u64, Buffers::default()).unwrap();
        for pages in frames {
            let pages: Vec<_> = pages
                .into_iter()
                .map(|(number, member, content)| (number, Member(member), content))
                .collect();
            let mut decoded = Vec::new();
            let (stream, _) = source.frame(&pages, |data| decoded = decoder.decode(data).unwrap());
            prop_assert!(decoded == stream);
            for slot in (0..slots).map(Slot) {
                prop_assert!(source.window.get(slot) == decoder.window.get(slot), "{slot:?}");
            }
        }
    }

    #[test]
    fn a_mutated_frame_is_an_error_or_the_same_bytes(
        at in any::<prop::sample::Index>(),
        flip in 1u8..=255,
    ) {
        let mut source = Source::new(64, BlockSize::B1024);
        let mut decoder = Decoder::new(&KEY, 64 * PAGE_BYTES as u64, Buffers::default()).unwrap();
        for frame in 0..3u16 {
            let pages: Vec<_> = (0..20).map(|n| (Some(n), Member(0), n as u16 * 3 + frame)).collect();
            let mut decoded = None;
            let (stream, _) = source.frame(&pages, |data| {
                let mut payload = data.payload.to_vec();
                if frame == 2 {
                    let at = at.index(payload.len());
                    payload[at] ^= flip;
                }
                decoded = decoder.decode(&Data { payload: &payload, ..*data }).ok();
            });
            if let Some(decoded) = decoded {
                prop_assert!(decoded == stream);
            }
        }
    }
}

/// The same with a fixed input, so that a source that never finds a base cannot pass.
#[test]
fn every_operation_is_used_and_counted() {
    let mut source = Source::new(30, BlockSize::B512);
    let mut decoder = Decoder::new(&KEY, 30 * PAGE_BYTES as u64, Buffers::default()).unwrap();
    let mut total = Costs::default();
    for frame in 0..6u64 {
        let pages: Vec<_> = (0..40)
            .map(|number| {
                let content = (number * (7 + frame)) as u16 % 120;
                (Some(number), Member(0), content)
            })
            .collect();
        let (stream, costs) = source.frame(&pages, |data| {
            decoder.decode(data).unwrap();
        });
        assert_eq!(costs.total().stream, stream.len() as u64);
        for (sum, cost) in [
            (&mut total.delta, costs.delta),
            (&mut total.sub_page, costs.sub_page),
        ] {
            sum.stream += cost.stream;
            sum.payload += cost.payload;
        }
    }
    for cost in [total.delta, total.sub_page] {
        assert!(cost.stream > 20 * 4104, "{total:?}");
        assert!(cost.payload < cost.stream, "{total:?}");
    }
}

/// A frame of one page with this content, for a decoder with one slot.
fn decode_one(
    decoder: &mut Decoder,
    sequence: u64,
    content: Content<'_>,
    page: &Page,
) -> Result<Vec<u8>, DecodeError> {
    let mut payload = Encoder::default();
    payload.page(Place::Body, content);
    let mut bytes = Vec::new();
    payload.finish(&mut bytes);
    decoder.decode(&Data {
        sequence,
        stream_len: PAGE_BYTES as u32,
        digest: FrameDigest::new(&KEY).of(page),
        compression: vmgang_wire::Compression::None,
        payload: &bytes,
    })
}

#[test]
fn a_slot_may_be_its_own_base() {
    let mut decoder = Decoder::new(&KEY, PAGE_BYTES as u64, Buffers::default()).unwrap();
    let first = page(1);
    let define = Content::Define {
        slot: 0,
        page: &first,
    };
    decode_one(&mut decoder, 0, define, &first).unwrap();

    let mut second = first;
    second[100] ^= 1;
    let mut change = Vec::new();
    assert!(delta::encode(&second, &first, 10, &mut change));
    let content = Content::Delta {
        slot: 0,
        base: 0,
        delta: &change,
    };
    decode_one(&mut decoder, 1, content, &second).unwrap();

    // The two halves of the page change places: each is read before it is overwritten.
    let mut third = second;
    third.rotate_left(2048);
    let mut sources = [None; BLOCKS_MAX];
    sources[0] = Some(BlockReference { slot: 0, index: 1 });
    sources[1] = Some(BlockReference { slot: 0, index: 0 });
    let blocks = PageBlocks::of_page(2048, sources, &third).unwrap();
    decode_one(&mut decoder, 2, Content::Blocks { slot: 0, blocks }, &third).unwrap();
    assert!(decoder.window.get(Slot(0)) == Ok(&third));
}

#[test]
fn slots_that_are_empty_or_beyond_the_budget_are_errors() {
    let page = page(1);
    let mut sequence = 0..;
    let mut decoder = Decoder::new(&KEY, 2 * PAGE_BYTES as u64, Buffers::default()).unwrap();
    let mut error = |content: Content<'_>| {
        let sequence = sequence.next().unwrap();
        match decode_one(&mut decoder, sequence, content, &page) {
            Err(DecodeError::Window(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    let delta = |slot, base| Content::Delta {
        slot,
        base,
        delta: &[],
    };
    let block = |slot| {
        let mut sources = [None; BLOCKS_MAX];
        sources[1] = Some(BlockReference { slot, index: 0 });
        let blocks = PageBlocks::of_page(512, sources, &page).unwrap();
        Content::Blocks { slot: 1, blocks }
    };
    assert_eq!(error(delta(0, 1)), WindowError::Undefined(Slot(1)));
    assert_eq!(error(delta(0, 2)), WindowError::OutOfBudget(Slot(2)));
    assert_eq!(error(block(0)), WindowError::Undefined(Slot(0)));
    assert_eq!(
        error(block(u32::MAX)),
        WindowError::OutOfBudget(Slot(u32::MAX))
    );
    let far = Content::Define {
        slot: 2,
        page: &page,
    };
    assert_eq!(error(far), WindowError::OutOfBudget(Slot(2)));
}
