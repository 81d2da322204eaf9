//! Payloads: what is encoded is what is decoded; hostile payloads end in an error, not in
//! a panic or an allocation; costs add up.

use proptest::prelude::*;
use vmgang_wire::payload::{Content, Encoder, Operation, Operations, PAGE_BYTES, Place};

#[derive(Debug, Clone)]
enum Step {
    Opaque(Vec<u8>),
    Zero(u64, u8),
    Page {
        record: Option<u64>,
        content: u8,
        slot: u32,
        tag: u8,
    },
}

fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..20, Just((1 << 52) - 1), 0u64..(1 << 52)]
}

fn slots() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..20, any::<u32>()]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 1..50).prop_map(Step::Opaque),
        (pages(), prop_oneof![Just(0u8), any::<u8>()]).prop_map(|(p, f)| Step::Zero(p << 12, f)),
        (prop::option::of(pages()), 0u8..4, slots(), any::<u8>()).prop_map(
            |(page, content, slot, tag)| Step::Page {
                record: page.map(|page| page << 12),
                content,
                slot,
                tag,
            }
        ),
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
                });
            }
        }
        steps
    })
}

fn operation<'a>(step: &'a Step, page: &'a [u8; PAGE_BYTES]) -> Operation<'a> {
    match step {
        Step::Opaque(bytes) => Operation::Opaque(bytes),
        Step::Zero(address, fill) => Operation::Zero {
            address: *address,
            fill: *fill,
        },
        Step::Page {
            record,
            content,
            slot,
            tag,
        } => Operation::Page {
            place: match record {
                Some(address) => Place::Record { address: *address },
                None => Place::Body,
            },
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
        let mut encoder = Encoder::default();
        encoder.page(Place::Body, Content::Uniform { fill: 1 });
        encoder.clear();
        for operation in &operations {
            match *operation {
                Operation::Opaque(bytes) => encoder.opaque(bytes),
                Operation::Zero { address, fill } => encoder.zero(address, fill),
                Operation::Page { place, content } => encoder.page(place, content),
            }
        }
        let mut payload = Vec::new();
        let costs = encoder.finish(&mut payload);
        let decoded: Result<Vec<_>, _> = Operations::new(&payload).unwrap().collect();
        prop_assert_eq!(decoded.unwrap(), operations.clone());

        let all = [costs.literal, costs.zero, costs.uniform, costs.reference[0], costs.reference[1]];
        let stream: usize = operations.iter().map(Operation::stream_len).sum();
        prop_assert_eq!(all.iter().map(|c| c.stream).sum::<u64>(), stream as u64);
        let spent: u64 = all.iter().map(|c| c.payload).sum();
        let length_field = payload.len() as u64 - spent;
        prop_assert!((1..=10).contains(&length_field), "{}", length_field);
    }

    #[test]
    fn arbitrary_payloads_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(operations) = Operations::new(&bytes) {
            // A run may claim billions of records: the engine stops at the announced
            // stream length, so does this.
            for operation in operations.take(10_000) {
                if operation.is_err() {
                    break;
                }
            }
        }
    }
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
fn literal_bytes_left_over_are_an_error() {
    let mut encoder = Encoder::default();
    encoder.opaque(b"abc");
    let mut payload = Vec::new();
    encoder.finish(&mut payload);
    payload.push(0);
    let last = Operations::new(&payload).unwrap().last();
    assert!(matches!(last, Some(Err(_))), "{last:?}");
}
