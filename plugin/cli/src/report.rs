//! The result of a job: its JSON as the daemon made it, read for the summary and exit code.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::{exit, text};

/// What the summary needs of the report.
#[derive(Debug, Deserialize)]
pub struct Report {
    pub job: String,
    pub destination: String,
    pub state: String,
    pub error: Option<String>,
    elapsed_ms: u64,
    switchover_spread_ms: Option<u64>,
    bytes: Bytes,
    domains: Vec<Domain>,
}

#[derive(Debug, Deserialize)]
struct Bytes {
    qemu_stream: u64,
    wire: u64,
    saved: BTreeMap<String, i64>,
}

#[derive(Debug, Deserialize)]
struct Domain {
    name: String,
    state: String,
    elapsed_ms: u64,
    downtime_ms: Option<u64>,
    qemu_stream_bytes: u64,
    error: Option<String>,
}

/// The exit code of a job that ended so.
pub fn exit_code(state: &str) -> u8 {
    match state {
        "completed" => exit::MIGRATED,
        "partial" => exit::PARTIAL,
        "aborted" => exit::ABORTED,
        _ => exit::FAILED,
    }
}

impl Report {
    pub fn exit_code(&self) -> u8 {
        exit_code(&self.state)
    }

    /// A few lines for people.
    pub fn summary(&self, barrier_approximate: bool) -> String {
        let rows: Vec<_> = self
            .domains
            .iter()
            .map(|domain| {
                vec![
                    domain.name.clone(),
                    domain.state.clone(),
                    text::milliseconds(domain.elapsed_ms),
                    domain.downtime_ms.map_or("-".into(), text::milliseconds),
                    text::bytes(domain.qemu_stream_bytes),
                    domain.error.clone().unwrap_or_default(),
                ]
            })
            .collect();
        let mut lines = text::table(&["DOMAIN", "NOW", "TIME", "PAUSE", "STREAM", ""], &rows);
        lines.push_str(&format!(
            "{}{} in {}",
            match self.state.as_str() {
                "completed" => "Migrated to ",
                "partial" => "Only partly migrated to ",
                "aborted" => "Aborted the migration to ",
                _ => "Not migrated to ",
            },
            self.destination,
            text::milliseconds(self.elapsed_ms)
        ));
        if let Some(spread) = self.switchover_spread_ms {
            lines.push_str(&format!(
                ", switched over within {}",
                text::milliseconds(spread)
            ));
        }
        lines.push_str(&format!(
            "\n{} went over the wire for {} of streams{}\n",
            text::bytes(self.bytes.wire),
            text::bytes(self.bytes.qemu_stream),
            self.savings()
        ));
        if barrier_approximate {
            lines.push_str(
                "The barrier was approximate: not every member could be held until all were ready.\n",
            );
        }
        if let Some(error) = &self.error {
            lines.push_str(&format!("{error}\n"));
        }
        lines
    }

    fn savings(&self) -> String {
        let mut parts: Vec<_> = self
            .bytes
            .saved
            .iter()
            .filter(|(_, bytes)| **bytes > 0)
            .collect();
        parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
        let parts: Vec<_> = parts
            .into_iter()
            .map(|(name, bytes)| {
                format!(
                    "{} {}",
                    name.replace('_', " "),
                    text::bytes(bytes.unsigned_abs())
                )
            })
            .collect();
        if parts.is_empty() {
            String::new()
        } else {
            format!("; saved: {}", parts.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_and_exit_code() {
        let json = r#"{"job":"1","gang":null,"destination":"qemu+tls://b/system","state":"partial",
            "error":"domain b broke","elapsed_ms":2500,"switchover_spread_ms":12,
            "bytes":{"qemu_stream":4096,"wire":1024,"literal":0,"saved":{"cross_vm":3000,"zero":172,"compression":-100}},
            "domains":[{"name":"a","uuid":"x","state":"migrated","elapsed_ms":2000,"downtime_ms":90,
            "iterations":3,"qemu_stream_bytes":4096,"wire_bytes":1000,"error":null}]}"#;
        let report: Report = serde_json::from_str(json).expect("valid");
        assert_eq!(report.exit_code(), exit::PARTIAL);
        assert!(report.summary(true).contains("barrier was approximate"));
        let summary = report.summary(false);
        assert!(!summary.contains("barrier"), "{summary}");
        for part in [
            "Only partly",
            "within 12 ms",
            "cross vm",
            "90 ms",
            "domain b broke",
        ] {
            assert!(summary.contains(part), "{part}: {summary}");
        }
        assert!(
            !summary.contains("compression"),
            "it saved nothing: {summary}"
        );
    }

    #[test]
    fn exit_codes_are_the_contract() {
        let codes = ["completed", "failed", "partial", "aborted"].map(exit_code);
        assert_eq!(codes, [0, 1, 3, 4]);
    }
}
