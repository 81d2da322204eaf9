//! What the two halves tell each other about a job, in the engine's own types.
//!
//! Must not: carry wire details; conversion to frames happens here and nowhere else.

use uuid::Uuid;
use vmgang_wire as wire;

/// A job as the source proposes it to the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    pub job: Uuid,
    /// Name of the gang, for logs; of an ambient session what the destination is called in the path of its
    /// sockets.
    pub gang: String,
    /// Host name of the source, for logs.
    pub source_host: String,
    /// Bytes the page window may take at most.
    pub window_budget_bytes: u64,
    pub members: Vec<MemberOffer>,
}

/// What a session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The members migrate; contents may have been staged in the session of that job.
    Migrate { stage: Option<Uuid> },
    /// Contents are staged, to be kept for so many seconds at most.
    Stage { seconds: u32 },
    /// The members may migrate, each when its client says so; see [`crate::AmbientSession`].
    Ambient,
}

impl From<wire::Purpose> for Purpose {
    fn from(purpose: wire::Purpose) -> Self {
        match purpose {
            wire::Purpose::Migrate { stage } => Purpose::Migrate {
                stage: stage.map(|stage| stage.id),
            },
            wire::Purpose::Stage { seconds } => Purpose::Stage { seconds },
            wire::Purpose::Ambient => Purpose::Ambient,
        }
    }
}

/// A member of the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberOffer {
    pub uuid: Uuid,
    pub name: String,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// The user that the domain itself prescribes for its QEMU, on every host; `None`: each
    /// host has its own.
    pub fixed_owner: Option<SocketOwner>,
}

/// How a member's migration ended, as the destination's libvirt tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemberOutcome {
    pub downtime_ms: Option<u64>,
    pub iterations: Option<u64>,
    pub memory_bytes: Option<u64>,
}

/// The user that a member's QEMU runs as on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketOwner {
    pub uid: u32,
    pub gid: u32,
}

impl Offer {
    pub(crate) fn to_hello(
        &self,
        integrity_key: [u8; 32],
        purpose: wire::Purpose,
        page_key_id: u64,
    ) -> wire::Hello {
        wire::Hello {
            job: self.job,
            integrity_key,
            features: 0,
            purpose,
            page_key_id,
            window_budget_bytes: self.window_budget_bytes,
            source_host: self.source_host.clone(),
            gang: self.gang.clone(),
            members: self
                .members
                .iter()
                .map(|member| wire::MemberHello {
                    uuid: member.uuid,
                    memory_bytes: member.memory_bytes,
                    fixed_owner: member.fixed_owner.map(|owner| (owner.uid, owner.gid)),
                    name: member.name.clone(),
                })
                .collect(),
        }
    }

    pub(crate) fn from_hello(hello: &wire::Hello) -> Self {
        Self {
            job: hello.job,
            gang: hello.gang.clone(),
            source_host: hello.source_host.clone(),
            window_budget_bytes: hello.window_budget_bytes,
            members: hello
                .members
                .iter()
                .map(|member| MemberOffer {
                    uuid: member.uuid,
                    name: member.name.clone(),
                    memory_bytes: member.memory_bytes,
                    fixed_owner: member
                        .fixed_owner
                        .map(|(uid, gid)| SocketOwner { uid, gid }),
                })
                .collect(),
        }
    }
}

impl From<MemberOutcome> for wire::Outcome {
    fn from(outcome: MemberOutcome) -> Self {
        Self {
            downtime_ms: outcome.downtime_ms,
            iterations: outcome.iterations,
            memory_bytes: outcome.memory_bytes,
        }
    }
}

impl From<wire::Outcome> for MemberOutcome {
    fn from(outcome: wire::Outcome) -> Self {
        Self {
            downtime_ms: outcome.downtime_ms,
            iterations: outcome.iterations,
            memory_bytes: outcome.memory_bytes,
        }
    }
}
