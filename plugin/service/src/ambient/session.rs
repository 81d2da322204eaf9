//! Migrations to one peer that overlap in time, or nearly: they share a session, which is shown as a job.
//!
//! Its members are all domains that run when it is opened; of those that do not migrate nothing is said.
//! Must not: decide how a migration ended. What is reported is what QEMU and libvirt say.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, mpsc};
use uuid::Uuid;
use vmgang_engine::{
    AmbientSession, AmbientSocket, MEMBERS_MAX, MemberOffer, Offer, PeerAddress, Pending,
    QemuConnection, QemuListener, Scanned, SessionCounters, SocketOwner, SourceEvent,
    SourceOptions, Techniques, ambient_socket,
};
use vmgang_libvirt::{DomainInfo, LibvirtError};

use crate::budget;
use crate::coordinator::Coordinator;
use crate::error::ServiceError;
use crate::history::Record;
use crate::hypervisor::ask;
use crate::job::{Control, Job, MemberState, MemberView};
use crate::report::{Bytes, DomainOutcome, DomainReport, JobState, Report};

/// How often figures are brought up to date, and whether anybody is still there is looked at.
const TICK: Duration = Duration::from_millis(500);

/// The way to one peer.
pub(super) struct Route {
    peer: PeerAddress,
    linger: Duration,
    coordinator: Arc<Coordinator>,
    current: Mutex<Option<Open>>,
}

/// A session that takes connections.
struct Open {
    job: String,
    members: HashMap<Uuid, mpsc::UnboundedSender<QemuConnection>>,
    /// When the last one was handed over.
    handed: Instant,
}

impl Open {
    /// Hands a connection over, or gives it back.
    fn take(&mut self, domain: Uuid, connection: QemuConnection) -> Option<QemuConnection> {
        let Some(member) = self.members.get(&domain) else {
            return Some(connection);
        };
        match member.send(connection) {
            Ok(()) => {
                self.handed = Instant::now();
                None
            }
            Err(mpsc::error::SendError(connection)) => Some(connection),
        }
    }
}

/// Gives a session the connections of one member that [`Route`] hands over.
struct Handed(mpsc::UnboundedReceiver<QemuConnection>);

impl QemuListener for Handed {
    fn accept(&mut self) -> Pending<'_, QemuConnection> {
        Box::pin(async {
            match self.0.recv().await {
                Some(connection) => Ok(connection),
                // No more come to this session.
                None => std::future::pending().await,
            }
        })
    }
}

impl Route {
    pub(super) fn new(peer: PeerAddress, linger: Duration, coordinator: Arc<Coordinator>) -> Route {
        Route {
            peer,
            linger,
            coordinator,
            current: Mutex::default(),
        }
    }

    /// What the peer is called in the paths of sockets.
    pub(super) fn name(&self) -> &str {
        &self.peer.host
    }

    /// Takes a connection that was made for a domain. Without a session it is dropped: the client is told
    /// that the migration has failed, and the guest goes on here.
    pub(super) async fn take(self: &Arc<Self>, domain: Uuid, connection: QemuConnection) {
        // Held while a session is opened: whoever comes meanwhile shares it.
        let mut current = self.current.lock().await;
        let connection = match &mut *current {
            Some(open) => open.take(domain, connection),
            None => Some(connection),
        };
        // There is no session, it has ended, or the domain was started after it had begun.
        let Some(connection) = connection else {
            return;
        };
        match self.open(domain).await {
            Ok(mut open) => {
                let _ = open.take(domain, connection);
                *current = Some(open);
            }
            Err(error) => tracing::error!(
                peer = %self.peer, %domain, error = error.sentence(),
                "an ambient migration has no session; its client is told that it has failed"
            ),
        }
    }

