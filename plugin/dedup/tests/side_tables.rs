//! Similarity, sub-page blocks and history: what they return is in the window now, under any
//! budget; they take the memory they say; they find what they are made for.

use std::collections::HashMap;

use proptest::prelude::*;
use vmgang_dedup::{
    BlockHasher, BlockSize, DedupMap, DigestKey, HashSimilarityDetector, Member, PAGE_BYTES, Page,
    PageDigest, PageHistory, PageWindow, SimilarityParameters, SimilarityTable, Slot, SubPageTable,
    Verdict,
};

const KEY: DigestKey = DigestKey([9; 32]);

/// Pages made of few different blocks and of counters, so that all tables have work.
fn page(content: u16) -> Page {
    let mut page = [0; PAGE_BYTES];
    for (index, block) in page.as_chunks_mut::<512>().0.iter_mut().enumerate() {
        let kind = (usize::from(content) * 7 + index * usize::from(content % 3)) % 11;
        for (at, byte) in block.iter_mut().enumerate() {
            *byte = (at * (kind + 1) % 251) as u8;
        }
    }
    let at = usize::from(content) * 61 % (PAGE_BYTES - 2);
    page[at..at + 2].copy_from_slice(&content.to_le_bytes());
    page
}

/// The source half with all tables, as a session drives them.
struct Source {
    map: DedupMap,
    window: PageWindow,
    detector: HashSimilarityDetector,
    similar: SimilarityTable,
    hasher: BlockHasher,
    blocks: SubPageTable,
    history: PageHistory,
    /// What each slot has, for comparison.
    model: Vec<Option<Page>>,
    /// What each page was when it was last sent.
    last: HashMap<(Member, u64), Page>,
    found: [usize; 3],
}

impl Source {
    fn new(slots: u32, parameters: SimilarityParameters, size: BlockSize) -> Self {
        Self {
            map: DedupMap::new(slots),
            window: PageWindow::new(slots),
            detector: HashSimilarityDetector::new(&KEY, parameters),
            similar: SimilarityTable::new(slots, parameters),
            hasher: BlockHasher::new(&KEY, size),
            blocks: SubPageTable::new(slots, size),
            history: PageHistory::new(u64::from(slots)),
            model: vec![None; slots as usize],
            last: HashMap::new(),
            found: [0; 3],
        }
    }

    fn is_current(&self, slot: Slot) -> bool {
        let page = self.model[slot.0 as usize].as_ref();
        let tag = page.map(|page| PageDigest::of(&KEY, page).tag());
        tag.is_some() && tag == self.map.tag(slot) && self.window.get(slot).ok() == page
    }

    fn send(&mut self, member: Member, page_number: u64, page: &Page) {
        let digest = PageDigest::of(&KEY, page);
        let tag = digest.tag();
        let before = self.last.insert((member, page_number), *page);
        if let Some(Verdict::Reference { slot, .. }) = self.map.refer(&digest) {
            self.history.record(member, page_number, slot, tag);
            return;
        }
        if let Some(slot) = self.history.find(member, page_number, &self.map) {
            assert!(self.is_current(slot), "history");
            assert!(self.window.get(slot).ok() == before.as_ref(), "history");
            self.found[0] += 1;
        }
        let signatures = self.detector.signatures(page);
        for slot in self.similar.candidates(&signatures, &self.map) {
            assert!(self.is_current(slot), "similarity");
            self.found[1] += 1;
        }
        let hashes = self.hasher.hashes(page);
        let matches = self.blocks.find(&hashes, page, &self.map, &self.window);
        let bytes = self.blocks.size().bytes();
        for (block, found) in page.chunks(bytes).zip(matches.blocks()) {
            let Some(found) = found else { continue };
            assert!(self.is_current(found.slot), "sub-page");
            let start = usize::from(found.index) * bytes;
            let there = self.model[found.slot.0 as usize].expect("a content");
            assert_eq!(block, &there[start..start + bytes]);
        }
        self.found[2] += matches.matched();
        if let Verdict::Define { slot } = self.map.admit(digest, member) {
            self.window.define(slot, page).expect("within the budget");
            self.model[slot.0 as usize] = Some(*page);
            self.history.record(member, page_number, slot, tag);
            self.similar.insert(&signatures, slot, tag);
            self.blocks.insert(&hashes, slot, tag);
        }
    }
}

fn parameters() -> impl Strategy<Value = SimilarityParameters> {
    (1usize..=4, 1usize..=8, 1usize..=4)
        .prop_map(|(k, s, c)| SimilarityParameters::new(k, s, c).expect("within the maxima"))
}

fn sizes() -> impl Strategy<Value = BlockSize> {
    prop_oneof![
        Just(BlockSize::B512),
        Just(BlockSize::B1024),
        Just(BlockSize::B2048)
    ]
}

proptest! {
    #[test]
    fn whatever_is_found_is_in_the_window_now(
        slots in 0u32..30,
        parameters in parameters(),
        size in sizes(),
        pages in prop::collection::vec((0u16..3, 0u64..20, 0u16..200), 1..300),
    ) {
        let mut source = Source::new(slots, parameters, size);
        for (member, page_number, content) in pages {
            source.send(Member(member), page_number, &page(content));
        }
    }
}

