//! The transfer engine: both halves of a session between two vmgangd.
//!
//! Owns: the peer connection, the channels (one per connection that QEMU opens), encoding
//! and decoding, flow control, and the exact counts of what was saved.
//! Must not: talk to libvirt or D-Bus, or decide when a gang switches over; it reports
//! events and obeys `release`.
//!
//! Path of a byte: QEMU -> `stream::Token` -> `dedup::Verdict` -> `wire::Frame` -> peer ->
//! `dedup::PageWindow` -> verified stream bytes -> QEMU.

mod ambient;
mod answers;
mod buffers;
mod certificate;
mod channel_source;
mod chunk;
mod compression;
mod connection;
mod control;
mod counters;
mod decode;
mod decode_pipeline;
mod delivery;
pub mod destination;
mod destination_session;
mod encode;
mod estimator;
mod frame_digest;
#[cfg(any(fuzzing, feature = "fuzzing"))]
pub mod fuzzing;
mod gate;
mod greeting;
mod identify;
mod join;
mod ladder;
mod lanes;
mod libvirt_rpc;
mod network;
mod offer;
mod offering;
mod order;
mod page_key;
mod passes;
mod peer;
mod pool;
mod processors;
mod runtime_dir;
mod scanned;
mod seal;
mod sharing;
pub mod source;
mod source_api;
mod stage_session;
pub mod stage_source;
mod stages;
mod technique;
pub mod tls;
mod tls_refusal;
mod trial;
mod workers;

pub use ambient::{AmbientSession, AmbientSocket, ambient_directory, ambient_socket};
pub use answers::Recall;
pub use certificate::CertificateFacts;
pub use compression::{Rung, ZSTD_WINDOW_MAX_BYTES};
pub use control::{ServeControl, connect_control};
pub use counters::{MemberCounters, Saved, SessionCounters};
pub use destination::{Admission, DestinationHost, Listener};
pub use estimator::Estimator;
pub use libvirt_rpc::{LIBVIRT_CONNECTIONS_MAX, LibvirtConnection};
pub use network::{
    Connection, Network, PeerListener, Pending, QemuConnection, QemuListener, system,
};
pub use offer::{MemberOffer, MemberOutcome, Offer, Purpose, SocketOwner};
pub use order::Remains;
pub use page_key::PageKey;
pub use peer::{DEFAULT_PORT, PeerAddress, PeerName};
pub use runtime_dir::sweep_runtime_dir;
pub use scanned::Scanned;
pub use source::{
    Hold, Offers, SessionEnd, SourceError, SourceEvent, SourceOptions, SourceSession,
};
pub use stage_source::{STAGE_PAGES_MAX, StageOptions, StagePages, StageSession, StagedContents};
pub use technique::{Techniques, Zstd};
pub use tls::{TlsError, TlsFiles, TlsIdentity, Transport, Transports};
pub use vmgang_wire::MEMBERS_MAX;

/// Most TCP connections of one session.
pub const CONNECTIONS_MAX: usize = vmgang_wire::CONNECTIONS_MAX as usize;

pub use workers::{Execute, Workers};
