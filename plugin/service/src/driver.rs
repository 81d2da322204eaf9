//! Runs one job: starts libvirt's migrations wave by wave, feeds the barrier with what happens,
//! does what it says, and writes the report. All decisions are in `barrier.rs`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, error::TryRecvError};
use tokio::task::{AbortHandle, JoinSet};
use vmgang_engine::SourceEvent;
use vmgang_libvirt::{DomainInfo, MigrateOptions};

use crate::barrier::{Action, Barrier, Cause, Input, OnFailure, Outcome};
use crate::hypervisor::{Hypervisor, ask};
use crate::job::{Control, Job, MemberState};
use crate::outcome;
use crate::report::{Bytes, DomainOutcome, DomainReport, JobState, Report};
use crate::request::MigrateRequest;
use crate::tunnel::Session;

/// Members migrated at once: libvirtd has 20 workers, and abort and statistics need some.
pub const WAVE_MEMBERS_MAX: usize = 12;

const REFRESH_INTERVAL: Duration = Duration::from_millis(500);
const STATS_INTERVAL: Duration = Duration::from_secs(1);
const ABORT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// One job and all it needs.
pub struct Driver {
    pub job: Arc<Job>,
    pub hypervisor: Arc<dyn Hypervisor>,
    pub session: Box<dyn Session>,
    pub events: UnboundedReceiver<SourceEvent>,
    pub control: UnboundedReceiver<Control>,
    pub request: MigrateRequest,
    pub members: Vec<DomainInfo>,
}

/// What was measured of one member.
#[derive(Debug, Default, Clone)]
struct Facts {
    started: Option<Instant>,
    elapsed: Duration,
    guest_stopped: Option<Instant>,
    outcome: Option<Outcome>,
    error: Option<String>,
}

/// libvirt's answer for one member.
type Answer = (usize, Result<(), vmgang_libvirt::LibvirtError>);

impl Driver {
    /// Runs the job to its end. Always returns a report.
    pub async fn run(mut self) -> Report {
        let started = Instant::now();
        let mut facts = vec![Facts::default(); self.members.len()];
        let mut cause = None;
        let waves: Vec<Vec<usize>> = (0..self.members.len())
            .collect::<Vec<_>>()
            .chunks(WAVE_MEMBERS_MAX)
            .map(<[usize]>::to_vec)
            .collect();
        if waves.len() > 1 {
            tracing::info!(
                job = self.job.id,
                waves = waves.len(),
                "too many members for one wave"
            );
        }
        for wave in &waves {
            let barrier = self.wave(wave, started, &mut facts).await;
            if cause.is_none() {
                cause = barrier.cause().cloned();
            }
            let keep_going = match &cause {
                None => true,
                Some(Cause::Failure(_)) => {
                    self.request.on_failure == OnFailure::Continue && !self.events.is_closed()
                }
                Some(Cause::Aborted | Cause::TimedOut) => false,
            };
            if !keep_going {
                break;
            }
        }
        self.report(started, facts, cause).await
    }

