//! The JSON object that `vmgang migrate --json` prints, as users read it. Unknown and missing
//! fields are errors: the object is a contract.

use serde::Deserialize;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobResult {
    pub job: String,
    /// `null` for `--domains` and `--all`.
    pub gang: Option<String>,
    pub destination: String,
    pub state: String,
    pub error: Option<String>,
    pub elapsed_ms: u64,
    pub switchover_spread_ms: Option<u64>,
    pub bytes: Bytes,
    pub domains: Vec<DomainResult>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bytes {
    pub qemu_stream: u64,
    pub wire: u64,
    pub literal: u64,
    pub saved: Saved,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
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

impl Saved {
    pub fn total(&self) -> i64 {
        let Self {
            zero,
            uniform,
            intra_vm,
            cross_vm,
            staged,
            destination,
            sub_page,
            delta,
            compression,
        } = self;
        zero + uniform + intra_vm + cross_vm + staged + destination + sub_page + delta + compression
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainResult {
    pub name: String,
    pub uuid: String,
    pub state: String,
    pub elapsed_ms: u64,
    pub downtime_ms: Option<u64>,
    pub iterations: Option<u64>,
    pub qemu_stream_bytes: u64,
    pub wire_bytes: u64,
    /// With `--balloon` only.
    pub ballooned_bytes: Option<u64>,
    pub error: Option<String>,
}
