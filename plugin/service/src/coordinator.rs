//! Takes requests, has them checked (`preflight.rs`) before anything changes, and starts jobs.
//! Knows no D-Bus; how a started job runs is the driver's business.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use uuid::Uuid;
use vmgang_engine::{PageKey, Remains, Scanned, Transport, Workers};
use vmgang_libvirt::{DomainInfo, Membership};

use crate::balloon;
use crate::config::{TlsConfig, WindowBudget};
use crate::destination::Destination;
use crate::driver::Driver;
use crate::error::ServiceError;
use crate::estimate;
use crate::examination::Examination;
use crate::gangs;
use crate::history::{History, Record};
use crate::hypervisor::{Hypervisor, ask};
use crate::job::{Control, Job, MemberState};
use crate::jobs::Jobs;
use crate::libvirt_access::{DestinationLibvirt, LibvirtAccess};
use crate::memory::AvailableMemory;
use crate::peers::Peers;
use crate::preflight::Preflight;
use crate::recall::Contents;
use crate::report::{DomainOutcome, JobState, Report};
use crate::request::{DiagnoseRequest, MigrateRequest, PrepareRequest};
use crate::scans::Scans;
use crate::stages::{Stage, StageView, Stages};
use crate::tunnel::{Session, Tunnel};

/// How long running jobs may take to end when the daemon stops.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);

/// How long, and how often, guests whose host does not answer are to get their memory back.
const GIVE_BACK_TIME: Duration = Duration::from_secs(24 * 3600);
const GIVE_BACK_INTERVAL: Duration = Duration::from_secs(10);

/// How many members' names a line of the log has.
const LOGGED_NAMES_MAX: usize = 16;

/// How peers are talked to, or why they cannot be: asked at each migration, so that
/// certificates put in place later are found.
pub type TransportSource = dyn Fn() -> Result<Transport, String> + Send + Sync;

/// What the coordinator works with.
pub struct Parts {
    pub hypervisor: Arc<dyn Hypervisor>,
    pub tunnel: Arc<dyn Tunnel>,
    pub transport: Arc<TransportSource>,
    pub libvirt_access: Arc<LibvirtAccess>,
    /// Where its certificates are.
    pub tls: TlsConfig,
    pub history: History,
    pub peers: Arc<Peers>,
    pub runtime_dir: std::path::PathBuf,
    pub window_budget: WindowBudget,
    pub available_memory: Box<AvailableMemory>,
    pub workers: Workers,
    /// TCP connections of a session at most.
    pub connections: NonZeroUsize,
    pub scans: Arc<Scans>,
    pub stages: Arc<Stages>,
    pub contents: Arc<Contents>,
}

pub struct Coordinator {
    pub(crate) parts: Arc<Parts>,
    jobs: Arc<Jobs>,
    estimating: tokio::sync::Mutex<()>,
    diagnosing: tokio::sync::Mutex<()>,
    /// Rings when a job has ended.
    ended: tokio::sync::Notify,
    /// Jobs that nobody on the bus has asked for.
    unasked: (
        mpsc::UnboundedSender<Arc<Job>>,
        tokio::sync::Mutex<mpsc::UnboundedReceiver<Arc<Job>>>,
    ),
}

