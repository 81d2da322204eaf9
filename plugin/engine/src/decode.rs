//! The destination half of a session: DATA frames in, verified stream bytes out.
//!
//! Owns: the page window, obeying the source's defines in session order, and the three steps of
//! a frame: [`Piece::unpack`] in any order, [`Decoder::rebuild`] in session order,
//! [`Unverified::verify`] in any order.
//! Must not: do I/O, or hand out a byte that has not been verified. Everything a peer says
//! is bounded before memory is taken for it.

use vmgang_dedup::delta::{self, DeltaError};
use vmgang_dedup::{DigestKey, PAGE_BYTES, Page, PageWindow, Slot, WindowError, slots_in};
use vmgang_stream::rebuild;
#[cfg(test)]
use vmgang_wire::Data;
use vmgang_wire::payload::{Block, Content, Operation, Operations, PageBlocks, Place};
use vmgang_wire::{Compression, Frame, FrameHeader, WireError};

use crate::answers::Found;
use crate::buffers::Buffers;
use crate::compression::{Budget, DecompressError, FrameDecompressor, StreamDecompressor};
use crate::frame_digest::{FrameDigest, of_channel};

/// Fewer stream bytes get memory of their own.
const POOLED_BYTES_MIN: usize = 32 * 1024;

/// Why a frame cannot be turned back into stream bytes. Each ends the session: the two
/// windows could differ from here on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Window(#[from] WindowError),
    #[error(transparent)]
    Delta(#[from] DeltaError),
    #[error("frame {got} came where frame {expected} was due")]
    Sequence { expected: u64, got: u64 },
    #[error(transparent)]
    Compression(#[from] DecompressError),
    #[error("a frame says it stands for {announced} stream bytes and does not")]
    StreamLength { announced: u32 },
    #[error("the destination cannot set up decompression: {0}")]
    Memory(std::io::Error),
    #[error("a frame came to its turn before it was unpacked")]
    Packed,
    #[error("the digest of the rebuilt stream does not match; nothing of it was delivered")]
    Digest,
}

/// A DATA frame that owns its bytes.
#[derive(Debug)]
pub(crate) struct Piece {
    sequence: u64,
    stream_len: u32,
    digest: [u8; 16],
    compression: Compression,
    /// The payload is its end.
    bytes: Vec<u8>,
    payload_at: usize,
}

impl Piece {
    /// Reads the DATA or STAGE frame with that header. Also returns its channel; a stage has 0.
    pub(crate) fn read(header: &FrameHeader, body: Vec<u8>) -> Result<(u32, Piece), WireError> {
        let (channel, data) = match Frame::decode(header, &body)? {
            Frame::Data { channel, data } => (channel, data),
            Frame::Stage(data) => (0, data),
            _ => return Err(WireError::Value("kind")),
        };
        let piece = Piece {
            sequence: data.sequence,
            stream_len: data.stream_len,
            digest: data.digest,
            compression: data.compression,
            payload_at: body.len() - data.payload.len(),
            bytes: body,
        };
        Ok((channel, piece))
    }

    /// Stream bytes it says it stands for.
    pub(crate) fn stream_len(&self) -> u32 {
        self.stream_len
    }

    /// Bytes of memory it takes at most until its stream bytes are delivered.
    pub(crate) fn memory_bytes(&self) -> usize {
        let raw_len = match self.compression {
            Compression::Frame { raw_len } => raw_len as usize,
            // A piece of the stream is unpacked into the decoder's own buffer.
            _ => 0,
        };
        self.bytes.len() + raw_len + self.stream_len as usize
    }

    /// Decompresses a payload that is compressed on its own; leaves any other as it is.
    pub(crate) fn unpack(
        &mut self,
        frames: &mut FrameDecompressor,
        buffers: &Buffers,
    ) -> Result<(), DecodeError> {
        if let Compression::Frame { raw_len } = self.compression {
            let mut raw = buffers.take();
            frames.decompress(raw_len, self.payload(), &mut raw)?;
            buffers.give(std::mem::replace(&mut self.bytes, raw));
            self.payload_at = 0;
            self.compression = Compression::None;
        }
        Ok(())
    }

    /// Whose bytes they are to be.
    pub(crate) fn belongs_to(&mut self, channel: u32, member: usize) {
        self.digest = of_channel(self.digest, channel, member);
    }

    fn payload(&self) -> &[u8] {
        self.bytes.get(self.payload_at..).unwrap_or(&[])
    }

    /// Whether it can go through the window as it is.
    pub(crate) fn is_unpacked(&self) -> bool {
        self.compression == Compression::None
    }
}

/// Verified stream bytes: the end of a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StreamBytes {
    buffer: Vec<u8>,
    from: usize,
}

