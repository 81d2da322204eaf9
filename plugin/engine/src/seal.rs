//! The last step of a DATA frame before the socket, in the session's order: the session's zstd
//! stream, and the header in front.
//!
//! Owns: the stream's compressor and the count of what frames cost in the end.
//! Must not: reorder, wait, or drop a frame: each has its place in the session.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use vmgang_wire::payload::Costs;
use vmgang_wire::{Compression, DATA_OVERHEAD_BYTES, Data};

use crate::buffers::Buffers;
use crate::compression::{Patience, Rung, StreamCompressor};
use crate::counters::Live;
use crate::ladder::Ladder;

/// A frame that is built but for the session's stream and its header.
#[derive(Debug)]
pub(crate) struct Unsealed {
    pub channel: u32,
    pub member: usize,
    pub sequence: u64,
    pub stream_len: u32,
    pub digest: [u8; 16],
    /// [`DATA_OVERHEAD_BYTES`] of room and the payload.
    pub buffer: Vec<u8>,
    /// How the payload is compressed by now.
    pub compression: Compression,
    pub costs: Costs,
    /// Literal bytes in it, before compression.
    pub literal_bytes: u64,
    /// Its payload before compression.
    pub raw_len: usize,
}

/// Seals the frames of a session.
pub(crate) struct Sealer {
    /// `None`: the agreed budget has no room for it.
    stream: Option<StreamCompressor>,
    /// By channel, for the stream.
    patience: HashMap<u32, Patience>,
    ladder: Arc<Ladder>,
    live: Arc<Live>,
    buffers: Buffers,
}

impl Sealer {
    pub(crate) fn new(
        window_log: Option<u32>,
        ladder: Arc<Ladder>,
        live: Arc<Live>,
        buffers: Buffers,
    ) -> io::Result<Sealer> {
        Ok(Sealer {
            stream: window_log.map(StreamCompressor::new).transpose()?,
            patience: HashMap::new(),
            ladder,
            live,
            buffers,
        })
    }

    pub(crate) fn ladder(&self) -> &Ladder {
        &self.ladder
    }

    /// The frame as it is sent. Errors end the session.
    pub(crate) fn seal(&mut self, mut frame: Unsealed) -> io::Result<Vec<u8>> {
        let rung = self.ladder.rung();
        let raw = frame.buffer.get(DATA_OVERHEAD_BYTES..).unwrap_or(&[]);
        if frame.compression == Compression::None && rung.streams() {
            let patience = self.patience.entry(frame.channel).or_default();
            if let Some(stream) = &mut self.stream
                && patience.tries(raw.len())
            {
                let mut sealed = self.buffers.take();
                sealed.resize(DATA_OVERHEAD_BYTES, 0);
                frame.compression = stream.compress(rung, raw, &mut sealed)?;
                patience.learn(raw.len(), sealed.len() - DATA_OVERHEAD_BYTES);
                self.buffers
                    .give(std::mem::replace(&mut frame.buffer, sealed));
            }
        }
        let len = frame.buffer.len() - DATA_OVERHEAD_BYTES;
        self.ladder.shrunk(frame.raw_len, len);
        let data = Data {
            sequence: frame.sequence,
            stream_len: frame.stream_len,
            digest: frame.digest,
            compression: frame.compression,
            payload: &[],
        };
        data.seal(frame.channel, &mut frame.buffer)
            .ok_or_else(|| io::Error::other("a frame was built without room for its header"))?;
        self.live.frame(&frame);
        Ok(frame.buffer)
    }

    /// A sealed frame has left.
    pub(crate) fn written(&self, buffer: Vec<u8>) {
        self.buffers.give(buffer);
    }

    /// The rung that is used where the budget has no room for a stream.
    pub(crate) fn rung_without_stream(rung: Rung) -> Rung {
        if rung.streams() { Rung::Frame } else { rung }
    }
}