    /// Migrates one wave of members; returns its barrier at the end.
    async fn wave(&mut self, wave: &[usize], job_started: Instant, facts: &mut [Facts]) -> Barrier {
        let mut barrier = Barrier::new(wave.iter().copied(), self.request.on_failure);
        let mut answers: JoinSet<Answer> = JoinSet::new();
        let mut members_by_task = HashMap::new();
        let mut inputs = Vec::new();
        for &member in wave {
            facts[member].started = Some(Instant::now());
            match self.start_member(member) {
                Ok(verdict) => {
                    let task = answers.spawn(async move { (member, verdict.await) });
                    members_by_task.insert(task.id(), member);
                }
                Err(error) => inputs.push(Input::MigrateFailed(member, error.to_string())),
            }
        }
        self.job.update(|view| {
            view.state = JobState::Running;
            for &member in wave {
                view.members[member].state = MemberState::Copying;
            }
        });
        let statistics = self.watch_statistics(wave);
        let mut aborts: HashMap<usize, AbortHandle> = HashMap::new();
        let mut refresh = tokio::time::interval(REFRESH_INTERVAL);
        let deadline = self.request.timeout.map(|timeout| job_started + timeout);
        let mut deadline_armed = deadline.is_some();
        let mut control_open = true;
        let mut events_open = true;

        'wave: loop {
            for input in inputs.drain(..) {
                for action in barrier.handle(input) {
                    match action {
                        Action::Release(members) => self.release(&members),
                        Action::AbortMember(member) => {
                            aborts.insert(member, self.abort_member(member));
                        }
                        Action::Finish => break 'wave,
                    }
                }
            }
            tokio::select! {
                event = self.events.recv(), if events_open => match event {
                    Some(event) => inputs.extend(self.note_event(event, facts)),
                    None => {
                        events_open = false;
                        inputs.push(Input::SessionFailed("the session with the peer ended".into()));
                    }
                },
                answer = answers.join_next_with_id(), if !answers.is_empty() => {
                    // What broke the tunnel tells more than libvirt's "broken pipe": it goes first.
                    inputs.extend(self.pending_events(facts, &mut events_open));
                    if let Some((member, result)) = answer.and_then(|answer| settle(answer, &members_by_task)) {
                        facts[member].elapsed = facts[member].started.map_or(Duration::ZERO, |s| s.elapsed());
                        if let Some(abort) = aborts.remove(&member) {
                            abort.abort();
                        }
                        inputs.push(match result {
                            Ok(()) => Input::Migrated(member),
                            Err(error) => Input::MigrateFailed(member, error),
                        });
                    }
                }
                control = self.control.recv(), if control_open => match control {
                    Some(Control::Abort) => {
                        tracing::info!(job = self.job.id, "abort requested");
                        inputs.push(Input::AbortRequested);
                    }
                    Some(Control::SetBandwidth(bandwidth)) => self.session.set_bandwidth(bandwidth),
                    None => control_open = false,
                },
                () = sleep_until(deadline), if deadline_armed => {
                    deadline_armed = false;
                    inputs.push(Input::TimedOut);
                }
                _ = refresh.tick() => self.refresh(&barrier),
            }
        }
        statistics.abort();
        for abort in aborts.into_values() {
            abort.abort();
        }
        for &member in wave {
            facts[member].outcome = barrier.outcome(member).cloned();
            facts[member].error = barrier.member_error(member).map(str::to_owned);
        }
        self.refresh(&barrier);
        self.job.update(|view| {
            for &member in wave {
                view.members[member].state = match facts[member].outcome {
                    Some(Outcome::Migrated) => MemberState::Migrated,
                    _ => MemberState::Source,
                };
            }
        });
        barrier
    }

    fn start_member(
        &self,
        member: usize,
    ) -> Result<crate::hypervisor::Verdict, vmgang_libvirt::LibvirtError> {
        let domain = &self.members[member];
        let options = MigrateOptions {
            destination_uri: self.request.destination.uri.clone(),
            migrate_uri: self.session.migrate_uri(member),
            persistent: self.request.persistent,
            undefine_source: self.request.undefine_source,
            suspend: self.request.suspend,
        };
        self.hypervisor.migrate(domain.uuid, &domain.name, options)
    }

    fn note_event(&self, event: SourceEvent, facts: &mut [Facts]) -> Option<Input> {
        let set = |member: usize, state: MemberState| {
            self.job.update(|view| {
                if let Some(member) = view.members.get_mut(member) {
                    member.state = state;
                }
            });
        };
        match event {
            SourceEvent::ChannelOpened { member } => {
                tracing::debug!(
                    job = self.job.id,
                    member = self.name(member),
                    "channel opened"
                );
                None
            }
            SourceEvent::FirstPassDone { member } => {
                set(member, MemberState::Held);
                Some(Input::FirstPassDone(member))
            }
            SourceEvent::AckWithheld { member } => Some(Input::AckWithheld(member)),
            SourceEvent::GuestStopped { member, at } => {
                set(member, MemberState::Switching);
                if let Some(facts) = facts.get_mut(member) {
                    facts.guest_stopped.get_or_insert(at);
                }
                Some(Input::GuestStopped(member))
            }
            SourceEvent::StreamEnded { member } => Some(Input::StreamEnded(member)),
            SourceEvent::MemberFailed { member, error } => Some(Input::MemberFailed(
                member,
                format!("the channel of domain {} broke: {error}", self.name(member)),
            )),
            SourceEvent::SessionFailed { error } => Some(Input::SessionFailed(format!(
                "the session with vmgangd at {} broke: {error}",
                self.request.peer
            ))),
        }
    }

    fn pending_events(&mut self, facts: &mut [Facts], open: &mut bool) -> Vec<Input> {
        let mut inputs = Vec::new();
        while *open {
            match self.events.try_recv() {
                Ok(event) => inputs.extend(self.note_event(event, facts)),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => *open = false,
            }
        }
        inputs
    }

    /// The commit point.
    fn release(&self, members: &[usize]) {
        tracing::info!(
            job = self.job.id,
            members = members.len(),
            "released: the gang switches over"
        );
        if members.len() == self.members.len() {
            self.session.release();
        } else {
            for &member in members {
                self.session.release_member(member);
            }
        }
        self.job.update(|view| view.state = JobState::Switching);
    }

    /// Cancels a member's migration again and again until its task is stopped: libvirt refuses
    /// while the job has not begun yet.
    fn abort_member(&self, member: usize) -> AbortHandle {
        let hypervisor = self.hypervisor.clone();
        let uuid = self.members[member].uuid;
        let name = self.name(member).to_owned();
        tokio::spawn(async move {
            loop {
                if let Err(error) =
                    ask(&hypervisor, move |hypervisor| hypervisor.abort_job(uuid)).await
                {
                    tracing::debug!(
                        domain = name,
                        error = error.sentence(),
                        "abort not taken yet"
                    );
                }
                tokio::time::sleep(ABORT_RETRY_INTERVAL).await;
            }
        })
        .abort_handle()
    }

    /// Reads libvirt's own figures once a second, beside the job.
    fn watch_statistics(&self, wave: &[usize]) -> AbortHandle {
        let hypervisor = self.hypervisor.clone();
        let job = self.job.clone();
        let members: Vec<_> = wave.iter().map(|&m| (m, self.members[m].uuid)).collect();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(STATS_INTERVAL).await;
                for &(member, uuid) in &members {
                    let asked = ask(&hypervisor, move |hypervisor| hypervisor.running_job(uuid));
                    // A member that has left has no job to ask about.
                    let Ok(stats) = asked.await else { continue };
                    if !stats.active {
                        continue;
                    }
                    job.update(|view| {
                        let view = &mut view.members[member];
                        view.total_bytes = stats.memory_total_bytes.unwrap_or(0);
                        view.remaining_bytes = stats.memory_remaining_bytes.unwrap_or(0);
                        view.iterations = stats.iterations.unwrap_or(0);
                    });
                }
            }
        })
        .abort_handle()
    }

    fn refresh(&self, barrier: &Barrier) {
        let counters = self.session.counters();
        self.job.update(|view| {
            view.bytes = Bytes::from(&counters);
            view.barrier_approximate |= barrier.approximate();
            for (member, counters) in view.members.iter_mut().zip(&counters.members) {
                member.qemu_stream_bytes = counters.qemu_stream_bytes;
                member.wire_bytes = counters.wire_bytes;
            }
        });
    }

    async fn report(self, started: Instant, facts: Vec<Facts>, cause: Option<Cause>) -> Report {
        let mut domains = Vec::with_capacity(self.members.len());
        for (member, (domain, facts)) in self.members.iter().zip(&facts).enumerate() {
            let (state, error) = match facts.outcome {
                Some(Outcome::Migrated) => (DomainOutcome::Migrated, None),
                _ => outcome::after_failure(&self.hypervisor, domain, facts.error.clone()).await,
            };
            let measured = if state == DomainOutcome::Migrated {
                outcome::measured(&self.hypervisor, &*self.session, member, domain.uuid).await
            } else {
                outcome::Measured::default()
            };
            domains.push(DomainReport {
                name: domain.name.clone(),
                uuid: domain.uuid,
                state,
                elapsed_ms: milliseconds(facts.elapsed),
                downtime_ms: measured.downtime_ms,
                iterations: measured.iterations,
                qemu_stream_bytes: 0,
                wire_bytes: 0,
                error,
            });
        }
        let last_counters = self.session.counters();
        let counters = tokio::time::timeout(CLOSE_TIMEOUT, self.session.close())
            .await
            .unwrap_or(last_counters);
        for (domain, counters) in domains.iter_mut().zip(&counters.members) {
            domain.qemu_stream_bytes = counters.qemu_stream_bytes;
            domain.wire_bytes = counters.wire_bytes;
        }
        let aborted = cause == Some(Cause::Aborted);
        let state = Report::end_state(&domains, aborted);
        let error = match (state, cause) {
            (JobState::Completed, _) => None,
            (_, Some(Cause::Failure(error))) => Some(error),
            (_, Some(Cause::Aborted)) => Some("aborted on request".into()),
            (_, Some(Cause::TimedOut)) => Some(format!(
                "the gang was not ready to switch over within {} s (option timeout); give it more time or bandwidth",
                self.request.timeout.unwrap_or_default().as_secs()
            )),
            (_, None) => domains.iter().find_map(|domain| domain.error.clone()),
        };
        Report {
            job: self.job.id.clone(),
            gang: self.job.gang.clone(),
            destination: self.job.destination.clone(),
            state,
            error,
            elapsed_ms: milliseconds(started.elapsed()),
            switchover_spread_ms: spread_ms(&facts),
            bytes: Bytes::from(&counters),
            domains,
        }
    }

    fn name(&self, member: usize) -> &str {
        self.members.get(member).map_or("?", |domain| &domain.name)
    }
}

/// Whose answer it is, and libvirt's words if it failed.
fn settle(
    answer: Result<(tokio::task::Id, Answer), tokio::task::JoinError>,
    members_by_task: &HashMap<tokio::task::Id, usize>,
) -> Option<(usize, Result<(), String>)> {
    match answer {
        Ok((_, (member, result))) => Some((member, result.map_err(|error| error.to_string()))),
        Err(error) => {
            let member = members_by_task.get(&error.id()).copied()?;
            let text = "the task that waited for libvirt ended early; see the log of vmgangd";
            Some((member, Err(text.into())))
        }
    }
}

/// From the first to the last guest that stopped; `None` with fewer than two.
fn spread_ms(facts: &[Facts]) -> Option<u64> {
    let stopped: Vec<Instant> = facts
        .iter()
        .filter(|facts| facts.outcome == Some(Outcome::Migrated))
        .filter_map(|facts| facts.guest_stopped)
        .collect();
    if stopped.len() < 2 {
        return None;
    }
    let (first, last) = (stopped.iter().min()?, stopped.iter().max()?);
    Some(milliseconds(*last - *first))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
