//! Takes requests, checks everything that can be checked before anything changes, and starts
//! jobs. Knows no D-Bus; how a started job runs is the driver's business.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmgang_engine::{MemberOffer, Offer, SocketOwner, SourceOptions, Transport};
use vmgang_libvirt::{DomainInfo, DomainQemuUser, Membership};

use crate::driver::Driver;
use crate::error::ServiceError;
use crate::gangs;
use crate::history::{History, Record};
use crate::hypervisor::{DestinationInfo, Hypervisor, ask};
use crate::job::{Control, Job, MemberState};
use crate::jobs::Jobs;
use crate::memory::Memory;
use crate::peers::Peers;
use crate::request::MigrateRequest;
use crate::tunnel::Tunnel;

/// How long the destination's libvirt, or the peer, may take to answer.
const REACH_TIMEOUT: Duration = Duration::from_secs(20);
/// How long running jobs may take to end when the daemon stops.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);

/// How many members' names a line of the log has.
const LOGGED_NAMES_MAX: usize = 16;

/// How peers are talked to, or why they cannot be: asked at each migration, so that
/// certificates put in place later are found.
pub type TransportSource = dyn Fn() -> Result<Transport, String> + Send + Sync;

/// What the coordinator works with.
pub struct Parts {
    pub hypervisor: Arc<dyn Hypervisor>,
    pub tunnel: Arc<dyn Tunnel>,
    pub transport: Box<TransportSource>,
    pub history: History,
    pub peers: Arc<Peers>,
    pub runtime_dir: std::path::PathBuf,
    pub window_budget_bytes: u64,
}

pub struct Coordinator {
    parts: Parts,
    jobs: Arc<Jobs>,
}

