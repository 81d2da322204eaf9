//! Frames as typed values.
//!
//! Owns: which fields each kind has. Must not: interpret a DATA payload (see `payload`).

use crate::cursor::{Reader, put_text};
use crate::hello::further_connection;
use crate::{
    Announce, CHANNELS_MAX, FrameHeader, HEADER_BYTES, Have, Hello, Join, Kind, MEMBERS_MAX, Offer,
    STREAM_BYTES_MAX, TEXT_BYTES_MAX, Welcome, WireError, payload::PAGE_BYTES,
};

/// Why a session is refused. Numbers are never reused; unknown ones read as `Other`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefuseCode {
    /// 1: the peer speaks another protocol version.
    Version,
    /// 2: the offer cannot be met (memory, permission): the text says what.
    Offer,
    /// 3: a frame could not be read or was out of place.
    Protocol,
    /// Anything else.
    Other(u16),
}

impl RefuseCode {
    fn number(self) -> u16 {
        match self {
            Self::Version => 1,
            Self::Offer => 2,
            Self::Protocol => 3,
            Self::Other(number) => number,
        }
    }

    fn from_number(number: u16) -> Self {
        match number {
            1 => Self::Version,
            2 => Self::Offer,
            3 => Self::Protocol,
            other => Self::Other(other),
        }
    }
}

/// Which way the bytes go that a CREDIT is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// 0: source QEMU to destination QEMU.
    Stream,
    /// 1: destination QEMU to source QEMU.
    Return,
}

/// How a DATA payload is compressed. Lengths are those before compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// 0: not at all.
    None,
    /// 1: a zstd frame of its own.
    Frame { raw_len: u32 },
    /// 2: goes on with the session's zstd stream, whose window holds what went before.
    Stream { raw_len: u32 },
    /// 3: begins that stream anew.
    NewStream { raw_len: u32 },
}

impl Compression {
    fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Frame { .. } => 1,
            Self::Stream { .. } => 2,
            Self::NewStream { .. } => 3,
        }
    }

    fn raw_len(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Frame { raw_len } | Self::Stream { raw_len } | Self::NewStream { raw_len } => {
                raw_len
            }
        }
    }

    fn from_numbers(number: u8, raw_len: u32) -> Result<Self, WireError> {
        if raw_len as usize > crate::BODY_BYTES_MAX || (raw_len == 0) != (number == 0) {
            return Err(WireError::Value("raw_len"));
        }
        match number {
            0 => Ok(Self::None),
            1 => Ok(Self::Frame { raw_len }),
            2 => Ok(Self::Stream { raw_len }),
            3 => Ok(Self::NewStream { raw_len }),
            _ => Err(WireError::Value("compression")),
        }
    }
}

/// A piece of a migration stream, or pages for the window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data<'a> {
    /// Position in the session's one order, from 0, over all channels.
    pub sequence: u64,
    /// Stream bytes this piece stands for, 1 to [`STREAM_BYTES_MAX`]; in a STAGE frame the bytes
    /// of its pages.
    pub stream_len: u32,
    /// XXH3-128 of those bytes with the session's secret, see [`crate::FRAME_DIGEST_CONTEXT`].
    pub digest: [u8; 16],
    pub compression: Compression,
    /// See [`crate::payload`].
    pub payload: &'a [u8],
}

/// How a member's migration ended, as libvirt on the destination tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    pub downtime_ms: Option<u64>,
    pub iterations: Option<u64>,
    pub memory_bytes: Option<u64>,
}

/// Everything that can cross between two peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<'a> {
    Hello(Hello),
    Welcome(Welcome),
    Refuse {
        code: RefuseCode,
        text: String,
    },
    Open {
        channel: u32,
        member: u16,
    },
    Data {
        channel: u32,
        data: Data<'a>,
    },
    Credit {
        channel: u32,
        direction: Direction,
        bytes: u32,
    },
    Finish {
        channel: u32,
    },
    Reset {
        channel: u32,
        text: String,
    },
    Return {
        channel: u32,
        digest: [u8; 16],
        bytes: &'a [u8],
    },
    OutcomeRequest {
        member: u16,
    },
    Outcome {
        member: u16,
        outcome: Option<Outcome>,
    },
    Goodbye,
    Alive,
    Join(Join),
    /// The next DATA frame is on that connection.
    Elsewhere {
        connection: u8,
    },
    /// Pages for the window that no stream has asked for.
    Stage(Data<'a>),
    Offer(Offer),
    Have(Have),
    Announce(Announce),
    /// What follows is to go to the destination's libvirt, not to this protocol.
    Libvirt,
    /// It does.
    Connected,
    /// What follows is a request to the destination's vmgangd, not this protocol.
    Control,
}

