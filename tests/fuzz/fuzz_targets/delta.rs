//! Any bytes as a delta: an error, or a page whose own delta makes it again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmgang_dedup::{PAGE_BYTES, Page, delta};

fuzz_target!(|input: &[u8]| {
    let Some((seed, bytes)) = input.split_first() else {
        return;
    };
    let base: Page = std::array::from_fn(|index| (index * usize::from(*seed) >> 3) as u8);
    let mut page = [0; PAGE_BYTES];
    if delta::apply(&base, bytes, &mut page).is_err() {
        return;
    }
    let mut again = Vec::new();
    assert!(delta::encode(&page, &base, usize::MAX, &mut again));
    let mut rebuilt = [0; PAGE_BYTES];
    assert_eq!(delta::apply(&base, &again, &mut rebuilt), Ok(()));
    assert!(rebuilt == page);
    let exact = again.len();
    again.clear();
    if exact > 0 {
        assert!(!delta::encode(&page, &base, exact - 1, &mut again));
        assert!(again.is_empty());
    }
});
