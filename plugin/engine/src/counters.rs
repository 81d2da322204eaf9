//! What a session has moved and saved, exactly.
//!
//! Owns: the counters that every part of the source half adds to.
//! Must not: estimate. Savings add up to `qemu_stream - wire` to the byte: each kind of
//! token is credited with its stream bytes less its payload bytes, and `compression` is
//! credited with what happens to payloads after that: zstd, less everything the protocol
//! and TLS put around them.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};

use vmgang_wire::DATA_OVERHEAD_BYTES;

use crate::seal::Unsealed;
use crate::sharing::Sharing;

/// Bytes saved, by how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Saved {
    /// Zero pages, whose records QEMU writes in 9 bytes, collapsed into ranges.
    pub zero: i64,
    /// Pages of one repeated byte.
    pub uniform: i64,
    /// Pages the same VM had sent before.
    pub intra_vm: i64,
    /// Pages another VM of the gang had sent before.
    pub cross_vm: i64,
    /// Pages staged before the migration.
    pub staged: i64,
    /// Pages found at the destination.
    pub destination: i64,
    /// Parts of pages.
    pub sub_page: i64,
    /// Differences to similar pages.
    pub delta: i64,
    /// Compression and collapsed record headers, less the protocol's own bytes; negative
    /// where those outweigh it.
    pub compression: i64,
}

impl Saved {
    /// All of it.
    pub fn total(&self) -> i64 {
        self.zero
            + self.uniform
            + self.intra_vm
            + self.cross_vm
            + self.staged
            + self.destination
            + self.sub_page
            + self.delta
            + self.compression
    }
}

/// A session's counters at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SessionCounters {
    /// Bytes QEMU wrote, over all members and connections.
    pub qemu_stream_bytes: u64,
    /// Bytes the two daemons exchanged, both directions, TLS included.
    pub wire_bytes: u64,
    /// Stream bytes that were sent in full (before compression).
    pub literal_bytes: u64,
    pub saved: Saved,
    pub members: Vec<MemberCounters>,
    /// Pages of each member that went as references, by who had sent them first: the members, then what was
    /// staged, then what the destination had. Empty if there are too many members.
    pub shared_pages: Vec<Vec<u64>>,
}

/// A member's counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemberCounters {
    pub qemu_stream_bytes: u64,
    /// Bytes of this member's frames, without TLS.
    pub wire_bytes: u64,
    pub first_pass_done: bool,
    pub guest_stopped: bool,
}

/// Live counters of a source session.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// Both directions, counted at the TCP socket.
    pub wire_bytes: std::sync::Arc<AtomicU64>,
    stream_bytes: AtomicU64,
    literal_bytes: AtomicU64,
    zero: AtomicI64,
    uniform: AtomicI64,
    intra_vm: AtomicI64,
    cross_vm: AtomicI64,
    staged: AtomicI64,
    destination: AtomicI64,
    sub_page: AtomicI64,
    delta: AtomicI64,
    /// Collapsed record headers, less what operations and lengths cost.
    structure: AtomicI64,
    /// What zstd took off payloads.
    zstd: AtomicI64,
    /// Payload bytes sent; everything else on the wire is overhead.
    payload_bytes: AtomicU64,
    members: Vec<LiveMember>,
    pub sharing: std::sync::Arc<Sharing>,
}

#[derive(Debug, Default)]
struct LiveMember {
    stream_bytes: AtomicU64,
    wire_bytes: AtomicU64,
    first_pass_done: AtomicBool,
    guest_stopped: AtomicBool,
}

/// Which group of `payload::Costs::reference` a reference counts in.
pub(crate) const GROUP_INTRA_VM: usize = 0;
/// See [`GROUP_INTRA_VM`].
pub(crate) const GROUP_CROSS_VM: usize = 1;
/// See [`GROUP_INTRA_VM`].
pub(crate) const GROUP_STAGED: usize = 2;
/// See [`GROUP_INTRA_VM`].
pub(crate) const GROUP_DESTINATION: usize = 3;

