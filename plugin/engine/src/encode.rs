//! From identified chunks to DATA frames: the chunk's place in the session, and the choice
//! between a page in full, its delta and its blocks.
//!
//! Must not: do I/O or wait. Ordering is serial, in the order of the stream; building is not.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmgang_dedup::{BlockMatches, DigestKey, Member, PAGE_BYTES, Page, Slot, delta};
use vmgang_wire::payload::{BlockReference, Content, PageBlocks, Place};
use vmgang_wire::{Compression, DATA_OVERHEAD_BYTES};

use crate::Techniques;
use crate::buffers::Buffers;
use crate::chunk::{Chunk, Piece};
use crate::compression::{FrameCompressor, Patience, Rung, ZSTD_BYTES_MIN};
use crate::counters::{GROUP_CROSS_VM, GROUP_DESTINATION, GROUP_INTRA_VM, GROUP_STAGED};
use crate::frame_digest::FrameDigest;
use crate::identify::Identifier;
use crate::ladder::Worth;
use crate::order::{Bases, Judgement, SessionOrder};
use crate::pool::Pool;
use crate::scanned::Scanned;
use crate::seal::Unsealed;
use crate::sharing::Sharing;

/// A frame that has its place in the session but is not built yet.
#[derive(Debug)]
#[must_use = "a sequence number that is never sent ends the session"]
pub(crate) struct Ordered {
    sequence: u64,
}

/// How the frame of a chunk is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plan {
    /// The stream goes as it was read; nothing of it is copied.
    Pass,
    /// Operations and literals.
    Plain,
    /// The same, for the session's stream to compress.
    Stream(Rung),
    /// The same, compressed on its own.
    Compress(Rung),
}

/// What the encoders of a session share.
#[derive(Clone)]
pub(crate) struct Common {
    /// Of page digests.
    pub key: DigestKey,
    pub scanned: Scanned,
    pub digest: FrameDigest,
    pub techniques: Techniques,
    pub buffers: Buffers,
    /// zstd contexts for payloads, as many as are at work at once.
    pub compressors: Pool<FrameCompressor>,
    pub sharing: Arc<Sharing>,
}

/// Encodes one channel. For each chunk: [`identify`](Self::identify), then
/// [`order`](Self::order) under the session's lock, then [`build`](Self::build).
pub(crate) struct ChannelEncoder {
    channel: u32,
    member: Member,
    common: Common,
    identifier: Identifier,
    patience: Mutex<Patience>,
}

impl ChannelEncoder {
    pub(crate) fn new(channel: u32, member: Member, common: Common) -> Self {
        let scanned = common.scanned.of(member);
        Self {
            channel,
            member,
            identifier: Identifier::new(common.key.clone(), common.techniques, scanned),
            common,
            patience: Mutex::default(),
        }
    }

    /// The first step, for chunks side by side.
    pub(crate) fn identify(&self, chunk: &mut Chunk, scarce: bool) {
        self.identifier.identify(chunk, scarce);
    }

    /// Takes the chunk's place in the session: from here on the frame must be sent.
    pub(crate) fn order(&self, chunk: &mut Chunk, session: &mut SessionOrder) -> Ordered {
        let Chunk {
            bytes,
            pieces,
            identities,
            judgements,
            bases,
            ..
        } = chunk;
        judgements.clear();
        bases.clear();
        let mut unjudged = identities.iter();
        for piece in pieces.iter() {
            if let Piece::Page {
                start,
                place,
                known: true,
            } = piece
                && let Some(identity) = unjudged.next()
            {
                let number = match place {
                    Place::Record { address } => Some(address / PAGE_BYTES as u64),
                    Place::Body => None,
                };
                let page = Chunk::page(bytes, *start);
                let judgement = session.judge(self.member, number, identity, page, bases);
                judgements.push(judgement);
            }
        }
        if !identities.is_empty() {
            let earned = session.take_earned(self.member);
            let mut trials = self.identifier.trials();
            trials.page.count(identities.len() as u32, earned);
        }
        Ordered {
            sequence: session.next_sequence(),
        }
    }

