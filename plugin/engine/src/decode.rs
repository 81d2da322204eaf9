//! The destination half of a session: DATA frames in, verified stream bytes out.
//!
//! Owns: the page window, obeying the source's defines in session order.
//! Must not: do I/O, or hand out a byte that has not been verified. Everything a peer says
//! is bounded before memory is taken for it.

use vmgang_dedup::delta::{self, DeltaError};
use vmgang_dedup::{DigestKey, PAGE_BYTES, Page, PageWindow, Slot, WindowError, slots_in};
use vmgang_stream::rebuild;
use vmgang_wire::payload::{Block, Content, Operation, Operations, PageBlocks, Place};
use vmgang_wire::{Compression, Data, WireError};

use crate::buffers::Buffers;
use crate::compression::{Budget, DecompressError, Decompressor};
use crate::encode::frame_digest;

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
    #[error("the digest of the rebuilt stream does not match; nothing of it was delivered")]
    Digest,
}

/// Decodes the DATA frames of one session.
pub(crate) struct Decoder {
    key: DigestKey,
    window: PageWindow,
    next_sequence: u64,
    decompressor: Decompressor,
    raw: Vec<u8>,
    buffers: Buffers,
}

impl Decoder {
    /// A decoder that keeps at most `window_budget_bytes`.
    pub(crate) fn new(
        key: DigestKey,
        window_budget_bytes: u64,
        buffers: Buffers,
    ) -> std::io::Result<Self> {
        let budget = Budget::of(window_budget_bytes);
        Ok(Self {
            key,
            window: PageWindow::new(slots_in(budget.page_window_bytes)),
            next_sequence: 0,
            decompressor: Decompressor::new(budget.window_log)?,
            raw: Vec::new(),
            buffers,
        })
    }

    /// Rebuilds the stream bytes of a frame.
    pub(crate) fn decode(&mut self, data: &Data<'_>) -> Result<Vec<u8>, DecodeError> {
        if data.sequence != self.next_sequence {
            return Err(DecodeError::Sequence {
                expected: self.next_sequence,
                got: data.sequence,
            });
        }
        self.next_sequence += 1;
        let payload = if data.compression == Compression::None {
            data.payload
        } else {
            self.decompressor
                .decompress(data.compression, data.payload, &mut self.raw)?;
            &self.raw
        };
        let announced = data.stream_len as usize;
        let wrong_length = DecodeError::StreamLength {
            announced: data.stream_len,
        };
        let mut out = self.buffers.take();
        out.reserve(announced);
        for operation in Operations::new(payload)? {
            let operation = operation?;
            if out.len() + operation.stream_len() > announced {
                return Err(wrong_length);
            }
            apply(&mut self.window, &operation, &mut out)?;
        }
        if out.len() != announced {
            return Err(wrong_length);
        }
        if frame_digest(&self.key, &out) != data.digest {
            return Err(DecodeError::Digest);
        }
        Ok(out)
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