    /// Opens a session with all domains that run, and begins its job.
    /// `asking` is one of them.
    async fn open(self: &Arc<Self>, asking: Uuid) -> Result<Open, ServiceError> {
        let coordinator = &self.coordinator;
        let parts = &coordinator.parts;
        let (runtime_dir, host) = (parts.runtime_dir.clone(), self.name().to_owned());
        let (source_host, domains) = ask(&parts.hypervisor, move |hypervisor| {
            let mut members = Vec::new();
            let mut running = hypervisor.domains()?;
            running.retain(|domain| {
                domain.active() && ambient_socket(&runtime_dir, &host, &domain.name).is_some()
            });
            running.sort_by_key(|domain| domain.uuid != asking);
            if running.first().is_none_or(|first| first.uuid != asking) {
                return Err(LibvirtError::NoSuchDomain {
                    domain: asking.to_string(),
                });
            }
            for domain in running.into_iter().take(MEMBERS_MAX) {
                // It may have ended meanwhile.
                if let Ok(qemu) = hypervisor.domain_qemu(domain.uuid) {
                    members.push((domain, qemu.user));
                }
            }
            Ok((hypervisor.hostname()?, members))
        })
        .await?;
        let members: Vec<MemberOffer> = domains
            .iter()
            .map(|(domain, user)| MemberOffer {
                uuid: domain.uuid,
                name: domain.name.clone(),
                memory_bytes: domain.memory_bytes,
                fixed_owner: user.fixed.then_some(SocketOwner {
                    uid: user.user.uid,
                    gid: user.user.gid,
                }),
            })
            .collect();
        let guests = members.iter().map(|member| member.memory_bytes);
        let guests = guests.fold(0, u64::saturating_add);
        let id = Uuid::new_v4();
        let options = SourceOptions {
            peer: self.peer.clone(),
            transport: (parts.transport)().map_err(ServiceError::TlsFailed)?,
            offer: Offer {
                job: id,
                gang: self.name().to_owned(),
                source_host,
                window_budget_bytes: budget::to_offer(
                    parts.window_budget,
                    guests,
                    (parts.available_memory)().map_err(|error| {
                        ServiceError::Internal(format!("/proc/meminfo cannot be read: {error}"))
                    })?,
                ),
                members,
            },
            runtime_dir: PathBuf::new(),
            socket_owners: Vec::new(),
            techniques: Techniques::default(),
            workers: parts.workers.clone(),
            network: vmgang_engine::system(),
            connections: parts.connections,
            scanned: Scanned::default(),
            stage: None,
            keep_contents: false,
            bandwidth_bytes_per_s: None,
            hold: false,
        };
        let (senders, sockets): (HashMap<_, _>, Vec<_>) = domains
            .iter()
            .map(|(domain, _)| {
                let (sender, receiver) = mpsc::unbounded_channel();
                let socket = AmbientSocket {
                    path: ambient_socket(&parts.runtime_dir, self.name(), &domain.name)
                        .unwrap_or_default(),
                    connections: Box::new(Handed(receiver)),
                };
                ((domain.uuid, sender), socket)
            })
            .unzip();
        let opened = AmbientSession::connect(options, sockets).await;
        let (session, events) = opened.map_err(ServiceError::from)?;
        parts.peers.connected(&self.peer.to_string());
        let destination = format!("{} (ambient)", self.name());
        let (job, control) = Job::start(id, None, &destination, &[], false);
        let job = Arc::new(job);
        job.update(|view| view.state = JobState::Running);
        // The daemon may have begun to stop meanwhile.
        coordinator.begin_unasked(&job)?;
        tracing::info!(job = job.id, peer = %self.peer, "ambient session opened");
        let open = Open {
            job: job.id.clone(),
            members: senders,
            handed: Instant::now(),
        };
        let members = domains.into_iter().map(|(domain, _)| Member::new(domain));
        let shared = Shared {
            route: self.clone(),
            job,
            session,
            members: members.collect(),
            started: Instant::now(),
        };
        tokio::spawn(shared.run(events, control));
        Ok(open)
    }
}

/// A domain that may migrate in a session.
struct Member {
    domain: DomainInfo,
    /// Since when; `None`: it has not.
    began: Option<Instant>,
    /// The destination's QEMU has all of it.
    arrived: Option<Instant>,
    error: Option<String>,
}

impl Member {
    fn new(domain: DomainInfo) -> Member {
        Member {
            domain,
            began: None,
            arrived: None,
            error: None,
        }
    }
}

