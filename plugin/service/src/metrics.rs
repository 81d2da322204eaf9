//! What monitoring reads: figures of this daemon since its start, as a text file in Prometheus' format,
//! for the textfile collector of node_exporter. The names are a contract (docs/operations.md).
//!
//! Must not: count anything itself while a job runs; it reads what jobs, stages and sessions tell.

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder,
};

use crate::coordinator::Coordinator;
use crate::job::{Job, JobView};
use crate::memory;
use crate::peers::Admittance;
use crate::report::{Bytes, DomainOutcome, JobState};
use crate::scans::unix_seconds;
use crate::stages::StageView;

/// From one writing to the next; the end of a job is written at once.
const INTERVAL: Duration = Duration::from_secs(15);
/// Pauses of guests, in seconds.
const DOWNTIME_BUCKETS: [f64; 9] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];

/// What other hosts were promised here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Incoming {
    pub sessions: usize,
    pub window_bytes: u64,
}

/// All figures, and what was counted of jobs already.
pub(crate) struct Metrics {
    registry: Registry,
    jobs: IntGaugeVec,
    jobs_ended: IntCounterVec,
    members_ended: IntCounterVec,
    qemu_stream: IntCounter,
    wire: IntCounter,
    literal: IntCounter,
    saved: IntGaugeVec,
    downtime: Histogram,
    last_downtime: Gauge,
    last_spread: Gauge,
    last_end: IntGauge,
    stages: IntGaugeVec,
    stage_bytes: IntGaugeVec,
    incoming_sessions: IntGauge,
    window_promised: IntGauge,
    checkpoints: IntGauge,
    resident: IntGauge,
    /// Bytes of running jobs that are in the counters.
    counted: HashMap<String, Bytes>,
    /// Jobs whose end is in the counters, or was before this daemon.
    ended: HashSet<String>,
}

impl Metrics {
    /// With nothing counted. Jobs that have ended by now are those of earlier daemons.
    pub(crate) fn new(jobs: &[Arc<Job>]) -> prometheus::Result<Metrics> {
        let registry = Registry::new();
        let known = Known(&registry);
        let ended = jobs.iter().filter(|job| job.state().ended());
        let version = known.gauges("vmgang_build_info", "The version of vmgangd", &["version"])?;
        version
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        let metrics = Metrics {
            jobs: known.gauges("vmgang_jobs", "Jobs under way, by state", &["state"])?,
            jobs_ended: known.counters(
                "vmgang_jobs_total",
                "Jobs that have ended, by how",
                &["state"],
            )?,
            members_ended: known.counters(
                "vmgang_members_total",
                "Members of jobs that have ended, by where they are",
                &["state"],
            )?,
            qemu_stream: known.counter(
                "vmgang_qemu_stream_bytes_total",
                "Bytes that the QEMUs of guests leaving this host have written",
            )?,
            wire: known.counter(
                "vmgang_wire_bytes_total",
                "Bytes exchanged with other vmgangd for guests leaving this host, TLS included",
            )?,
            literal: known.counter(
                "vmgang_literal_bytes_total",
                "Bytes of these streams that were sent in full, before compression",
            )?,
            saved: known.gauges(
                "vmgang_saved_bytes",
                "Bytes saved since the start of vmgangd, by kind; can go down where a kind costs more than it saves",
                &["kind"],
            )?,
            downtime: known.histogram(
                "vmgang_downtime_seconds",
                "Pauses of guests that have migrated from here",
            )?,
            last_downtime: known.number(
                "vmgang_last_downtime_seconds",
                "Longest pause of a guest in the last job",
            )?,
            last_spread: known.number(
                "vmgang_last_switchover_spread_seconds",
                "From the first guest's stop to the last one's in the last job",
            )?,
            last_end: known.gauge(
                "vmgang_last_job_end_timestamp_seconds",
                "When the last job ended, in seconds since 1970; 0: none has",
            )?,
            stages: known.gauges(
                "vmgang_stages",
                "Stages, by direction and state",
                &["direction", "state"],
            )?,
            stage_bytes: known.gauges(
                "vmgang_stage_bytes",
                "Bytes of memory contents in stages, by direction",
                &["direction"],
            )?,
            incoming_sessions: known.gauge(
                "vmgang_incoming_sessions",
                "Sessions of gangs that arrive or are staged here",
            )?,
            window_promised: known.gauge(
                "vmgang_window_promised_bytes",
                "Memory that page windows of these sessions may take",
            )?,
            checkpoints: known.gauge(
                "vmgang_checkpoint_bytes",
                "Memory kept for the way back of guests that have left",
            )?,
            resident: known.gauge("vmgang_resident_memory_bytes", "Memory of vmgangd itself")?,
            counted: HashMap::new(),
            ended: ended.map(|job| job.id.clone()).collect(),
            registry,
        };
        metrics.begin_at_zero();
        Ok(metrics)
    }

