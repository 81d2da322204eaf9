//! A piece of one channel's stream on its way to becoming a frame, and what each step finds
//! out about it for the next: cut into tokens, identified, ordered, built.
//!
//! Owns: the memory of all steps, which goes round with the chunk. Must not: do any of them
//! but the cutting.

use vmgang_dedup::PageDigest;
use vmgang_stream::{PAGE_BYTES, Page, Token, Tokenizer};
use vmgang_wire::STREAM_BYTES_MAX;
use vmgang_wire::payload::{Encoder, Place};

use crate::order::{Bases, Identity, Judgement};
use crate::pool::Pool;

/// One piece of a chunk, by position.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Piece {
    Opaque {
        start: usize,
        len: usize,
    },
    Zeros {
        address: u64,
        fill: u8,
        count: usize,
    },
    Addresses {
        address: u64,
        count: usize,
    },
    Uniform {
        place: Place,
        fill: u8,
    },
    /// `known`: the next identity is its.
    Page {
        start: usize,
        place: Place,
        known: bool,
    },
}

/// See above.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    /// Stream bytes: more than the pieces cover until it is cut off.
    pub bytes: Vec<u8>,
    pub pieces: Vec<Piece>,
    /// Pages among the pieces.
    pub pages: u32,
    /// Its pages are still in their first pass.
    pub first_pass: bool,
    /// Whether that pays is on trial: similar pages and blocks were looked for.
    pub sought: bool,
    /// Of the pages that have one, in their order; so are the judgements.
    pub identities: Vec<Identity>,
    /// Of the pages that are being identified.
    pub digests: Vec<PageDigest>,
    pub judgements: Vec<Judgement>,
    pub bases: Bases,
    pub delta: Vec<u8>,
    pub payload: Encoder,
}

impl Chunk {
    fn clear(&mut self) {
        self.bytes.clear();
        self.pieces.clear();
        self.pages = 0;
        self.sought = false;
        self.identities.clear();
        self.digests.clear();
        self.judgements.clear();
        self.bases.clear();
        self.delta.clear();
        self.payload.clear();
    }

    /// What it takes, but for what is small.
    fn memory_bytes(&self) -> usize {
        self.bytes.capacity()
            + self.pieces.capacity() * size_of::<Piece>()
            + self.identities.capacity() * size_of::<Identity>()
            + self.judgements.capacity() * size_of::<Judgement>()
            + self.bases.memory_bytes()
            + self.payload.memory_bytes()
    }

    /// Cuts the bytes into pieces; returns how many bytes these cover, 0 if more are needed
    /// first. `flush`: all of them.
    pub(crate) fn tokenise(&mut self, tokenizer: &mut Tokenizer, flush: bool) -> usize {
        let Self {
            bytes,
            pieces,
            pages,
            ..
        } = self;
        self.first_pass = !tokenizer.progress().first_pass_done();
        pieces.clear();
        *pages = 0;
        let mut at = 0;
        let unread = &bytes[..bytes.len().min(STREAM_BYTES_MAX)];
        tokenizer.push(unread, flush, |token| {
            let end = at + token.stream_len();
            let mut page = |place| {
                *pages += 1;
                Piece::Page {
                    start: end - PAGE_BYTES,
                    place,
                    known: false,
                }
            };
            let piece = match token {
                Token::Opaque(bytes) => Piece::Opaque {
                    start: at,
                    len: bytes.len(),
                },
                Token::Zeros {
                    address,
                    fill,
                    count,
                } => Piece::Zeros {
                    address,
                    fill,
                    count,
                },
                Token::Addresses { address, count } => Piece::Addresses { address, count },
                Token::Page { address, .. } => page(Place::Record { address }),
                Token::Body(_) => page(Place::Body),
            };
            pieces.push(piece);
            at = end;
        })
    }

    /// The page of a piece of these bytes.
    pub(crate) fn page(bytes: &[u8], start: usize) -> &Page {
        let Some(page) = bytes[start..].first_chunk() else {
            unreachable!("a page piece lies inside its chunk");
        };
        page
    }
}

/// One that has grown larger is not kept. A guest can make a chunk of nothing but pieces.
const KEPT_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Chunks that go round; clones are the same pool.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chunks(Pool<Chunk>);

impl Chunks {
    /// An empty chunk with room for so many bytes.
    pub(crate) fn take(&self, room: usize) -> Chunk {
        let mut chunk = self.0.take().unwrap_or_default();
        chunk.bytes.reserve_exact(room);
        chunk
    }

    pub(crate) fn give(&self, mut chunk: Chunk) {
        chunk.clear();
        if chunk.memory_bytes() <= KEPT_BYTES_MAX {
            self.0.give(chunk);
        }
    }
}