/// How a session came to its end.
#[derive(Debug, PartialEq, Eq)]
enum Ending {
    /// Nobody has come for a while.
    Idle,
    /// A person, or the daemon's own end.
    Aborted(&'static str),
    Broken(String),
}

/// A session at work.
struct Shared {
    route: Arc<Route>,
    job: Arc<Job>,
    session: AmbientSession,
    members: Vec<Member>,
    started: Instant,
}

impl Shared {
    async fn run(
        mut self,
        mut events: mpsc::UnboundedReceiver<SourceEvent>,
        mut control: mpsc::UnboundedReceiver<Control>,
    ) {
        let mut tick = tokio::time::interval(TICK);
        let mut busy = Instant::now();
        let ending = loop {
            let happened = tokio::select! {
                Some(event) = events.recv() => self.hear(event),
                Some(control) = control.recv() => self.told(control),
                _ = tick.tick() => {
                    self.show(&self.session.counters());
                    if self.session.open_connections() > 0 {
                        busy = Instant::now();
                    }
                    match busy.elapsed() > self.route.linger && self.retire().await {
                        true => ControlFlow::Break(Ending::Idle),
                        false => ControlFlow::Continue(()),
                    }
                }
            };
            if let ControlFlow::Break(ending) = happened {
                break ending;
            }
        };
        self.end(ending).await;
    }

    fn hear(&mut self, event: SourceEvent) -> ControlFlow<Ending> {
        match event {
            SourceEvent::ChannelOpened { member } => self.begins(member),
            SourceEvent::GuestStopped { member, .. } => self.set(member, MemberState::Switching),
            SourceEvent::Arrived { member } => {
                self.members[member].arrived = Some(Instant::now());
                self.set(member, MemberState::Migrated);
            }
            SourceEvent::MemberFailed { member, error } => {
                let name = &self.members[member].domain.name;
                tracing::warn!(
                    job = self.job.id,
                    domain = name,
                    error,
                    "an ambient connection broke"
                );
                if self.members[member].arrived.is_none() {
                    self.set(member, MemberState::Failed);
                }
                self.members[member].error = Some(error);
            }
            SourceEvent::SessionFailed { error } => {
                return ControlFlow::Break(Ending::Broken(error));
            }
            // Nobody is held, so nobody waits for these.
            SourceEvent::FirstPassDone { .. }
            | SourceEvent::PassDone { .. }
            | SourceEvent::HeldInFirstPass { .. }
            | SourceEvent::Unreadable { .. }
            | SourceEvent::AckWithheld { .. }
            | SourceEvent::StreamEnded { .. } => {}
        }
        ControlFlow::Continue(())
    }

    fn told(&self, control: Control) -> ControlFlow<Ending> {
        match control {
            Control::Abort => ControlFlow::Break(Ending::Aborted("aborted on request")),
            Control::DaemonEnds => ControlFlow::Break(Ending::Aborted(
                "aborted because vmgangd was stopped, or lost the system bus; see its log",
            )),
            Control::SetBandwidth(bytes_per_s) => {
                self.session.set_bandwidth(bytes_per_s);
                ControlFlow::Continue(())
            }
            // Not offered for such a job.
            Control::StartPostCopy => ControlFlow::Continue(()),
        }
    }

    /// A connection for the member: a migration, or one more connection of it.
    fn begins(&mut self, index: usize) {
        let member = &mut self.members[index];
        let anew = member.arrived.take().is_some() || member.error.take().is_some();
        if member.began.is_none() || anew {
            member.began = Some(Instant::now());
        }
        let (uuid, name) = (member.domain.uuid, &member.domain.name);
        tracing::info!(job = self.job.id, domain = name, "ambient migration");
        let memory_bytes = member.domain.memory_bytes;
        self.job.update(|view| {
            if !view.members.iter().any(|shown| shown.uuid == uuid) {
                view.members.push(MemberView {
                    name: name.clone(),
                    uuid,
                    memory_bytes,
                    state: MemberState::Copying,
                    total_bytes: 0,
                    remaining_bytes: 0,
                    iterations: 0,
                    qemu_stream_bytes: 0,
                    wire_bytes: 0,
                    stalled: None,
                    throttled: false,
                });
            }
        });
        self.set(index, MemberState::Copying);
    }

    fn set(&self, index: usize, state: MemberState) {
        let uuid = self.members[index].domain.uuid;
        self.job.update(|view| {
            if let Some(shown) = view.members.iter_mut().find(|shown| shown.uuid == uuid) {
                shown.state = state;
            }
        });
    }

    /// Shows the figures of the moment.
    fn show(&self, counters: &SessionCounters) {
        self.job.update(|view| {
            view.bytes = Bytes::from(counters);
            for (member, counters) in self.members.iter().zip(&counters.members) {
                let shown = view.members.iter_mut();
                let mut shown = shown.filter(|shown| shown.uuid == member.domain.uuid);
                if let Some(shown) = shown.next() {
                    shown.qemu_stream_bytes = counters.qemu_stream_bytes;
                    shown.wire_bytes = counters.wire_bytes;
                }
            }
        });
    }

