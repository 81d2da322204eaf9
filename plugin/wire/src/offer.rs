//! Contents that the source could send, and which of them the destination has already.
//!
//! Must not: look any of them up.

use crate::cursor::Reader;
use crate::{OFFER_CONTENTS_MAX, WireError};

/// One content that is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offered {
    /// Where it is to go, if the destination has it.
    pub slot: u32,
    pub digest: [u8; 16],
}

/// Bytes of one content in an OFFER.
const OFFERED_BYTES: usize = 4 + 16;

/// Contents that are offered, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    pub contents: Vec<Offered>,
}

impl Offer {
    pub(crate) fn encode_body(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.contents.len() as u16).to_le_bytes());
        for content in &self.contents {
            out.extend_from_slice(&content.slot.to_le_bytes());
            out.extend_from_slice(&content.digest);
        }
    }

    pub(crate) fn decode_body(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let count = usize::from(reader.u16("count")?);
        let (entries, rest) = reader.rest().as_chunks::<OFFERED_BYTES>();
        if count == 0 || count > OFFER_CONTENTS_MAX || entries.len() != count || !rest.is_empty() {
            return Err(WireError::Value("count"));
        }
        let contents = entries.iter().map(|entry| {
            let [s0, s1, s2, s3, digest @ ..] = *entry;
            Offered {
                slot: u32::from_le_bytes([s0, s1, s2, s3]),
                digest,
            }
        });
        Ok(Self {
            contents: contents.collect(),
        })
    }
}

/// The answer to an OFFER: one bit for each of its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Have {
    /// Whether each is in its slot now.
    pub contents: Vec<bool>,
}

impl Have {
    pub(crate) fn encode_body(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.contents.len() as u16).to_le_bytes());
        for eight in self.contents.chunks(8) {
            let bits = eight.iter().enumerate();
            out.push(bits.fold(0, |byte, (bit, has)| byte | (u8::from(*has) << bit)));
        }
    }

    pub(crate) fn decode_body(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let count = usize::from(reader.u16("count")?);
        let bits = reader.rest();
        if count == 0 || count > OFFER_CONTENTS_MAX || bits.len() != count.div_ceil(8) {
            return Err(WireError::Value("count"));
        }
        let all = bits
            .iter()
            .flat_map(|byte| (0..8).map(move |bit| byte & (1 << bit) != 0));
        let contents: Vec<bool> = all.collect();
        let (contents, padding) = contents.split_at(count);
        if padding.contains(&true) {
            return Err(WireError::Value("padding"));
        }
        Ok(Self {
            contents: contents.to_vec(),
        })
    }
}

/// Contents that are in the window before anything was sent, one slot after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announce {
    pub digests: Vec<[u8; 16]>,
}

impl Announce {
    pub(crate) fn encode_body(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.digests.len() as u16).to_le_bytes());
        for digest in &self.digests {
            out.extend_from_slice(digest);
        }
    }

    pub(crate) fn decode_body(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let count = usize::from(reader.u16("count")?);
        let (digests, rest) = reader.rest().as_chunks::<16>();
        if count == 0 || count > OFFER_CONTENTS_MAX || digests.len() != count || !rest.is_empty() {
            return Err(WireError::Value("count"));
        }
        Ok(Self {
            digests: digests.to_vec(),
        })
    }
}
