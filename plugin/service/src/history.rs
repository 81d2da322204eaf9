//! Jobs on disk: one JSON file each in `STATE_DIR/jobs`, the newest 100 kept.
//!
//! A job is written when it starts, so that a daemon that was killed knows afterwards what it
//! was doing. Files are replaced by rename: a reader sees the old one or the new one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use vmgang_libvirt::DomainState;

use crate::balloon::Before;
use crate::outcome;
use crate::report::{DomainOutcome, JobState, Report};
use crate::timeline::Timeline;

/// How many ended jobs are kept.
pub const JOBS_KEPT_MAX: usize = 100;

/// What is known of one job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Seconds since 1970.
    pub started_unix_s: u64,
    /// Some member could not be held until all were ready.
    #[serde(default)]
    pub barrier_approximate: bool,
    /// Guests that have to get memory back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub balloons: Vec<Before>,
    /// Where the destination's vmgangd listens.
    #[serde(
        default,
        alias = "libvirt_peer",
        skip_serializing_if = "Option::is_none"
    )]
    pub peer: Option<String>,
    pub report: Report,
    /// What happened when. Not with records of jobs that run, or ran before it was noted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}

impl Record {
    pub fn running(&self) -> bool {
        !self.report.state.ended()
    }
}

/// The directory of job files.
#[derive(Debug)]
pub struct History {
    directory: PathBuf,
}

impl History {
    pub fn open(state_dir: &Path) -> io::Result<History> {
        let directory = state_dir.join("jobs");
        fs::create_dir_all(&directory)?;
        Ok(History { directory })
    }

    /// Writes one job's file, whole or not at all.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let file = self.file(&record.report.job);
        let temporary = file.with_extension("new");
        let written = || -> io::Result<()> {
            let mut writer = fs::File::create(&temporary)?;
            writer.write_all(serde_json::to_string(record)?.as_bytes())?;
            writer.sync_all()?;
            fs::rename(&temporary, &file)
        };
        written().inspect_err(|_| {
            // A full disk is not to be left with half a file as well.
            let _ = fs::remove_file(&temporary);
        })
    }

    /// All readable jobs, the newest first. An unreadable file is logged and left alone.
    pub fn load(&self) -> io::Result<Vec<Record>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let read = fs::read_to_string(&path)
                .map_err(|error| error.to_string())
                .and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()));
            match read {
                Ok(record) => records.push(record),
                Err(error) => {
                    tracing::warn!(file = %path.display(), error, "a job's record cannot be read");
                }
            }
        }
        records.sort_by(|a: &Record, b: &Record| {
            (b.started_unix_s, &b.report.job).cmp(&(a.started_unix_s, &a.report.job))
        });
        Ok(records)
    }

    /// Removes all but the newest ended jobs and returns the ids of those removed.
    pub fn prune(&self) -> io::Result<Vec<String>> {
        let mut removed = Vec::new();
        let ended = self.load()?.into_iter().filter(|record| !record.running());
        for record in ended.skip(JOBS_KEPT_MAX) {
            fs::remove_file(self.file(&record.report.job))?;
            removed.push(record.report.job);
        }
        Ok(removed)
    }

    /// After a restart: all readable jobs, the newest first, and how many of them were running;
    /// these get an end. `look` tells the state of a domain on this host, `None` if there is no
    /// such domain, or why libvirt could not be asked.
    pub fn end_interrupted(
        &self,
        look: impl Fn(uuid::Uuid) -> Result<Option<DomainState>, String>,
    ) -> io::Result<(Vec<Record>, usize)> {
        let mut records = self.load()?;
        let mut ended = 0;
        for record in records.iter_mut().filter(|record| record.running()) {
            interrupt(&mut record.report, &look);
            ended += 1;
            // A full disk must not keep the daemon from serving; the next start tries again.
            if let Err(error) = self.write(record) {
                tracing::error!(job = record.report.job, %error, "cannot write the job's record; check state_dir");
            }
        }
        Ok((records, ended))
    }

    fn file(&self, job: &str) -> PathBuf {
        self.directory.join(format!("{job}.json"))
    }
}