impl StreamBytes {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.get(self.from..).unwrap_or(&[])
    }

    /// The buffer, to be used again.
    pub(crate) fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }
}

/// Stream bytes that nobody may see before their digest was compared.
#[derive(Debug)]
#[must_use]
pub(crate) struct Unverified {
    bytes: StreamBytes,
    digest: [u8; 16],
    compare: FrameDigest,
}

impl Unverified {
    /// The bytes, if they are those that QEMU wrote.
    pub(crate) fn verify(self) -> Result<StreamBytes, DecodeError> {
        if self.compare.of(self.bytes.bytes()) != self.digest {
            return Err(DecodeError::Digest);
        }
        Ok(self.bytes)
    }
}

/// Decodes the DATA frames of one session.
pub(crate) struct Decoder {
    digest: FrameDigest,
    window: PageWindow,
    next_sequence: u64,
    stream: StreamDecompressor,
    raw: Vec<u8>,
    buffers: Buffers,
}

impl Decoder {
    /// A decoder that keeps at most `window_budget_bytes`.
    pub(crate) fn new(
        key: &DigestKey,
        window_budget_bytes: u64,
        buffers: Buffers,
    ) -> std::io::Result<Self> {
        let budget = Budget::of(window_budget_bytes);
        Ok(Self {
            digest: FrameDigest::new(key),
            window: PageWindow::new(slots_in(budget.page_window_bytes)),
            next_sequence: 0,
            stream: StreamDecompressor::new(budget.window_log)?,
            raw: Vec::new(),
            buffers,
        })
    }

    /// Puts contents into their slots.
    pub(crate) fn fill(&mut self, found: &Found) -> Result<(), WindowError> {
        let pages = found.pages.chunks_exact(PAGE_BYTES);
        for (slot, page) in found.slots.iter().zip(pages) {
            if let Some(page) = page.first_chunk() {
                self.window.define(*slot, page)?;
            }
        }
        Ok(())
    }

    /// Begins with the window of a stage.
    pub(crate) fn set_window(&mut self, window: PageWindow) {
        self.window = window;
    }

    pub(crate) fn into_window(self) -> PageWindow {
        self.window
    }

    /// Rebuilds the stream bytes of the session's next frame, which is unpacked.
    pub(crate) fn rebuild(&mut self, piece: Piece) -> Result<Unverified, DecodeError> {
        if piece.sequence != self.next_sequence {
            return Err(DecodeError::Sequence {
                expected: self.next_sequence,
                got: piece.sequence,
            });
        }
        self.next_sequence += 1;
        let (new, raw_len) = match piece.compression {
            Compression::None => {
                let bytes = match self.apply(&piece, piece.payload(), true)? {
                    Some(rebuilt) => {
                        let (digest, buffer) = (piece.digest, piece.bytes);
                        self.buffers.give(buffer);
                        return Ok(self.unverified(
                            StreamBytes {
                                buffer: rebuilt,
                                from: 0,
                            },
                            digest,
                        ));
                    }
                    None => StreamBytes {
                        from: piece.bytes.len() - piece.stream_len as usize,
                        buffer: piece.bytes,
                    },
                };
                return Ok(self.unverified(bytes, piece.digest));
            }
            Compression::Stream { raw_len } => (false, raw_len),
            Compression::NewStream { raw_len } => (true, raw_len),
            Compression::Frame { .. } => return Err(DecodeError::Packed),
        };
        let mut raw = std::mem::take(&mut self.raw);
        self.stream
            .decompress(new, raw_len, piece.payload(), &mut raw)?;
        let rebuilt = self.apply(&piece, &raw, false);
        self.raw = raw;
        let buffer = rebuilt?.unwrap_or_default();
        self.buffers.give(piece.bytes);
        Ok(self.unverified(StreamBytes { buffer, from: 0 }, piece.digest))
    }

    fn unverified(&self, bytes: StreamBytes, digest: [u8; 16]) -> Unverified {
        Unverified {
            bytes,
            digest,
            compare: self.digest.clone(),
        }
    }

