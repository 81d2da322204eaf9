//! Jobs on disk: one JSON file each in `STATE_DIR/jobs`, the newest 100 kept.
//!
//! A job is written when it starts, so that a daemon that was killed knows afterwards what it
//! was doing. Files are replaced by rename: a reader sees the old one or the new one.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::report::{JobState, Report};

/// How many ended jobs are kept.
pub const JOBS_KEPT_MAX: usize = 100;

/// What is known of one job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Seconds since 1970.
    pub started_unix_s: u64,
    pub report: Report,
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
        let mut writer = fs::File::create(&temporary)?;
        writer.write_all(serde_json::to_string(record)?.as_bytes())?;
        writer.sync_all()?;
        fs::rename(&temporary, &file)
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

    /// After a restart: jobs that were running get an end. `still_here` says whether a domain
    /// runs on this host now; `None` if libvirt could not be asked.
    pub fn end_interrupted(
        &self,
        still_here: impl Fn(uuid::Uuid) -> Option<bool>,
    ) -> io::Result<usize> {
        let mut ended = 0;
        for mut record in self.load()?.into_iter().filter(Record::running) {
            interrupt(&mut record.report, &still_here);
            self.write(&record)?;
            ended += 1;
        }
        Ok(ended)
    }

    fn file(&self, job: &str) -> PathBuf {
        self.directory.join(format!("{job}.json"))
    }
}

fn interrupt(report: &mut Report, still_here: &impl Fn(uuid::Uuid) -> Option<bool>) {
    use crate::report::DomainOutcome;
    let mut elsewhere = Vec::new();
    for domain in &mut report.domains {
        if domain.state == DomainOutcome::Source && still_here(domain.uuid) == Some(false) {
            domain.state = DomainOutcome::Failed;
            domain.error = Some(format!(
                "not running on this host after the daemon was restarted; look for it on {}",
                report.destination
            ));
            elsewhere.push(domain.name.clone());
        }
    }
    let migrated = report
        .domains
        .iter()
        .any(|domain| domain.state == DomainOutcome::Migrated);
    if elsewhere.is_empty() && !migrated {
        report.state = JobState::Aborted;
        report.error = Some("the daemon was restarted; members stayed on the source".into());
    } else {
        report.state = JobState::Partial;
        report.error = Some(format!(
            "the daemon was restarted during the switchover; check with `virsh list` on both hosts: {}",
            if elsewhere.is_empty() {
                "some members had migrated before".to_owned()
            } else {
                elsewhere.join(", ")
            }
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::DomainOutcome;

    fn record(job: &str, started_unix_s: u64, state: JobState) -> Record {
        let mut report = crate::report::tests::sample();
        report.job = job.into();
        report.state = state;
        Record {
            started_unix_s,
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
        assert_eq!(history.end_interrupted(|_| Some(true)).expect("ends"), 1);
        let report = &history.load().expect("loads")[0].report;
        assert_eq!(report.state, JobState::Aborted);
        assert!(
            report
                .error
                .as_deref()
                .is_some_and(|e| e.contains("restarted"))
        );
        assert_eq!(history.end_interrupted(|_| Some(true)).expect("ends"), 0);

        history.write(&running).expect("writes");
        history.end_interrupted(|_| Some(false)).expect("ends");
        let report = &history.load().expect("loads")[0].report;
        assert_eq!(report.state, JobState::Partial);
        assert_eq!(report.domains[0].state, DomainOutcome::Failed);
    }
}