impl<'a> Frame<'a> {
    fn kind_and_channel(&self) -> (Kind, u32) {
        match self {
            Frame::Hello(_) => (Kind::Hello, 0),
            Frame::Welcome(_) => (Kind::Welcome, 0),
            Frame::Refuse { .. } => (Kind::Refuse, 0),
            Frame::Open { channel, .. } => (Kind::Open, *channel),
            Frame::Data { channel, .. } => (Kind::Data, *channel),
            Frame::Credit { channel, .. } => (Kind::Credit, *channel),
            Frame::Finish { channel } => (Kind::Finish, *channel),
            Frame::Reset { channel, .. } => (Kind::Reset, *channel),
            Frame::Return { channel, .. } => (Kind::Return, *channel),
            Frame::OutcomeRequest { .. } => (Kind::OutcomeRequest, 0),
            Frame::Outcome { .. } => (Kind::Outcome, 0),
            Frame::Goodbye => (Kind::Goodbye, 0),
            Frame::Alive => (Kind::Alive, 0),
            Frame::Join(_) => (Kind::Join, 0),
            Frame::Elsewhere { .. } => (Kind::Elsewhere, 0),
            Frame::Stage(_) => (Kind::Stage, 0),
            Frame::Offer(_) => (Kind::Offer, 0),
            Frame::Have(_) => (Kind::Have, 0),
            Frame::Announce(_) => (Kind::Announce, 0),
            Frame::Libvirt => (Kind::Libvirt, 0),
            Frame::Connected => (Kind::Connected, 0),
            Frame::Control => (Kind::Control, 0),
        }
    }

    /// Appends header and body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, channel) = self.kind_and_channel();
        let start = out.len();
        FrameHeader {
            kind,
            channel,
            body_len: 0,
        }
        .encode(out);
        self.encode_body(out);
        let body_len = (out.len() - start - HEADER_BYTES) as u32;
        out[start + HEADER_BYTES - 4..start + HEADER_BYTES]
            .copy_from_slice(&body_len.to_le_bytes());
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        match self {
            Frame::Hello(hello) => hello.encode_body(out),
            Frame::Welcome(welcome) => welcome.encode_body(out),
            Frame::Refuse { code, text } => {
                out.extend_from_slice(&code.number().to_le_bytes());
                put_text(out, text, TEXT_BYTES_MAX);
            }
            Frame::Open { member, .. } | Frame::OutcomeRequest { member } => {
                out.extend_from_slice(&member.to_le_bytes());
            }
            Frame::Data { data, .. } | Frame::Stage(data) => {
                out.extend_from_slice(&data.sequence.to_le_bytes());
                out.extend_from_slice(&data.stream_len.to_le_bytes());
                out.extend_from_slice(&data.digest);
                out.push(data.compression.number());
                out.extend_from_slice(&data.compression.raw_len().to_le_bytes());
                out.extend_from_slice(data.payload);
            }
            Frame::Credit {
                direction, bytes, ..
            } => {
                out.push(*direction as u8);
                out.extend_from_slice(&bytes.to_le_bytes());
            }
            Frame::Reset { text, .. } => put_text(out, text, TEXT_BYTES_MAX),
            Frame::Return { digest, bytes, .. } => {
                out.extend_from_slice(digest);
                out.extend_from_slice(bytes);
            }
            Frame::Outcome { member, outcome } => {
                out.extend_from_slice(&member.to_le_bytes());
                out.push(u8::from(outcome.is_some()));
                let outcome = outcome.unwrap_or_default();
                for value in [
                    outcome.downtime_ms,
                    outcome.iterations,
                    outcome.memory_bytes,
                ] {
                    out.push(u8::from(value.is_some()));
                    out.extend_from_slice(&value.unwrap_or(0).to_le_bytes());
                }
            }
            Frame::Join(join) => join.encode_body(out),
            Frame::Elsewhere { connection } => out.push(*connection),
            Frame::Offer(offer) => offer.encode_body(out),
            Frame::Have(have) => have.encode_body(out),
            Frame::Announce(announce) => announce.encode_body(out),
            Frame::Finish { .. }
            | Frame::Goodbye
            | Frame::Alive
            | Frame::Libvirt
            | Frame::Connected
            | Frame::Control => {}
        }
    }

    /// Reads the body that belongs to `header`.
    pub fn decode(header: &FrameHeader, body: &'a [u8]) -> Result<Self, WireError> {
        if body.len() != header.body_len as usize {
            return Err(WireError::Truncated("body"));
        }
        let channel = header.channel;
        let about_a_channel = matches!(
            header.kind,
            Kind::Open | Kind::Data | Kind::Credit | Kind::Finish | Kind::Reset | Kind::Return
        );
        if about_a_channel == (channel == 0) || channel > CHANNELS_MAX {
            return Err(WireError::Value("channel"));
        }
        let mut reader = Reader::new(body);
        let r = &mut reader;
        let frame = match header.kind {
            Kind::Hello => Frame::Hello(Hello::decode_body(r)?),
            Kind::Welcome => Frame::Welcome(Welcome::decode_body(r)?),
            Kind::Refuse => Frame::Refuse {
                code: RefuseCode::from_number(r.u16("code")?),
                text: r.text(TEXT_BYTES_MAX, "text")?.to_owned(),
            },
            Kind::Open => Frame::Open {
                channel,
                member: member(r)?,
            },
            Kind::Data => Frame::Data {
                channel,
                data: decode_data(r)?,
            },
            Kind::Credit => Frame::Credit {
                channel,
                direction: match r.u8("direction")? {
                    0 => Direction::Stream,
                    1 => Direction::Return,
                    _ => return Err(WireError::Value("direction")),
                },
                bytes: r.u32("bytes")?,
            },
            Kind::Finish => Frame::Finish { channel },
            Kind::Reset => Frame::Reset {
                channel,
                text: r.text(TEXT_BYTES_MAX, "text")?.to_owned(),
            },
            Kind::Return => Frame::Return {
                channel,
                digest: r.array("digest")?,
                bytes: match r.rest() {
                    [] => return Err(WireError::Truncated("bytes")),
                    bytes => bytes,
                },
            },
            Kind::OutcomeRequest => Frame::OutcomeRequest { member: member(r)? },
            Kind::Outcome => {
                let member = member(r)?;
                let known = r.flag("known")?;
                let mut next = || -> Result<Option<u64>, WireError> {
                    let known = r.flag("known_value")?;
                    let value = r.u64("value")?;
                    Ok(known.then_some(value))
                };
                let outcome = Outcome {
                    downtime_ms: next()?,
                    iterations: next()?,
                    memory_bytes: next()?,
                };
                Frame::Outcome {
                    member,
                    outcome: known.then_some(outcome),
                }
            }
            Kind::Goodbye => Frame::Goodbye,
            Kind::Alive => Frame::Alive,
            Kind::Join => Frame::Join(Join::decode_body(r)?),
            Kind::Elsewhere => Frame::Elsewhere {
                connection: further_connection(r)?,
            },
            Kind::Stage => {
                let data = decode_data(r)?;
                if !(data.stream_len as usize).is_multiple_of(PAGE_BYTES) {
                    return Err(WireError::Value("page_bytes"));
                }
                Frame::Stage(data)
            }
            Kind::Offer => Frame::Offer(Offer::decode_body(r)?),
            Kind::Have => Frame::Have(Have::decode_body(r)?),
            Kind::Announce => Frame::Announce(Announce::decode_body(r)?),
            Kind::Libvirt => Frame::Libvirt,
            Kind::Connected => Frame::Connected,
            Kind::Control => Frame::Control,
        };
        reader.finish()?;
        Ok(frame)
    }
}

