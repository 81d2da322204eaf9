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
use crate::frame_digest::of_channel;
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
    /// The end of the payload, where that is the stream as it was read; else empty.
    pub tail: Vec<u8>,
    /// How the payload is compressed by now.
    pub compression: Compression,
    /// Built to go into the session's stream, at this rung.
    pub stream: Option<Rung>,
    pub costs: Costs,
    /// Literal bytes in it, before compression.
    pub literal_bytes: u64,
    /// Its payload before compression.
    pub raw_len: usize,
}

impl Unsealed {
    /// Header and payload as they are now.
    pub(crate) fn wire_len(&self) -> usize {
        self.buffer.len() + self.tail.len()
    }
}

/// A frame as it is sent: two parts, so that neither is copied.
#[derive(Debug, Default)]
pub(crate) struct Sealed {
    pub head: Vec<u8>,
    pub tail: Vec<u8>,
}

impl Sealed {
    pub(crate) fn len(&self) -> usize {
        self.head.len() + self.tail.len()
    }

    /// Both parts in one.
    #[cfg(test)]
    pub(crate) fn joined(self) -> Vec<u8> {
        [self.head, self.tail].concat()
    }

    /// Gives back its memory.
    pub(crate) fn recycle(self, buffers: &Buffers) {
        buffers.give(self.head);
        if self.tail.capacity() > 0 {
            buffers.give(self.tail);
        }
    }
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

    /// Whether sealing the frame takes long: it goes into the session's stream.
    pub(crate) fn compresses(&self, frame: &Unsealed) -> bool {
        self.stream.is_some() && frame.stream.is_some()
    }

    /// The frame as it is sent. Errors end the session.
    pub(crate) fn seal(&mut self, mut frame: Unsealed) -> io::Result<Sealed> {
        if let Some(rung) = frame.stream {
            self.compress(rung, &mut frame)?;
        }
        let len = frame.wire_len() - DATA_OVERHEAD_BYTES;
        self.ladder.shrunk(frame.raw_len, len);
        let data = Data {
            sequence: frame.sequence,
            stream_len: frame.stream_len,
            digest: match frame.channel {
                // Pages for the window are nobody's.
                0 => frame.digest,
                channel => of_channel(frame.digest, channel, frame.member),
            },
            compression: frame.compression,
            payload: &[],
        };
        data.seal(frame.channel, &mut frame.buffer, frame.tail.len())
            .ok_or_else(|| io::Error::other("a frame was built without room for its header"))?;
        self.live.frame(&frame);
        Ok(Sealed {
            head: frame.buffer,
            tail: frame.tail,
        })
    }

    fn compress(&mut self, rung: Rung, frame: &mut Unsealed) -> io::Result<()> {
        let raw = frame.buffer.get(DATA_OVERHEAD_BYTES..).unwrap_or(&[]);
        let patience = self.patience.entry(frame.channel).or_default();
        let Some(stream) = self.stream.as_mut().filter(|_| patience.tries(raw.len())) else {
            return Ok(());
        };
        let mut sealed = self.buffers.take();
        sealed.resize(DATA_OVERHEAD_BYTES, 0);
        frame.compression = stream.compress(rung, raw, &mut sealed)?;
        patience.learn(raw.len(), sealed.len() - DATA_OVERHEAD_BYTES);
        self.buffers
            .give(std::mem::replace(&mut frame.buffer, sealed));
        Ok(())
    }

    /// A sealed frame has left.
    pub(crate) fn written(&self, frame: Sealed) {
        frame.recycle(&self.buffers);
    }

    /// The rung that is used where the budget has no room for a stream.
    pub(crate) fn rung_without_stream(rung: Rung) -> Rung {
        if rung.streams() { Rung::Frame } else { rung }
    }
}
