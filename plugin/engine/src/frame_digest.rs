//! The digest that a frame carries of its stream bytes.
//!
//! It finds what this software or a machine gets wrong: XXH3 over the delivered bytes, at the
//! speed of memory. It need not withstand an adversary: peers are held off by TLS, and what
//! makes two pages the same is keyed BLAKE3 (`docs/decisions/0009`). The secret is the session's all
//! the same, so that no guest can choose bytes for it.
//! Must not: be used to tell contents apart.

use std::sync::Arc;

use twox_hash::XxHash3_128;
use vmgang_dedup::DigestKey;
use vmgang_wire::FRAME_DIGEST_CONTEXT;

/// XXH3's own secret is as long.
const SECRET_BYTES: usize = 192;

/// Makes the digests of one session.
#[derive(Clone)]
pub(crate) struct FrameDigest(Arc<[u8; SECRET_BYTES]>);

impl FrameDigest {
    pub(crate) fn new(key: &DigestKey) -> FrameDigest {
        let mut secret = [0; SECRET_BYTES];
        blake3::Hasher::new_derive_key(FRAME_DIGEST_CONTEXT)
            .update(&key.0)
            .finalize_xof()
            .fill(&mut secret);
        FrameDigest(Arc::new(secret))
    }

    pub(crate) fn of(&self, bytes: &[u8]) -> [u8; 16] {
        match XxHash3_128::oneshot_with_secret(&self.0[..], bytes) {
            Ok(digest) => digest.to_le_bytes(),
            Err(_) => unreachable!("the secret is long enough"),
        }
    }
}

/// The digest of a channel's bytes as it crosses the wire, made of that of the bytes; and that one
/// again. It tells whose bytes they are: without TLS nothing else would notice that a frame has got
/// another channel's number on its way, or a channel another member's.
pub(crate) fn of_channel(mut digest: [u8; 16], channel: u32, member: usize) -> [u8; 16] {
    let whose = channel.to_le_bytes().into_iter();
    let whose = whose.chain((member as u16).to_le_bytes());
    for (byte, whose) in digest.iter_mut().zip(whose) {
        *byte ^= whose;
    }
    digest
}

/// The same of bytes of a return path, which also tells where in it they begin: these frames are not
/// numbered, and one that was lost would shift what comes after it.
pub(crate) fn of_return(digest: [u8; 16], channel: u32, member: usize, position: u64) -> [u8; 16] {
    let mut digest = of_channel(digest, channel, member);
    for (byte, position) in digest[6..].iter_mut().zip(position.to_le_bytes()) {
        *byte ^= position;
    }
    digest
}

impl std::fmt::Debug for FrameDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrameDigest(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_and_the_key_count() {
        let digest = FrameDigest::new(&DigestKey([1; 32]));
        for len in [1, 100, 240, 241, 5000] {
            let mut bytes = vec![7; len];
            let before = digest.of(&bytes);
            assert_ne!(before, FrameDigest::new(&DigestKey([2; 32])).of(&bytes));
            for at in 0..len {
                bytes[at] ^= 1;
                assert_ne!(digest.of(&bytes), before, "byte {at} of {len}");
                bytes[at] ^= 1;
            }
            assert_eq!(digest.of(&bytes), before);
        }
    }

    #[test]
    fn whose_bytes_they_are_counts() {
        let digest = [9; 16];
        let ours = of_channel(digest, 1 << 9, 3);
        assert_eq!(of_channel(ours, 1 << 9, 3), digest);
        assert_ne!(of_channel(ours, 1 << 8, 3), digest);
        assert_ne!(of_channel(ours, 1 << 9, 2), digest);
        assert_eq!(of_return(ours, 1 << 9, 3, 0), digest);
        let far = of_return(digest, 1 << 9, 3, 1 << 40);
        assert_eq!(of_return(far, 1 << 9, 3, 1 << 40), digest);
        assert_ne!(of_return(far, 1 << 9, 3, 1 << 41), digest);
    }

    /// What `docs/protocol.md` has as its example.
    #[test]
    fn the_example_of_the_protocol() {
        let key = DigestKey(std::array::from_fn(|index| index as u8));
        let digest = FrameDigest::new(&key).of(b"vmgang");
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let document = include_str!("../../../docs/protocol.md");
        assert!(document.contains(&format!("`{hex}`")), "{hex}");
    }
}
