//! Payloads: what is encoded is what is decoded; hostile payloads end in an error, not in
//! a panic or an allocation; costs add up.

use proptest::prelude::*;
use vmgang_wire::payload::{
    BLOCKS_MAX, BlockReference, Content, Costs, DELTA_BYTES_MAX, Encoder, Operation, Operations,
    PAGE_BYTES, PageBlocks, Place,
};

#[derive(Debug, Clone)]
enum Step {
    Opaque(Vec<u8>),
    Zero(u64, u8),
    Address(u64),
    Page {
        record: Option<u64>,
        content: u8,
        slot: u32,
        tag: u8,
    },
    Delta {
        record: Option<u64>,
        slot: u32,
        base: u32,
        len: usize,
    },
    Blocks {
        record: Option<u64>,
        slot: u32,
        size: usize,
        sources: [Option<BlockReference>; BLOCKS_MAX],
    },
}

fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..20, Just((1 << 52) - 1), 0u64..(1 << 52)]
}

fn slots() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..20, any::<u32>()]
}

/// Sources for each of the blocks: some follow each other, some do not.
fn sources(size: usize) -> impl Strategy<Value = [Option<BlockReference>; BLOCKS_MAX]> {
    let count = PAGE_BYTES / size;
    let one = prop::option::of((slots(), 0..count as u8, any::<bool>()));
    prop::collection::vec(one, count).prop_map(move |found| {
        let mut sources: [Option<BlockReference>; BLOCKS_MAX] = [None; BLOCKS_MAX];
        for (number, found) in found.into_iter().enumerate() {
            let before = number.checked_sub(1).and_then(|before| sources[before]);
            sources[number] = found.map(|(slot, index, follows)| match before {
                Some(before) if follows && usize::from(before.index) + 1 < count => {
                    BlockReference {
                        index: before.index + 1,
                        ..before
                    }
                }
                Some(before) if follows => BlockReference {
                    slot: before.slot.saturating_add(1),
                    index: 0,
                },
                _ => BlockReference { slot, index },
            });
        }
        sources
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 1..50).prop_map(Step::Opaque),
        (pages(), prop_oneof![Just(0u8), any::<u8>()]).prop_map(|(p, f)| Step::Zero(p << 12, f)),
        pages().prop_map(|p| Step::Address(p << 12)),
        (prop::option::of(pages()), 0u8..4, slots(), any::<u8>()).prop_map(
            |(page, content, slot, tag)| Step::Page {
                record: page.map(|page| page << 12),
                content,
                slot,
                tag,
            }
        ),
        (
            prop::option::of(pages()),
            slots(),
            slots(),
            prop_oneof![0usize..300, Just(DELTA_BYTES_MAX)],
        )
            .prop_map(|(page, slot, base, len)| Step::Delta {
                record: page.map(|page| page << 12),
                slot,
                base,
                len,
            }),
        (
            prop::option::of(pages()),
            slots(),
            prop_oneof![Just(512usize), Just(1024), Just(2048)]
                .prop_flat_map(|size| sources(size).prop_map(move |sources| (size, sources))),
        )
            .prop_map(|(page, slot, (size, sources))| Step::Blocks {
                record: page.map(|page| page << 12),
                slot,
                size,
                sources,
            }),
    ]
}

/// Steps with sequential stretches, as real streams have.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((step(), 1usize..5), 0..60).prop_map(|runs| {
        let mut steps = Vec::new();
        for (step, count) in runs {
            for i in 0..count as u64 {
                steps.push(match step.clone() {
                    Step::Opaque(bytes) => Step::Opaque(bytes),
                    Step::Address(address) => {
                        Step::Address(address.saturating_add(i << 12) & !0xfff)
                    }
                    Step::Zero(address, fill) => {
                        Step::Zero(address.saturating_add(i << 12) & !0xfff, fill)
                    }
                    Step::Page {
                        record,
                        content,
                        slot,
                        tag,
                    } => Step::Page {
                        record: record.map(|a| a.saturating_add(i << 12) & !0xfff),
                        content,
                        slot: slot.saturating_add(i as u32),
                        tag,
                    },
                    Step::Delta {
                        record,
                        slot,
                        base,
                        len,
                    } => Step::Delta {
                        record: record.map(|a| a.saturating_add(i << 12) & !0xfff),
                        slot: slot.saturating_add(i as u32),
                        base: base.saturating_add(i as u32 / 2),
                        len,
                    },
                    Step::Blocks {
                        record,
                        slot,
                        size,
                        sources,
                    } => Step::Blocks {
                        record: record.map(|a| a.saturating_add(i << 12) & !0xfff),
                        slot: slot.saturating_add(i as u32),
                        size,
                        sources,
                    },
                });
            }
        }
        steps
    })
}

