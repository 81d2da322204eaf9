//! Sets of migration streams: recorded ones as they lie on disk, or synthetic ones.
//!
//! A recorded set is a directory with one `MEMBER.stream` for each guest, exactly what its QEMU
//! wrote, and `record.json`, which names them in order and says where they come from.
//! Must not: change a byte of a stream.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::synthetic::{self, Kind};

/// The file in a set's directory that describes it.
const DESCRIPTION: &str = "record.json";

/// What `record.json` says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recording {
    /// The guests' mix, as `record --mix` names it.
    pub mix: String,
    /// What QEMU calls its version.
    pub qemu: String,
    /// What each migration was allowed to send, in MiB/s.
    pub bandwidth_mib: u64,
    /// In the order of the gang.
    pub members: Vec<RecordedMember>,
}

/// One guest's migration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RecordedMember {
    pub guest: String,
    pub memory_mib: u64,
    pub stream_bytes: u64,
    /// What the destination QEMU answered on the return path.
    pub return_bytes: u64,
    /// From the first to the last byte of the stream.
    pub seconds: f64,
    /// How often the guest's memory was gone through.
    pub passes: u64,
}

impl RecordedMember {
    /// The file of the stream, in the set's directory.
    pub fn file(&self, dir: &Path) -> PathBuf {
        stream_file(dir, &self.guest)
    }
}

/// Where a guest's stream lies in a set's directory.
pub fn stream_file(dir: &Path, guest: &str) -> PathBuf {
    dir.join(format!("{guest}.stream"))
}

impl Recording {
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(DESCRIPTION);
        let text = std::fs::read(&path)
            .with_context(|| format!("{} holds no recorded streams", dir.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    pub fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join(DESCRIPTION);
        std::fs::write(&path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// One member's stream, in memory.
#[derive(Debug)]
pub struct MemberStream {
    pub name: String,
    pub memory_bytes: u64,
    pub bytes: Vec<u8>,
}

/// The streams of a gang.
#[derive(Debug)]
pub struct StreamSet {
    /// What reports call it.
    pub title: String,
    pub members: Vec<MemberStream>,
    /// Where what is known about the set can be kept; recorded sets only.
    pub dir: Option<PathBuf>,
}

impl StreamSet {
    /// Loads the first `members` (or all) of a recorded set.
    pub fn recorded(dir: &Path, members: Option<usize>) -> Result<Self> {
        let recording = Recording::load(dir)?;
        let count = members.unwrap_or(recording.members.len());
        ensure!(
            (1..=recording.members.len()).contains(&count),
            "{} holds {} members, not {count}",
            dir.display(),
            recording.members.len()
        );
        let members = recording.members[..count]
            .iter()
            .map(|member| {
                let path = member.file(dir);
                let bytes = std::fs::read(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                if bytes.len() as u64 != member.stream_bytes {
                    bail!(
                        "{} has {} bytes, {} were recorded; record the set again",
                        path.display(),
                        bytes.len(),
                        member.stream_bytes
                    );
                }
                Ok(MemberStream {
                    name: member.guest.clone(),
                    memory_bytes: member.memory_mib << 20,
                    bytes,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            title: format!("{} ({})", recording.mix, recording.qemu),
            members,
            dir: Some(dir.to_owned()),
        })
    }

    /// Makes a synthetic set; the same arguments make the same bytes.
    pub fn synthetic(kind: Kind, members: usize, memory_mib: u64) -> Self {
        Self {
            title: format!("synthetic {kind}, {memory_mib} MiB each"),
            members: (0..members)
                .map(|member| MemberStream {
                    name: format!("g{member}"),
                    memory_bytes: memory_mib << 20,
                    bytes: synthetic::stream(kind, member, memory_mib << 20),
                })
                .collect(),
            dir: None,
        }
    }

    pub fn stream_bytes(&self) -> u64 {
        self.members.iter().map(|m| m.bytes.len() as u64).sum()
    }

    /// Identifies the set by its content.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for member in &self.members {
            hasher.update(blake3::hash(&member.bytes).as_bytes());
        }
        hasher.finalize().to_hex()[..32].to_owned()
    }
}
