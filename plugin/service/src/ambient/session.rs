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
use tokio::task::JoinSet;
use uuid::Uuid;
use vmgang_engine::{
    AmbientSession, AmbientSocket, Hold, MEMBERS_MAX, MemberOffer, Offer, PeerAddress, Pending,
    QemuConnection, QemuListener, Scanned, SessionCounters, SocketOwner, SourceEvent,
    SourceOptions, Techniques, ambient_socket,
};
use vmgang_libvirt::{DomainInfo, DomainState, LibvirtError};

use crate::budget;
use crate::coordinator::Coordinator;
use crate::error::ServiceError;
use crate::history::Record;
use crate::hypervisor::ask;
use crate::job::{Control, Job, MemberState, MemberView};
use crate::outcome;
use crate::report::{Bytes, DomainOutcome, DomainReport, JobState, Report};

/// How often figures are brought up to date, and whether anybody is still there is looked at.
const TICK: Duration = Duration::from_millis(500);
/// Connections that a session takes. Its protocol has numbers for twice as many.
const CONNECTIONS_MAX: u32 = 32_768;
/// How long a session that could not be opened counts also for those who come later: they may have waited
/// behind another connection of their domain.
const FAILURE_COUNTS: Duration = Duration::from_secs(1);
/// What a session that was left may still have to tell.
const DRAIN: Duration = Duration::from_secs(1);
/// libvirt ends a migration, or has the guest go on here, within this time.
const SETTLE: Duration = Duration::from_secs(2);
const SETTLE_INTERVAL: Duration = Duration::from_millis(100);

/// The way to one peer.
pub(super) struct Route {
    peer: PeerAddress,
    linger: Duration,
    coordinator: Arc<Coordinator>,
    /// Held while a session is opened.
    current: Mutex<Current>,
}

/// What comes of the next connection.
#[derive(Default)]
struct Current {
    open: Option<Open>,
    /// When opening a session has failed last.
    failed: Option<Instant>,
}

impl Current {
    /// Whether a connection that came at that time hears of a failure there was meanwhile, or just before.
    fn has_failed(&self, came: Instant) -> bool {
        self.failed
            .is_some_and(|failed| came < failed + FAILURE_COUNTS)
    }
}

/// A session that takes connections.
struct Open {
    job: String,
    members: HashMap<Uuid, mpsc::UnboundedSender<QemuConnection>>,
    /// Connections it has had.
    taken: u32,
    /// When the last one was handed over.
    handed: Instant,
}