/// The same with a fixed input, so that "nothing was ever found" cannot pass.
#[test]
fn all_tables_find_something() {
    let mut source = Source::new(100, SimilarityParameters::HPDC_2011, BlockSize::B512);
    for round in 0..5 {
        for number in 0..60 {
            source.send(Member(0), number, &page(number as u16 + 7 * round));
        }
    }
    assert!(
        source.found.iter().all(|found| *found > 20),
        "{:?}",
        source.found
    );
}

#[test]
fn similar_pages_are_found_where_their_samples_are_equal() {
    for parameters in [
        SimilarityParameters::HPDC_2011,
        SimilarityParameters::DIFFERENCE_ENGINE,
    ] {
        let detector = HashSimilarityDetector::new(&KEY, parameters);
        let k = parameters.signatures();
        let positions: Vec<_> = detector.positions().collect();
        assert_eq!(positions.len(), k);
        let base: Page = std::array::from_fn(|index| (index * index / 7) as u8);
        let mut map = DedupMap::new(4);
        let mut table = SimilarityTable::new(4, parameters);
        let digest = PageDigest::of(&KEY, &base);
        assert_eq!(
            map.judge(digest, Member(0)),
            Verdict::Define { slot: Slot(0) }
        );
        table.insert(&detector.signatures(&base), Slot(0), digest.tag());
        let candidates =
            |page: &Page, map: &DedupMap| table.candidates(&detector.signatures(page), map).count();

        let mut near = base;
        for (at, byte) in near.iter_mut().enumerate() {
            if !positions
                .iter()
                .any(|from| (*from..from + 64).contains(&at))
            {
                *byte ^= 0x55;
            }
        }
        assert_eq!(candidates(&near, &map), k);
        for (changed, at) in positions.iter().enumerate() {
            near[at + 63] ^= 1;
            assert_eq!(candidates(&near, &map), k - changed - 1);
        }

        // A slot filled again is never offered for what it had.
        for content in 0..4u8 {
            map.judge(PageDigest::of(&KEY, &[content; PAGE_BYTES]), Member(0));
        }
        assert_eq!(candidates(&base, &map), 0);
    }
}

#[test]
fn samples_that_say_nothing_are_no_signature() {
    let parameters = SimilarityParameters::new(4, 8, 1).expect("within the maxima");
    let detector = HashSimilarityDetector::new(&KEY, parameters);
    let mut table = SimilarityTable::new(4, parameters);
    let mut map = DedupMap::new(4);
    let zero = [0; PAGE_BYTES];
    let digest = PageDigest::of(&KEY, &zero);
    map.judge(digest, Member(0));
    let signatures = detector.signatures(&zero);
    table.insert(&signatures, Slot(0), digest.tag());
    assert_eq!(table.candidates(&signatures, &map).count(), 0);
}

#[test]
fn blocks_are_found_at_other_places_and_in_sequence() {
    for size in [BlockSize::B512, BlockSize::B1024, BlockSize::B2048] {
        let bytes = size.bytes();
        let hasher = BlockHasher::new(&KEY, size);
        let mut table = SubPageTable::new(8, size);
        let mut map = DedupMap::new(8);
        let mut window = PageWindow::new(8);
        let known: Page = std::array::from_fn(|index| (index * index / 11) as u8);
        let digest = PageDigest::of(&KEY, &known);
        map.judge(digest, Member(0));
        window.define(Slot(0), &known).expect("within the budget");
        table.insert(&hasher.hashes(&known), Slot(0), digest.tag());

        let mut page = known;
        page.rotate_left(bytes);
        page[..10].fill(0xaa);
        let matches = table.find(&hasher.hashes(&page), &page, &map, &window);
        assert_eq!(matches.matched(), size.blocks() - 1);
        assert_eq!(matches.blocks()[0], None);
        for number in 1..size.blocks() {
            let found = matches.blocks()[number].expect("this block is known");
            assert_eq!(usize::from(found.index), (number + 1) % size.blocks());
        }

        // Without the content in the window nothing is found, whatever the table thinks.
        let empty = PageWindow::new(8);
        let matches = table.find(&hasher.hashes(&known), &known, &map, &empty);
        assert_eq!(matches.matched(), 0);
    }
}

#[test]
fn memory_is_what_the_documentation_says() {
    let slots = 100_000;
    let per_slot = |bytes: usize| (bytes as f64 / f64::from(slots)).round() as usize;
    for (k, c, expected) in [(1, 1, 16), (2, 1, 32), (2, 4, 32)] {
        let parameters = SimilarityParameters::new(k, 1, c).expect("within the maxima");
        let table = SimilarityTable::new(slots, parameters);
        assert_eq!(per_slot(table.memory_bytes()), expected);
    }
    for (size, expected) in [
        (BlockSize::B2048, 32),
        (BlockSize::B1024, 64),
        (BlockSize::B512, 128),
    ] {
        assert_eq!(
            per_slot(SubPageTable::new(slots, size).memory_bytes()),
            expected
        );
    }
    assert_eq!(per_slot(PageHistory::new(slots.into()).memory_bytes()), 16);
}
