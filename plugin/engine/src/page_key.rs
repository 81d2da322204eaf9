//! The key that page digests are made with: one for all hosts that trust the same authorities, so
//! that a content has one digest on all of them (`docs/decisions/0011`).
//!
//! Must not: be sent; its id is.

use vmgang_dedup::{DigestKey, Fingerprinter};

const KEY_CONTEXT: &str = "vmgang 1 page identity";
const ID_CONTEXT: &str = "vmgang 1 page key id";

/// A trust domain's key.
#[derive(Debug, Clone)]
pub struct PageKey {
    key: DigestKey,
    id: u64,
}

impl PageKey {
    /// The key of hosts that trust these certificates, in DER. Without any, the one of hosts
    /// without TLS, which is no secret.
    pub fn of_authorities<C: AsRef<[u8]>>(certificates: &[C]) -> Self {
        let mut sorted: Vec<&[u8]> = certificates.iter().map(AsRef::as_ref).collect();
        sorted.sort_unstable();
        let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
        for certificate in sorted {
            hasher.update(certificate);
        }
        let key = *hasher.finalize().as_bytes();
        let [i0, i1, i2, i3, i4, i5, i6, i7, ..] = blake3::derive_key(ID_CONTEXT, &key);
        Self {
            key: DigestKey(key),
            id: u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]),
        }
    }

    /// Tells keys apart, and tells nothing else of them.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What page digests are made with.
    pub fn digest_key(&self) -> &DigestKey {
        &self.key
    }

    /// What makes the fingerprints that go with them.
    pub fn fingerprinter(&self) -> Fingerprinter {
        Fingerprinter::new(&self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_make_the_key_whatever_their_order() {
        let key = |certificates: &[&[u8]]| PageKey::of_authorities(certificates);
        let (ab, ba) = (key(&[b"a", b"b"]), key(&[b"b", b"a"]));
        assert_eq!((ab.id(), &ab.key), (ba.id(), &ba.key));
        assert_ne!(ab.id(), key(&[b"a"]).id());
        assert_ne!(key(&[]).id(), key(&[b"a"]).id());
    }
}
