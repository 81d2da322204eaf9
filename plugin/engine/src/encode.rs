//! The source half of a channel: stream bytes in, encoded DATA frames out.
//!
//! Owns: the order of a session ([`SessionOrder`]: map and sequence number move together)
//! and one channel's tokenizer and buffers ([`ChannelEncoder`]).
//! Must not: do I/O or wait. The map's lock is held for look-ups only, never while hashing
//! or compressing.

use vmgang_dedup::{DedupMap, DigestKey, Member, PageDigest, Verdict, uniform_byte};
use vmgang_stream::{PAGE_BYTES, Page, Progress, Token, Tokenizer};
use vmgang_wire::payload::{Content, Encoder, Place};
use vmgang_wire::{Compression, DATA_OVERHEAD_BYTES, STREAM_BYTES_MAX};

use crate::Techniques;
use crate::buffers::Buffers;
use crate::compression::{FrameCompressor, Patience, Rung};
use crate::counters::{GROUP_CROSS_VM, GROUP_INTRA_VM};
use crate::seal::Unsealed;

/// What must move in one order over all channels of a session.
#[derive(Debug)]
pub(crate) struct SessionOrder {
    map: DedupMap,
    next_sequence: u64,
}

impl SessionOrder {
    pub(crate) fn new(window_slots: u32) -> Self {
        Self {
            map: DedupMap::new(window_slots),
            next_sequence: 0,
        }
    }
}

/// One piece of the chunk at hand, by position instead of by reference so that the list
/// can be reused.
#[derive(Debug, Clone, Copy)]
enum Piece {
    Opaque {
        start: usize,
        len: usize,
    },
    Zero {
        address: u64,
        fill: u8,
    },
    Uniform {
        place: Place,
        fill: u8,
    },
    Page {
        start: usize,
        place: Place,
        digest: Option<PageDigest>,
    },
}

/// A frame that has its place in the session but is not built yet.
#[derive(Debug)]
#[must_use = "a sequence number that is never sent ends the session"]
pub(crate) struct Ordered {
    sequence: u64,
}

/// Encodes one channel. For each chunk: [`chunk`](Self::chunk), then
/// [`order`](Self::order) under the session's lock, then [`build`](Self::build).
pub(crate) struct ChannelEncoder {
    channel: u32,
    member: Member,
    key: DigestKey,
    techniques: Techniques,
    tokenizer: Tokenizer,
    pieces: Vec<Piece>,
    verdicts: Vec<Verdict>,
    payload: Encoder,
    buffers: Buffers,
    zstd: FrameCompressor,
    patience: Patience,
}

impl ChannelEncoder {
    pub(crate) fn new(
        channel: u32,
        member: Member,
        key: DigestKey,
        techniques: Techniques,
        buffers: Buffers,
    ) -> std::io::Result<Self> {
        Ok(Self {
            channel,
            member,
            key,
            techniques,
            tokenizer: Tokenizer::new(),
            pieces: Vec::new(),
            verdicts: Vec::new(),
            payload: Encoder::default(),
            buffers,
            zstd: FrameCompressor::new()?,
            patience: Patience::default(),
        })
    }

    pub(crate) fn progress(&self) -> &Progress {
        self.tokenizer.progress()
    }

    /// Nothing of this stream is understood, now or any more.
    pub(crate) fn is_opaque(&self) -> bool {
        self.tokenizer.is_opaque()
    }

    /// Tokenises and hashes what is unread of the stream; returns how many bytes the next
    /// frame covers, 0 if more are needed first. `flush`: cover all of it.
    pub(crate) fn chunk(&mut self, unread: &[u8], flush: bool) -> usize {
        let unread = &unread[..unread.len().min(STREAM_BYTES_MAX)];
        let Self {
            key,
            techniques,
            tokenizer,
            pieces,
            ..
        } = self;
        pieces.clear();
        let mut at = 0;
        let page = |place: Place, body: &Page, start: usize| {
            if techniques.uniform
                && let Some(fill) = uniform_byte(body)
            {
                return Piece::Uniform { place, fill };
            }
            let digest = techniques.page.then(|| PageDigest::of(key, body));
            Piece::Page {
                start,
                place,
                digest,
            }
        };
        tokenizer.push(unread, flush, |token| {
            let end = at + token.stream_len();
            let piece = match token {
                Token::Opaque(bytes) => Piece::Opaque {
                    start: at,
                    len: bytes.len(),
                },
                Token::Zero { address, fill } => Piece::Zero { address, fill },
                Token::Page { address, body } => {
                    page(Place::Record { address }, body, end - PAGE_BYTES)
                }
                Token::Body(body) => page(Place::Body, body, end - PAGE_BYTES),
            };
            pieces.push(piece);
            at = end;
        })
    }