    /// What nothing has happened to yet is 0, not absent: rates need a beginning.
    fn begin_at_zero(&self) {
        for state in ["completed", "failed", "partial", "aborted"] {
            self.jobs_ended.with_label_values(&[state]);
        }
        for state in ["migrated", "source", "failed"] {
            self.members_ended.with_label_values(&[state]);
        }
        for (kind, _) in Bytes::default().saved.parts() {
            self.saved.with_label_values(&[kind]);
        }
    }

    /// Takes note of all jobs as they are now. Each end counts once.
    pub(crate) fn observe_jobs(&mut self, jobs: &[Arc<Job>]) {
        self.jobs.reset();
        for state in [JobState::Preparing, JobState::Running, JobState::Switching] {
            self.jobs.with_label_values(&[state.as_str()]).set(0);
        }
        // The oldest first: the last figures are those of the newest.
        for job in jobs.iter().rev() {
            if self.ended.contains(&job.id) {
                continue;
            }
            let view = job.view();
            self.count_bytes(&job.id, &view.bytes);
            if view.state.ended() {
                self.counted.remove(&job.id);
                self.ended.insert(job.id.clone());
                self.count_end(&view);
            } else {
                self.jobs.with_label_values(&[view.state.as_str()]).inc();
            }
        }
        let known: HashSet<&String> = jobs.iter().map(|job| &job.id).collect();
        self.ended.retain(|id| known.contains(id));
    }

    fn count_bytes(&mut self, job: &str, now: &Bytes) {
        let before = self.counted.insert(job.to_owned(), now.clone());
        let before = before.unwrap_or_default();
        let grown = |now: u64, before: u64| now.saturating_sub(before);
        self.qemu_stream
            .inc_by(grown(now.qemu_stream, before.qemu_stream));
        self.wire.inc_by(grown(now.wire, before.wire));
        self.literal.inc_by(grown(now.literal, before.literal));
        for ((kind, now), (_, before)) in now.saved.parts().into_iter().zip(before.saved.parts()) {
            let gauge = self.saved.with_label_values(&[kind]);
            gauge.add(now.saturating_sub(before));
        }
    }

    fn count_end(&self, view: &JobView) {
        self.jobs_ended
            .with_label_values(&[view.state.as_str()])
            .inc();
        let Some(report) = &view.report else {
            return;
        };
        let seconds = |ms: u64| ms as f64 / 1000.0;
        let mut longest_ms = 0;
        for domain in &report.domains {
            let state = match domain.state {
                DomainOutcome::Migrated => "migrated",
                DomainOutcome::Source => "source",
                DomainOutcome::Failed => "failed",
            };
            self.members_ended.with_label_values(&[state]).inc();
            if let (DomainOutcome::Migrated, Some(ms)) = (domain.state, domain.downtime_ms) {
                self.downtime.observe(seconds(ms));
                longest_ms = longest_ms.max(ms);
            }
        }
        self.last_downtime.set(seconds(longest_ms));
        self.last_spread
            .set(seconds(report.switchover_spread_ms.unwrap_or(0)));
        let end = i64::try_from(unix_seconds()).unwrap_or(i64::MAX);
        self.last_end.set(end);
    }

    fn observe_rest(&self, stages: &[StageView], incoming: Incoming, checkpoint_bytes: u64) {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.stages.reset();
        for outgoing in ["outgoing", "incoming"] {
            self.stage_bytes.with_label_values(&[outgoing]).set(0);
        }
        for stage in stages {
            let direction = if stage.outgoing {
                "outgoing"
            } else {
                "incoming"
            };
            self.stages
                .with_label_values(&[direction, stage.state.as_str()])
                .inc();
            let bytes = stage
                .contents
                .saturating_mul(vmgang_dedup::PAGE_BYTES as u64);
            let gauge = self.stage_bytes.with_label_values(&[direction]);
            gauge.add(number(bytes));
        }
        self.incoming_sessions.set(number(incoming.sessions as u64));
        self.window_promised.set(number(incoming.window_bytes));
        self.checkpoints.set(number(checkpoint_bytes));
        self.resident
            .set(number(memory::resident_bytes().unwrap_or(0)));
    }

