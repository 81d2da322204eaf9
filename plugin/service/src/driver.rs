//! Runs one job to its report. How its members are conducted is in `conduct.rs`, and all decisions
//! about them in `barrier.rs`.

use std::num::NonZeroU8;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;
use vmgang_engine::{Remains, SessionEnd, SourceEvent};
use vmgang_libvirt::DomainInfo;

use crate::balloon::{self, Before};
use crate::barrier::{Barrier, Cause, Outcome};
use crate::convergence::{Convergence, Judgement};
use crate::departures::Departures;
use crate::doubt;
use crate::hypervisor::Hypervisor;
use crate::job::{Control, Job, MemberState};
use crate::libvirt_access::DestinationLibvirt;
use crate::outcome::{self, PostCopy};
use crate::report::{Bytes, DomainOutcome, DomainReport, JobState, Report};
use crate::request::MigrateRequest;
use crate::switchover::{Limits, StreamRates};
use crate::tunnel::Session;

/// A libvirt connection serves five calls at a time.
const OUTCOMES_AT_ONCE: usize = 4;
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// One job and all it needs.
pub struct Driver {
    pub job: Arc<Job>,
    pub hypervisor: Arc<dyn Hypervisor>,
    pub session: Box<dyn Session>,
    pub events: UnboundedReceiver<SourceEvent>,
    pub control: UnboundedReceiver<Control>,
    pub request: MigrateRequest,
    /// The destination's.
    pub libvirt: DestinationLibvirt,
    pub members: Vec<DomainInfo>,
    /// Tell each member's QEMU when it may take itself for done.
    pub limit_passes: bool,
    /// So many connections of QEMU carry a member's pages, beside its main one.
    pub parallel: Option<NonZeroU8>,
    /// The job is aborted because of that.
    pub daemon_ends: bool,
    /// Members that may be asked to give up memory.
    pub balloons: Vec<Before>,
}

/// What was measured of one member.
#[derive(Debug, Default, Clone)]
pub(crate) struct Facts {
    pub(crate) started: Option<Instant>,
    pub(crate) elapsed: Duration,
    pub(crate) guest_stopped: Option<std::time::Instant>,
    /// Its QEMU has connected to the tunnel.
    pub(crate) connected: bool,
    /// It was aborted before that, and cannot connect any more.
    pub(crate) closed: Option<Instant>,
    /// Its destination QEMU has said that it has all of the guest.
    pub(crate) arrived: bool,
    /// Its stream was read to its end, both ways.
    pub(crate) stream_ended: bool,
    /// What its guest gave up, if that was asked for.
    pub(crate) ballooned_bytes: Option<u64>,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) error: Option<String>,
}

impl Facts {
    /// The destination has all of the guest, and may have been told to run it: libvirt here learns
    /// that by an answer that can be lost, and then lets the guest go on here as well.
    pub(crate) fn may_run_there(&self) -> bool {
        self.guest_stopped.is_some() && (self.arrived || self.stream_ended)
    }
}

/// What is known of a job while it runs.
pub(crate) struct Known {
    /// By member.
    pub(crate) facts: Vec<Facts>,
    /// The peer is gone.
    pub(crate) session_lost: bool,
    /// More events may come.
    pub(crate) events_open: bool,
    pub(crate) rates: StreamRates,
    /// By member.
    pub(crate) convergence: Vec<Convergence>,
    pub(crate) judged: Vec<Option<Judgement>>,
    /// If vmgang sets them.
    pub(crate) limits: Option<Limits>,
    pub(crate) departures: Departures,
}

impl Known {
    /// How much the member may have left to send when its guest is stopped.
    pub(crate) fn may_be_left(&self, member: usize) -> u64 {
        let carried = self.convergence.get(member).and_then(Convergence::carried);
        self.rates.unsent_bytes(member, carried)
    }
}

impl Driver {
    /// Runs the job to its end. Always returns a report, and what the session leaves behind.
    pub async fn run(mut self) -> (Report, Option<Remains>) {
        let started = Instant::now();
        let mut known = Known {
            facts: vec![Facts::default(); self.members.len()],
            session_lost: false,
            events_open: true,
            rates: StreamRates::new(self.members.len()),
            convergence: vec![Convergence::default(); self.members.len()],
            judged: vec![None; self.members.len()],
            limits: None,
            departures: Departures::default(),
        };
        if self.request.policy.takes_turns(self.members.len()) {
            known.departures = Departures::each_by_itself();
            tracing::info!(
                job = self.job.id,
                "the gang is too large for a common switchover: its members take turns, if they can be held"
            );
        } else if !self.request.policy.holds(self.members.len()) {
            tracing::info!(job = self.job.id, "nobody is held for a common switchover");
        }
        let early = self.shrink(&mut known).await;
        let barrier = self.conduct(&mut known, early).await;
        let cause = barrier.cause().cloned();
        self.report(started, known.facts, cause).await
    }

    /// Lets guests give up what they do not need. Returns what was said to the job meanwhile.
    async fn shrink(&mut self, known: &mut Known) -> Vec<Control> {
        let mut said = Vec::new();
        if self.balloons.is_empty() {
            return said;
        }
        for balloon in &self.balloons {
            if let Some(member) = self.members.iter().position(|m| m.uuid == balloon.uuid) {
                self.set_state(member, MemberState::Ballooning);
            }
        }
        let stop = AtomicBool::new(false);
        let mut given = pin!(balloon::shrink(&self.hypervisor, &self.balloons, &stop));
        let given = loop {
            tokio::select! {
                biased;
                given = &mut given => break given,
                Some(control) = self.control.recv() => {
                    if matches!(control, Control::Abort | Control::DaemonEnds) {
                        stop.store(true, Relaxed);
                    }
                    said.push(control);
                }
            }
        };
        for (balloon, given) in self.balloons.iter().zip(given) {
            if let Some(member) = self.members.iter().position(|m| m.uuid == balloon.uuid) {
                known.facts[member].ballooned_bytes = Some(given);
                self.set_state(member, MemberState::Waiting);
            }
        }
        said
    }