fn member(r: &mut Reader<'_>) -> Result<u16, WireError> {
    let member = r.u16("member")?;
    if usize::from(member) >= MEMBERS_MAX {
        return Err(WireError::Value("member"));
    }
    Ok(member)
}

fn decode_data<'a>(r: &mut Reader<'a>) -> Result<Data<'a>, WireError> {
    let sequence = r.u64("sequence")?;
    let stream_len = r.u32("stream_len")?;
    if stream_len == 0 || stream_len as usize > STREAM_BYTES_MAX {
        return Err(WireError::Value("stream_len"));
    }
    let digest = r.array("digest")?;
    let number = r.u8("compression")?;
    let compression = Compression::from_numbers(number, r.u32("raw_len")?)?;
    Ok(Data {
        sequence,
        stream_len,
        digest,
        compression,
        payload: r.rest(),
    })
}

/// Bytes of a DATA frame besides its payload: header, sequence, lengths, digest, compression.
pub const DATA_OVERHEAD_BYTES: usize = HEADER_BYTES + 8 + 4 + 16 + 1 + 4;

impl Data<'_> {
    /// Writes header and fields into the first [`DATA_OVERHEAD_BYTES`] of a buffer that holds
    /// the payload behind them, but for its last `behind` bytes, which are sent after the buffer.
    /// So the payload is not copied; `self.payload` is not used. Channel 0 makes it a STAGE frame.
    ///
    /// Returns `None`, with nothing written, for a buffer without that room.
    #[must_use]
    pub fn seal(&self, channel: u32, buffer: &mut [u8], behind: usize) -> Option<()> {
        let body_len = buffer.len().checked_sub(HEADER_BYTES)? + behind;
        let room = buffer.get_mut(..DATA_OVERHEAD_BYTES)?;
        let mut fields = [0; DATA_OVERHEAD_BYTES];
        let header = FrameHeader {
            kind: match channel {
                0 => Kind::Stage,
                _ => Kind::Data,
            },
            channel,
            body_len: body_len as u32,
        };
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            fields[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&header.to_bytes());
        put(&self.sequence.to_le_bytes());
        put(&self.stream_len.to_le_bytes());
        put(&self.digest);
        put(&[self.compression.number()]);
        put(&self.compression.raw_len().to_le_bytes());
        room.copy_from_slice(&fields);
        Some(())
    }
}
