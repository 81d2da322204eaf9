//! A job as others see it: its members, state and figures, and how to stop it.
//! Owns shared state only; the driver writes it, the bus reads it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use uuid::Uuid;
use vmgang_libvirt::DomainInfo;

use crate::convergence::Rates;
use crate::error::ServiceError;
use crate::history::Record;
use crate::report::{Bytes, DomainOutcome, DomainReport, JobState, Report};
use crate::timeline::{Recorder, Timeline};

/// What the driver can be told while it works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    Abort,
    SetBandwidth(Option<u64>),
    /// The daemon is about to end.
    DaemonEnds,
    /// The whole gang switches to post-copy.
    StartPostCopy,
}

/// Where one member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// It has not been started: others are under way.
    Waiting,
    /// Its guest gives up what memory it does not need.
    Ballooning,
    Copying,
    /// Every page was sent once; it waits for the others, or for its turn.
    Held,
    /// Its guest is stopped on the source.
    Switching,
    Migrated,
    Source,
    Failed,
}

impl MemberState {
    pub fn as_str(self) -> &'static str {
        match self {
            MemberState::Waiting => "waiting",
            MemberState::Ballooning => "ballooning",
            MemberState::Copying => "copying",
            MemberState::Held => "held",
            MemberState::Switching => "switching",
            MemberState::Migrated => "migrated",
            MemberState::Source => "source",
            MemberState::Failed => "failed",
        }
    }
}

impl MemberState {
    /// libvirt is migrating it.
    pub fn under_way(self) -> bool {
        matches!(
            self,
            MemberState::Copying | MemberState::Held | MemberState::Switching
        )
    }
}

impl From<DomainOutcome> for MemberState {
    fn from(outcome: DomainOutcome) -> Self {
        match outcome {
            DomainOutcome::Migrated => MemberState::Migrated,
            DomainOutcome::Source => MemberState::Source,
            DomainOutcome::Failed => MemberState::Failed,
        }
    }
}

/// A member's progress.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberView {
    pub name: String,
    pub uuid: Uuid,
    pub memory_bytes: u64,
    pub state: MemberState,
    /// libvirt's figures: how much there is, and how much is left in this pass.
    pub total_bytes: u64,
    pub remaining_bytes: u64,
    pub iterations: u64,
    pub qemu_stream_bytes: u64,
    pub wire_bytes: u64,
    /// It does not converge: it dirties memory as fast as it can be sent.
    pub stalled: Option<Rates>,
    /// QEMU slows its guest down.
    pub throttled: bool,
}

impl MemberView {
    /// A member of which nothing has moved yet.
    pub(crate) fn new(name: &str, uuid: Uuid, memory_bytes: u64, state: MemberState) -> MemberView {
        MemberView {
            name: name.to_owned(),
            uuid,
            memory_bytes,
            state,
            total_bytes: 0,
            remaining_bytes: 0,
            iterations: 0,
            qemu_stream_bytes: 0,
            wire_bytes: 0,
            stalled: None,
            throttled: false,
        }
    }

    /// What can be told of it while nobody has measured its migration.
    pub(crate) fn report(&self, state: DomainOutcome, error: Option<String>) -> DomainReport {
        DomainReport {
            name: self.name.clone(),
            uuid: self.uuid,
            state,
            elapsed_ms: 0,
            downtime_ms: None,
            iterations: None,
            qemu_stream_bytes: self.qemu_stream_bytes,
            wire_bytes: self.wire_bytes,
            ballooned_bytes: None,
            error,
        }
    }
}

/// Everything about a job that changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobView {
    pub state: JobState,
    pub members: Vec<MemberView>,
    pub bytes: Bytes,
    pub switchover_spread_ms: Option<u64>,
    /// Some member could not be held, so the gang's barrier was not exact.
    pub barrier_approximate: bool,
    /// Set once, at the end.
    pub report: Option<Report>,
}

/// What happened when.
enum Recording {
    Running(Recorder),
    /// `None` if nobody has noted it: the job is an old one.
    Ended(Option<Arc<Timeline>>),
}

/// One job, running or ended.
pub struct Job {
    pub id: String,
    pub gang: Option<String>,
    pub destination: String,
    pub started_unix_s: u64,
    started: Option<Instant>,
    view: Mutex<JobView>,
    timeline: Mutex<Recording>,
    /// Counts changes, for whoever publishes them.
    changes: watch::Sender<u64>,
    control: Option<mpsc::UnboundedSender<Control>>,
    can_post_copy: bool,
}

impl Job {
    /// A job that starts now, and the driver's end of its control channel.
    pub fn start(
        id: Uuid,
        gang: Option<&str>,
        destination: &str,
        members: &[DomainInfo],
        can_post_copy: bool,
    ) -> (Job, mpsc::UnboundedReceiver<Control>) {
        let (control, receiver) = mpsc::unbounded_channel();
        let members = members
            .iter()
            .map(|domain| {
                let memory_bytes = domain.memory_bytes;
                MemberView::new(
                    &domain.name,
                    domain.uuid,
                    memory_bytes,
                    MemberState::Waiting,
                )
            })
            .collect();
        let job = Job {
            id: id.simple().to_string(),
            gang: gang.map(str::to_owned),
            destination: destination.to_owned(),
            started_unix_s: unix_seconds(),
            started: Some(Instant::now()),
            view: Mutex::new(JobView {
                state: JobState::Preparing,
                members,
                bytes: Bytes::default(),
                switchover_spread_ms: None,
                barrier_approximate: false,
                report: None,
            }),
            timeline: Mutex::new(Recording::Running(Recorder::default())),
            changes: watch::Sender::new(0),
            control: Some(control),
            can_post_copy,
        };
        (job, receiver)
    }