    /// All of it as text.
    fn text(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// Makes figures that the registry knows.
struct Known<'a>(&'a Registry);

impl Known<'_> {
    fn keep<T>(&self, collector: T) -> prometheus::Result<T>
    where
        T: prometheus::core::Collector + Clone + 'static,
    {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.keep(IntCounter::new(name, help)?)
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.keep(IntGauge::new(name, help)?)
    }

    fn number(&self, name: &str, help: &str) -> prometheus::Result<Gauge> {
        self.keep(Gauge::new(name, help)?)
    }

    fn counters(&self, name: &str, help: &str, by: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.keep(IntCounterVec::new(Opts::new(name, help), by)?)
    }

    fn gauges(&self, name: &str, help: &str, by: &[&str]) -> prometheus::Result<IntGaugeVec> {
        self.keep(IntGaugeVec::new(Opts::new(name, help), by)?)
    }

    fn histogram(&self, name: &str, help: &str) -> prometheus::Result<Histogram> {
        let buckets = DOWNTIME_BUCKETS.to_vec();
        self.keep(Histogram::with_opts(
            HistogramOpts::new(name, help).buckets(buckets),
        )?)
    }
}

/// Writes the file from now on, for as long as the daemon runs.
pub async fn run(file: PathBuf, coordinator: Arc<Coordinator>, admittance: Arc<Admittance>) {
    let mut metrics = match Metrics::new(&coordinator.jobs()) {
        Ok(metrics) => metrics,
        Err(error) => {
            tracing::error!(%error, "no metrics are written");
            return;
        }
    };
    let mut failing = false;
    loop {
        metrics.observe_jobs(&coordinator.jobs());
        metrics.observe_rest(
            &coordinator.stages(),
            admittance.promised(),
            admittance.contents.checkpoint_bytes(),
        );
        let written = match metrics.text() {
            Ok(text) => {
                let file = file.clone();
                let writing = tokio::task::spawn_blocking(move || write(&file, &text));
                writing
                    .await
                    .unwrap_or_else(|error| Err(io::Error::other(error)))
            }
            Err(error) => Err(io::Error::other(error)),
        };
        // Said once, not every quarter of a minute.
        match written {
            Err(error) if !failing => {
                failing = true;
                tracing::error!(file = %file.display(), %error, "cannot write metrics_file; does its directory exist, and may vmgangd write there?");
            }
            Ok(()) if failing => {
                failing = false;
                tracing::info!(file = %file.display(), "metrics_file is written again");
            }
            _ => {}
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = coordinator.job_ended() => {}
        }
    }
}

