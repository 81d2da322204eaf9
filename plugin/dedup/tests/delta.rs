//! A delta makes the page it was made of, or an error; never another size, never a panic.

use proptest::prelude::*;
use vmgang_dedup::delta::{DeltaError, apply, encode};
use vmgang_dedup::{PAGE_BYTES, Page};

fn random_page(seed: u64) -> Page {
    let mut state = seed | 1;
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
}

/// A page of 8-byte pointers and counters, as heaps have.
fn structured_page(seed: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    for (index, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let index = index as u64;
        *word = match index % 4 {
            0 => 0xffff_8880_0000_0000 + (seed << 12) + index * 8,
            1 => seed + index,
            _ => 0,
        }
        .to_le_bytes();
    }
    page
}

fn pages() -> impl Strategy<Value = Page> {
    prop_oneof![
        any::<u64>().prop_map(random_page),
        (0u64..1000).prop_map(structured_page),
        any::<u8>().prop_map(|fill| [fill; PAGE_BYTES]),
    ]
}

/// Pairs of pages from equal to unrelated; changes of many lengths anywhere, at both ends
/// and across 64-byte blocks as well.
fn pairs() -> impl Strategy<Value = (Page, Page)> {
    let changes = prop::collection::vec((0usize..PAGE_BYTES, 1usize..200, any::<u8>()), 0..40);
    prop_oneof![
        (pages(), changes).prop_map(|(base, changes)| {
            let mut target = base;
            for (at, len, value) in changes {
                let end = (at + len).min(PAGE_BYTES);
                target[at..end].fill(value);
            }
            (target, base)
        }),
        (pages(), pages()),
        // Every n-th byte: the most runs.
        (pages(), 1usize..9).prop_map(|(base, step)| {
            let mut target = base;
            target.iter_mut().step_by(step).for_each(|byte| *byte ^= 1);
            (target, base)
        }),
    ]
}

fn round_trip(target: &Page, base: &Page) -> usize {
    let mut delta = b"before".to_vec();
    assert!(encode(target, base, usize::MAX, &mut delta));
    assert_eq!(&delta[..6], b"before");
    let mut page = [0xee; PAGE_BYTES];
    assert_eq!(apply(base, &delta[6..], &mut page), Ok(()));
    assert!(page == *target);
    delta.len() - 6
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn the_target_comes_back_and_the_limit_holds((target, base) in pairs(), limit in 0usize..5000) {
        let exact = round_trip(&target, &base);
        // Runs are merged where a header would cost more; those of 144 bytes and more have
        // headers of four bytes, one more than the smallest gap.
        let bound = PAGE_BYTES + 4 + PAGE_BYTES / (144 + 3);
        prop_assert!(exact <= bound, "{}", exact);
        let mut out = vec![1, 2, 3];
        let fits = encode(&target, &base, limit, &mut out);
        prop_assert_eq!(fits, exact <= limit, "{} bytes, limit {}", exact, limit);
        prop_assert_eq!(out.len(), if fits { 3 + exact } else { 3 });
        prop_assert!(encode(&target, &base, exact, &mut out));
        prop_assert!(exact == 0 || !encode(&target, &base, exact - 1, &mut out));
    }

    #[test]
    fn arbitrary_deltas_end_in_a_page_or_an_error(
        delta in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut page = [0; PAGE_BYTES];
        let _ = apply(&[7; PAGE_BYTES], &delta, &mut page);
    }

    #[test]
    fn a_delta_cut_short_or_changed_is_no_panic(
        (target, base) in pairs(),
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
    ) {
        let mut delta = Vec::new();
        prop_assert!(encode(&target, &base, usize::MAX, &mut delta));
        prop_assume!(!delta.is_empty());
        let at = at.index(delta.len());
        let mut page = [0; PAGE_BYTES];
        let _ = apply(&base, &delta[..at], &mut page);
        delta[at] ^= flip;
        let _ = apply(&base, &delta, &mut page);
    }
}

#[test]
fn every_single_byte_costs_three_bytes() {
    let base = random_page(5);
    for at in 0..PAGE_BYTES {
        let mut target = base;
        target[at] ^= 0x80;
        assert_eq!(round_trip(&target, &base), 3, "byte {at}");
    }
}

#[test]
fn sizes_are_those_of_the_format() {
    let base = random_page(9);
    assert_eq!(round_trip(&base, &base), 0);
    // Eight counters of eight bytes: a header of two bytes each.
    let mut target = base;
    for counter in target.as_chunks_mut::<8>().0.iter_mut().step_by(64) {
        *counter = counter.map(|byte| !byte);
    }
    assert_eq!(round_trip(&target, &base), 8 * (2 + 8));
    // The lengths around which the header grows, at each end of the page.
    for (len, bytes) in [
        (15, 17),
        (16, 19),
        (143, 146),
        (144, 148),
        (PAGE_BYTES, 4100),
    ] {
        for at in [0, PAGE_BYTES - len] {
            let mut target = base;
            target[at..at + len]
                .iter_mut()
                .for_each(|byte| *byte = !*byte);
            assert_eq!(round_trip(&target, &base), bytes, "{len} bytes at {at}");
        }
    }
}

#[test]
fn hostile_deltas_are_named_errors() {
    let base = [0; PAGE_BYTES];
    let mut page = [0; PAGE_BYTES];
    for (delta, error) in [
        (&[0][..], DeltaError::Truncated),
        (&[0, 0], DeltaError::Truncated),
        (&[0, 0x10, 1], DeltaError::Truncated),
        (&[0, 0xf0], DeltaError::Truncated),
        (&[0, 0xf0, 0x80], DeltaError::Truncated),
        (&[0, 0xf0, 0x80, 0], DeltaError::Length),
        (&[0, 0xf0, 0x80, 0x80], DeltaError::Length),
        (&[0xff, 0x1f, 1, 2], DeltaError::OutOfPage),
        (&[0xff, 0x0f, 1, 0, 0, 2], DeltaError::OutOfPage),
        (&[1, 0xf0, 0xf0, 0x1f], DeltaError::OutOfPage),
    ] {
        assert_eq!(apply(&base, delta, &mut page), Err(error), "{delta:?}");
    }
}

#[test]
fn the_documented_delta_is_what_is_written() {
    let document = include_str!("../../../docs/protocol.md");
    let (_, block) = document.split_once("```text delta\n").expect("the example");
    let block = block.split("```").next().unwrap_or(block);
    let documented: Vec<u8> = block
        .lines()
        .flat_map(|line| line.split("  ").next().unwrap_or(line).split_whitespace())
        .map(|byte| u8::from_str_radix(byte, 16).expect("a byte"))
        .collect();
    let base = [0xff; PAGE_BYTES];
    let mut target = base;
    target[4..12].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    target[4095] = 9;
    let mut delta = Vec::new();
    assert!(encode(&target, &base, 100, &mut delta));
    assert_eq!(delta, documented);
}