impl Live {
    pub(crate) fn new(members: usize) -> Self {
        Self {
            members: (0..members).map(|_| LiveMember::default()).collect(),
            sharing: Sharing::new(members).into(),
            ..Self::default()
        }
    }

    /// Counts one DATA frame, sealed.
    pub(crate) fn frame(&self, frame: &Unsealed) {
        let costs = &frame.costs;
        let payload_bytes = frame.wire_len().saturating_sub(DATA_OVERHEAD_BYTES);
        let saved = |cost: vmgang_wire::payload::Cost| cost.stream as i64 - cost.payload as i64;
        let stream = costs.total().stream;
        self.stream_bytes.fetch_add(stream, Relaxed);
        self.literal_bytes.fetch_add(frame.literal_bytes, Relaxed);
        let length_field = frame.raw_len as i64 - costs.total().payload as i64;
        self.structure
            .fetch_add(saved(costs.literal) - length_field, Relaxed);
        self.zstd
            .fetch_add(frame.raw_len as i64 - payload_bytes as i64, Relaxed);
        self.payload_bytes.fetch_add(payload_bytes as u64, Relaxed);
        self.zero.fetch_add(saved(costs.zero), Relaxed);
        self.uniform.fetch_add(saved(costs.uniform), Relaxed);
        self.sub_page.fetch_add(saved(costs.sub_page), Relaxed);
        self.delta.fetch_add(saved(costs.delta), Relaxed);
        self.intra_vm
            .fetch_add(saved(costs.reference[GROUP_INTRA_VM]), Relaxed);
        self.cross_vm
            .fetch_add(saved(costs.reference[GROUP_CROSS_VM]), Relaxed);
        self.staged
            .fetch_add(saved(costs.reference[GROUP_STAGED]), Relaxed);
        self.destination
            .fetch_add(saved(costs.reference[GROUP_DESTINATION]), Relaxed);
        if let Some(member) = self.members.get(frame.member) {
            member.stream_bytes.fetch_add(stream, Relaxed);
            member
                .wire_bytes
                .fetch_add(frame.wire_len() as u64, Relaxed);
        }
    }

    /// True the first time.
    pub(crate) fn first_pass_done(&self, member: usize) -> bool {
        let member = self.members.get(member);
        member.is_some_and(|member| !member.first_pass_done.swap(true, Relaxed))
    }

    pub(crate) fn guest_stopped(&self, member: usize) {
        if let Some(member) = self.members.get(member) {
            member.guest_stopped.store(true, Relaxed);
        }
    }

    pub(crate) fn snapshot(&self) -> SessionCounters {
        let stream = self.stream_bytes.load(Relaxed);
        let wire = self.wire_bytes.load(Relaxed);
        // Frames, TLS, credits, return paths, keep-alive.
        let overhead = wire as i64 - self.payload_bytes.load(Relaxed) as i64;
        let saved = Saved {
            zero: self.zero.load(Relaxed),
            uniform: self.uniform.load(Relaxed),
            intra_vm: self.intra_vm.load(Relaxed),
            cross_vm: self.cross_vm.load(Relaxed),
            staged: self.staged.load(Relaxed),
            destination: self.destination.load(Relaxed),
            sub_page: self.sub_page.load(Relaxed),
            delta: self.delta.load(Relaxed),
            compression: self.structure.load(Relaxed) + self.zstd.load(Relaxed) - overhead,
        };
        SessionCounters {
            qemu_stream_bytes: stream,
            wire_bytes: wire,
            literal_bytes: self.literal_bytes.load(Relaxed),
            saved,
            members: self
                .members
                .iter()
                .map(|member| MemberCounters {
                    qemu_stream_bytes: member.stream_bytes.load(Relaxed),
                    wire_bytes: member.wire_bytes.load(Relaxed),
                    first_pass_done: member.first_pass_done.load(Relaxed),
                    guest_stopped: member.guest_stopped.load(Relaxed),
                })
                .collect(),
            shared_pages: self.sharing.rows(),
        }
    }
}
