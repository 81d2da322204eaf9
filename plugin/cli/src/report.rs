//! The result of a job: its JSON as the daemon made it, read for the summary and exit code.

use serde::Deserialize;

use crate::savings::{self, Saved};
use crate::{exit, paint, text};

/// What the summary needs of the report.
#[derive(Debug, Deserialize)]
pub struct Report {
    pub job: String,
    pub destination: String,
    pub state: String,
    pub error: Option<String>,
    pub elapsed_ms: u64,
    switchover_spread_ms: Option<u64>,
    pub bytes: Bytes,
    domains: Vec<Domain>,
}

#[derive(Debug, Deserialize)]
pub struct Bytes {
    pub qemu_stream: u64,
    pub wire: u64,
    pub saved: Saved,
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
                    text::plain(&domain.name),
                    paint::state(&domain.state),
                    text::milliseconds(domain.elapsed_ms),
                    domain.downtime_ms.map_or("-".into(), text::milliseconds),
                    text::bytes(domain.qemu_stream_bytes),
                ]
            })
            .collect();
        let mut lines = text::table(&["DOMAIN", "NOW", "TIME", "PAUSE", "STREAM"], &rows);
        for domain in &self.domains {
            if let Some(error) = &domain.error {
                let told = format!("{}: {error}", text::plain(&domain.name));
                lines.push_str(&text::sentence(&told));
                lines.push('\n');
            }
        }
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
        lines.push('\n');
        if self.bytes.qemu_stream > 0 {
            let Bytes {
                qemu_stream,
                wire,
                saved,
            } = &self.bytes;
            lines.push_str(&savings::table(*qemu_stream, *wire, saved));
        }
        if barrier_approximate {
            lines.push_str(
                "The barrier was approximate: not every member could be held until all were ready.\n",
            );
        }
        if let Some(error) = &self.error {
            lines.push_str(&text::sentence(error));
            lines.push('\n');
        }
        lines
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
            "from others",
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