    /// How an ordered chunk is best built.
    pub(crate) fn plan(&self, chunk: &Chunk, rung: Rung) -> Plan {
        if rung.streams() {
            Plan::Stream(rung)
        } else if rung.frames() && self.patience().tries(chunk.bytes.len()) {
            Plan::Compress(rung)
        } else if passes(chunk) {
            Plan::Pass
        } else {
            Plan::Plain
        }
    }

    fn patience(&self) -> MutexGuard<'_, Patience> {
        self.patience.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Builds the frame of the chunk.
    pub(crate) fn build(
        &self,
        chunk: &mut Chunk,
        ordered: Ordered,
        plan: Plan,
        worth: Worth,
    ) -> Unsealed {
        match plan {
            Plan::Pass => pass(chunk),
            Plan::Plain | Plan::Stream(_) | Plan::Compress(_) => self.encode(chunk, worth),
        }
        let literal_bytes = chunk.payload.literal_bytes() as u64;
        let mut buffer = self.common.buffers.take();
        buffer.resize(DATA_OVERHEAD_BYTES, 0);
        let costs = chunk.payload.finish(&mut buffer);
        let raw_len = buffer.len() - DATA_OVERHEAD_BYTES;
        let digest = self.common.digest.of(&chunk.bytes);
        let stream_len = chunk.bytes.len() as u32;
        let (compression, tail) = match plan {
            Plan::Pass => {
                let tail = std::mem::replace(&mut chunk.bytes, self.common.buffers.take());
                (Compression::None, tail)
            }
            Plan::Plain | Plan::Stream(_) => (Compression::None, Vec::new()),
            Plan::Compress(rung) => (self.compress(&mut buffer, rung), Vec::new()),
        };
        let raw_len = raw_len + tail.len();
        Unsealed {
            channel: self.channel,
            member: usize::from(self.member.0),
            sequence: ordered.sequence,
            stream_len,
            digest,
            buffer,
            tail,
            compression,
            stream: match plan {
                Plan::Stream(rung) => Some(rung),
                _ => None,
            },
            costs,
            literal_bytes,
            raw_len,
        }
    }

    fn encode(&self, chunk: &mut Chunk, worth: Worth) {
        let Chunk {
            bytes,
            pieces,
            identities,
            judgements,
            bases,
            delta,
            payload,
            sought,
            ..
        } = chunk;
        payload.clear();
        let mut judged = identities.iter().zip(judgements.iter());
        // Pages that were looked for, and those that were found.
        let (mut near, mut sub_page) = ((0, 0), (0, 0));
        for piece in pieces.iter() {
            match *piece {
                Piece::Opaque { start, len } => payload.opaque(&bytes[start..start + len]),
                Piece::Zeros {
                    address,
                    fill,
                    count,
                } => payload.zeros(address, fill, count),
                Piece::Addresses { address, count } => payload.addresses(address, count),
                Piece::Uniform { place, fill } => payload.page(place, Content::Uniform { fill }),
                Piece::Page {
                    start,
                    place,
                    known,
                } => {
                    let page = Chunk::page(bytes, start);
                    let judgement = if known { judged.next() } else { None };
                    let content = match judgement {
                        Some((_, Judgement::Reference { slot, first_sender })) => {
                            self.common.sharing.count(self.member, *first_sender);
                            Content::Reference {
                                slot: slot.0,
                                group: match *first_sender {
                                    Member::STAGED => GROUP_STAGED,
                                    Member::DESTINATION => GROUP_DESTINATION,
                                    sender if sender == self.member => GROUP_INTRA_VM,
                                    _ => GROUP_CROSS_VM,
                                },
                            }
                        }
                        Some((
                            identity,
                            Judgement::Define {
                                slot,
                                bases: of,
                                blocks,
                            },
                        )) => {
                            let base = shortest(bases, *of, page, worth.delta_max, delta);
                            let content = define(
                                &self.common.techniques,
                                *slot,
                                base.map(|base| (base, &delta[..])),
                                blocks,
                                page,
                            );
                            if *sought && identity.near {
                                near.0 += 1;
                                near.1 += u32::from(!matches!(content, Content::Define { .. }));
                            }
                            if identity.blocks.is_some() {
                                sub_page.0 += 1;
                                sub_page.1 += u32::from(matches!(content, Content::Blocks { .. }));
                            }
                            content
                        }
                        Some((_, Judgement::Send)) | None => Content::Literal(page),
                    };
                    payload.page(place, content);
                }
            }
        }
        if near.0 + sub_page.0 > 0 {
            let mut trials = self.identifier.trials();
            trials.near.count(near.0, near.1, worth.scarce);
            trials.page.earn(near.1 + sub_page.1);
            trials.sub_page.count(sub_page.0, sub_page.1, worth.scarce);
        }
    }