/// Readers see the old file or the new one, never a part.
fn write(file: &Path, text: &[u8]) -> io::Result<()> {
    let mut name = file
        .file_name()
        .ok_or_else(|| io::Error::other("it names no file"))?
        .to_owned();
    // The collector reads *.prom only.
    name.push(".new");
    let temporary = file.with_file_name(name);
    let written = || {
        let mut writer = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            // Others may write in that directory: no link of theirs is followed.
            .custom_flags(libc::O_NOFOLLOW)
            .open(&temporary)?;
        // Who collects it is not root.
        writer.set_permissions(Permissions::from_mode(0o644))?;
        writer.write_all(text)?;
        fs::rename(&temporary, file)
    };
    written().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use uuid::Uuid;

    use super::*;
    use crate::report::tests::sample;
    use crate::report::{Report, SavedBytes};

    /// Samples by name and labels, as Prometheus' text format has them: each after its own HELP and TYPE.
    fn parse(text: &[u8]) -> BTreeMap<String, f64> {
        let text = std::str::from_utf8(text).expect("UTF-8");
        assert!(text.ends_with('\n'));
        let mut samples = BTreeMap::new();
        let mut described = (String::new(), String::new());
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                described.0 = help.split(' ').next().unwrap_or_default().to_owned();
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a type");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
                described.1 = name.to_owned();
            } else {
                let (name, value) = line.rsplit_once(' ').expect("a value");
                assert!(name.starts_with(&described.0), "{line}");
                assert_eq!(described.0, described.1, "{line}");
                let value: f64 = value.parse().expect("a number");
                let twice = samples.insert(name.to_owned(), value);
                assert_eq!(twice, None, "{line}");
            }
        }
        samples
    }

    fn running(wire: u64, delta: i64) -> Arc<Job> {
        let (job, _) = Job::start(
            Uuid::new_v4(),
            Some("web"),
            "qemu+tls://b/system",
            &[],
            false,
        );
        job.update(|view| {
            view.state = JobState::Running;
            view.bytes = bytes(wire, delta);
        });
        Arc::new(job)
    }

    fn bytes(wire: u64, delta: i64) -> Bytes {
        Bytes {
            qemu_stream: 1000,
            wire,
            literal: 7,
            saved: SavedBytes {
                delta,
                ..SavedBytes::default()
            },
        }
    }

    fn end(job: &Job, report: Report) {
        job.update(|view| {
            view.state = report.state;
            view.bytes = report.bytes.clone();
            view.report = Some(report);
        });
    }

    #[test]
    fn jobs_count_while_they_run_and_their_end_counts_once() {
        let before = running(5, 0);
        end(&before, sample());
        let mut jobs = vec![before];
        let mut metrics = Metrics::new(&jobs).expect("metrics");
        let job = running(100, -5);
        jobs.insert(0, job.clone());
        metrics.observe_jobs(&jobs);
        let now = parse(&metrics.text().expect("text"));
        assert_eq!(now[r#"vmgang_jobs{state="running"}"#], 1.0);
        assert_eq!(
            now[r#"vmgang_jobs_total{state="completed"}"#], 0.0,
            "that was before"
        );
        assert_eq!(now["vmgang_wire_bytes_total"], 100.0);
        assert_eq!(now[r#"vmgang_saved_bytes{kind="delta"}"#], -5.0);

        let mut report = sample();
        report.bytes = bytes(300, 40);
        end(&job, report);
        for _ in 0..2 {
            metrics.observe_jobs(&jobs);
            metrics.observe_rest(
                &[],
                Incoming {
                    sessions: 2,
                    window_bytes: 9,
                },
                8,
            );
            let now = parse(&metrics.text().expect("text"));
            assert_eq!(now[r#"vmgang_jobs{state="running"}"#], 0.0);
            assert_eq!(now[r#"vmgang_jobs_total{state="completed"}"#], 1.0);
            assert_eq!(now[r#"vmgang_members_total{state="migrated"}"#], 1.0);
            assert_eq!(now["vmgang_wire_bytes_total"], 300.0);
            assert_eq!(now["vmgang_qemu_stream_bytes_total"], 1000.0);
            assert_eq!(now[r#"vmgang_saved_bytes{kind="delta"}"#], 40.0);
            assert_eq!(now["vmgang_last_switchover_spread_seconds"], 0.012);
            assert_eq!(now["vmgang_last_downtime_seconds"], 0.003);
            assert_eq!(now["vmgang_downtime_seconds_count"], 1.0);
            assert!(now["vmgang_last_job_end_timestamp_seconds"] > 0.0);
            assert_eq!(now["vmgang_incoming_sessions"], 2.0);
            assert_eq!(now["vmgang_window_promised_bytes"], 9.0);
            assert_eq!(now["vmgang_checkpoint_bytes"], 8.0);
            assert!(now["vmgang_resident_memory_bytes"] > 0.0);
        }
        // What is not listed any more is not remembered.
        metrics.observe_jobs(&[]);
        assert!(metrics.ended.is_empty() && metrics.counted.is_empty());
    }

    #[test]
    fn each_name_is_in_the_documents() {
        let document = include_str!("../../../docs/operations.md");
        let metrics = Metrics::new(&[]).expect("metrics");
        for family in metrics.registry.gather() {
            let name = family.name();
            assert!(document.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn the_file_is_whole_and_readable_and_a_failure_leaves_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("vmgang.prom");
        write(&file, b"a 1\n").expect("written");
        write(&file, b"b 2\n").expect("written again");
        assert_eq!(fs::read(&file).expect("there"), b"b 2\n");
        let mode = fs::metadata(&file).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        let entries = || fs::read_dir(directory.path()).expect("a list").count();
        assert_eq!(entries(), 1);

        let taken = directory.path().join("taken.prom");
        fs::create_dir(&taken).expect("a directory");
        write(&taken, b"a 1\n").expect_err("it is a directory");
        assert_eq!(entries(), 2);

        // A link that somebody else has put there is not written through.
        let victim = directory.path().join("victim");
        fs::write(&victim, "mine").expect("written");
        let link = directory.path().join("vmgang.prom.new");
        std::os::unix::fs::symlink(&victim, link).expect("a link");
        write(&file, b"c 3\n").expect_err("it is a link");
        assert_eq!(fs::read(&victim).expect("there"), b"mine");
    }
}
