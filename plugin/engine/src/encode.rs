//! The source half of a channel: stream bytes in, encoded DATA frames out.
//!
//! Owns: one channel's tokenizer, what it hashes, and the choice between a page in full, its
//! delta and its blocks.
//! Must not: do I/O or wait.

use vmgang_dedup::{
    BlockHasher, BlockMatches, DigestKey, HashSimilarityDetector, Member, PageDigest, Slot, delta,
    uniform_byte,
};
use vmgang_stream::{PAGE_BYTES, Page, Progress, Token, Tokenizer};
use vmgang_wire::payload::{BlockReference, Content, Encoder, PageBlocks, Place};
use vmgang_wire::{Compression, DATA_OVERHEAD_BYTES, STREAM_BYTES_MAX};

use crate::Techniques;
use crate::buffers::Buffers;
use crate::compression::{FrameCompressor, Patience, Rung};
use crate::counters::{GROUP_CROSS_VM, GROUP_INTRA_VM};
use crate::order::{Bases, Identity, Judgement, SessionOrder};
use crate::seal::Unsealed;
use crate::trial::Trial;

/// A delta longer than this is no better than a page that zstd has been over.
const DELTA_LIMIT: usize = PAGE_BYTES / 2;

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
        identity: Option<Identity>,
    },
}

/// A frame that has its place in the session but is not built yet.
#[derive(Debug)]
#[must_use = "a sequence number that is never sent ends the session"]
pub(crate) struct Ordered {
    sequence: u64,
}

