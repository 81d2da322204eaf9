//! How DATA payloads are compressed: the session's zstd stream, frames of their own, or not.
//!
//! Owns: the rungs from light to strong, the zstd contexts of both halves, and what memory
//! the session's stream may take. Which rung is right is measured in `ladder.rs`.
//! Must not: do I/O, or know what a payload holds.

use std::io;

use vmgang_wire::{BODY_BYTES_MAX, Compression};
use zstd::stream::raw::CParameter;
use zstd::zstd_safe::{
    CCtx, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, compress_bound, get_error_name,
};

/// Payloads shorter than this are not worth a compression call.
pub(crate) const ZSTD_BYTES_MIN: usize = 64;
/// A payload that compression takes less than one part in so many off was not worth it.
const WORTH: usize = 32;
/// Frames of a channel that stay uncompressed after one that was not worth it, at most.
const SKIP_MAX: u32 = 32;
/// 128 MiB: distinct pages of similar guests still find their likes over that distance.
const WINDOW_LOG_MAX: u32 = 27;
/// The most that a session's zstd stream takes of its budget, besides never more than an eighth.
pub const ZSTD_WINDOW_MAX_BYTES: u64 = 1 << WINDOW_LOG_MAX;
/// Below 1 MiB a stream finds no more than frames of their own.
const WINDOW_LOG_MIN: u32 = 20;

/// How hard to compress, from not at all to hard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rung {
    /// As it is.
    None,
    /// A zstd frame each, as quick as zstd goes.
    Quick,
    /// A zstd frame each, level 1.
    Frame,
    /// The session's stream, level 1, with long-range matching over all members.
    Long,
    /// The same at level 3.
    Hard,
}

impl Rung {
    /// From light to strong.
    pub const ALL: [Rung; 5] = [Rung::None, Rung::Quick, Rung::Frame, Rung::Long, Rung::Hard];

    fn level(self) -> i32 {
        match self {
            Rung::None => 0,
            Rung::Quick => -5,
            Rung::Frame | Rung::Long => 1,
            Rung::Hard => 3,
        }
    }

    /// Of a frame of its own. zstd's level 1 looks for 7 equal bytes; 5, and a table twice as large,
    /// find 2 % more in pages in the same time (`docs/decisions/0008`).
    fn frame_parameters(self) -> [CParameter; 3] {
        let (min_match, hash_log) = match self {
            Rung::Frame => (5, 15),
            // What the level says.
            _ => (0, 0),
        };
        [
            CParameter::CompressionLevel(self.level()),
            CParameter::MinMatch(min_match),
            CParameter::HashLog(hash_log),
        ]
    }

    /// Whether it compresses each payload on its own, so that payloads can be done at the
    /// same time.
    pub(crate) fn frames(self) -> bool {
        matches!(self, Rung::Quick | Rung::Frame)
    }

    /// Whether it goes through the session's stream.
    pub(crate) fn streams(self) -> bool {
        matches!(self, Rung::Long | Rung::Hard)
    }
}

/// The memory that both ends set aside for a job, divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Of the session's zstd stream; `None`: there is none.
    pub window_log: Option<u32>,
    /// For the page window.
    pub page_window_bytes: u64,
}

impl Budget {
    /// Of the window budget that WELCOME grants.
    pub(crate) fn of(window_budget_bytes: u64) -> Budget {
        let log = (window_budget_bytes / 8).checked_ilog2().unwrap_or(0);
        if log < WINDOW_LOG_MIN {
            return Budget {
                window_log: None,
                page_window_bytes: window_budget_bytes,
            };
        }
        let log = log.min(WINDOW_LOG_MAX);
        Budget {
            window_log: Some(log),
            page_window_bytes: window_budget_bytes - (1 << log),
        }
    }
}

/// Slots of a session's page window.
pub(crate) fn window_slots(budget_bytes: u64) -> u32 {
    vmgang_dedup::slots_in(Budget::of(budget_bytes).page_window_bytes)
}

