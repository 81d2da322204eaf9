//! The identity of a page content, and the test for uniform pages.
//!
//! Must not: look at memory that can change under it. The caller hashes a private copy
//! (hashing live guest memory and sending it later would poison other VMs).

use crate::{Page, digest_batch};

/// The secret that makes page digests of one trust domain meaningless in another: a guest
/// cannot craft colliding pages without it.
#[derive(Clone, PartialEq, Eq)]
pub struct DigestKey(pub [u8; 32]);

impl std::fmt::Debug for DigestKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DigestKey(..)")
    }
}

/// Keyed BLAKE3 of a page, cut to 128 bits. Two different pages share one with probability
/// 2^-128; even then the frame digest catches it before anything is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageDigest(pub [u8; 16]);

impl PageDigest {
    /// Hashes a page.
    pub fn of(key: &DigestKey, page: &Page) -> Self {
        Self::cut(blake3::keyed_hash(&key.0, page).as_bytes())
    }

    /// Appends the digest of each page: the same as [`of`](Self::of) one after the other, in
    /// less time from four pages on.
    pub fn of_many(key: &DigestKey, pages: &[&Page], digests: &mut Vec<Self>) {
        digests.reserve(pages.len());
        digest_batch::keyed_hashes(key, pages, |hash| digests.push(Self::cut(hash)));
    }

    fn cut(hash: &[u8; 32]) -> Self {
        let mut digest = [0; 16];
        digest.copy_from_slice(&hash[..16]);
        Self(digest)
    }

    /// The part of the digest that tells contents of one slot apart.
    pub fn tag(&self) -> ContentTag {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[12..]);
        ContentTag(u32::from_le_bytes(bytes))
    }

    /// A table index: the digest is uniformly distributed already.
    pub(crate) fn table_hash(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(bytes)
    }
}

/// 32 bits of a content's digest: enough to notice that a slot was filled again, not enough
/// to take two contents for the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentTag(pub(crate) u32);

/// The byte a page consists of, if it is one repeated byte.
pub fn uniform_byte(page: &Page) -> Option<u8> {
    let first = page[0];
    // Most pages differ within a few bytes: look there before reading all.
    if page[..64].iter().any(|byte| *byte != first) {
        return None;
    }
    let mut differs = 0u8;
    for byte in page {
        differs |= byte ^ first;
    }
    (differs == 0).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_pages_are_found_and_one_byte_makes_the_difference() {
        for fill in [0, 1, 0xff] {
            let mut page = [fill; 4096];
            assert_eq!(uniform_byte(&page), Some(fill));
            for at in [0, 1, 63, 64, 65, 4095] {
                page[at] ^= 0x10;
                assert_eq!(uniform_byte(&page), None, "byte {at}");
                page[at] ^= 0x10;
            }
        }
    }

    #[test]
    fn the_key_changes_the_digest() {
        let page = [7; 4096];
        let a = PageDigest::of(&DigestKey([1; 32]), &page);
        let b = PageDigest::of(&DigestKey([2; 32]), &page);
        assert_ne!(a, b);
    }
}
