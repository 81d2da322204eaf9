//! What is known to be sent again is kept, what is known not to be goes first, and no
//! sequence of calls exceeds the budget or makes the windows differ.

use proptest::prelude::*;
use vmgang_dedup::{DedupMap, DigestKey, Member, Page, PageDigest, PageWindow, Slot, Verdict};

const KEY: DigestKey = DigestKey([4; 32]);

fn page(content: u16) -> Page {
    let mut page = [1; 4096];
    page[..2].copy_from_slice(&content.to_le_bytes());
    page
}

fn digest(content: u16) -> PageDigest {
    PageDigest::of(&KEY, &page(content))
}

#[derive(Debug, Clone)]
enum Call {
    Judge(u16),
    Expect(u16, u32),
    Retract(u16),
    Touch(u32),
    Offer(u16),
    /// The oldest offer without an answer, and whether the peer has it.
    Answer(bool),
    Clear,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let content = 0u16..50;
    let sends = prop_oneof![0u32..4, 250u32..260, Just(u32::MAX)];
    let call = prop_oneof![
        12 => content.clone().prop_map(Call::Judge),
        4 => (content.clone(), sends).prop_map(|(content, sends)| Call::Expect(content, sends)),
        2 => content.prop_map(Call::Retract),
        1 => (0u32..40).prop_map(Call::Touch),
        4 => (0u16..50).prop_map(Call::Offer),
        3 => any::<bool>().prop_map(Call::Answer),
        1 => Just(Call::Clear),
    ];
    prop::collection::vec(call, 1..600)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn no_sequence_exceeds_the_budget_or_breaks_a_reference(
        slots in prop_oneof![0u32..3, 0u32..40],
        calls in calls(),
    ) {
        let mut map = DedupMap::new(slots);
        let mut window = PageWindow::new(slots);
        let mut offers = std::collections::VecDeque::new();
        let mut filled = std::collections::HashSet::new();
        for call in calls {
            match call {
                Call::Offer(content) => {
                    let known = map.has(&digest(content));
                    if let Some(slot) = map.offer(digest(content)) {
                        prop_assert!(!known && !filled.contains(&slot));
                        prop_assert!(!offers.iter().any(|(other, _)| *other == slot));
                        offers.push_back((slot, content));
                    }
                    prop_assert_eq!(map.has(&digest(content)), known);
                }
                Call::Answer(has) => {
                    if let Some((slot, content)) = offers.pop_front() {
                        if has {
                            prop_assert_eq!(window.define(slot, &page(content)), Ok(()));
                        }
                        let known = map.has(&digest(content));
                        let takes = map.answered(slot, has);
                        prop_assert_eq!(takes, has && !known);
                        prop_assert!(!map.answered(slot, has), "one answer");
                        if takes {
                            filled.insert(slot);
                        }
                    }
                }
                Call::Judge(content) => {
                    let page = page(content);
                    match map.judge(digest(content), Member(0)) {
                        Verdict::Reference { slot, .. } => {
                            prop_assert_eq!(window.get(slot), Ok(&page));
                        }
                        // The window itself refuses a slot beyond the budget.
                        Verdict::Define { slot } => {
                            prop_assert!(!offers.iter().any(|(other, _)| *other == slot));
                            filled.insert(slot);
                            prop_assert_eq!(window.define(slot, &page), Ok(()));
                            prop_assert_eq!(map.tag(slot), Some(digest(content).tag()));
                        }
                        Verdict::Send => {}
                    }
                }
                Call::Expect(content, sends) => map.expect(digest(content), sends),
                Call::Retract(content) => map.retract(digest(content)),
                Call::Touch(slot) => map.touch(Slot(slot)),
                Call::Clear => map.clear_expectations(),
            }
            prop_assert!(map.len() <= slots as usize);
        }
        // Whatever has happened, every slot can still be given away and be found again.
        for (slot, _) in offers {
            map.answered(slot, false);
        }
        map.clear_expectations();
        let mut given = std::collections::HashSet::new();
        for content in 1000..1000 + slots as u16 {
            match map.judge(digest(content), Member(0)) {
                Verdict::Define { slot } => prop_assert!(given.insert(slot)),
                other => prop_assert!(false, "{:?}", other),
            }
        }
        for content in 1000..1000 + slots as u16 {
            let verdict = map.judge(digest(content), Member(0));
            let is_reference = matches!(verdict, Verdict::Reference { .. });
            prop_assert!(is_reference);
        }
    }

    /// With exact counts a window that has room for all contents under way sends nothing
    /// twice, however many others pass through it.
    #[test]
    fn exact_counts_send_each_shared_content_once(
        sends in prop::collection::vec(0u16..10, 1..400),
    ) {
        // One slot more than shared contents: for what passes through.
        let mut map = DedupMap::new(11);
        for content in 0..10 {
            let count = sends.iter().filter(|sent| **sent == content).count();
            map.expect(digest(content), count as u32);
        }
        let mut defined = std::collections::HashSet::new();
        for (index, content) in sends.into_iter().enumerate() {
            for noise in 0..3 {
                map.judge(digest(1000 + index as u16 * 3 + noise), Member(0));
            }
            let verdict = map.judge(digest(content), Member(1));
            let first = defined.insert(content);
            prop_assert_eq!(first, matches!(verdict, Verdict::Define { .. }));
        }
    }
}