/// Leaves out a channel's payloads for a while after one that would not shrink: random or
/// encrypted memory seldom comes alone.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    skip: u32,
    left: u32,
}

impl Patience {
    /// Whether the next payload is to be tried.
    pub(crate) fn tries(&mut self, raw_len: usize) -> bool {
        if raw_len < ZSTD_BYTES_MIN {
            return false;
        }
        if self.left > 0 {
            self.left -= 1;
            return false;
        }
        true
    }

    /// What became of it.
    pub(crate) fn learn(&mut self, raw_len: usize, compressed_len: usize) {
        if compressed_len + raw_len / WORTH < raw_len {
            self.skip = 0;
        } else {
            self.skip = (self.skip * 2).clamp(1, SKIP_MAX);
            self.left = self.skip;
        }
    }
}

fn failed(code: usize) -> io::Error {
    io::Error::other(get_error_name(code))
}

/// Compresses payloads one by one.
pub(crate) struct FrameCompressor {
    context: CCtx<'static>,
    rung: Rung,
    /// Compressed bytes go here first: it is cleared only when it grows.
    scratch: Vec<u8>,
}

impl FrameCompressor {
    pub(crate) fn new() -> io::Result<Self> {
        let context = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            context,
            rung: Rung::None,
            scratch: Vec::new(),
        })
    }

    /// Appends the compressed payload to `out`.
    pub(crate) fn compress(
        &mut self,
        rung: Rung,
        raw: &[u8],
        out: &mut Vec<u8>,
    ) -> io::Result<Compression> {
        if self.rung != rung {
            for parameter in rung.frame_parameters() {
                self.context.set_parameter(parameter).map_err(failed)?;
            }
            self.rung = rung;
        }
        let room = room(&mut self.scratch, compress_bound(raw.len()));
        let written = self.context.compress2(room, raw).map_err(failed)?;
        out.extend_from_slice(&self.scratch[..written]);
        Ok(Compression::Frame {
            raw_len: raw.len() as u32,
        })
    }
}

/// The first `bytes` of a buffer that grows as needed.
fn room(scratch: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if scratch.len() < bytes {
        scratch.resize(bytes, 0);
    }
    &mut scratch[..bytes]
}

/// The source's end of the session's stream.
pub(crate) struct StreamCompressor {
    context: CCtx<'static>,
    scratch: Vec<u8>,
    window_log: u32,
    /// What the stream at hand was begun with.
    rung: Option<Rung>,
}

impl StreamCompressor {
    pub(crate) fn new(window_log: u32) -> io::Result<Self> {
        let context = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            context,
            scratch: Vec::new(),
            window_log,
            rung: None,
        })
    }

    /// Appends the next piece of the stream to `out`. With another rung than the last time,
    /// a new stream begins.
    ///
    /// After an error the two ends may differ: the session must end.
    pub(crate) fn compress(
        &mut self,
        rung: Rung,
        raw: &[u8],
        out: &mut Vec<u8>,
    ) -> io::Result<Compression> {
        let raw_len = raw.len() as u32;
        let compression = if self.rung == Some(rung) {
            Compression::Stream { raw_len }
        } else {
            self.begin(rung)?;
            Compression::NewStream { raw_len }
        };
        // A flush closes the block at hand, so a few bytes on top of the bound.
        let room = room(&mut self.scratch, compress_bound(raw.len()) + 64);
        let mut output = OutBuffer::around(room);
        let mut input = InBuffer::around(raw);
        while input.pos() < raw.len() {
            self.context
                .compress_stream(&mut output, &mut input)
                .map_err(failed)?;
        }
        while self.context.flush_stream(&mut output).map_err(failed)? > 0 {
            if output.pos() == output.capacity() {
                return Err(io::Error::other("zstd exceeds its own bound"));
            }
        }
        let written = output.pos();
        out.extend_from_slice(&self.scratch[..written]);
        Ok(compression)
    }

    fn begin(&mut self, rung: Rung) -> io::Result<()> {
        self.context
            .reset(ResetDirective::SessionAndParameters)
            .map_err(failed)?;
        for parameter in [
            CParameter::CompressionLevel(rung.level()),
            CParameter::WindowLog(self.window_log),
            CParameter::EnableLongDistanceMatching(true),
            CParameter::ContentSizeFlag(false),
        ] {
            self.context.set_parameter(parameter).map_err(failed)?;
        }
        self.rung = Some(rung);
        Ok(())
    }
}