fn place(record: Option<u64>) -> Place {
    match record {
        Some(address) => Place::Record { address },
        None => Place::Body,
    }
}

fn operation<'a>(step: &'a Step, page: &'a [u8; PAGE_BYTES]) -> Operation<'a> {
    match step {
        Step::Opaque(bytes) => Operation::Opaque(bytes),
        Step::Zero(address, fill) => Operation::Zero {
            address: *address,
            fill: *fill,
        },
        Step::Address(address) => Operation::Address { address: *address },
        Step::Page {
            record,
            content,
            slot,
            tag,
        } => Operation::Page {
            place: place(*record),
            content: match content {
                0 => Content::Literal(page),
                1 => Content::Define { slot: *slot, page },
                2 => Content::Reference {
                    slot: *slot,
                    group: 0,
                },
                _ => Content::Uniform { fill: *tag },
            },
        },
        Step::Delta {
            record,
            slot,
            base,
            len,
        } => Operation::Page {
            place: place(*record),
            content: Content::Delta {
                slot: *slot,
                base: *base,
                delta: &page[..*len],
            },
        },
        Step::Blocks {
            record,
            slot,
            size,
            sources,
        } => Operation::Page {
            place: place(*record),
            content: Content::Blocks {
                slot: *slot,
                blocks: PageBlocks::of_page(*size, *sources, page).expect("well-formed"),
            },
        },
    }
}

/// The payload of the operations, from an encoder that was used before.
fn encode(operations: &[Operation<'_>]) -> (Vec<u8>, Costs) {
    let mut encoder = Encoder::default();
    encoder.page(Place::Body, Content::Uniform { fill: 1 });
    let delta = Content::Delta {
        slot: 5,
        base: 6,
        delta: b"abc",
    };
    encoder.page(Place::Body, delta);
    encoder.clear();
    for operation in operations {
        match *operation {
            Operation::Opaque(bytes) => encoder.opaque(bytes),
            Operation::Zero { address, fill } => encoder.zero(address, fill),
            Operation::Address { address } => encoder.addresses(address, 1),
            Operation::Page { place, content } => encoder.page(place, content),
            Operation::Keep { .. } => unreachable!("no step is one"),
        }
    }
    let mut payload = Vec::new();
    let costs = encoder.finish(&mut payload);
    (payload, costs)
}

/// Decodes until the first error, but not for ever: a run may claim billions of records. The
/// engine stops at the announced stream length, so does this.
fn decode_at_most(payload: &[u8]) {
    let Ok(operations) = Operations::new(payload) else {
        return;
    };
    for operation in operations.take(10_000) {
        let Ok(operation) = operation else { break };
        if let Operation::Page {
            content: Content::Blocks { blocks, .. },
            ..
        } = operation
        {
            let block = blocks.block_bytes();
            assert_eq!(blocks.iter().count() * block, PAGE_BYTES);
        }
    }
}

proptest! {
    #[test]
    fn operations_come_back_and_costs_add_up(steps in steps()) {
        let pages: Vec<[u8; PAGE_BYTES]> = steps
            .iter()
            .map(|step| match step {
                Step::Page { tag, .. } => [*tag; PAGE_BYTES],
                _ => [0; PAGE_BYTES],
            })
            .collect();
        let operations: Vec<_> =
            steps.iter().zip(&pages).map(|(step, page)| operation(step, page)).collect();
        let (payload, costs) = encode(&operations);
        let decoded: Result<Vec<_>, _> = Operations::new(&payload).unwrap().collect();
        prop_assert_eq!(decoded.unwrap(), operations.clone());

        let stream: usize = operations.iter().map(Operation::stream_len).sum();
        prop_assert_eq!(costs.total().stream, stream as u64);
        let length_field = payload.len() as u64 - costs.total().payload;
        prop_assert!((1..=10).contains(&length_field), "{}", length_field);
        // Each kind pays for itself.
        let of = |wanted: fn(&Content<'_>) -> bool| {
            let counted = operations.iter().filter(|operation| {
                matches!(operation, Operation::Page { content, .. } if wanted(content))
            });
            counted.map(Operation::stream_len).sum::<usize>() as u64
        };
        prop_assert_eq!(costs.delta.stream, of(|c| matches!(c, Content::Delta { .. })));
        prop_assert_eq!(costs.sub_page.stream, of(|c| matches!(c, Content::Blocks { .. })));
    }

    #[test]
    fn arbitrary_payloads_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        decode_at_most(&bytes);
    }

    #[test]
    fn payloads_cut_short_or_changed_do_not_panic(
        steps in steps(),
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
    ) {
        let page = [0x5a; PAGE_BYTES];
        let operations: Vec<_> = steps.iter().map(|step| operation(step, &page)).collect();
        let (mut payload, _) = encode(&operations);
        // Most errors are to be made among the operations, which come first.
        let at = at.index(payload.len().min(400));
        let cut = Operations::new(&payload[..at]).and_then(|read| read.collect::<Result<Vec<_>, _>>());
        prop_assert!(cut.is_err());
        payload[at] ^= flip;
        decode_at_most(&payload);
    }
}

