//! What changed in a page: a page as a difference to another one that both ends have.
//!
//! Owns: the delta format ([`encode`], [`apply`]).
//! Must not: choose the base, keep pages, or look for content that has moved inside a page
//! (finding that is the compressor's business).
//!
//! A delta is a list of runs of bytes to overwrite, in rising order:
//! - u16 little-endian: the low 12 bits are the bytes that stay as they are since the end of
//!   the run before (or the start of the page); the high 4 bits are the length less one, 0 to
//!   14, or 15 if
//! - a varint follows (LEB128, one byte or two): the length less 16;
//! - the bytes of the run.
//!
//! What follows the last run stays as it is, so equal pages have an empty delta.

use crate::byte_mask::{BLOCK_BYTES, difference};
use crate::{PAGE_BYTES, Page};

/// Runs closer than this are one: a run's own header takes as many bytes.
const GAP_BYTES_MAX: usize = 2;
/// Bits of a run's header that say how far it is from the one before.
const SKIP_BITS: u32 = 12;
/// The length in the header that says a varint follows.
const LONG: u16 = 15;

/// What a peer can get wrong about a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    #[error("a delta ends inside a run")]
    Truncated,
    #[error("a delta reaches beyond its page")]
    OutOfPage,
    #[error("a delta has a run with a bad length")]
    Length,
}

/// Appends to `out` the delta that makes `target` of `base`. False, with nothing appended, if
/// it would take more than `limit` bytes.
pub fn encode(target: &Page, base: &Page, limit: usize, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let mut writer = Writer {
        target,
        out,
        full_at: start.saturating_add(limit),
        written_to: 0,
        run: None,
    };
    let fits = writer.page(base);
    if !fits {
        out.truncate(start);
    }
    fits
}

struct Writer<'a> {
    target: &'a Page,
    out: &'a mut Vec<u8>,
    full_at: usize,
    /// Where the last run in `out` ends in the page.
    written_to: usize,
    /// The run being grown: where it starts and ends.
    run: Option<(usize, usize)>,
}

impl Writer<'_> {
    fn page(&mut self, base: &Page) -> bool {
        let (targets, _) = self.target.as_chunks::<BLOCK_BYTES>();
        let (bases, _) = base.as_chunks::<BLOCK_BYTES>();
        // Blocks are compared four at a time first: nearly equal pages have few that differ.
        for (index, (targets, bases)) in targets.chunks(4).zip(bases.chunks(4)).enumerate() {
            if targets.as_flattened() == bases.as_flattened() {
                continue;
            }
            for (inner, (target, base)) in targets.iter().zip(bases).enumerate() {
                let differs = difference(target, base);
                if !self.block((index * 4 + inner) * BLOCK_BYTES, differs) {
                    return false;
                }
            }
        }
        self.close()
    }

    /// Takes the differing bytes of the block at `at`, a bit each.
    fn block(&mut self, at: usize, mut differs: u64) -> bool {
        while differs != 0 {
            let first = differs.trailing_zeros();
            let len = (differs >> first).trailing_ones();
            if !self.bytes(at + first as usize, len as usize) {
                return false;
            }
            match u64::MAX.checked_shl(first + len) {
                Some(rest) => differs &= rest,
                None => break,
            }
        }
        true
    }

    fn bytes(&mut self, at: usize, len: usize) -> bool {
        match &mut self.run {
            Some((start, end)) if at - *end <= GAP_BYTES_MAX => {
                *end = at + len;
                // Long runs are measured while they grow: unrelated pages end early.
                self.out.len() + (*end - *start) <= self.full_at
            }
            _ => {
                let fits = self.close();
                self.run = Some((at, at + len));
                fits
            }
        }
    }

    fn close(&mut self) -> bool {
        let Some((start, end)) = self.run.take() else {
            return true;
        };
        let skip = (start - self.written_to) as u16;
        let len = end - start;
        let short = ((len - 1).min(usize::from(LONG))) as u16;
        self.out
            .extend_from_slice(&(skip | (short << SKIP_BITS)).to_le_bytes());
        if short == LONG {
            let rest = len - 1 - usize::from(LONG);
            if rest < 0x80 {
                self.out.push(rest as u8);
            } else {
                self.out
                    .extend_from_slice(&[rest as u8 | 0x80, (rest >> 7) as u8]);
            }
        }
        self.out.extend_from_slice(&self.target[start..end]);
        self.written_to = end;
        self.out.len() <= self.full_at
    }
}

/// Makes `page` of `base` and a delta. On an error `page` is something in between and must not
/// be used.
pub fn apply(base: &Page, delta: &[u8], page: &mut Page) -> Result<(), DeltaError> {
    *page = *base;
    let mut rest = delta;
    let mut at = 0;
    while !rest.is_empty() {
        let (header, after) = rest.split_first_chunk().ok_or(DeltaError::Truncated)?;
        rest = after;
        let header = u16::from_le_bytes(*header);
        at += usize::from(header & ((1 << SKIP_BITS) - 1));
        let mut len = usize::from(header >> SKIP_BITS) + 1;
        if header >> SKIP_BITS == LONG {
            len += usize::from(varint(&mut rest)?);
        }
        let end = at + len;
        let to = page.get_mut(at..end).ok_or(DeltaError::OutOfPage)?;
        let (bytes, after) = rest.split_at_checked(len).ok_or(DeltaError::Truncated)?;
        to.copy_from_slice(bytes);
        rest = after;
        at = end;
    }
    debug_assert!(at <= PAGE_BYTES);
    Ok(())
}

/// One byte or two; two that would fit into one are an error.
fn varint(rest: &mut &[u8]) -> Result<u16, DeltaError> {
    let mut byte = || {
        let (first, after) = rest.split_first().ok_or(DeltaError::Truncated)?;
        *rest = after;
        Ok(*first)
    };
    let low = byte()?;
    if low < 0x80 {
        return Ok(u16::from(low));
    }
    match byte()? {
        high @ 1..0x80 => Ok(u16::from(low & 0x7f) | (u16::from(high) << 7)),
        _ => Err(DeltaError::Length),
    }
}
