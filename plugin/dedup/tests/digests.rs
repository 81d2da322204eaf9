//! Digests of many pages are those of each page, and those are keyed BLAKE3, whatever the
//! processor and the BLAKE3 crate's inner workings are.

use proptest::prelude::*;
use vmgang_dedup::{DigestKey, PAGE_BYTES, Page, PageDigest};

fn assert_equal_to_keyed_blake3(key: [u8; 32], pages: &[Page]) {
    // What is there already stays.
    let before = PageDigest([9; 16]);
    let mut expected = vec![before];
    for page in pages {
        let hash = blake3::Hasher::new_keyed(&key).update(page).finalize();
        let digest: &[u8; 16] = hash.as_bytes().first_chunk().unwrap();
        expected.push(PageDigest(*digest));
        assert_eq!(PageDigest::of(&DigestKey(key), page).0, *digest);
    }
    let pages: Vec<&Page> = pages.iter().collect();
    let mut digests = vec![before];
    PageDigest::of_many(&DigestKey(key), &pages, &mut digests);
    assert_eq!(digests, expected);
}

/// A page that is another one for each seed, in each of its chunks.
fn page(seed: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut page);
    page
}

/// Each count of pages that fills vectors differently, and all their remainders.
#[test]
fn any_number_of_pages() {
    let pages: Vec<Page> = (0..70).map(page).collect();
    for count in 0..=pages.len() {
        assert_equal_to_keyed_blake3([0x42; 32], &pages[..count]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_pages_under_any_key(
        key in any::<[u8; 32]>(),
        seeds in prop::collection::vec(any::<u64>(), 0..40),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..PAGE_BYTES, any::<u8>()), 0..20),
        repeat in any::<prop::sample::Index>(),
    ) {
        let mut pages: Vec<Page> = seeds.into_iter().map(page).collect();
        if !pages.is_empty() {
            pages.push(pages[repeat.index(pages.len())]);
            pages.push([0; PAGE_BYTES]);
            for (index, at, byte) in edits {
                let index = index.index(pages.len());
                pages[index][at] = byte;
            }
        }
        assert_equal_to_keyed_blake3(key, &pages);
    }
}
