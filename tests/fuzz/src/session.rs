//! Sessions of DATA frames as a source might send them: right ones, ones that break the rules
//! of the window, and ones that were damaged on the way.
//!
//! Owns: packing payloads into frames, and what may be said of the answer.

use arbitrary::Arbitrary;
use vmgang_dedup::DigestKey;
use vmgang_engine::fuzzing::{Destination, digest};
use vmgang_wire::payload::Encoder;
use vmgang_wire::{Compression, Data, Frame, FrameHeader, HEADER_BYTES, STREAM_BYTES_MAX};
use zstd::zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, ResetDirective, compress_bound};

use crate::model::{Model, Step};

/// Large enough for a session stream of 1 MiB; the rest are slots.
const BUDGET_BYTES: u64 = 8 << 20;
const BUDGET_SLOTS: u32 = 7 << 8;
/// Too small for one.
const TINY_BUDGET_BYTES: u64 = 64 << 10;
const TINY_BUDGET_SLOTS: u32 = 16;
const WINDOW_LOG: u32 = 20;
const KEY: DigestKey = DigestKey([3; 32]);

/// So much is enough to meet each other; more only takes time.
const FRAMES_MAX: usize = 12;
const STEPS_MAX: usize = 24;

#[derive(Debug, Arbitrary)]
pub struct Session {
    tiny: bool,
    frames: Vec<FrameOf>,
}

#[derive(Debug, Arbitrary)]
struct FrameOf {
    steps: Vec<Step>,
    packing: Packing,
    damage: Option<Damage>,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Packing {
    None,
    Frame,
    Stream,
    NewStream,
}

#[derive(Debug, Arbitrary)]
enum Damage {
    /// To the payload, before it is packed.
    Payload {
        at: u16,
        flip: u8,
    },
    /// Instead of the payload.
    AnyPayload(Vec<u8>),
    /// To the payload as packed.
    Packed {
        at: u16,
        flip: u8,
    },
    /// Instead of the payload as packed.
    AnyPacked(Vec<u8>),
    Cut(u16),
    StreamLen(u32),
    Sequence(u64),
    Digest(u8),
    RawLen(u32),
    /// It says it is packed in another way.
    Packing(Packing),
}

/// The source's end of compression.
struct Packer {
    context: CCtx<'static>,
    begun: bool,
}

impl Packer {
    /// `None` if this is not possible now.
    fn pack(&mut self, packing: Packing, raw: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; compress_bound(raw.len()) + 64];
        let len = match packing {
            Packing::None => return Some(raw.to_vec()),
            Packing::Frame => zstd::zstd_safe::compress(&mut out[..], raw, 1).ok()?,
            Packing::Stream if !self.begun => return None,
            Packing::Stream | Packing::NewStream => {
                if matches!(packing, Packing::NewStream) {
                    self.begin();
                }
                let mut output = OutBuffer::around(&mut out[..]);
                let mut input = InBuffer::around(raw);
                while input.pos() < raw.len() {
                    self.context.compress_stream(&mut output, &mut input).ok()?;
                }
                while self.context.flush_stream(&mut output).ok()? > 0 {}
                output.pos()
            }
        };
        out.truncate(len);
        Some(out)
    }

    fn begin(&mut self) {
        let parameters = [
            CParameter::CompressionLevel(1),
            CParameter::WindowLog(WINDOW_LOG),
            CParameter::ContentSizeFlag(false),
        ];
        let context = &mut self.context;
        context
            .reset(ResetDirective::SessionAndParameters)
            .expect("a reset");
        for parameter in parameters {
            context.set_parameter(parameter).expect("a parameter");
        }
        self.begun = true;
    }
}

fn flip(bytes: &mut [u8], at: u16, flip: u8) {
    if !bytes.is_empty() {
        bytes[usize::from(at) % bytes.len()] ^= flip;
    }
}

fn compression(packing: Packing, raw_len: u32) -> Compression {
    match packing {
        Packing::None => Compression::None,
        Packing::Frame => Compression::Frame { raw_len },
        Packing::Stream => Compression::Stream { raw_len },
        Packing::NewStream => Compression::NewStream { raw_len },
    }
}

