//! A job's result and timeline, as far as the page shows them. Must not reckon.

use serde::Deserialize;

#[derive(Debug, Deserialize)]
pub(crate) struct Report {
    pub(crate) job: String,
    pub(crate) gang: Option<String>,
    pub(crate) destination: String,
    pub(crate) state: String,
    pub(crate) error: Option<String>,
    pub(crate) elapsed_ms: u64,
    pub(crate) switchover_spread_ms: Option<u64>,
    pub(crate) bytes: Bytes,
    pub(crate) domains: Vec<Domain>,
}

impl Report {
    pub(crate) fn who(&self) -> &str {
        self.gang.as_deref().unwrap_or("domains")
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct Bytes {
    pub(crate) qemu_stream: u64,
    pub(crate) wire: u64,
    pub(crate) saved: Saved,
}

#[derive(Debug, Default, Clone, Deserialize)]
pub(crate) struct Saved {
    zero: i64,
    uniform: i64,
    intra_vm: i64,
    cross_vm: i64,
    staged: i64,
    destination: i64,
    sub_page: i64,
    delta: i64,
    compression: i64,
}

impl Saved {
    /// In the order of the journey, with the words that people see.
    pub(crate) fn parts(&self) -> [(&'static str, i64); 9] {
        [
            ("zero pages", self.zero),
            ("uniform pages", self.uniform),
            ("had from itself", self.intra_vm),
            ("had from others", self.cross_vm),
            ("prepared", self.staged),
            ("was there", self.destination),
            ("parts of pages", self.sub_page),
            ("differences", self.delta),
            ("compression", self.compression),
        ]
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct Domain {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) state: String,
    pub(crate) elapsed_ms: u64,
    pub(crate) downtime_ms: Option<u64>,
    pub(crate) iterations: Option<u64>,
    pub(crate) qemu_stream_bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) error: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Timeline {
    pub(crate) members: Vec<Member>,
    pub(crate) switching_ms: Option<u64>,
    pub(crate) samples: Samples,
    #[serde(default)]
    pub(crate) shared_pages: Vec<Vec<u64>>,
}

impl Timeline {
    /// When the last thing happened.
    pub(crate) fn end_ms(&self, report: &Report) -> u64 {
        let phases = self
            .members
            .iter()
            .filter_map(|member| member.phases.last());
        let last = phases.map(|phase| phase.at_ms).max();
        let sampled = self.samples.at_ms.last().copied();
        let end = last.max(sampled).unwrap_or(0);
        end.max(report.elapsed_ms).max(1)
    }
}

#[derive(Debug, Deserialize)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) uuid: String,
    pub(crate) phases: Vec<Phase>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Phase {
    pub(crate) at_ms: u64,
    pub(crate) phase: String,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct Samples {
    pub(crate) at_ms: Vec<u64>,
    pub(crate) qemu_stream: Vec<u64>,
    pub(crate) wire: Vec<u64>,
    pub(crate) saved: Vec<Saved>,
}
