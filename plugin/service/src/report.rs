//! The result of a job: the JSON object that `--json` prints, the history keeps and scripts
//! read. Field names and their order are a contract; nothing is measured here.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmgang_engine::{Saved, SessionCounters};

/// How a job as a whole stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    Preparing,
    Running,
    Switching,
    Completed,
    Failed,
    Partial,
    Aborted,
}

impl JobState {
    pub fn as_str(self) -> &'static str {
        match self {
            JobState::Preparing => "preparing",
            JobState::Running => "running",
            JobState::Switching => "switching",
            JobState::Completed => "completed",
            JobState::Failed => "failed",
            JobState::Partial => "partial",
            JobState::Aborted => "aborted",
        }
    }

    pub fn ended(self) -> bool {
        !matches!(
            self,
            JobState::Preparing | JobState::Running | JobState::Switching
        )
    }
}

/// Where a domain is after the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainOutcome {
    Migrated,
    /// Still running on the source.
    Source,
    /// Neither is known to be good; the error says what is known.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub job: String,
    pub gang: Option<String>,
    pub destination: String,
    pub state: JobState,
    pub error: Option<String>,
    pub elapsed_ms: u64,
    pub switchover_spread_ms: Option<u64>,
    pub bytes: Bytes,
    pub domains: Vec<DomainReport>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    pub qemu_stream: u64,
    pub wire: u64,
    pub literal: u64,
    pub saved: SavedBytes,
}

/// Adds up to `qemu_stream - wire` exactly; a part that cost more than it saved is negative.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedBytes {
    pub zero: i64,
    pub uniform: i64,
    pub intra_vm: i64,
    pub cross_vm: i64,
    pub staged: i64,
    pub destination: i64,
    pub sub_page: i64,
    pub delta: i64,
    pub compression: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainReport {
    pub name: String,
    pub uuid: Uuid,
    pub state: DomainOutcome,
    pub elapsed_ms: u64,
    pub downtime_ms: Option<u64>,
    pub iterations: Option<u64>,
    pub qemu_stream_bytes: u64,
    pub wire_bytes: u64,
    /// Memory its guest gave up for the move, and got back after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ballooned_bytes: Option<u64>,
    pub error: Option<String>,
}

impl From<&SessionCounters> for Bytes {
    fn from(counters: &SessionCounters) -> Self {
        Bytes {
            qemu_stream: counters.qemu_stream_bytes,
            wire: counters.wire_bytes,
            literal: counters.literal_bytes,
            saved: (&counters.saved).into(),
        }
    }
}

impl From<&Saved> for SavedBytes {
    fn from(saved: &Saved) -> Self {
        SavedBytes {
            zero: saved.zero,
            uniform: saved.uniform,
            intra_vm: saved.intra_vm,
            cross_vm: saved.cross_vm,
            staged: saved.staged,
            destination: saved.destination,
            sub_page: saved.sub_page,
            delta: saved.delta,
            compression: saved.compression,
        }
    }
}

impl SavedBytes {
    /// Each part with the name it has in the JSON.
    pub fn parts(&self) -> [(&'static str, i64); 9] {
        [
            ("zero", self.zero),
            ("uniform", self.uniform),
            ("intra_vm", self.intra_vm),
            ("cross_vm", self.cross_vm),
            ("staged", self.staged),
            ("destination", self.destination),
            ("sub_page", self.sub_page),
            ("delta", self.delta),
            ("compression", self.compression),
        ]
    }
}

impl Report {
    pub fn to_json(&self) -> String {
        // Plain structs with string keys cannot fail to serialise.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The job's end state, from where its domains are and whether the user asked to stop.
    pub fn end_state(domains: &[DomainReport], aborted: bool) -> JobState {
        let migrated = domains
            .iter()
            .filter(|domain| domain.state == DomainOutcome::Migrated)
            .count();
        // "Failed" and "aborted" promise that everything is still on the source.
        let unknown = domains
            .iter()
            .any(|domain| domain.state == DomainOutcome::Failed);
        if migrated == domains.len() {
            JobState::Completed
        } else if migrated > 0 || unknown {
            JobState::Partial
        } else if aborted {
            JobState::Aborted
        } else {
            JobState::Failed
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Report {
        Report {
            job: "0".repeat(32),
            gang: Some("web".into()),
            destination: "qemu+tls://b/system".into(),
            state: JobState::Completed,
            error: None,
            elapsed_ms: 5,
            switchover_spread_ms: Some(12),
            bytes: Bytes::default(),
            domains: vec![DomainReport {
                name: "a".into(),
                uuid: Uuid::nil(),
                state: DomainOutcome::Migrated,
                elapsed_ms: 4,
                downtime_ms: Some(3),
                iterations: None,
                qemu_stream_bytes: 2,
                wire_bytes: 1,
                ballooned_bytes: None,
                error: None,
            }],
        }
    }

    /// Users script against these names and this order.
    #[test]
    fn the_json_is_the_contract() {
        assert_eq!(
            sample().to_json(),
            concat!(
                r#"{"job":"00000000000000000000000000000000","gang":"web","#,
                r#""destination":"qemu+tls://b/system","state":"completed","error":null,"#,
                r#""elapsed_ms":5,"switchover_spread_ms":12,"#,
                r#""bytes":{"qemu_stream":0,"wire":0,"literal":0,"saved":{"zero":0,"uniform":0,"#,
                r#""intra_vm":0,"cross_vm":0,"staged":0,"destination":0,"sub_page":0,"delta":0,"#,
                r#""compression":0}},"domains":[{"name":"a","#,
                r#""uuid":"00000000-0000-0000-0000-000000000000","state":"migrated","#,
                r#""elapsed_ms":4,"downtime_ms":3,"iterations":null,"qemu_stream_bytes":2,"#,
                r#""wire_bytes":1,"error":null}]}"#
            )
        );
    }

    #[test]
    fn end_states() {
        let with = |states: &[DomainOutcome], aborted| {
            let domains: Vec<_> = states
                .iter()
                .map(|state| DomainReport {
                    state: *state,
                    ..sample().domains[0].clone()
                })
                .collect();
            Report::end_state(&domains, aborted)
        };
        use DomainOutcome::{Failed, Migrated, Source};
        assert_eq!(with(&[Migrated, Migrated], true), JobState::Completed);
        assert_eq!(with(&[Migrated, Source], true), JobState::Partial);
        assert_eq!(with(&[Migrated, Failed], false), JobState::Partial);
        assert_eq!(with(&[Source, Source], true), JobState::Aborted);
        assert_eq!(with(&[Source, Source], false), JobState::Failed);
        assert_eq!(with(&[Source, Failed], false), JobState::Partial);
    }
}
