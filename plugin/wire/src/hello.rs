//! The handshake: what the source offers, what the destination grants, and what makes a further
//! connection one of the session's.
//!
//! Must not: judge an offer; it only says whether it is well-formed.

use uuid::Uuid;

use crate::cursor::{Reader, put_text};
use crate::{CONNECTIONS_MAX, MEMBERS_MAX, NAME_BYTES_MAX, WireError};

/// The source can send over further connections.
pub const FEATURE_CONNECTIONS: u32 = 1;

/// A session as the source proposes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub job: Uuid,
    /// Keys page digests and frame digests of this session.
    pub integrity_key: [u8; 32],
    /// Optional features the source has, one bit each; bits that are not known are ignored.
    pub features: u32,
    pub purpose: Purpose,
    /// Tells keys of page digests apart: contents are found at the destination if both sides
    /// have the same.
    pub page_key_id: u64,
    /// Bytes the page window may take.
    pub window_budget_bytes: u64,
    /// Host name of the source, for logs and messages.
    pub source_host: String,
    pub gang: String,
    pub members: Vec<MemberHello>,
}

/// What a session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// 0, or 1 with a stage: the members migrate.
    Migrate { stage: Option<TakenStage> },
    /// 2: contents are staged, and kept for a migration that comes within so many seconds.
    Stage { seconds: u32 },
    /// 3: the members may migrate, each when somebody else's client says so. What the destination is called
    /// in the path of their sockets is in [`Hello::gang`].
    Ambient,
}

/// A stage that a migration begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakenStage {
    /// The job of its session.
    pub id: Uuid,
    /// STAGE frames that were sent in it.
    pub frames: u64,
}

impl Purpose {
    fn encode(self, out: &mut Vec<u8>) {
        let (number, id, frames, seconds) = match self {
            Purpose::Migrate { stage: None } => (0, Uuid::nil(), 0, 0),
            Purpose::Migrate { stage: Some(stage) } => (1, stage.id, stage.frames, 0),
            Purpose::Stage { seconds } => (2, Uuid::nil(), 0, seconds),
            Purpose::Ambient => (3, Uuid::nil(), 0, 0),
        };
        out.push(number);
        out.extend_from_slice(id.as_bytes());
        out.extend_from_slice(&u64::to_le_bytes(frames));
        out.extend_from_slice(&u32::to_le_bytes(seconds));
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let number = reader.u8("purpose")?;
        let id = Uuid::from_bytes(reader.array("stage_id")?);
        let frames = reader.u64("stage_frames")?;
        let seconds = reader.u32("stage_seconds")?;
        match (number, id.is_nil(), frames, seconds) {
            (0, true, 0, 0) => Ok(Purpose::Migrate { stage: None }),
            (1, false, _, 0) => Ok(Purpose::Migrate {
                stage: Some(TakenStage { id, frames }),
            }),
            (2, true, 0, 1..) => Ok(Purpose::Stage { seconds }),
            (3, true, 0, 0) => Ok(Purpose::Ambient),
            _ => Err(WireError::Value("purpose")),
        }
    }
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
        self.purpose.encode(out);
        out.extend_from_slice(&self.page_key_id.to_le_bytes());
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
        let purpose = Purpose::decode(reader)?;
        let page_key_id = reader.u64("page_key_id")?;
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
            purpose,
            page_key_id,
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
    /// At most what was offered.
    pub window_budget_bytes: u64,
    /// Stream bytes a channel may have under way, before any CREDIT.
    pub channel_credit_bytes: u32,
    /// Contents that OFFERs may find here; 0: there is no use in any.
    pub contents: u64,
    /// The stage that was named is this session's window now.
    pub stage: bool,
    /// Contents in the window's first slots; ANNOUNCEs with all of them follow.
    pub announced: u32,
    /// [`FEATURE_CONNECTIONS`], if both have it.
    pub more_connections: Option<MoreConnections>,
}

/// Leave to open further connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoreConnections {
    /// How many the session may have in all, 2 to [`CONNECTIONS_MAX`].
    pub connections: u8,
    /// What [`Join`] must show.
    pub token: [u8; 16],
}

impl Welcome {
    pub(crate) fn encode_body(&self, out: &mut Vec<u8>) {
        let features = match self.more_connections {
            Some(_) => FEATURE_CONNECTIONS,
            None => 0,
        };
        out.extend_from_slice(&features.to_le_bytes());
        out.extend_from_slice(&self.window_budget_bytes.to_le_bytes());
        out.extend_from_slice(&self.channel_credit_bytes.to_le_bytes());
        out.extend_from_slice(&self.contents.to_le_bytes());
        out.push(u8::from(self.stage));
        out.extend_from_slice(&self.announced.to_le_bytes());
        if let Some(more) = &self.more_connections {
            out.push(more.connections);
            out.extend_from_slice(&more.token);
        }
    }

    pub(crate) fn decode_body(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let features = reader.u32("features")?;
        // No source offers another one, so none may be granted.
        if features & !FEATURE_CONNECTIONS != 0 {
            return Err(WireError::Value("features"));
        }
        Ok(Self {
            window_budget_bytes: reader.u64("window_budget")?,
            channel_credit_bytes: reader.u32("channel_credit")?,
            contents: reader.u64("contents")?,
            stage: reader.flag("stage")?,
            announced: reader.u32("announced")?,
            more_connections: if features & FEATURE_CONNECTIONS == 0 {
                None
            } else {
                let connections = reader.u8("connections")?;
                if !(2..=CONNECTIONS_MAX).contains(&connections) {
                    return Err(WireError::Value("connections"));
                }
                Some(MoreConnections {
                    connections,
                    token: reader.array("token")?,
                })
            },
        })
    }
}

/// The first frame of a further connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    pub job: Uuid,
    /// As granted.
    pub token: [u8; 16],
    /// Which one of the session it is, 1 to [`CONNECTIONS_MAX`] - 1.
    pub connection: u8,
}

impl Join {
    pub(crate) fn encode_body(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.job.as_bytes());
        out.extend_from_slice(&self.token);
        out.push(self.connection);
    }

    pub(crate) fn decode_body(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            job: Uuid::from_bytes(reader.array("job")?),
            token: reader.array("token")?,
            connection: further_connection(reader)?,
        })
    }
}

/// The number of a connection that is not the first one.
pub(crate) fn further_connection(reader: &mut Reader<'_>) -> Result<u8, WireError> {
    match reader.u8("connection")? {
        connection @ 1..CONNECTIONS_MAX => Ok(connection),
        _ => Err(WireError::Value("connection")),
    }
}