proptest! {
    #[test]
    fn pages_are_kept_where_they_lie(
        stream in prop::collection::vec(any::<u8>(), 1..40_000),
        kept in prop::collection::vec((0usize..9000, slots()), 0..6),
        cut in 1usize..4096,
    ) {
        let mut encoder = Encoder::default();
        encoder.opaque(b"before");
        encoder.keep(0, 1);
        encoder.clear();
        encoder.passed(stream.len());
        let mut expected = vec![Operation::Opaque(&stream)];
        let mut at = 0;
        for (skip, slot) in kept {
            let Some(page) = stream.get(at + skip..).and_then(|rest| rest.first_chunk()) else {
                break;
            };
            encoder.keep(at + skip, slot);
            expected.push(Operation::Keep { slot, page });
            at += skip + PAGE_BYTES;
        }
        prop_assert_eq!(encoder.literal_bytes(), stream.len());
        let mut payload = Vec::new();
        let costs = encoder.finish(&mut payload);
        let head = payload.len();
        payload.extend_from_slice(&stream);
        prop_assert_eq!(costs.total().stream, stream.len() as u64);
        // The length in front takes one byte.
        prop_assert_eq!(costs.total().payload, payload.len() as u64 - 1);
        let decoded: Result<Vec<_>, _> = Operations::new(&payload).unwrap().collect();
        prop_assert_eq!(decoded.unwrap(), expected);
        // A page that ends beyond the literals is none.
        payload.truncate(payload.len().saturating_sub(cut).max(head));
        let read = Operations::new(&payload).and_then(|read| read.collect::<Result<Vec<_>, _>>());
        prop_assert!(read.is_err());
    }
}

/// Page after page out of the same bytes would be work without bound.
#[test]
fn kept_pages_do_not_overlap() {
    // Opaque bytes, and two pages of them with nothing skipped.
    let two_pages = [&[8, 0, 0x81, 0x40, 8, 2, 0, 0, 0], &[7; 8193][..]].concat();
    let read: Result<Vec<_>, _> = Operations::new(&two_pages).unwrap().collect();
    assert_eq!(read.unwrap().len(), 3);
    let too_short = [&[8, 0, 0xff, 0x3f, 8, 2, 0, 0, 0], &[7; 8191][..]].concat();
    let read: Vec<_> = Operations::new(&too_short).unwrap().collect();
    assert_eq!(read.len(), 3);
    assert!(read[2].is_err(), "{:?}", read[2]);
}

#[test]
fn a_run_of_zero_pages_costs_a_few_bytes() {
    let mut encoder = Encoder::default();
    for i in 0..100_000u64 {
        encoder.zero(i * 4096, 0);
    }
    let mut payload = Vec::new();
    let costs = encoder.finish(&mut payload);
    assert!(payload.len() < 10, "{}", payload.len());
    assert_eq!(costs.zero.stream, 900_000);
}

#[test]
fn runs_of_zero_pages_are_written_like_their_records() {
    // The second goes on with the first, the others do not.
    let runs = [
        (0, 7, 20),
        (20, 7, 1),
        (21, 8, 3),
        (30, 8, 2),
        (30, 8, 0),
        (32, 8, 300),
    ];
    let mut by_run = Encoder::default();
    let mut by_record = Encoder::default();
    for (page, fill, count) in runs {
        by_run.zeros(page << 12, fill, count);
        for number in 0..count as u64 {
            by_record.zero((page + number) << 12, fill);
        }
    }
    let (mut payload, mut expected) = (Vec::new(), Vec::new());
    assert_eq!(by_run.finish(&mut payload), by_record.finish(&mut expected));
    assert_eq!(payload, expected);
}

#[test]
fn literal_bytes_left_over_are_an_error() {
    let mut encoder = Encoder::default();
    encoder.opaque(b"abc");
    let mut payload = Vec::new();
    encoder.finish(&mut payload);
    payload.push(0);
    let last = Operations::new(&payload).unwrap().last();
    assert!(matches!(last, Some(Err(_))), "{last:?}");
}

