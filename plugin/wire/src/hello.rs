//! The handshake: what the source offers, and what the destination grants.
//!
//! Must not: judge an offer; it only says whether it is well-formed.

use uuid::Uuid;

use crate::cursor::{Reader, put_text};
use crate::{MEMBERS_MAX, NAME_BYTES_MAX, WireError};

/// A session as the source proposes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub job: Uuid,
    /// Keys page digests and frame digests of this session.
    pub integrity_key: [u8; 32],
    /// Optional features the source has, one bit each. None is defined yet.
    pub features: u32,
    /// Bytes the page window may take.
    pub window_budget_bytes: u64,
    /// Host name of the source, for logs and messages.
    pub source_host: String,
    pub gang: String,
    pub members: Vec<MemberHello>,
}

/// A member as the source announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberHello {
    pub uuid: Uuid,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// User and group ids that the domain prescribes for its QEMU on every host.
    pub fixed_owner: Option<(u32, u32)>,
    pub name: String,
}

impl Hello {
    pub(crate) fn encode_body(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.job.as_bytes());
        out.extend_from_slice(&self.integrity_key);
        out.extend_from_slice(&self.features.to_le_bytes());
        out.extend_from_slice(&self.window_budget_bytes.to_le_bytes());
        put_text(out, &self.source_host, NAME_BYTES_MAX);
        put_text(out, &self.gang, NAME_BYTES_MAX);
        out.extend_from_slice(&(self.members.len() as u16).to_le_bytes());
        for member in &self.members {
            out.extend_from_slice(member.uuid.as_bytes());
            out.extend_from_slice(&member.memory_bytes.to_le_bytes());
            out.push(u8::from(member.fixed_owner.is_some()));
            let (uid, gid) = member.fixed_owner.unwrap_or_default();
            out.extend_from_slice(&uid.to_le_bytes());
            out.extend_from_slice(&gid.to_le_bytes());
            put_text(out, &member.name, NAME_BYTES_MAX);
        }
    }

    pub(crate) fn decode_body(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let job = Uuid::from_bytes(reader.array("job")?);
        let integrity_key = reader.array("integrity_key")?;
        let features = reader.u32("features")?;
        let window_budget_bytes = reader.u64("window_budget")?;
        let source_host = reader.text(NAME_BYTES_MAX, "source_host")?.to_owned();
        let gang = reader.text(NAME_BYTES_MAX, "gang")?.to_owned();
        let count = usize::from(reader.u16("member_count")?);
        if count == 0 || count > MEMBERS_MAX {
            return Err(WireError::Value("member_count"));
        }
        let mut members = Vec::with_capacity(count);
        for _ in 0..count {
            members.push(MemberHello {
                uuid: Uuid::from_bytes(reader.array("member_uuid")?),
                memory_bytes: reader.u64("member_memory")?,
                fixed_owner: {
                    let fixed = reader.flag("member_owner_fixed")?;
                    let owner = (reader.u32("member_uid")?, reader.u32("member_gid")?);
                    if !fixed && owner != (0, 0) {
                        return Err(WireError::Value("member_uid"));
                    }
                    fixed.then_some(owner)
                },
                name: reader.text(NAME_BYTES_MAX, "member_name")?.to_owned(),
            });
        }
        Ok(Self {
            job,
            integrity_key,
            features,
            window_budget_bytes,
            source_host,
            gang,
            members,
        })
    }
}

/// What the destination grants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// Features both have.
    pub features: u32,
    /// At most what was offered.
    pub window_budget_bytes: u64,
    /// Stream bytes a channel may have under way, before any CREDIT.
    pub channel_credit_bytes: u32,
}

impl Welcome {
    pub(crate) fn encode_body(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.features.to_le_bytes());
        out.extend_from_slice(&self.window_budget_bytes.to_le_bytes());
        out.extend_from_slice(&self.channel_credit_bytes.to_le_bytes());
    }

    pub(crate) fn decode_body(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            features: reader.u32("features")?,
            window_budget_bytes: reader.u64("window_budget")?,
            channel_credit_bytes: reader.u32("channel_credit")?,
        })
    }
}