/// Which techniques pay for this stream.
#[derive(Debug, Default)]
struct Trials {
    similar: Trial,
    sub_page: Trial,
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
    judgements: Vec<Judgement>,
    bases: Bases,
    delta: Vec<u8>,
    detector: Option<HashSimilarityDetector>,
    hasher: Option<BlockHasher>,
    trials: Trials,
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
            key: key.clone(),
            techniques,
            tokenizer: Tokenizer::new(),
            pieces: Vec::new(),
            judgements: Vec::new(),
            bases: Bases::default(),
            delta: Vec::new(),
            detector: techniques
                .similar
                .map(|parameters| HashSimilarityDetector::new(&key, parameters)),
            hasher: techniques.sub_page.map(|size| BlockHasher::new(&key, size)),
            trials: Trials::default(),
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
        let hashes = self.techniques.page
            && (self.techniques.rehash || !self.tokenizer.progress().first_pass_done());
        let Self {
            key,
            techniques,
            tokenizer,
            pieces,
            detector,
            hasher,
            trials,
            ..
        } = self;
        pieces.clear();
        let mut at = 0;
        let mut page = |place: Place, body: &Page, start: usize| {
            if techniques.uniform
                && let Some(fill) = uniform_byte(body)
            {
                return Piece::Uniform { place, fill };
            }
            let identity = hashes.then(|| Identity {
                digest: PageDigest::of(key, body),
                signatures: match detector {
                    Some(detector) if trials.similar.on() => Some(detector.signatures(body)),
                    _ => None,
                },
                blocks: match hasher {
                    Some(hasher) if trials.sub_page.on() => Some(hasher.hashes(body)),
                    _ => None,
                },
            });
            Piece::Page {
                start,
                place,
                identity,
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

    /// Takes the chunk's place in the session: from here on the frame must be sent. `bytes` are
    /// those that [`chunk`](Self::chunk) said it covers.
    pub(crate) fn order(&mut self, bytes: &[u8], session: &mut SessionOrder) -> Ordered {
        self.judgements.clear();
        self.bases.clear();
        for piece in &self.pieces {
            if let Piece::Page {
                start,
                place,
                identity: Some(identity),
            } = piece
            {
                let number = match place {
                    Place::Record { address } => Some(address / PAGE_BYTES as u64),
                    Place::Body => None,
                };
                let page = page_at(bytes, *start);
                let bases = &mut self.bases;
                let judgement = session.judge(self.member, number, identity, page, bases);
                self.judgements.push(judgement);
            }
        }
        Ordered {
            sequence: session.next_sequence(),
        }
    }

    /// Builds the frame of the chunk, compressed if `rung` is for frames on their own: `bytes`
    /// are those that [`chunk`](Self::chunk) said it covers.
    pub(crate) fn build(&mut self, bytes: &[u8], ordered: Ordered, rung: Rung) -> Unsealed {
        self.payload.clear();
        let mut judgements = self.judgements.iter();
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
                    identity,
                } => {
                    let page = page_at(bytes, start);
                    let judgement = identity
                        .as_ref()
                        .and_then(|identity| Some((identity, judgements.next()?)));
                    let content = match judgement {
                        Some((_, Judgement::Reference { slot, first_sender })) => {
                            Content::Reference {
                                slot: slot.0,
                                group: if *first_sender == self.member {
                                    GROUP_INTRA_VM
                                } else {
                                    GROUP_CROSS_VM
                                },
                            }
                        }
                        Some((
                            identity,
                            Judgement::Define {
                                slot,
                                bases,
                                blocks,
                            },
                        )) => {
                            let base = shortest(&self.bases, *bases, page, &mut self.delta);
                            let content = define(
                                &self.techniques,
                                *slot,
                                base.map(|base| (base, &self.delta[..])),
                                blocks,
                                page,
                            );
                            self.trials.count(identity, &content);
                            content
                        }
                        Some((_, Judgement::Send)) | None => Content::Literal(page),
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

/// The page of a piece.
fn page_at(bytes: &[u8], start: usize) -> &Page {
    let Some(page) = bytes[start..].first_chunk() else {
        unreachable!("a page piece lies inside its chunk");
    };
    page
}

/// Leaves the shortest delta in `delta`, and says to which base; `None` if all are too long.
fn shortest(bases: &Bases, of: (usize, usize), page: &Page, delta: &mut Vec<u8>) -> Option<Slot> {
    let mut found = None;
    let mut limit = DELTA_LIMIT;
    delta.clear();
    for (slot, base) in bases.of(of) {
        let before = delta.len();
        if delta::encode(page, base, limit, delta) {
            delta.drain(..before);
            limit = delta.len().saturating_sub(1);
            found = Some(slot);
        }
    }
    found
}

/// The shortest way to say what goes into a slot.
fn define<'a>(
    techniques: &Techniques,
    slot: Slot,
    delta: Option<(Slot, &'a [u8])>,
    matches: &BlockMatches,
    page: &'a Page,
) -> Content<'a> {
    let blocks = techniques
        .sub_page
        .filter(|_| matches.matched() > 0)
        .and_then(|size| {
            let sources = matches.blocks().map(|block| {
                block.map(|block| BlockReference {
                    slot: block.slot.0,
                    index: block.index,
                })
            });
            let left = (size.blocks() - matches.matched()) * size.bytes();
            Some((left, PageBlocks::of_page(size.bytes(), sources, page)?))
        });
    match (delta, blocks) {
        (Some((_, delta)), Some((left, blocks))) if left < delta.len() => Content::Blocks {
            slot: slot.0,
            blocks,
        },
        (Some((base, delta)), _) => Content::Delta {
            slot: slot.0,
            base: base.0,
            delta,
        },
        (None, Some((_, blocks))) => Content::Blocks {
            slot: slot.0,
            blocks,
        },
        (None, None) => Content::Define { slot: slot.0, page },
    }
}

impl Trials {
    /// A page that the peer did not have whole was sent like this.
    fn count(&mut self, identity: &Identity, content: &Content<'_>) {
        if identity.signatures.is_some() {
            self.similar.count(matches!(content, Content::Delta { .. }));
        }
        if identity.blocks.is_some() {
            self.sub_page
                .count(matches!(content, Content::Blocks { .. }));
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
