//! Invariant 3: obeying the map's verdicts in order, the window answers every reference
//! with the content that was meant, under any budget; and the map stays small.

use proptest::prelude::*;
use vmgang_dedup::{DedupMap, DigestKey, Member, Page, PageDigest, PageWindow, Slot, Verdict};

fn page(content: u16) -> Page {
    let mut page = [0; 4096];
    page[..2].copy_from_slice(&content.to_le_bytes());
    page[4000] = 1;
    page
}

proptest! {
    #[test]
    fn references_find_what_was_meant(
        slots in 0u32..40,
        pages in prop::collection::vec((0u16..60, 0u16..4), 1..2000),
    ) {
        let key = DigestKey([3; 32]);
        let mut map = DedupMap::new(slots);
        let mut window = PageWindow::new(slots);
        for (content, member) in pages {
            let page = page(content);
            match map.judge(PageDigest::of(&key, &page), Member(member)) {
                Verdict::Reference { slot, .. } => prop_assert_eq!(window.get(slot), Ok(&page)),
                Verdict::Define { slot } => prop_assert_eq!(window.define(slot, &page), Ok(())),
                Verdict::Send => prop_assert_eq!(slots, 0),
            }
            prop_assert!(map.len() <= slots as usize);
        }
    }

    /// Least recently used: with a working set no larger than the window nothing is ever
    /// sent twice.
    #[test]
    fn a_working_set_that_fits_is_sent_once(
        contents in prop::collection::vec(0u16..20, 1..500),
    ) {
        let key = DigestKey([3; 32]);
        let mut map = DedupMap::new(20);
        let mut defined = std::collections::HashSet::new();
        for content in contents {
            let verdict = map.judge(PageDigest::of(&key, &page(content)), Member(0));
            let first = defined.insert(content);
            prop_assert_eq!(first, matches!(verdict, Verdict::Define { .. }));
        }
    }
}

#[test]
fn the_oldest_content_leaves_first_and_a_touch_keeps_it() {
    let key = DigestKey([0; 32]);
    let mut map = DedupMap::new(2);
    let mut judge = |content| map.judge(PageDigest::of(&key, &page(content)), Member(1));
    assert_eq!(judge(1), Verdict::Define { slot: Slot(0) });
    assert_eq!(judge(2), Verdict::Define { slot: Slot(1) });
    assert!(matches!(judge(1), Verdict::Reference { slot: Slot(0), .. }));
    assert_eq!(judge(3), Verdict::Define { slot: Slot(1) });
    assert!(matches!(judge(1), Verdict::Reference { slot: Slot(0), .. }));
    assert_eq!(judge(2), Verdict::Define { slot: Slot(1) });
}

#[test]
fn a_hostile_slot_is_an_error() {
    let mut window = PageWindow::new(4);
    assert!(window.get(Slot(0)).is_err());
    assert!(window.get(Slot(4)).is_err());
    assert!(window.define(Slot(u32::MAX), &page(0)).is_err());
}

#[test]
fn a_forgotten_slot_is_empty_until_it_is_filled_again() {
    let mut window = PageWindow::new(2);
    window.define(Slot(1), &page(1)).unwrap();
    window.forget(Slot(1));
    window.forget(Slot(7));
    assert!(window.get(Slot(1)).is_err());
    window.define(Slot(1), &page(2)).unwrap();
    assert_eq!(window.get(Slot(1)), Ok(&page(2)));
}

#[test]
fn the_map_needs_at_most_forty_bytes_a_unique_page() {
    let key = DigestKey([0; 32]);
    let pages = 300_000;
    let mut map = DedupMap::new(u32::MAX);
    let mut worst: f64 = 0.0;
    for content in 1..=pages {
        let mut page = [0; 4096];
        page[..4].copy_from_slice(&u32::to_le_bytes(content));
        map.judge(PageDigest::of(&key, &page), Member(0));
        // Also just after the table has grown, which is the worst moment.
        if content >= 1 << 16 {
            worst = worst.max(map.memory_bytes() as f64 / f64::from(content));
        }
    }
    assert!(worst <= 40.0, "{worst} bytes a page");
    assert_eq!(map.len(), pages as usize);
}