fn define(map: &mut DedupMap, content: u16) -> Slot {
    match map.judge(digest(content), Member(0)) {
        Verdict::Define { slot } => slot,
        other => panic!("content {content}: {other:?}"),
    }
}

fn refer(map: &mut DedupMap, content: u16) {
    let verdict = map.judge(digest(content), Member(0));
    assert!(
        matches!(verdict, Verdict::Reference { .. }),
        "content {content}: {verdict:?}"
    );
}

#[test]
fn the_spent_go_first_and_the_expected_last() {
    let mut map = DedupMap::new(3);
    map.expect(digest(1), 2);
    map.expect(digest(3), 2);
    let expected = define(&mut map, 1);
    let plain = define(&mut map, 2);
    let spent = define(&mut map, 3);
    refer(&mut map, 3);
    assert_eq!(define(&mut map, 4), spent);
    assert_eq!(define(&mut map, 5), plain);
    assert_eq!(define(&mut map, 6), spent);
    refer(&mut map, 1);
    assert_eq!(define(&mut map, 7), expected);
}

#[test]
fn a_full_window_of_expected_contents_lets_no_other_in() {
    let mut map = DedupMap::new(2);
    map.expect(digest(1), 3);
    map.expect(digest(2), 3);
    let first = define(&mut map, 1);
    define(&mut map, 2);
    map.expect(digest(3), 3);
    assert_eq!(map.judge(digest(9), Member(0)), Verdict::Send);
    // One that is expected itself may, and what it replaced is still known to come.
    assert_eq!(define(&mut map, 3), first);
    refer(&mut map, 2);
    refer(&mut map, 2);
    define(&mut map, 1);
    assert_eq!(map.judge(digest(9), Member(0)), Verdict::Send);
    refer(&mut map, 1);
    assert!(matches!(
        map.judge(digest(9), Member(0)),
        Verdict::Define { .. }
    ));
    // Counts that have become old can be forgotten.
    refer(&mut map, 3);
    map.clear_expectations();
    define(&mut map, 10);
    define(&mut map, 11);
}

#[test]
fn more_sends_than_a_slot_can_count_are_counted() {
    for sends in [254, 255, 256, 1000] {
        let mut map = DedupMap::new(1);
        map.expect(digest(1), sends);
        define(&mut map, 1);
        for _ in 1..sends {
            assert_eq!(map.judge(digest(9), Member(0)), Verdict::Send);
            refer(&mut map, 1);
        }
        define(&mut map, 9);
    }
}

#[test]
fn a_retracted_send_is_not_waited_for() {
    let mut map = DedupMap::new(1);
    map.expect(digest(1), 3);
    map.retract(digest(1));
    define(&mut map, 1);
    map.retract(digest(1));
    define(&mut map, 2);
    map.expect(digest(2), 5);
    assert_eq!(map.judge(digest(3), Member(0)), Verdict::Send);
    map.expect(digest(2), 0);
    define(&mut map, 3);
}

#[test]
fn expectations_take_no_more_than_they_say() {
    let contents = 200_000u32;
    let mut map = DedupMap::new(contents);
    let digest = |content: u32| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(
            &u64::from(content)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes(),
        );
        bytes[8..12].copy_from_slice(&content.to_le_bytes());
        PageDigest(bytes)
    };
    // More than the window has slots are not remembered.
    for content in 0..contents * 2 {
        map.expect(digest(content), 2);
        if (1 << 16..contents).contains(&content) {
            let bytes = map.memory_bytes() as f64 / f64::from(content + 1);
            assert!(bytes <= 30.0, "{bytes} bytes an expectation");
        }
    }
    let bytes = map.memory_bytes() as f64 / f64::from(contents);
    assert!(bytes <= 30.0, "{bytes} bytes an expectation");
    // As contents get their slots, their expectations go.
    for content in 0..contents {
        map.judge(digest(content), Member(0));
        map.judge(digest(content), Member(0));
    }
    let bytes = map.memory_bytes() as f64 / f64::from(contents);
    assert!(bytes <= 40.0, "{bytes} bytes a page");
}

#[test]
fn adopted_contents_have_the_first_slots_and_give_way_like_others() {
    let mut map = DedupMap::new(4);
    map.adopt(&[digest(1), digest(2), digest(1)]);
    assert_eq!(map.len(), 2);
    let at = |slot| Verdict::Reference {
        slot: Slot(slot),
        first_sender: Member::DESTINATION,
    };
    assert_eq!(map.judge(digest(2), Member(0)), at(1));
    assert_eq!(map.judge(digest(1), Member(0)), at(0));
    // The twice told one's slot is free, then the last one, then the oldest.
    for (content, slot) in [(10, 2), (11, 3), (12, 1), (13, 0)] {
        let verdict = map.judge(digest(content), Member(0));
        assert_eq!(verdict, Verdict::Define { slot: Slot(slot) });
    }
    let mut small = DedupMap::new(1);
    small.adopt(&[digest(1), digest(2)]);
    assert_eq!(small.len(), 1);
}