    /// A job from the history.
    pub fn ended(record: Record) -> Job {
        let report = record.report;
        let members = report
            .domains
            .iter()
            .map(|domain| MemberView {
                iterations: domain.iterations.unwrap_or(0),
                qemu_stream_bytes: domain.qemu_stream_bytes,
                wire_bytes: domain.wire_bytes,
                ..MemberView::new(&domain.name, domain.uuid, 0, domain.state.into())
            })
            .collect();
        Job {
            id: report.job.clone(),
            gang: report.gang.clone(),
            destination: report.destination.clone(),
            started_unix_s: record.started_unix_s,
            started: None,
            view: Mutex::new(JobView {
                state: report.state,
                members,
                bytes: report.bytes.clone(),
                switchover_spread_ms: report.switchover_spread_ms,
                barrier_approximate: record.barrier_approximate,
                report: Some(report),
            }),
            timeline: Mutex::new(Recording::Ended(record.timeline.map(Arc::new))),
            changes: watch::Sender::new(0),
            control: None,
            can_post_copy: false,
        }
    }

    pub fn view(&self) -> JobView {
        self.lock().clone()
    }

    pub fn state(&self) -> JobState {
        self.lock().state
    }

    /// Time since the start, or the whole time once ended.
    pub fn elapsed(&self) -> Duration {
        match (&self.lock().report, self.started) {
            (Some(report), _) => Duration::from_millis(report.elapsed_ms),
            (None, Some(started)) => started.elapsed(),
            (None, None) => Duration::ZERO,
        }
    }

    /// Changes the view and wakes those who watch it.
    pub fn update(&self, change: impl FnOnce(&mut JobView)) {
        {
            let mut view = self.lock();
            change(&mut view);
            if let (Recording::Running(recorder), Some(started)) =
                (&mut *self.recording(), self.started)
            {
                recorder.note(started.elapsed(), &view);
            }
        }
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// The job has ended like this: its timeline is whole. `shared_pages` as the engine counts them.
    pub fn close_timeline(&self, report: &Report, shared_pages: Vec<Vec<u64>>) {
        let mut recording = self.recording();
        if let (Recording::Running(recorder), Some(started)) = (&mut *recording, self.started) {
            let recorder = std::mem::take(recorder);
            let timeline = recorder.close(started.elapsed(), report, shared_pages);
            *recording = Recording::Ended(Some(Arc::new(timeline)));
        }
    }

    /// What happened when, so far; `None` of a job that ended before that was noted.
    pub fn timeline(&self) -> Option<Arc<Timeline>> {
        match &*self.recording() {
            Recording::Running(recorder) => Some(Arc::new(recorder.timeline().clone())),
            Recording::Ended(timeline) => timeline.clone(),
        }
    }

    /// Wakes at every change; check [`JobState::ended`] to know when to stop.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Tells the driver something; refused once the job has ended.
    pub fn control(&self, control: Control) -> Result<(), ServiceError> {
        let ended = || {
            ServiceError::JobEnded(format!(
                "the job {} has ended ({}); see `vmgang history {}`",
                self.id,
                self.state().as_str(),
                self.id
            ))
        };
        let sender = self.control.as_ref().ok_or_else(ended)?;
        sender.send(control).map_err(|_| ended())
    }

    /// Tells the driver to switch the gang to post-copy; refused if the job cannot.
    pub fn start_post_copy(&self) -> Result<(), ServiceError> {
        if self.control.is_some() && !self.can_post_copy {
            return Err(ServiceError::InvalidOption(format!(
                "the job {} cannot go to post-copy: it was started without the option postcopy",
                self.id
            )));
        }
        self.control(Control::StartPostCopy)
    }

    /// The record of a job that still runs: every member is on the source.
    pub fn running_record(&self) -> Record {
        let view = self.lock();
        let domains = view
            .members
            .iter()
            .map(|member| {
                let state = match member.state {
                    MemberState::Migrated => DomainOutcome::Migrated,
                    _ => DomainOutcome::Source,
                };
                member.report(state, None)
            })
            .collect();
        Record {
            started_unix_s: self.started_unix_s,
            barrier_approximate: view.barrier_approximate,
            balloons: Vec::new(),
            peer: None,
            timeline: None,
            report: Report {
                job: self.id.clone(),
                gang: self.gang.clone(),
                destination: self.destination.clone(),
                state: JobState::Running,
                error: None,
                elapsed_ms: 0,
                switchover_spread_ms: None,
                bytes: view.bytes.clone(),
                domains,
            },
        }
    }

    fn recording(&self) -> MutexGuard<'_, Recording> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, JobView> {
        // A panic while holding the lock leaves plain figures, which are fine to read.
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