/// Only a guest that is seen running here is said to have stayed.
fn interrupt(
    report: &mut Report,
    look: &impl Fn(uuid::Uuid) -> Result<Option<DomainState>, String>,
) {
    let mut unclear = Vec::new();
    for domain in &mut report.domains {
        if domain.state != DomainOutcome::Source {
            continue;
        }
        let (name, destination) = (&domain.name, &report.destination);
        let known = match look(domain.uuid) {
            Ok(Some(DomainState::Running)) => continue,
            Ok(Some(DomainState::Paused)) => outcome::paused(name, destination),
            Ok(Some(state)) => format!(
                "the domain is {} on this host; look for it on {destination} before starting it here",
                state.as_str()
            ),
            Ok(None) => {
                format!("the domain is not on this host any more; look for it on {destination}")
            }
            Err(reason) => format!(
                "where it runs is not known, because libvirt could not be asked ({reason}); check `virsh domstate {name}` here and on {destination}"
            ),
        };
        domain.state = DomainOutcome::Failed;
        domain.error = Some(format!("after the daemon was restarted: {known}"));
        unclear.push(name.clone());
    }
    let migrated = report
        .domains
        .iter()
        .any(|domain| domain.state == DomainOutcome::Migrated);
    let error = if !unclear.is_empty() {
        report.state = JobState::Partial;
        format!(
            "the daemon was restarted while the job ran; check with `virsh list` on both hosts: {}",
            unclear.join(", ")
        )
    } else if migrated {
        report.state = JobState::Partial;
        "the daemon was restarted while the job ran; some members had migrated before".to_owned()
    } else {
        report.state = JobState::Aborted;
        "the daemon was restarted; members stayed on the source".to_owned()
    };
    report.error = Some(error);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(job: &str, started_unix_s: u64, state: JobState) -> Record {
        let mut report = crate::report::tests::sample();
        report.job = job.into();
        report.state = state;
        Record {
            peer: None,
            timeline: None,
            started_unix_s,
            barrier_approximate: false,
            balloons: Vec::new(),
            report,
        }
    }

    #[test]
    fn keeps_the_newest_and_never_a_running_one() {
        let dir = tempfile::tempdir().expect("a directory");
        let history = History::open(dir.path()).expect("opens");
        for n in 0..JOBS_KEPT_MAX as u64 + 2 {
            history
                .write(&record(&format!("{n:032}"), n, JobState::Completed))
                .expect("writes");
        }
        let running = record("r", 0, JobState::Running);
        history.write(&running).expect("writes");
        std::fs::write(dir.path().join("jobs/broken.json"), "{").expect("writes");

        let removed = history.prune().expect("prunes");
        assert_eq!(removed, [format!("{:032}", 1), format!("{:032}", 0)]);
        let left = history.load().expect("loads");
        assert_eq!(left.len(), JOBS_KEPT_MAX + 1);
        assert_eq!(left[0].started_unix_s, 101, "newest first");
        assert_eq!(left[JOBS_KEPT_MAX], running);
    }

    #[test]
    fn a_job_cut_short_is_told_as_aborted() {
        let dir = tempfile::tempdir().expect("a directory");
        let history = History::open(dir.path()).expect("opens");
        let mut running = record("r", 0, JobState::Running);
        running.report.domains[0].state = DomainOutcome::Source;
        history.write(&running).expect("writes");
        let running_here = |_| Ok(Some(DomainState::Running));
        assert_eq!(history.end_interrupted(running_here).expect("ends").1, 1);
        let report = &history.load().expect("loads")[0].report;
        assert_eq!(report.state, JobState::Aborted);
        assert!(
            report
                .error
                .as_deref()
                .is_some_and(|e| e.contains("restarted"))
        );
        assert_eq!(history.end_interrupted(running_here).expect("ends").1, 0);
    }

    #[test]
    fn a_record_that_cannot_be_written_is_told_all_the_same() {
        let dir = tempfile::tempdir().expect("a directory");
        let history = History::open(dir.path()).expect("opens");
        let running = record("r", 0, JobState::Running);
        history.write(&running).expect("writes");
        // A directory where the new record should be written, which stops even root.
        std::fs::create_dir(dir.path().join("jobs/r.new")).expect("a directory");
        let (records, ended) = history.end_interrupted(|_| Ok(None)).expect("ends");
        assert_eq!(ended, 1);
        assert!(records[0].report.state.ended());
        assert_eq!(history.load().expect("loads"), [running]);
    }

    #[test]
    fn a_guest_not_seen_running_here_is_not_said_to_have_stayed() {
        let dir = tempfile::tempdir().expect("a directory");
        let history = History::open(dir.path()).expect("opens");
        let mut running = record("r", 0, JobState::Running);
        running.report.domains[0].state = DomainOutcome::Source;
        let cases = [
            (Ok(None), "not on this host any more"),
            (Ok(Some(DomainState::ShutOff)), "before starting it here"),
            (
                Ok(Some(DomainState::Paused)),
                "virsh -c qemu+tls://b/system domstate a",
            ),
            (Err("no libvirtd".to_owned()), "no libvirtd"),
        ];
        for (found, expected) in cases {
            history.write(&running).expect("writes");
            history.end_interrupted(|_| found.clone()).expect("ends");
            let report = &history.load().expect("loads")[0].report;
            assert_eq!(report.state, JobState::Partial);
            assert_eq!(report.domains[0].state, DomainOutcome::Failed);
            let error = report.domains[0].error.as_deref().unwrap_or_default();
            assert!(error.contains(expected), "{error}");
            let error = report.error.as_deref().unwrap_or_default();
            assert!(!error.contains("stayed"), "{error}");
        }
    }
}