impl Coordinator {
    /// Takes up the history: jobs a killed daemon left running get their end here.
    pub async fn open(parts: Parts) -> std::io::Result<Arc<Coordinator>> {
        let domains = ask(&parts.hypervisor, |hypervisor| hypervisor.domains()).await;
        let ended = parts.history.end_interrupted(|uuid| match &domains {
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
        for record in parts.history.load()?.into_iter().rev() {
            // Fresh as it is, it takes them all.
            let _ = jobs.add(Arc::new(Job::ended(record)));
        }
        Ok(Arc::new(Coordinator { parts, jobs }))
    }

    pub fn jobs(&self) -> Vec<Arc<Job>> {
        self.jobs.list()
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
        let id = Uuid::new_v4();
        let reservation = self.jobs.reserve(id, request.gang(), &members)?;
        let transport = (self.parts.transport)().map_err(ServiceError::TlsFailed)?;
        self.check_idle(&members).await?;
        self.check_destination(&request, &members).await?;
        let (options, limit_passes) = self
            .source_options(id, &request, &members, transport)
            .await?;

        let connected = tokio::time::timeout(REACH_TIMEOUT, self.parts.tunnel.connect(options));
        let (session, events) = connected.await.map_err(|_| {
            ServiceError::PeerUnreachable(format!(
                "vmgangd at {} did not answer within {} s; check that it runs there and that no firewall is in between",
                request.peer,
                REACH_TIMEOUT.as_secs()
            ))
        })??;
        self.parts.peers.connected(&request.peer.to_string());

        let (job, control) = Job::start(id, request.gang(), &request.destination.uri, &members);
        let job = Arc::new(job);
        // The daemon may have begun to stop meanwhile.
        self.jobs.add(job.clone())?;
        tracing::info!(
            job = job.id,
            gang = job.gang,
            destination = job.destination,
            members = shortened(members.iter().map(|member| member.name.clone())),
            "job started"
        );
        // Without the record a restart could not tell what happened, so it comes first.
        self.write_record(&job.running_record());
        let driver = Driver {
            job: job.clone(),
            hypervisor: self.parts.hypervisor.clone(),
            session,
            events,
            control,
            request,
            members,
            limit_passes,
        };
        let coordinator = self.clone();
        let started = job.clone();
        tokio::spawn(async move {
            let report = driver.run().await;
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
            coordinator.write_record(&Record {
                started_unix_s: job.started_unix_s,
                barrier_approximate: job.view().barrier_approximate,
                report: report.clone(),
            });
            // Freed before anybody sees the end: the next job may come at once.
            drop(reservation);
            job.update(|view| {
                view.state = report.state;
                view.bytes = report.bytes.clone();
                view.switchover_spread_ms = report.switchover_spread_ms;
                for (member, domain) in view.members.iter_mut().zip(&report.domains) {
                    member.state = domain.state.into();
                }
                view.report = Some(report);
            });
        });
        Ok(started)
    }

    /// A libvirt job (dump, save, another migration) would make ours fail half-way.
    async fn check_idle(&self, members: &[DomainInfo]) -> Result<(), ServiceError> {
        for member in members {
            let uuid = member.uuid;
            let stats = ask(&self.parts.hypervisor, move |hypervisor| {
                hypervisor.running_job(uuid)
            })
            .await?;
            if stats.active {
                return Err(ServiceError::Busy(format!(
                    "domain {name} has a libvirt job running already (a migration, save or dump); wait for it or stop it with `virsh domjobabort {name}`",
                    name = member.name
                )));
            }
        }
        Ok(())
    }

    async fn check_destination(
        &self,
        request: &MigrateRequest,
        members: &[DomainInfo],
    ) -> Result<(), ServiceError> {
        let uri = request.destination.uri.clone();
        let unreachable = |reason: String| {
            ServiceError::DestinationUnreachable(format!(
                "the destination's libvirt cannot be used: {reason}; try `virsh -c {uri} list` as root on this host",
                uri = request.destination.uri
            ))
        };
        let asked = ask(&self.parts.hypervisor, move |hypervisor| {
            hypervisor.inspect_destination(&uri)
        });
        let found = tokio::time::timeout(REACH_TIMEOUT, asked)
            .await
            .map_err(|_| unreachable(format!("no answer within {} s", REACH_TIMEOUT.as_secs())))?
            .map_err(|error| unreachable(error.sentence().to_owned()))?;
        let here = ask(&self.parts.hypervisor, |hypervisor| hypervisor.host_uuid())
            .await
            .ok();
        check_room(request, members, &found, here)
    }

    /// And whether QEMU is to be told when it may take itself for done.
    async fn source_options(
        &self,
        id: Uuid,
        request: &MigrateRequest,
        members: &[DomainInfo],
        transport: Transport,
    ) -> Result<(SourceOptions, bool), ServiceError> {
        let uuids: Vec<Uuid> = members.iter().map(|member| member.uuid).collect();
        let emulated_uuids = uuids.clone();
        let (source_host, owners, emulated, limit_passes) =
            ask(&self.parts.hypervisor, move |hypervisor| {
                let owners: Result<Vec<_>, _> = uuids
                    .into_iter()
                    .map(|uuid| hypervisor.domain_qemu_user(uuid))
                    .collect();
                let emulated = emulated_uuids
                    .into_iter()
                    .map(|uuid| hypervisor.domain_is_emulated(uuid))
                    .collect::<Result<Vec<_>, _>>()?;
                Ok((
                    hypervisor.hostname()?,
                    owners?,
                    emulated.contains(&true),
                    hypervisor.takes_switchover_rate()?,
                ))
            })
            .await?;
        let hold = limit_passes || !emulated;
        if !hold {
            tracing::warn!(
                job = id.simple().to_string(),
                "a member's processor is emulated (<domain type='qemu'>) and this libvirt is older than 11.1 or its QEMU older than 8.2: the gang is not held for a common switchover"
            );
        }
        let options = SourceOptions {
            peer: request.peer.clone(),
            transport,
            offer: Offer {
                job: id,
                gang: request.gang().unwrap_or_default().to_owned(),
                source_host,
                window_budget_bytes: window_to_offer(self.parts.window_budget_bytes),
                members: members
                    .iter()
                    .zip(&owners)
                    .map(|(member, owner)| MemberOffer {
                        uuid: member.uuid,
                        name: member.name.clone(),
                        memory_bytes: member.memory_bytes,
                        fixed_owner: owner.fixed.then_some(socket_owner(owner)),
                    })
                    .collect(),
            },
            runtime_dir: self.parts.runtime_dir.clone(),
            socket_owners: owners.iter().map(socket_owner).collect(),
            techniques: request.techniques,
            bandwidth_bytes_per_s: request.bandwidth_bytes_per_s,
            hold,
        };
        Ok((options, limit_passes))
    }

    fn write_record(&self, record: &Record) {
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

    /// Aborts what runs and waits for it, so that the daemon can stop.
    pub async fn shutdown(&self) {
        self.jobs.close();
        let mut running = Vec::new();
        for job in self.jobs.list() {
            if !job.state().ended() && job.control(Control::Abort).is_ok() {
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

/// The source keeps a copy of the window, so its own memory counts as well.
fn window_to_offer(configured_bytes: u64) -> u64 {
    Memory::read().map_or(configured_bytes, |memory| {
        memory.window_to_offer(configured_bytes)
    })
}

/// A few names for the log.
fn shortened(mut names: impl ExactSizeIterator<Item = String>) -> String {
    let shown: Vec<String> = names.by_ref().take(LOGGED_NAMES_MAX).collect();
    match names.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

fn socket_owner(owner: &DomainQemuUser) -> SocketOwner {
    SocketOwner {
        uid: owner.user.uid,
        gid: owner.user.gid,
    }
}

/// What can be told from a look at the destination.
fn check_room(
    request: &MigrateRequest,
    members: &[DomainInfo],
    found: &DestinationInfo,
    here: Option<Uuid>,
) -> Result<(), ServiceError> {
    let uri = &request.destination.uri;
    if here.is_some() && here == found.host_uuid {
        return Err(ServiceError::InvalidDestination(format!(
            "the destination {uri} is this host itself (or a host with the same host_uuid in libvirtd.conf); name the other host"
        )));
    }
    for member in members {
        for there in &found.domains {
            if there.uuid == member.uuid && there.active() {
                return Err(ServiceError::MemberNotMigratable(format!(
                    "domain {} runs on {uri} already; stop it there first",
                    member.name
                )));
            }
            if there.name == member.name && there.uuid != member.uuid {
                return Err(ServiceError::MemberNotMigratable(format!(
                    "another domain named {} exists on {uri}; rename or undefine that one",
                    member.name
                )));
            }
        }
    }
    Ok(())
}