    /// Shows the figures of the moment.
    pub(crate) fn refresh(&self, barrier: &Barrier, known: &Known) {
        let counters = self.session.counters();
        self.job.update(|view| {
            for (member, view) in view.members.iter_mut().enumerate() {
                view.throttled = barrier.throttled(member);
                view.stalled = match known.judged.get(member) {
                    Some(Some(Judgement::Stalled(rates))) => Some(*rates),
                    _ => None,
                };
            }
            view.bytes = Bytes::from(&counters);
            view.barrier_approximate |= barrier.approximate();
            for (member, counters) in view.members.iter_mut().zip(&counters.members) {
                member.qemu_stream_bytes = counters.qemu_stream_bytes;
                member.wire_bytes = counters.wire_bytes;
            }
        });
    }

    async fn report(
        self,
        started: Instant,
        facts: Vec<Facts>,
        cause: Option<Cause>,
    ) -> (Report, Option<Remains>) {
        let members = self.members.iter().zip(&facts).enumerate();
        // Several at the same time; the destination asks its libvirt for each.
        let reports: Vec<_> = members
            .map(|(member, (domain, facts))| self.domain_report(member, domain, facts).boxed())
            .collect();
        let mut domains: Vec<_> = futures_util::stream::iter(reports)
            .buffered(OUTCOMES_AT_ONCE)
            .collect()
            .await;
        let last_counters = self.session.counters();
        let SessionEnd { counters, remains } =
            tokio::time::timeout(CLOSE_TIMEOUT, self.session.close())
                .await
                .unwrap_or(SessionEnd {
                    counters: last_counters,
                    remains: None,
                });
        for (domain, counters) in domains.iter_mut().zip(&counters.members) {
            domain.qemu_stream_bytes = counters.qemu_stream_bytes;
            domain.wire_bytes = counters.wire_bytes;
        }
        let aborted = cause == Some(Cause::Aborted);
        let state = Report::end_state(&domains, aborted);
        let error = match (state, cause) {
            (JobState::Completed, _) => None,
            (_, Some(Cause::Failure(error))) => Some(error),
            (_, Some(Cause::Aborted)) if self.daemon_ends => Some(
                "aborted because vmgangd was stopped, or lost the system bus; see its log".into(),
            ),
            (_, Some(Cause::Aborted)) => Some("aborted on request".into()),
            (_, Some(Cause::TimedOut)) => Some(format!(
                "the gang was not ready to switch over within {} s (option timeout); give it more time or bandwidth",
                self.request.timeout.unwrap_or_default().as_secs()
            )),
            (_, None) => domains.iter().find_map(|domain| domain.error.clone()),
        };
        let report = Report {
            job: self.job.id.clone(),
            gang: self.job.gang.clone(),
            destination: self.job.destination.clone(),
            state,
            error,
            elapsed_ms: milliseconds(started.elapsed()),
            switchover_spread_ms: spread_ms(&facts),
            bytes: Bytes::from(&counters),
            domains,
        };
        self.job.close_timeline(&report, counters.shared_pages);
        (report, remains)
    }

    async fn domain_report(
        &self,
        member: usize,
        domain: &DomainInfo,
        facts: &Facts,
    ) -> DomainReport {
        let (state, error) = match facts.outcome {
            Some(Outcome::Migrated) => (DomainOutcome::Migrated, None),
            _ => {
                let destination = &*self.request.destination.name;
                let post_copy = match self.request.policy.can_post_copy() {
                    _ if self.request.post_copy_resume => PostCopy::Broken,
                    true => PostCopy::Possible,
                    false => PostCopy::Never,
                };
                let error = facts.error.clone();
                if facts.may_run_there() {
                    let (hypervisor, domain) = (self.hypervisor.clone(), domain.clone());
                    let there = (destination, self.libvirt.clone());
                    doubt::settle(hypervisor, domain, there, error).await
                } else {
                    let hypervisor = &self.hypervisor;
                    outcome::after_failure(hypervisor, domain, destination, post_copy, error).await
                }
            }
        };
        let measured = if state == DomainOutcome::Migrated {
            outcome::measured(&self.hypervisor, &*self.session, member, domain.uuid).await
        } else {
            outcome::Measured::default()
        };
        DomainReport {
            name: domain.name.clone(),
            uuid: domain.uuid,
            state,
            elapsed_ms: milliseconds(facts.elapsed),
            downtime_ms: measured.downtime_ms,
            iterations: measured.iterations,
            qemu_stream_bytes: 0,
            wire_bytes: 0,
            ballooned_bytes: facts.ballooned_bytes,
            error,
        }
    }

    pub(crate) fn name(&self, member: usize) -> &str {
        self.members.get(member).map_or("?", |domain| &domain.name)
    }
}

/// From the first to the last guest that stopped; `None` with fewer than two.
fn spread_ms(facts: &[Facts]) -> Option<u64> {
    let stopped: Vec<std::time::Instant> = facts
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