/// What a page costs besides its delta or its literal blocks, where things come in sequence.
#[test]
fn sequences_of_deltas_and_blocks_cost_a_few_bytes_a_page() {
    let count = 1000u32;
    let page = [3; PAGE_BYTES];
    let record = |number: u32, content| Operation::Page {
        place: Place::Record {
            address: u64::from(number) << 12,
        },
        content,
    };
    let deltas: Vec<_> = (0..count)
        .map(|number| {
            let content = Content::Delta {
                slot: 5000 + number,
                base: 200 + number,
                delta: &page[..10],
            };
            record(number, content)
        })
        .collect();
    let (payload, costs) = encode(&deltas);
    assert!(payload.len() < 1000 * (10 + 2) + 20, "{}", payload.len());
    assert_eq!(costs.delta.stream, 1000 * 4104);

    // The first two blocks of four are those of another page, the last one is the same.
    let blocks: Vec<_> = (0..count)
        .map(|number| {
            let source = |index| {
                Some(BlockReference {
                    slot: 70 + number,
                    index,
                })
            };
            let mut sources = [None; BLOCKS_MAX];
            (sources[0], sources[1], sources[3]) = (source(0), source(1), source(3));
            let content = Content::Blocks {
                slot: 9000 + number,
                blocks: PageBlocks::of_page(1024, sources, &page).expect("well-formed"),
            };
            record(number, content)
        })
        .collect();
    let (payload, costs) = encode(&blocks);
    assert!(payload.len() < 1000 * (1024 + 5) + 20, "{}", payload.len());
    assert_eq!(costs.sub_page.stream, 1000 * 4104);
}

#[test]
fn malformed_blocks_and_deltas_are_refused() {
    let read = |bytes: &[u8]| {
        let read = Operations::new(bytes).and_then(|read| read.collect::<Result<Vec<_>, _>>());
        read.map(|operations| operations.len())
    };
    let blocks = |fields: &[u8], literals: usize| {
        // Body only, one page, slot 0.
        let mut payload = vec![fields.len() as u8 + 3, 0x27, 1, 0];
        payload.extend_from_slice(fields);
        payload.resize(payload.len() + literals, 0);
        payload
    };
    assert_eq!(read(&blocks(&[11, 5, 0], 0)), Ok(1));
    assert_eq!(read(&blocks(&[11, 2, 3, 0], 2048)), Ok(1));
    assert_eq!(read(&blocks(&[9, 16], 4096)), Ok(1));
    let value = |field| Err(vmgang_wire::WireError::Value(field));
    assert_eq!(read(&blocks(&[8, 32], 4096)), value("block_size"));
    assert_eq!(read(&blocks(&[12, 2], 4096)), value("block_size"));
    assert_eq!(read(&blocks(&[11, 7, 0], 0)), value("segment"));
    assert_eq!(read(&blocks(&[11, 0, 4], 4096)), value("segment"));
    assert_eq!(read(&blocks(&[11, 1, 0], 0)), value("segment"));
    assert_eq!(read(&blocks(&[11, 5, 1], 0)), value("block"));
    // The last block there can be, and one more than that.
    let last = [0xfe, 0xff, 0xff, 0xff, 0x3f];
    let with = |fields: &[u8]| [fields, &last[..]].concat();
    assert_eq!(
        read(&blocks(&[&with(&[11, 3]), &[2][..]].concat(), 2048)),
        Ok(1)
    );
    assert_eq!(read(&blocks(&with(&[11, 5]), 0)), value("block"));
    let delta = |fields: &[u8], literals: usize| {
        let mut payload = vec![fields.len() as u8 + 3, 0x26, 1, 0];
        payload.extend_from_slice(fields);
        payload.resize(payload.len() + literals, 0);
        payload
    };
    assert_eq!(read(&delta(&[0, 0xff, 0x1f], 4095)), Ok(1));
    assert_eq!(read(&delta(&[0, 0x80, 0x20], 4096)), value("delta_len"));
    assert_eq!(read(&delta(&[1, 0], 0)), value("base"));
}

#[test]
fn only_well_formed_pages_of_blocks_can_be_built() {
    let page = [0; PAGE_BYTES];
    let reference = |index| Some(BlockReference { slot: 0, index });
    let none = [None; BLOCKS_MAX];
    for size in [0, 256, 1000, 4096] {
        assert!(PageBlocks::of_page(size, none, &page).is_none(), "{size}");
    }
    for (size, count) in [(512, 8), (1024, 4), (2048, 2)] {
        assert!(PageBlocks::of_page(size, none, &page).is_some());
        let mut sources = none;
        sources[0] = reference(count);
        assert!(PageBlocks::of_page(size, sources, &page).is_none());
        if count < 8 {
            let mut sources = none;
            sources[usize::from(count)] = reference(0);
            assert!(PageBlocks::of_page(size, sources, &page).is_none());
        }
    }
}