    /// Compresses the payload in `buffer` if that makes it shorter.
    fn compress(&self, buffer: &mut Vec<u8>, rung: Rung) -> Compression {
        let raw_len = buffer.len() - DATA_OVERHEAD_BYTES;
        if raw_len < ZSTD_BYTES_MIN {
            return Compression::None;
        }
        let mut out = self.common.buffers.take();
        out.resize(DATA_OVERHEAD_BYTES, 0);
        let raw = buffer.get(DATA_OVERHEAD_BYTES..).unwrap_or(&[]);
        let zstd = self.common.compressors.take();
        let zstd = zstd.map_or_else(FrameCompressor::new, Ok);
        let compressed = zstd.and_then(|mut zstd| {
            let compression = zstd.compress(rung, raw, &mut out)?;
            self.common.compressors.give(zstd);
            Ok(compression)
        });
        let len = out.len() - DATA_OVERHEAD_BYTES;
        match compressed {
            Ok(compression) if len < raw_len => {
                self.patience().learn(raw_len, len);
                self.common.buffers.give(std::mem::replace(buffer, out));
                compression
            }
            // Also what zstd fails at goes as it is.
            _ => {
                self.patience().learn(raw_len, raw_len);
                self.common.buffers.give(out);
                Compression::None
            }
        }
    }
}

/// Whether a chunk is nothing but bytes and pages to be sent as they are.
fn passes(chunk: &Chunk) -> bool {
    let as_it_is = |judgement: &Judgement| match judgement {
        Judgement::Reference { .. } => false,
        Judgement::Define {
            bases: (_, bases),
            blocks,
            ..
        } => *bases == 0 && blocks.matched() == 0,
        Judgement::Send => true,
    };
    chunk
        .pieces
        .iter()
        .all(|piece| matches!(piece, Piece::Opaque { .. } | Piece::Page { .. }))
        && chunk.judgements.iter().all(as_it_is)
}

/// The payload of such a chunk, but for its stream bytes, which go behind it.
fn pass(chunk: &mut Chunk) {
    let Chunk {
        bytes,
        pieces,
        judgements,
        payload,
        ..
    } = chunk;
    payload.clear();
    payload.passed(bytes.len());
    let mut judged = judgements.iter();
    for piece in pieces.iter() {
        if let Piece::Page {
            start, known: true, ..
        } = piece
            && let Some(Judgement::Define { slot, .. }) = judged.next()
        {
            payload.keep(*start, slot.0);
        }
    }
}

/// Leaves the shortest delta in `delta`, and says to which base; `None` if all are too long.
fn shortest(
    bases: &Bases,
    of: (usize, usize),
    page: &Page,
    mut limit: usize,
    delta: &mut Vec<u8>,
) -> Option<Slot> {
    let mut found = None;
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