/// Why a payload could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DecompressError {
    #[error("a compressed payload could not be read: {0}")]
    Zstd(io::Error),
    #[error("a compressed payload is not of the length it says")]
    Length,
    #[error("it uses a session stream that does not exist")]
    NoStream,
}

/// Room for a payload of that length, and nothing in it.
fn make_room(raw: &mut Vec<u8>, raw_len: u32) -> usize {
    let raw_len = (raw_len as usize).min(BODY_BYTES_MAX);
    raw.clear();
    raw.reserve(raw_len);
    raw_len
}

/// The destination's end of frames on their own, which may be read in any order.
pub(crate) struct FrameDecompressor(DCtx<'static>);

impl FrameDecompressor {
    pub(crate) fn new() -> io::Result<Self> {
        let context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self(context))
    }

    /// Replaces `raw` by the payload.
    pub(crate) fn decompress(
        &mut self,
        raw_len: u32,
        payload: &[u8],
        raw: &mut Vec<u8>,
    ) -> Result<(), DecompressError> {
        let raw_len = make_room(raw, raw_len);
        let written = self
            .0
            .decompress(raw, payload)
            .map_err(|code| DecompressError::Zstd(failed(code)))?;
        if written == raw_len {
            Ok(())
        } else {
            Err(DecompressError::Length)
        }
    }
}

/// The destination's end of the session's stream.
pub(crate) struct StreamDecompressor {
    /// `None`: the budget has no room for a stream.
    context: Option<DCtx<'static>>,
    begun: bool,
}

impl StreamDecompressor {
    pub(crate) fn new(window_log: Option<u32>) -> io::Result<Self> {
        let context = match window_log {
            None => None,
            Some(window_log) => {
                let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
                // A larger window would take more memory than was agreed.
                context
                    .set_parameter(DParameter::WindowLogMax(window_log))
                    .map_err(failed)?;
                Some(context)
            }
        };
        Ok(Self {
            context,
            begun: false,
        })
    }

    /// Replaces `raw` by the next piece of the stream, or the first one of a `new` stream.
    pub(crate) fn decompress(
        &mut self,
        new: bool,
        raw_len: u32,
        payload: &[u8],
        raw: &mut Vec<u8>,
    ) -> Result<(), DecompressError> {
        let zstd = |code| DecompressError::Zstd(failed(code));
        let Some(context) = &mut self.context else {
            return Err(DecompressError::NoStream);
        };
        if new {
            context.reset(ResetDirective::SessionOnly).map_err(zstd)?;
            self.begun = true;
        } else if !self.begun {
            return Err(DecompressError::NoStream);
        }
        let raw_len = make_room(raw, raw_len);
        let mut input = InBuffer::around(payload);
        let mut output = OutBuffer::around(raw);
        while input.pos() < payload.len() {
            let before = (input.pos(), output.pos());
            let hint = context
                .decompress_stream(&mut output, &mut input)
                .map_err(zstd)?;
            // An end that never comes from a source, or more than the piece has room for.
            if hint == 0 || before == (input.pos(), output.pos()) {
                return Err(DecompressError::Length);
            }
        }
        if output.pos() != raw_len {
            return Err(DecompressError::Length);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "compression_tests.rs"]
mod tests;
