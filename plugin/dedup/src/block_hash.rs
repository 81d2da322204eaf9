//! A fast keyed hash of pieces of pages, for finding candidates.
//!
//! Owns: NH, the universal hash of UMAC (RFC 4418, section 5.2.1), with a key as long as the
//! longest block. Two different blocks share a hash with probability 2^-32 for whoever does
//! not know the key.
//! Must not: be taken for identity. Whoever finds something by it compares the contents.

use crate::DigestKey;

/// Words of 64 bits that a key has: for blocks of 2048 bytes.
const KEY_WORDS: usize = 256;

/// The key, stretched to the length of the longest block.
#[derive(Clone)]
pub(crate) struct BlockKey(Box<[u64; KEY_WORDS]>);

impl std::fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockKey(..)")
    }
}

impl BlockKey {
    /// `purpose` keeps keys for different tables apart.
    pub(crate) fn new(key: &DigestKey, purpose: &str) -> Self {
        let mut stream = blake3::Hasher::new_keyed(&key.0)
            .update(purpose.as_bytes())
            .finalize_xof();
        let mut words = Box::new([0; KEY_WORDS]);
        for word in words.iter_mut() {
            let mut bytes = [0; 8];
            stream.fill(&mut bytes);
            *word = u64::from_le_bytes(bytes);
        }
        Self(words)
    }

    /// NH of a block, with the key's words from `from` on. Bytes beyond the key, or after the
    /// last full word, do not count; no caller has any.
    pub(crate) fn hash(&self, block: &[u8], from: usize) -> u64 {
        let key = self.0.get(from..).unwrap_or_default();
        let (words, _) = block.as_chunks::<8>();
        words
            .iter()
            .zip(key)
            .map(|(word, key)| {
                let word = u64::from_le_bytes(*word);
                let low = (word as u32).wrapping_add(*key as u32);
                let high = ((word >> 32) as u32).wrapping_add((key >> 32) as u32);
                u64::from(low).wrapping_mul(u64::from(high))
            })
            .fold(0, u64::wrapping_add)
    }
}

/// Spreads a value over all bits (the finaliser of MurmurHash3): a table takes its place from
/// the high bits, and sums of products do not vary there enough.
pub(crate) fn spread(mut value: u64) -> u64 {
    value ^= value >> 33;
    value = value.wrapping_mul(0xff51_afd7_ed55_8ccd);
    value ^= value >> 33;
    value = value.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    value ^ (value >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_changed_byte_and_the_key_change_the_hash() {
        let key = BlockKey::new(&DigestKey([1; 32]), "test");
        let other = BlockKey::new(&DigestKey([2; 32]), "test");
        let mut block = [0x5a; 2048];
        let hash = key.hash(&block, 0);
        assert_ne!(hash, other.hash(&block, 0));
        assert_ne!(
            hash,
            BlockKey::new(&DigestKey([1; 32]), "else").hash(&block, 0)
        );
        for at in 0..block.len() {
            block[at] ^= 1;
            assert_ne!(key.hash(&block, 0), hash, "byte {at}");
            block[at] ^= 1;
        }
    }
}