    /// Takes no more connections, unless one has come just now.
    async fn retire(&self) -> bool {
        let mut current = self.route.current.lock().await;
        let own = current.as_ref().filter(|open| open.job == self.job.id);
        if own.is_some_and(|open| open.handed.elapsed() <= self.route.linger) {
            return false;
        }
        if own.is_some() {
            *current = None;
        }
        true
    }

    async fn end(mut self, ending: Ending) {
        let mut domains = Vec::new();
        for index in 0..self.members.len() {
            if self.members[index].began.is_some() {
                domains.push((index, self.report(index, &ending).await));
            }
        }
        let counters = match ending {
            Ending::Idle => self.session.close().await.counters,
            // Hangs up at once on whoever is under way: QEMU goes on here.
            _ => {
                let counters = self.session.counters();
                drop(self.session);
                counters
            }
        };
        for (index, domain) in &mut domains {
            if let Some(counters) = counters.members.get(*index) {
                domain.qemu_stream_bytes = counters.qemu_stream_bytes;
                domain.wire_bytes = counters.wire_bytes;
            }
        }
        let domains: Vec<DomainReport> = domains.into_iter().map(|(_, domain)| domain).collect();
        let state = Report::end_state(&domains, matches!(ending, Ending::Aborted(_)));
        let error = match (state, ending) {
            (JobState::Completed, _) => None,
            (_, Ending::Aborted(why)) => Some(why.to_owned()),
            (_, Ending::Broken(error)) => Some(error),
            (_, Ending::Idle) => domains.iter().find_map(|domain| domain.error.clone()),
        };
        let report = Report {
            job: self.job.id.clone(),
            gang: None,
            destination: self.job.destination.clone(),
            state,
            error,
            elapsed_ms: milliseconds(self.started.elapsed()),
            switchover_spread_ms: None,
            bytes: Bytes::from(&counters),
            domains,
        };
        tracing::info!(
            job = report.job,
            state = state.as_str(),
            error = report.error,
            qemu_stream_bytes = report.bytes.qemu_stream,
            wire_bytes = report.bytes.wire,
            "ambient session ended"
        );
        self.route.coordinator.ambient_ended(&self.job, report);
    }

    /// Where the member is now.
    async fn report(&mut self, index: usize, ending: &Ending) -> DomainReport {
        let hypervisor = self.route.coordinator.parts.hypervisor.clone();
        let member = &mut self.members[index];
        let uuid = member.domain.uuid;
        let now = ask(&hypervisor, move |hypervisor| hypervisor.domain(uuid)).await;
        let here = now.is_ok_and(|domain| domain.active());
        let (state, error) = match (member.arrived, here) {
            (Some(_), _) => (DomainOutcome::Migrated, None),
            (None, true) => (DomainOutcome::Source, member.error.take()),
            (None, false) => (
                DomainOutcome::Failed,
                Some(format!(
                    "the guest does not run on this host; see on {} with `virsh list`, and what its client has said",
                    self.route.name()
                )),
            ),
        };
        let ended = member.arrived.unwrap_or_else(Instant::now);
        let took = member.began.map_or(Duration::ZERO, |began| ended - began);
        let measured = match (state, ending) {
            (DomainOutcome::Migrated, Ending::Idle) => {
                self.session.member_outcome(index).await.ok().flatten()
            }
            _ => None,
        };
        let measured = measured.unwrap_or_default();
        DomainReport {
            name: member.domain.name.clone(),
            uuid,
            state,
            elapsed_ms: milliseconds(took),
            downtime_ms: measured.downtime_ms,
            iterations: measured.iterations,
            qemu_stream_bytes: 0,
            wire_bytes: 0,
            ballooned_bytes: None,
            error,
        }
    }
}

impl Coordinator {
    /// An ambient session's job is over.
    fn ambient_ended(&self, job: &Job, report: Report) {
        job.close_timeline(&report, Vec::new());
        self.write_record(&Record {
            started_unix_s: job.started_unix_s,
            barrier_approximate: false,
            balloons: Vec::new(),
            peer: None,
            timeline: job.timeline().map(Arc::unwrap_or_clone),
            report: report.clone(),
        });
        self.has_ended(job, report);
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
