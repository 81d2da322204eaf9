//! The protocol between two vmgangd: frames, and the encoding of stream pieces in them.
//!
//! Owns: bytes to typed values and back, for everything that crosses between peers;
//! `docs/protocol.md` is the specification, this crate follows it.
//! Must not: do I/O, know a clock, keep session state, or allocate from a length that has
//! not been checked.
//!
//! Invariants: kinds and codes are never reused; trailing bytes are an error; the layout of
//! the frame header is the same in every version, so versions can refuse each other.

mod cursor;
mod frame;
mod header;
mod hello;
mod offer;
pub mod payload;

pub use frame::{Compression, DATA_OVERHEAD_BYTES, Data, Direction, Frame, Outcome, RefuseCode};
pub use header::{FrameHeader, HEADER_BYTES, Kind};
pub use hello::{
    FEATURE_CONNECTIONS, Hello, Join, MemberHello, MoreConnections, Purpose, TakenStage, Welcome,
};
pub use offer::{Announce, Have, Offer, Offered};

/// The version of the protocol this build speaks.
pub const VERSION: u8 = 1;

/// No frame body is longer.
pub const BODY_BYTES_MAX: usize = 2 * 1024 * 1024;
/// One DATA frame stands for at most this many stream bytes.
pub const STREAM_BYTES_MAX: usize = 1024 * 1024;
/// A DATA frame takes at least this much credit, however few stream bytes it stands for: each one
/// that waits for a QEMU takes memory.
pub const FRAME_CREDIT_BYTES_MIN: usize = 4096;
/// Members of one session.
pub const MEMBERS_MAX: usize = 1024;
/// Connections of one session, over all members and all time.
pub const CHANNELS_MAX: u32 = 65_536;
/// Connections of one session.
pub const CONNECTIONS_MAX: u8 = 16;
/// Return path bytes a channel may have under way, before any CREDIT.
pub const RETURN_CREDIT_BYTES: usize = 1024 * 1024;
/// Contents of one OFFER, and of one ANNOUNCE.
pub const OFFER_CONTENTS_MAX: usize = 4096;
/// OFFERs that may be without an answer.
pub const OFFERS_MAX: usize = 4;
/// With this BLAKE3 derives the secret of frame digests from a session's integrity key: its
/// first 192 bytes of output are the secret of XXH3-128.
pub const FRAME_DIGEST_CONTEXT: &str = "vmgang 1 frame digest";
/// Names of hosts, gangs and members, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Free text in a refusal or a reset.
pub const TEXT_BYTES_MAX: usize = 1024;

/// What a peer can get wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("this is not a vmgang peer (the connection began with other bytes)")]
    Magic,
    #[error(
        "the peer speaks vmgang protocol {theirs}, this daemon speaks {VERSION}; install the same vmgang version on both hosts"
    )]
    Version { theirs: u8 },
    #[error("the peer sent frame kind {0}, which this version does not know")]
    UnknownKind(u8),
    #[error("the peer sent a {kind:?} frame of {len} bytes, which is not allowed")]
    Length { kind: Kind, len: usize },
    #[error("a frame ends before its field `{0}`")]
    Truncated(&'static str),
    #[error("a frame has bytes after its last field")]
    Trailing,
    #[error("a frame has a bad value in field `{0}`")]
    Value(&'static str),
}