impl Open {
    /// Hands a connection over, or gives it back.
    fn take(&mut self, domain: Uuid, connection: QemuConnection) -> Option<QemuConnection> {
        let Some(member) = self.members.get(&domain) else {
            return Some(connection);
        };
        if self.taken == CONNECTIONS_MAX {
            tracing::info!(
                job = self.job,
                "an ambient session has had {CONNECTIONS_MAX} connections and takes no more; the next one opens another session"
            );
            return Some(connection);
        }
        match member.send(connection) {
            Ok(()) => {
                self.taken += 1;
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
        let came = Instant::now();
        if let Err(why) = self.is_asked_for(domain).await {
            tracing::warn!(peer = %self.peer, %domain, why, "refused an ambient connection");
            return;
        }
        // Whoever comes while a session is opened shares it.
        let mut current = self.current.lock().await;
        let connection = match &mut current.open {
            Some(open) => open.take(domain, connection),
            None => Some(connection),
        };
        // There is no session, it has ended, or the domain was started after it had begun.
        let Some(connection) = connection else {
            return;
        };
        // A peer that does not answer is not waited for once for each who has waited already.
        if current.has_failed(came) {
            tracing::error!(
                peer = %self.peer, %domain,
                "an ambient migration has no session either; its client is told that it has failed"
            );
            return;
        }
        match self.open(domain).await {
            Ok(mut open) => {
                let _ = open.take(domain, connection);
                *current = Current {
                    open: Some(open),
                    failed: None,
                };
            }
            Err(error) => {
                current.failed = Some(Instant::now());
                tracing::error!(
                    peer = %self.peer, %domain, error = error.sentence(),
                    "an ambient migration has no session; its client is told that it has failed"
                );
            }
        }
    }

    /// A guest that has broken out of its QEMU could connect at any time; libvirt knows whether anybody has
    /// asked for a migration.
    async fn is_asked_for(&self, domain: Uuid) -> Result<(), String> {
        let hypervisor = &self.coordinator.parts.hypervisor;
        match ask(hypervisor, move |hypervisor| hypervisor.running_job(domain)).await {
            Ok(job) if job.active && job.outgoing => Ok(()),
            Ok(_) => Err("libvirt does not migrate this domain".to_owned()),
            Err(error) => Err(format!(
                "libvirt cannot say whether it migrates this domain: {}",
                error.sentence()
            )),
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
            hold: Hold::Nothing,
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
            taken: 0,
            handed: Instant::now(),
        };
        let members = domains.into_iter().map(|(domain, _)| Member::new(domain));
        let shared = Shared {
            route: self.clone(),
            job,
            members: members.collect(),
            started: Instant::now(),
        };
        tokio::spawn(shared.run(session, events, control));
        Ok(open)
    }
}

/// A domain that may migrate in a session.
struct Member {
    domain: DomainInfo,
    /// Since when; `None`: it has not.
    began: Option<Instant>,
    /// The destination's QEMU says that it has all of it.
    arrived: Option<Instant>,
    /// And libvirt had it here no longer. It may have come back since.
    gone: bool,
    error: Option<String>,
}

impl Member {
    fn new(domain: DomainInfo) -> Member {
        Member {
            domain,
            began: None,
            arrived: None,
            gone: false,
            error: None,
        }
    }

    /// Whether its destination has it, and libvirt may not know yet.
    fn may_be_here(&self) -> bool {
        self.arrived.is_some() && !self.gone
    }

    fn took_ms(&self) -> u64 {
        let ended = self.arrived.unwrap_or_else(Instant::now);
        self.began.map_or(0, |began| milliseconds(ended - began))
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
    members: Vec<Member>,
    started: Instant,
}

impl Shared {
    async fn run(
        mut self,
        session: AmbientSession,
        mut events: mpsc::UnboundedReceiver<SourceEvent>,
        mut control: mpsc::UnboundedReceiver<Control>,
    ) {
        let hypervisor = self.route.coordinator.parts.hypervisor.clone();
        // One question at a time: libvirt may take its time, and nobody waits for it.
        let mut looking: JoinSet<Result<Vec<DomainInfo>, ServiceError>> = JoinSet::new();
        let mut tick = tokio::time::interval(TICK);
        let mut busy = Instant::now();
        let ending = loop {
            let happened = tokio::select! {
                Some(event) = events.recv() => self.hear(event),
                Some(control) = control.recv() => self.told(control, &session),
                Some(Ok(Ok(domains))) = looking.join_next() => {
                    self.look_for_gone(&domains);
                    ControlFlow::Continue(())
                }
                _ = tick.tick() => {
                    self.show(&session.counters());
                    if looking.is_empty() && self.members.iter().any(Member::may_be_here) {
                        looking.spawn(ask(&hypervisor, |hypervisor| hypervisor.domains()));
                    }
                    if session.open_connections() > 0 {
                        busy = Instant::now();
                    }
                    match busy.elapsed() > self.route.linger && self.retire() {
                        true => ControlFlow::Break(Ending::Idle),
                        false => ControlFlow::Continue(()),
                    }
                }
            };
            if let ControlFlow::Break(ending) = happened {
                break ending;
            }
        };
        self.end(ending, session, events).await;
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

    fn told(&self, control: Control, session: &AmbientSession) -> ControlFlow<Ending> {
        match control {
            Control::Abort => ControlFlow::Break(Ending::Aborted("aborted on request")),
            Control::DaemonEnds => ControlFlow::Break(Ending::Aborted(
                "aborted because vmgangd was stopped, or lost the system bus; see its log",
            )),
            Control::SetBandwidth(bytes_per_s) => {
                session.set_bandwidth(bytes_per_s);
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
        member.gone = false;
        if member.began.is_none() || anew {
            member.began = Some(Instant::now());
        }
        let (uuid, name) = (member.domain.uuid, &member.domain.name);
        tracing::info!(job = self.job.id, domain = name, "ambient migration");
        let memory_bytes = member.domain.memory_bytes;
        self.job.update(|view| {
            if !view.members.iter().any(|shown| shown.uuid == uuid) {
                let member = MemberView::new(name, uuid, memory_bytes, MemberState::Copying);
                view.members.push(member);
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

    /// Takes note of who has arrived and left this host.
    fn look_for_gone(&mut self, domains: &[DomainInfo]) {
        for member in self.members.iter_mut().filter(|it| it.may_be_here()) {
            let uuid = member.domain.uuid;
            member.gone = !domains
                .iter()
                .any(|domain| domain.uuid == uuid && domain.active());
        }
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
    fn retire(&self) -> bool {
        // Another session is being opened, which may take long: the next look will do.
        let Ok(mut current) = self.route.current.try_lock() else {
            return false;
        };
        let own = current.open.as_ref().filter(|open| open.job == self.job.id);
        if own.is_some_and(|open| open.handed.elapsed() <= self.route.linger) {
            return false;
        }
        if own.is_some() {
            current.open = None;
        }
        true
    }

    async fn end(
        mut self,
        ending: Ending,
        session: AmbientSession,
        mut events: mpsc::UnboundedReceiver<SourceEvent>,
    ) {
        let mut measured = HashMap::new();
        let counters = match ending {
            Ending::Idle => {
                for (index, member) in self.members.iter().enumerate() {
                    if member.arrived.is_some()
                        && let Ok(Some(outcome)) = session.member_outcome(index).await
                    {
                        measured.insert(index, outcome);
                    }
                }
                session.close().await.counters
            }
            // Nobody comes any more, and whoever is under way is hung up on: QEMU goes on here. Only then
            // libvirt knows where each is.
            _ => {
                self.leave();
                let counters = session.counters();
                drop(session);
                let drain = async {
                    while let Some(event) = events.recv().await {
                        let _ = self.hear(event);
                    }
                };
                let _ = tokio::time::timeout(DRAIN, drain).await;
                counters
            }
        };
        let settled = Instant::now() + SETTLE;
        let mut domains = Vec::new();
        for index in 0..self.members.len() {
            if self.members[index].began.is_some() {
                let (state, error) = self.place(index, settled).await;
                let member = &self.members[index];
                let figures = counters.members.get(index).copied().unwrap_or_default();
                let outcome = measured.remove(&index).unwrap_or_default();
                domains.push(DomainReport {
                    name: member.domain.name.clone(),
                    uuid: member.domain.uuid,
                    state,
                    elapsed_ms: member.took_ms(),
                    downtime_ms: outcome.downtime_ms,
                    iterations: outcome.iterations,
                    qemu_stream_bytes: figures.qemu_stream_bytes,
                    wire_bytes: figures.wire_bytes,
                    ballooned_bytes: None,
                    error,
                });
            }
        }
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
            state = report.state.as_str(),
            error = report.error,
            qemu_stream_bytes = report.bytes.qemu_stream,
            wire_bytes = report.bytes.wire,
            "ambient session ended"
        );
        self.route.coordinator.ambient_ended(&self.job, report);
    }

    /// Takes no connections any more.
    fn leave(&self) {
        // While another session is opened, nobody is handed to this one, and then it has that one's place.
        if let Ok(mut current) = self.route.current.try_lock() {
            current.open.take_if(|open| open.job == self.job.id);
        }
    }

    /// Where the member is now; until `settled` libvirt may still be about to move it.
    async fn place(&mut self, index: usize, settled: Instant) -> (DomainOutcome, Option<String>) {
        let hypervisor = self.route.coordinator.parts.hypervisor.clone();
        let there = self.route.name();
        let member = &mut self.members[index];
        let (uuid, name) = (member.domain.uuid, &member.domain.name);
        if member.gone {
            return (DomainOutcome::Migrated, None);
        }
        let arrived = member.arrived.is_some();
        let here = loop {
            let now = ask(&hypervisor, move |hypervisor| hypervisor.domain(uuid)).await;
            let here = now.ok().filter(DomainInfo::active);
            if !arrived || here.is_none() || Instant::now() >= settled {
                break here.map(|domain| domain.state);
            }
            tokio::time::sleep(SETTLE_INTERVAL).await;
        };
        match (arrived, here) {
            (true, None) => (DomainOutcome::Migrated, None),
            (true, Some(DomainState::Paused)) => {
                (DomainOutcome::Failed, Some(outcome::paused(name, there)))
            }
            (true, Some(_)) => {
                let text = format!(
                    "the destination has said that it has all of the guest, but the guest runs on this host; see what its client has said, and on {there} with `virsh list`"
                );
                let text = match member.error.take() {
                    Some(error) => format!("{error}; {text}"),
                    None => text,
                };
                (DomainOutcome::Source, Some(text))
            }
            (false, Some(_)) => (DomainOutcome::Source, member.error.take()),
            (false, None) => (
                DomainOutcome::Failed,
                Some(format!(
                    "the guest does not run on this host; see on {there} with `virsh list`, and what its client has said"
                )),
            ),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> QemuConnection {
        (Box::new(tokio::io::empty()), Box::new(tokio::io::sink()))
    }

    #[test]
    fn a_session_takes_so_many_connections_and_no_more() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let domain = Uuid::from_u128(1);
        let mut open = Open {
            job: "j".to_owned(),
            members: HashMap::from([(domain, sender)]),
            taken: 0,
            handed: Instant::now(),
        };
        let other = open.take(Uuid::from_u128(2), connection());
        assert!(other.is_some(), "it is no member");
        for _ in 0..CONNECTIONS_MAX {
            assert!(open.take(domain, connection()).is_none());
        }
        assert!(open.take(domain, connection()).is_some(), "one too many");
        let mut handed = 0;
        while receiver.try_recv().is_ok() {
            handed += 1;
        }
        assert_eq!(handed, CONNECTIONS_MAX);
    }
}