impl Coordinator {
    /// Takes up the history: jobs a killed daemon left running get their end here.
    pub async fn open(parts: Parts) -> std::io::Result<Arc<Coordinator>> {
        let domains = ask(&parts.hypervisor, |hypervisor| hypervisor.domains()).await;
        let (records, ended) = parts.history.end_interrupted(|uuid| match &domains {
            Ok(domains) => {
                let domain = domains.iter().find(|domain| domain.uuid == uuid);
                Ok(domain.map(|domain| domain.state))
            }
            Err(error) => Err(error.sentence().to_owned()),
        })?;
        if ended > 0 {
            tracing::warn!(jobs = ended, "jobs were cut short when the daemon ended");
        }
        let jobs = Arc::new(Jobs::default());
        let owed: Vec<Record> = records
            .iter()
            .filter(|record| !record.balloons.is_empty())
            .cloned()
            .collect();
        for record in records.into_iter().rev() {
            // Fresh as it is, it takes them all.
            let _ = jobs.add(Arc::new(Job::ended(record)));
        }
        let (unasked, receiver) = mpsc::unbounded_channel();
        let coordinator = Arc::new(Coordinator {
            unasked: (unasked, receiver.into()),
            parts: Arc::new(parts),
            jobs,
            estimating: tokio::sync::Mutex::default(),
            diagnosing: tokio::sync::Mutex::default(),
            ended: tokio::sync::Notify::new(),
        });
        for record in owed {
            coordinator.give_back_later(record);
        }
        Ok(coordinator)
    }

    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.jobs.list()
    }

    /// Stages that this host fills and holds.
    pub fn stages(&self) -> Vec<StageView> {
        self.parts.stages.list()
    }

    /// Drops a stage that this host fills.
    pub fn abort_stage(&self, id: &str) -> Result<(), ServiceError> {
        self.parts.stages.abort(id)
    }

    /// Begins to stage a gang's contents; returns the stage's id.
    pub async fn prepare(&self, request: PrepareRequest) -> Result<String, ServiceError> {
        let stage = self.parts.stages.prepare(&self.parts, request).await?;
        Ok(stage.id())
    }

    /// What a migration of the gang would send, as one JSON object.
    pub async fn estimate(&self, gang: &str) -> Result<String, ServiceError> {
        // Each reads all of a gang's memory, as fast as it can.
        let _alone = self.estimating.lock().await;
        estimate::estimate(&self.parts, gang).await
    }

    /// Whether migrations would be refused, and what could be better, as one JSON object.
    pub async fn diagnose(&self, request: DiagnoseRequest) -> String {
        // Whoever may ask may not keep peers busy with many at once.
        let _alone = self.diagnosing.lock().await;
        let examination = Examination::new(&self.parts, &self.jobs, &request);
        // Plain structs with string keys cannot fail to serialise.
        serde_json::to_string(&examination.run().await).unwrap_or_default()
    }

    pub fn peers(&self) -> Vec<String> {
        self.parts.peers.list()
    }

    pub async fn domains(&self) -> Result<Vec<DomainInfo>, ServiceError> {
        ask(&self.parts.hypervisor, |hypervisor| hypervisor.domains()).await
    }

    /// Puts domains into a gang; all or none. Returns the names of those that changed.
    pub async fn add_to_gang(
        &self,
        gang: &str,
        names: &[String],
    ) -> Result<Vec<String>, ServiceError> {
        Membership::check_gang_name(gang).map_err(ServiceError::InvalidOption)?;
        let domains = self.domains().await?;
        let mut to_change = Vec::new();
        for domain in self.named(names, &domains)? {
            match &domain.membership {
                Ok(Some(member)) if member.gang == gang => {}
                Ok(Some(member)) => {
                    return Err(ServiceError::AlreadyInGang(format!(
                        "domain {name} is in the gang '{other}' already; take it out first with `vmgang gang remove {other} {name}`",
                        name = domain.name,
                        other = member.gang
                    )));
                }
                Ok(None) => to_change.push(domain.clone()),
                Err(problem) => {
                    return Err(ServiceError::InvalidMetadata(problem.to_string()));
                }
            }
        }
        let membership = Membership {
            gang: gang.to_owned(),
            order: None,
        };
        self.set_memberships(to_change, Some(membership)).await
    }

    /// Takes domains out of a gang; all or none. Metadata that cannot be read is removed too.
    pub async fn remove_from_gang(
        &self,
        gang: &str,
        names: &[String],
    ) -> Result<Vec<String>, ServiceError> {
        let domains = self.domains().await?;
        let mut to_change = Vec::new();
        for domain in self.named(names, &domains)? {
            let belongs = match &domain.membership {
                Ok(member) => member.as_ref().is_some_and(|member| member.gang == gang),
                Err(problem) => problem.gang.as_deref().is_none_or(|named| named == gang),
            };
            if !belongs {
                return Err(ServiceError::UnknownGang(format!(
                    "domain {} is not in the gang '{gang}'; `vmgang gang show {gang}` lists its members",
                    domain.name
                )));
            }
            to_change.push(domain.clone());
        }
        self.set_memberships(to_change, None).await
    }

    /// The named domains, none of them held by a job.
    fn named<'a>(
        &self,
        names: &[String],
        domains: &'a [DomainInfo],
    ) -> Result<Vec<&'a DomainInfo>, ServiceError> {
        if names.is_empty() {
            return Err(ServiceError::InvalidOption(
                "no domain was named; give at least one".into(),
            ));
        }
        let mut found: Vec<&DomainInfo> = Vec::new();
        for name in names {
            let domain = gangs::find(name, domains)?;
            self.jobs.check_free(domain)?;
            if !found.iter().any(|other| other.uuid == domain.uuid) {
                found.push(domain);
            }
        }
        Ok(found)
    }

    async fn set_memberships(
        &self,
        domains: Vec<DomainInfo>,
        membership: Option<Membership>,
    ) -> Result<Vec<String>, ServiceError> {
        let mut changed = Vec::new();
        for domain in domains {
            let membership = membership.clone();
            ask(&self.parts.hypervisor, move |hypervisor| {
                hypervisor.set_membership(domain.uuid, membership.as_ref())
            })
            .await?;
            changed.push(domain.name);
        }
        Ok(changed)
    }

    /// Checks a request and starts its job. An error means that nothing has changed.
    pub async fn migrate(
        self: &Arc<Self>,
        request: MigrateRequest,
    ) -> Result<Arc<Job>, ServiceError> {
        let domains = self.domains().await?;
        let members = gangs::select(&request.selection, &domains)?;
        request.check_members(members.len())?;
        let id = Uuid::new_v4();
        let reservation = self.jobs.reserve(id, request.gang(), &members)?;
        let preflight = Preflight {
            parts: &self.parts,
            job: id,
            request: &request,
            members: &members,
        };
        let quiet = self.parts.scans.quiet();
        let ready = match preflight.run().await {
            Ok(ready) => ready,
            Err((error, taken)) => {
                drop(quiet);
                self.stage_again(taken);
                return Err(error);
            }
        };
        let (session, events) = ready.opened;
        let taken = ready.taken;
        let offering = offer_contents(&*session, &ready.scanned);

        let (job, control) = Job::start(
            id,
            request.gang(),
            &request.destination.name,
            &members,
            request.policy.can_post_copy(),
        );
        let job = Arc::new(job);
        // The daemon may have begun to stop meanwhile.
        self.jobs.add(job.clone())?;
        tracing::info!(
            job = job.id,
            gang = job.gang,
            destination = job.destination,
            members = shortened(members.iter().map(|member| member.name.clone())),
            window_offered_bytes = ready.window_offered_bytes,
            "job started"
        );
        // Without the record a restart could not tell what happened, so it comes first.
        let balloons = ready.balloons;
        let peer = Some(request.peer.to_string());
        self.write_record(&Record {
            balloons: balloons.clone(),
            peer: peer.clone(),
            ..job.running_record()
        });
        let driver = Driver {
            job: job.clone(),
            hypervisor: self.parts.hypervisor.clone(),
            session,
            events,
            control,
            request,
            libvirt: ready.libvirt.clone(),
            members,
            limit_passes: ready.limit_passes,
            parallel: ready.parallel,
            daemon_ends: false,
            balloons: balloons.clone(),
        };
        let page_key = ready.page_key;
        let libvirt = ready.libvirt;
        let coordinator = self.clone();
        let started = job.clone();
        tokio::spawn(async move {
            let (report, remains) = driver.run().await;
            offering.abort();
            drop(quiet);
            tracing::info!(
                job = report.job,
                state = report.state.as_str(),
                error = report.error,
                elapsed_ms = report.elapsed_ms,
                members = shortened(report.domains.iter().map(|domain| {
                    let now = MemberState::from(domain.state);
                    format!("{} {}", domain.name, now.as_str())
                })),
                "job ended"
            );
            let hypervisor = &coordinator.parts.hypervisor;
            let balloons = balloon::give_back(hypervisor, balloons, &libvirt).await;
            let record = Record {
                started_unix_s: job.started_unix_s,
                barrier_approximate: job.view().barrier_approximate,
                balloons,
                peer,
                timeline: job.timeline().map(Arc::unwrap_or_clone),
                report: report.clone(),
            };
            coordinator.write_record(&record);
            if !record.balloons.is_empty() {
                coordinator.give_back_later(record);
            }
            coordinator.keep_contents(&report, &page_key, remains);
            if report.state != JobState::Completed {
                coordinator.stage_again(taken);
            }
            // Freed before anybody sees the end: the next job may come at once.
            drop(reservation);
            coordinator.has_ended(&job, report);
        });
        Ok(started)
    }

    /// Shows that a job has ended, and how.
    pub(crate) fn has_ended(&self, job: &Job, report: Report) {
        job.update(|view| {
            view.state = report.state;
            view.bytes = report.bytes.clone();
            view.switchover_spread_ms = report.switchover_spread_ms;
            for member in &mut view.members {
                let mut domains = report.domains.iter();
                if let Some(domain) = domains.find(|domain| domain.uuid == member.uuid) {
                    member.state = domain.state.into();
                }
            }
            view.report = Some(report);
        });
        self.ended.notify_one();
    }

    /// Goes on giving memory back to guests of a job that has ended, until the destination answers.
    fn give_back_later(self: &Arc<Self>, mut record: Record) {
        let coordinator = self.clone();
        let libvirt = match self.libvirt_of(&record) {
            Ok(libvirt) => libvirt,
            Err(error) => {
                let job = &record.report.job;
                tracing::warn!(job, error, "guests of the job are not given memory back");
                return;
            }
        };
        tokio::spawn(async move {
            let until = Instant::now() + GIVE_BACK_TIME;
            while Instant::now() < until {
                let hypervisor = &coordinator.parts.hypervisor;
                let owed = record.balloons.clone();
                let left = balloon::attempt_to_give_back(hypervisor, owed, &libvirt).await;
                if left != record.balloons {
                    record.balloons = left;
                    coordinator.write_record(&record);
                }
                if record.balloons.is_empty() {
                    return;
                }
                tokio::time::sleep(GIVE_BACK_INTERVAL).await;
            }
        });
    }

    /// The destination's libvirt of a job that has ended.
    fn libvirt_of(&self, record: &Record) -> Result<DestinationLibvirt, String> {
        let destination = Destination::parse(&record.report.destination)?;
        let peer = match &record.peer {
            Some(peer) => peer.parse().map_err(|error| format!("{error}"))?,
            None => destination.peer(),
        };
        let reached = self.parts.libvirt_access.reach(&destination, &peer);
        reached.map_err(|error| error.sentence().to_owned())
    }

    /// What a job's session leaves is kept for its members' way back.
    fn keep_contents(&self, report: &Report, key: &PageKey, remains: Option<Remains>) {
        let migrated: HashSet<Uuid> = report
            .domains
            .iter()
            .filter(|domain| domain.state == DomainOutcome::Migrated)
            .map(|domain| domain.uuid)
            .collect();
        // What was open of their memory would keep it from being freed.
        self.parts.scans.forget(&migrated);
        if let Some(remains) = remains.filter(|_| !migrated.is_empty()) {
            let gang = report.gang.as_deref().unwrap_or_default();
            self.parts.contents.keep(gang, migrated, key, remains);
        }
    }

    /// A stage that was taken in vain is filled again.
    fn stage_again(&self, taken: Option<Arc<Stage>>) {
        if let Some(stage) = taken {
            let parts = self.parts.clone();
            tokio::spawn(async move { parts.stages.again(&parts, &stage).await });
        }
    }

    pub(crate) fn write_record(&self, record: &Record) {
        if let Err(error) = self.parts.history.write(record) {
            tracing::error!(job = record.report.job, %error, "cannot write the job's record; check state_dir");
        }
    }

    /// Forgets the oldest ended jobs beyond those kept; returns their ids.
    pub fn prune(&self) -> Vec<String> {
        let removed = self.parts.history.prune().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot tidy the job history");
            Vec::new()
        });
        for id in &removed {
            self.jobs.remove(id);
        }
        removed
    }

    /// A job has begun that nobody on the bus has asked for.
    pub(crate) fn begin_unasked(&self, job: &Arc<Job>) -> Result<(), ServiceError> {
        self.add(job)?;
        self.show_started(job);
        Ok(())
    }

    /// A job has begun, and is shown by whoever has asked for it. Refused once the daemon has begun to stop.
    pub(crate) fn add(&self, job: &Arc<Job>) -> Result<(), ServiceError> {
        self.jobs.add(job.clone())
    }

    /// Has a job shown on the bus.
    pub(crate) fn show_started(&self, job: &Arc<Job>) {
        // Without a bus nobody is to see it.
        let _ = self.unasked.0.send(job.clone());
    }

    /// The next such job, to be shown there. One task may wait for it.
    pub async fn next_unasked(&self) -> Arc<Job> {
        match self.unasked.1.lock().await.recv().await {
            Some(job) => job,
            None => std::future::pending().await,
        }
    }

    /// Waits until a job has ended since this was last waited for. One task may do so.
    pub async fn job_ended(&self) {
        self.ended.notified().await;
    }

    /// Whether a job is under way.
    pub fn is_busy(&self) -> bool {
        self.jobs.list().iter().any(|job| !job.state().ended())
    }

    /// Aborts what runs and waits for it, so that the daemon can stop.
    pub async fn shutdown(&self) {
        self.jobs.close();
        self.parts.scans.end();
        self.parts.stages.shutdown();
        let mut running = Vec::new();
        for job in self.jobs.list() {
            if !job.state().ended() && job.control(Control::DaemonEnds).is_ok() {
                running.push(job);
            }
        }
        let all = async {
            for job in running {
                let mut changes = job.watch();
                while !job.state().ended() && changes.changed().await.is_ok() {}
            }
        };
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, all).await.is_err() {
            tracing::error!("jobs did not end in time; their members are left to libvirt");
        }
    }
}

/// Asks the destination for contents it may have, if the members were scanned. What it has told
/// unasked is not asked for again.
fn offer_contents(session: &dyn Session, scanned: &Scanned) -> AbortHandle {
    let wanted = session.may_find_contents() && !session.has_stage();
    let (offer, census) = (session.offers(), scanned.census().cloned());
    let task = tokio::spawn(async move {
        let Some(census) = census.filter(|_| wanted) else {
            return;
        };
        let by_worth = tokio::task::spawn_blocking(move || census.by_worth());
        let Ok(contents) = by_worth.await else {
            return;
        };
        let offered = contents.len();
        let digests = contents.into_iter().map(|content| content.digest);
        let found = offer(digests.collect()).await;
        tracing::info!(offered, found, "the destination was asked what it has");
    });
    task.abort_handle()
}

/// A few names for the log.
fn shortened(mut names: impl ExactSizeIterator<Item = String>) -> String {
    let shown: Vec<String> = names.by_ref().take(LOGGED_NAMES_MAX).collect();
    match names.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
