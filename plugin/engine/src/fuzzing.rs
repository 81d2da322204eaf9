//! A session's destination half, as far as a hostile source reaches it, for the fuzz targets.
//!
//! Must not: be part of anything but a fuzz build (`cfg(fuzzing)`) and tests, or decode anything itself:
//! it takes each frame through the steps that the pipeline takes it through.

use vmgang_dedup::DigestKey;
use vmgang_wire::FrameHeader;

use crate::buffers::Buffers;
use crate::compression::FrameDecompressor;
use crate::decode::{DecodeError, Decoder, Piece};
use crate::frame_digest::FrameDigest;

/// What decodes the DATA frames of one session.
pub struct Destination {
    decoder: Decoder,
    frames: FrameDecompressor,
    buffers: Buffers,
}

impl Destination {
    /// A session under that key, with that window budget.
    pub fn new(key: &DigestKey, window_budget_bytes: u64) -> std::io::Result<Self> {
        let buffers = Buffers::default();
        Ok(Self {
            decoder: Decoder::new(key, window_budget_bytes, buffers.clone())?,
            frames: FrameDecompressor::new()?,
            buffers,
        })
    }

    /// The bytes that would be delivered to QEMU, or why the session would end.
    pub fn decode(&mut self, header: &FrameHeader, body: &[u8]) -> Result<Vec<u8>, String> {
        self.steps(header, body).map_err(|error| error.to_string())
    }

    fn steps(&mut self, header: &FrameHeader, body: &[u8]) -> Result<Vec<u8>, DecodeError> {
        let (_, mut piece) = Piece::read(header, body.to_vec())?;
        piece.unpack(&mut self.frames, &self.buffers)?;
        Ok(self.decoder.rebuild(piece)?.verify()?.bytes().to_vec())
    }
}

/// The digest of a frame that stands for these stream bytes.
pub fn digest(key: &DigestKey, bytes: &[u8]) -> [u8; 16] {
    FrameDigest::new(key).of(bytes)
}
