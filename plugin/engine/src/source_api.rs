//! What the source half of a session needs to start, what it reports, and how it fails to open.
//!
//! Must not: do anything; `source.rs` does.

use std::io;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmgang_wire::MEMBERS_MAX;

use crate::network::Network;
use crate::{
    Offer, PeerAddress, Scanned, SocketOwner, StagedContents, Techniques, Transport, Workers,
};

/// What a session needs to start.
#[derive(Debug)]
pub struct SourceOptions {
    pub peer: PeerAddress,
    pub transport: Transport,
    pub offer: Offer,
    /// Sockets are made in `<runtime_dir>/migrate/<job>/`.
    pub runtime_dir: PathBuf,
    /// The user of each member's QEMU on this host, in the order of the offer's members.
    pub socket_owners: Vec<SocketOwner>,
    pub techniques: Techniques,
    /// What hashes, builds and compresses.
    pub workers: Workers,
    pub bandwidth_bytes_per_s: Option<u64>,
    /// TCP connections at most; the peer may grant fewer.
    pub connections: NonZeroUsize,
    pub hold: Hold,
    /// What the members' pages were when they were scanned.
    pub scanned: Scanned,
    /// What was staged for them at this peer.
    pub stage: Option<StagedContents>,
    /// Where connections come from.
    pub network: Arc<dyn Network>,
    /// What is sent is to be there when the session is over, see [`SessionEnd::remains`].
    pub keep_contents: bool,
}

/// What keeps a member from switching over before it is released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    Nothing,
    /// Its SWITCHOVER_ACK is withheld. Without one it goes when QEMU finds it ready.
    Ack,
    /// Without one, its first pass is not read to its end.
    Anything,
}

/// Why a session could not be opened, or ended.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("cannot reach vmgangd on {peer}: {error}; is it running there, and is the port open?")]
    Unreachable { peer: PeerAddress, error: io::Error },
    #[error("no secure connection to vmgangd on {peer}: {error}")]
    Tls { peer: PeerAddress, error: String },
    #[error(
        "vmgangd on {peer} speaks protocol version {theirs}, this host speaks {ours}; install the same vmgang version on both hosts"
    )]
    VersionMismatch {
        peer: PeerAddress,
        theirs: String,
        ours: u8,
    },
    #[error("vmgangd on {peer} refuses: {reason}")]
    Refused { peer: PeerAddress, reason: String },
    #[error("vmgangd on {peer} does not keep to the protocol: {reason}")]
    Protocol { peer: PeerAddress, reason: String },
    #[error("cannot make the migration sockets in {}: {error}", path.display())]
    Sockets { path: PathBuf, error: io::Error },
    #[error(
        "a session takes 1 to {MEMBERS_MAX} members and a socket owner for each, not {members}; migrate fewer at a time"
    )]
    Members { members: usize },
    #[error("setting up compression failed: {0}")]
    Compression(io::Error),
    #[error("the session with the peer has ended")]
    Ended,
}

/// What happens in a session, by member index.
#[derive(Debug, Clone)]
pub enum SourceEvent {
    /// QEMU (or libvirtd) has connected.
    ChannelOpened { member: usize },
    /// Every page has been sent once.
    FirstPassDone { member: usize },
    /// A pass over what was dirtied in the pass before has ended; it has sent so much guest memory.
    PassDone {
        member: usize,
        sent_bytes: u64,
        took: Duration,
    },
    /// The destination has sent no acknowledgement that could be withheld, so the member is held by
    /// not reading on near the end of its first pass ([`Hold::Anything`]).
    HeldInFirstPass { member: usize },
    /// The member's stream is not understood (any more) before its guest has stopped: the ends of its
    /// passes will not be seen.
    Unreadable { member: usize },
    /// The destination is ready to switch over, and the source has not been told.
    AckWithheld { member: usize },
    /// The guest is stopped now: what follows is downtime.
    GuestStopped { member: usize, at: Instant },
    /// The destination QEMU has said that it has all of the guest, and the source QEMU is about to hear it.
    Arrived { member: usize },
    /// A connection ended in order, both ways.
    StreamEnded { member: usize },
    /// A connection broke.
    MemberFailed { member: usize, error: String },
    /// The peer is gone; every connection is closed.
    SessionFailed { error: String },
}