impl Session {
    /// Has a destination decode it, up to its first error. Panics if that delivers what it must
    /// not, or refuses what is right.
    pub fn run(&self) {
        let (budget, slots) = if self.tiny {
            (TINY_BUDGET_BYTES, TINY_BUDGET_SLOTS)
        } else {
            (BUDGET_BYTES, BUDGET_SLOTS)
        };
        let mut destination = Destination::new(&KEY, budget).expect("memory");
        let mut model = Model::new(slots);
        let mut packer = Packer {
            context: CCtx::create(),
            begun: false,
        };
        // Whether the model still knows what the destination has.
        let mut known = true;
        let frames = self.frames.iter().take(FRAMES_MAX);
        for (sequence, frame) in (0..).zip(frames) {
            let mut payload = Encoder::default();
            let mut stream = Vec::new();
            let mut right = true;
            for step in frame.steps.iter().take(STEPS_MAX) {
                right &= model.step(step, &mut payload, &mut stream).is_ok();
            }
            if stream.is_empty() || stream.len() > STREAM_BYTES_MAX {
                return;
            }
            let mut raw = Vec::new();
            payload.finish(&mut raw);
            let Some(sent) = frame.pack(sequence, raw, &stream, &mut packer) else {
                return;
            };
            let header = FrameHeader::decode(sent.first_chunk().expect("a header"));
            let header = header.expect("only the body is damaged");
            let Ok(Frame::Data { data, .. }) = Frame::decode(&header, &sent[HEADER_BYTES..]) else {
                // What is not a frame does not come to the decoder.
                assert!(frame.damage.is_some(), "nothing is wrong with it");
                return;
            };
            let has_stream = !self.tiny
                || matches!(
                    data.compression,
                    Compression::None | Compression::Frame { .. }
                );
            let answer = destination.decode(&header, &sent[HEADER_BYTES..]);
            if let Ok(delivered) = &answer {
                assert_eq!(delivered.len(), data.stream_len as usize);
                assert_eq!(digest(&KEY, delivered), data.digest);
                assert!(has_stream, "there is no room for a stream");
            }
            if frame.damage.is_some() {
                known = false;
            } else if known && right && has_stream {
                let delivered = answer.as_ref().expect("nothing is wrong with it");
                assert!(*delivered == stream, "other bytes than QEMU wrote");
            } else if known && !right {
                assert!(answer.is_err(), "the rules of the window were broken");
            }
            if answer.is_err() {
                return;
            }
        }
    }
}

impl FrameOf {
    /// The frame's bytes, damaged if it is to be.
    fn pack(
        &self,
        sequence: u64,
        mut raw: Vec<u8>,
        stream: &[u8],
        packer: &mut Packer,
    ) -> Option<Vec<u8>> {
        match &self.damage {
            Some(Damage::Payload { at, flip: by }) => flip(&mut raw, *at, *by),
            Some(Damage::AnyPayload(bytes)) => raw.clone_from(bytes),
            _ => {}
        }
        let mut payload = packer.pack(self.packing, &raw)?;
        let mut data = Data {
            sequence,
            stream_len: stream.len() as u32,
            digest: digest(&KEY, stream),
            compression: compression(self.packing, raw.len() as u32),
            payload: &[],
        };
        match &self.damage {
            Some(Damage::Packed { at, flip: by }) => flip(&mut payload, *at, *by),
            Some(Damage::AnyPacked(bytes)) => payload.clone_from(bytes),
            Some(Damage::Cut(at)) => payload.truncate(usize::from(*at)),
            Some(Damage::StreamLen(len)) => data.stream_len = *len,
            Some(Damage::Sequence(number)) => data.sequence = *number,
            Some(Damage::Digest(at)) => data.digest[usize::from(*at) % 16] ^= 1,
            Some(Damage::RawLen(len)) => data.compression = compression(self.packing, *len),
            Some(Damage::Packing(packing)) => {
                data.compression = compression(*packing, raw.len() as u32);
            }
            _ => {}
        }
        data.payload = &payload;
        let mut out = Vec::new();
        Frame::Data { channel: 1, data }.encode(&mut out);
        Some(out)
    }
}