    /// Takes the chunk's place in the session: from here on the frame must be sent.
    pub(crate) fn order(&mut self, session: &mut SessionOrder) -> Ordered {
        self.verdicts.clear();
        for piece in &self.pieces {
            if let Piece::Page {
                digest: Some(digest),
                ..
            } = piece
            {
                self.verdicts.push(session.map.judge(*digest, self.member));
            }
        }
        let sequence = session.next_sequence;
        session.next_sequence += 1;
        Ordered { sequence }
    }

    /// Builds the frame of the chunk, compressed if `rung` is for frames on their own: `bytes`
    /// are those that [`chunk`](Self::chunk) said it covers.
    pub(crate) fn build(&mut self, bytes: &[u8], ordered: Ordered, rung: Rung) -> Unsealed {
        self.payload.clear();
        let mut verdicts = self.verdicts.iter();
        for piece in &self.pieces {
            match *piece {
                Piece::Opaque { start, len } => self.payload.opaque(&bytes[start..start + len]),
                Piece::Zero { address, fill } => self.payload.zero(address, fill),
                Piece::Uniform { place, fill } => {
                    self.payload.page(place, Content::Uniform { fill });
                }
                Piece::Page {
                    start,
                    place,
                    digest,
                } => {
                    let verdict = digest.and_then(|_| verdicts.next());
                    let Some(page) = bytes[start..].first_chunk::<PAGE_BYTES>() else {
                        unreachable!("a page piece lies inside its chunk");
                    };
                    let content = match verdict {
                        Some(Verdict::Reference { slot, first_sender }) => Content::Reference {
                            slot: slot.0,
                            group: if *first_sender == self.member {
                                GROUP_INTRA_VM
                            } else {
                                GROUP_CROSS_VM
                            },
                        },
                        Some(Verdict::Define { slot }) => Content::Define { slot: slot.0, page },
                        Some(Verdict::Send) | None => Content::Literal(page),
                    };
                    self.payload.page(place, content);
                }
            }
        }
        let literal_bytes = self.payload.literal_bytes() as u64;
        let mut buffer = self.buffers.take();
        buffer.resize(DATA_OVERHEAD_BYTES, 0);
        let costs = self.payload.finish(&mut buffer);
        let raw_len = buffer.len() - DATA_OVERHEAD_BYTES;
        let compression = self.compress(&mut buffer, rung);
        Unsealed {
            channel: self.channel,
            member: usize::from(self.member.0),
            sequence: ordered.sequence,
            stream_len: bytes.len() as u32,
            digest: frame_digest(&self.key, bytes),
            buffer,
            compression,
            costs,
            literal_bytes,
            raw_len,
        }
    }

    /// Compresses the payload in `buffer` if that makes it shorter.
    fn compress(&mut self, buffer: &mut Vec<u8>, rung: Rung) -> Compression {
        let raw_len = buffer.len() - DATA_OVERHEAD_BYTES;
        if !rung.frames() || !self.patience.tries(raw_len) {
            return Compression::None;
        }
        let mut out = self.buffers.take();
        out.resize(DATA_OVERHEAD_BYTES, 0);
        let raw = buffer.get(DATA_OVERHEAD_BYTES..).unwrap_or(&[]);
        let compressed = self.zstd.compress(rung, raw, &mut out);
        let len = out.len() - DATA_OVERHEAD_BYTES;
        match compressed {
            Ok(compression) if len < raw_len => {
                self.patience.learn(raw_len, len);
                self.buffers.give(std::mem::replace(buffer, out));
                compression
            }
            // Also what zstd fails at goes as it is.
            _ => {
                self.patience.learn(raw_len, raw_len);
                self.buffers.give(out);
                Compression::None
            }
        }
    }
}

/// The digest that a frame carries of its stream bytes.
pub(crate) fn frame_digest(key: &DigestKey, bytes: &[u8]) -> [u8; 16] {
    let hash = blake3::keyed_hash(&key.0, bytes);
    let mut digest = [0; 16];
    digest.copy_from_slice(&hash.as_bytes()[..16]);
    digest
}