    /// Carries out the operations of a payload. Returns what they rebuild; `None` if that is the
    /// end of the payload as it is, and `may_pass`.
    fn apply(
        &mut self,
        piece: &Piece,
        payload: &[u8],
        may_pass: bool,
    ) -> Result<Option<Vec<u8>>, DecodeError> {
        let announced = piece.stream_len as usize;
        let wrong_length = DecodeError::StreamLength {
            announced: piece.stream_len,
        };
        // A large buffer is not to wait for QEMU with a few bytes in it.
        let may_pass = may_pass && announced >= POOLED_BYTES_MIN;
        let mut out = None;
        let mut covered = 0;
        for operation in Operations::new(payload)? {
            let operation = operation?;
            covered += operation.stream_len();
            if covered > announced {
                return Err(wrong_length);
            }
            match operation {
                // All literals are its, and they are the end of the payload.
                Operation::Opaque(bytes) if may_pass && bytes.len() == announced => {}
                Operation::Keep { slot, page } => self.window.define(Slot(slot), page)?,
                _ => {
                    let out = out.get_or_insert_with(|| {
                        let mut out = match announced < POOLED_BYTES_MIN {
                            true => Vec::new(),
                            false => self.buffers.take(),
                        };
                        out.reserve(announced);
                        out
                    });
                    apply(&mut self.window, &operation, out)?;
                }
            }
        }
        if covered != announced {
            return Err(wrong_length);
        }
        Ok(out)
    }

    /// All steps of a frame at once.
    #[cfg(test)]
    pub(crate) fn decode(&mut self, data: &Data<'_>) -> Result<Vec<u8>, DecodeError> {
        let mut piece = Piece {
            sequence: data.sequence,
            stream_len: data.stream_len,
            digest: data.digest,
            compression: data.compression,
            bytes: data.payload.to_vec(),
            payload_at: 0,
        };
        let mut frames = FrameDecompressor::new().expect("memory for a context");
        piece.unpack(&mut frames, &self.buffers)?;
        Ok(self.rebuild(piece)?.verify()?.bytes().to_vec())
    }
}

fn apply(
    window: &mut PageWindow,
    operation: &Operation<'_>,
    out: &mut Vec<u8>,
) -> Result<(), DecodeError> {
    match *operation {
        Operation::Opaque(bytes) => out.extend_from_slice(bytes),
        Operation::Zero { address, fill } => rebuild::zero_record(out, address, fill),
        Operation::Address { address } => rebuild::address(out, address),
        Operation::Keep { slot, page } => window.define(Slot(slot), page)?,
        Operation::Page { place, content } => {
            if let Place::Record { address } = place {
                rebuild::page_header(out, address);
            }
            match content {
                Content::Literal(page) => out.extend_from_slice(page),
                Content::Define { slot, page } => {
                    window.define(Slot(slot), page)?;
                    out.extend_from_slice(page);
                }
                Content::Reference { slot, .. } => out.extend_from_slice(window.get(Slot(slot))?),
                Content::Uniform { fill } => {
                    out.resize(out.len() + vmgang_stream::PAGE_BYTES, fill);
                }
                // Both read all they need before their slot, which may be one they read
                // from, is filled again.
                Content::Delta { slot, base, delta } => {
                    let mut page: Page = [0; PAGE_BYTES];
                    delta::apply(window.get(Slot(base))?, delta, &mut page)?;
                    window.define(Slot(slot), &page)?;
                    out.extend_from_slice(&page);
                }
                Content::Blocks { slot, blocks } => {
                    let page = page_of_blocks(window, &blocks)?;
                    window.define(Slot(slot), &page)?;
                    out.extend_from_slice(&page);
                }
            }
        }
    }
    Ok(())
}

fn page_of_blocks(window: &PageWindow, blocks: &PageBlocks<'_>) -> Result<Page, WindowError> {
    let mut page: Page = [0; PAGE_BYTES];
    let block_bytes = blocks.block_bytes();
    for (to, block) in page.chunks_exact_mut(block_bytes).zip(blocks.iter()) {
        let from = match block {
            Block::Literal(bytes) => bytes,
            Block::Reference(block) => {
                let start = usize::from(block.index) * block_bytes;
                &window.get(Slot(block.slot))?[start..start + block_bytes]
            }
        };
        to.copy_from_slice(from);
    }
    Ok(page)
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "codec_operation_tests.rs"]
mod operation_tests;
