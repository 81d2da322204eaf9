//! What is checked before a job begins, up to the open session with the peer.
//!
//! Questions that do not need each other's answers are under way at the same time, and the
//! session opens while the destination's libvirt is looked at; which of several problems is told
//! does not depend on who answers first.
//! Must not: change anything that the end of the session does not undo.

use std::future::Future;
use std::num::NonZeroU8;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;
use vmgang_engine::{
    Hold, MemberOffer, Offer, PageKey, Scanned, SocketOwner, SourceOptions, Transport,
};
use vmgang_libvirt::{DomainInfo, DomainQemu, DomainQemuUser, JobStats};

use crate::balloon::{self, Before};
use crate::budget;
use crate::coordinator::Parts;
use crate::error::ServiceError;
use crate::hypervisor::{DestinationInfo, ask};
use crate::libvirt_access::DestinationLibvirt;
use crate::request::{MigrateRequest, Parallel};
use crate::stages::Stage;
use crate::tunnel::Opened;

/// How long the destination's libvirt, or the peer, may take to answer.
pub(crate) const REACH_TIMEOUT: Duration = Duration::from_secs(20);
/// Questions about members that are under way together. A libvirt connection serves five calls
/// at a time, and two are about the host.
const LANES: usize = 3;

/// A job that may begin.
pub(crate) struct Ready {
    pub(crate) opened: Opened,
    /// The destination's.
    pub(crate) libvirt: DestinationLibvirt,
    /// Tell each member's QEMU when it may take itself for done.
    pub(crate) limit_passes: bool,
    /// So many connections of QEMU carry a member's pages, beside its main one.
    pub(crate) parallel: Option<NonZeroU8>,
    pub(crate) window_offered_bytes: u64,
    pub(crate) page_key: PageKey,
    pub(crate) scanned: Scanned,
    /// Members that may be asked to give up memory.
    pub(crate) balloons: Vec<Before>,
    /// What was staged for it, if it is used now.
    pub(crate) taken: Option<Arc<Stage>>,
}

/// Connections of QEMU for a member's pages, where that suits: with more there is more to switch
/// between, and each is a thread on both hosts.
const PAGE_CONNECTIONS: Option<NonZeroU8> = NonZeroU8::new(2);

/// What this host's libvirt tells for the job.
struct Here {
    source_host: String,
    takes_switchover_rate: bool,
    parallel: Option<NonZeroU8>,
    members: Vec<DomainQemu>,
}

pub(crate) struct Preflight<'a> {
    pub(crate) parts: &'a Parts,
    pub(crate) job: Uuid,
    pub(crate) request: &'a MigrateRequest,
    pub(crate) members: &'a [DomainInfo],
}

impl Preflight<'_> {
    /// Checks everything. An error means that nothing has changed, but that a stage may have been
    /// taken, which comes with it.
    pub(crate) async fn run(&self) -> Result<Ready, (ServiceError, Option<Arc<Stage>>)> {
        let mut taken = None;
        match self.check(&mut taken).await {
            Ok(ready) => Ok(Ready { taken, ..ready }),
            Err(error) => Err((error, taken)),
        }
    }

    async fn check(&self, taken: &mut Option<Arc<Stage>>) -> Result<Ready, ServiceError> {
        let began = Instant::now();
        let took = |what: &str| {
            let elapsed_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            tracing::debug!(job = %self.job.simple(), elapsed_ms, "preflight: {what}");
        };
        let transport = (self.parts.transport)().map_err(ServiceError::TlsFailed)?;
        if self.request.tls && matches!(transport, Transport::Plain) {
            return Err(ServiceError::TlsFailed(
                "TLS was asked for, but vmgangd on this host talks to its peers without; take `tls = false` out of vmgang.toml on both hosts and restart vmgangd, or leave the option tls out".into(),
            ));
        }
        let page_key = transport.page_key();
        let scanned = self.scanned(&page_key);
        let access = &self.parts.libvirt_access;
        let libvirt = access.reach(&self.request.destination, &self.request.peer)?;
        let there = self.look_there(&libvirt);
        let host_uuid = ask(&self.parts.hypervisor, |hypervisor| hypervisor.host_uuid());
        let here = self.look_here().await?;
        took("this host's libvirt has answered");

        let balloons = match self.request.balloon {
            true => balloon::look(&self.parts.hypervisor, self.members).await?,
            false => Vec::new(),
        };
        let parallel = here.parallel;
        let (mut options, limit_passes) = self.source_options(here, transport)?;
        let scanned = scanned.await;
        options.scanned = scanned.clone();
        let stages = &self.parts.stages;
        let stage = stages.take(self.request.gang(), &self.request.peer, self.members);
        if let Some((stage, contents)) = stage.await {
            options.stage = Some(contents);
            *taken = Some(stage);
        }
        let window_offered_bytes = options.offer.window_budget_bytes;
        // Dropped, it breaks off what is not open yet.
        let mut connecting = JoinSet::new();
        connecting.spawn(self.connect(options));

        let room = async {
            let there = there.await?;
            took("the destination's libvirt has answered");
            check_room(self.request, self.members, &there, host_uuid.await.ok())
        };
        if let Err(problem) = room.await {
            if let Some(Ok(Ok((session, _)))) = connecting.try_join_next() {
                session.close().await;
            }
            return Err(problem);
        }
        let opened = match connecting.join_next().await {
            Some(Ok(connected)) => connected?,
            Some(Err(_)) | None => {
                return Err(ServiceError::Internal(
                    "opening the session with the peer ended early; see the log of vmgangd".into(),
                ));
            }
        };
        took("the session with the peer is open");
        self.parts.peers.connected(&self.request.peer.to_string());
        Ok(Ready {
            opened,
            libvirt,
            limit_passes,
            parallel,
            window_offered_bytes,
            page_key,
            scanned,
            balloons,
            taken: None,
        })
    }

    /// What the destination's libvirt alone has against the job.
    pub(crate) async fn try_there(&self) -> Result<DestinationLibvirt, ServiceError> {
        let access = &self.parts.libvirt_access;
        let libvirt = access.reach(&self.request.destination, &self.request.peer)?;
        let host_uuid = ask(&self.parts.hypervisor, |hypervisor| hypervisor.host_uuid());
        let there = self.look_there(&libvirt).await?;
        check_room(self.request, self.members, &there, host_uuid.await.ok())?;
        Ok(libvirt)
    }

    /// What the peer alone has against the job, in a session that ends at once. Without members it is
    /// asked about a guest that needs nothing.
    pub(crate) async fn try_peer(&self) -> Result<(), ServiceError> {
        let transport = (self.parts.transport)().map_err(ServiceError::TlsFailed)?;
        let here = self.look_here().await?;
        let (mut options, _) = self.source_options(here, transport)?;
        if options.offer.members.is_empty() {
            options.offer.members.push(MemberOffer {
                uuid: self.job,
                name: String::new(),
                memory_bytes: 0,
                fixed_owner: None,
            });
            options.socket_owners.push(SocketOwner { uid: 0, gid: 0 });
        }
        let (session, _) = self.connect(options).await?;
        session.close().await;
        Ok(())
    }

    /// Opens the session with the peer.
    fn connect(
        &self,
        options: SourceOptions,
    ) -> impl Future<Output = Result<Opened, ServiceError>> + use<> {
        let (tunnel, peer) = (self.parts.tunnel.clone(), self.request.peer.clone());
        async move {
            match timeout(REACH_TIMEOUT, tunnel.connect(options)).await {
                Ok(connected) => Ok(connected?),
                Err(_) => Err(ServiceError::PeerUnreachable(format!(
                    "vmgangd at {peer} did not answer within {} s; check that it runs there and that no firewall is in between",
                    REACH_TIMEOUT.as_secs()
                ))),
            }
        }
    }

    /// What is known of the members' memory. Nothing is scanned for it. Begins at once.
    fn scanned(&self, key: &PageKey) -> impl Future<Output = Scanned> + use<> {
        let scans = self.members.iter();
        let scans = scans.map(|member| self.parts.scans.last(member.uuid, key));
        let snapshots: Vec<_> = scans.map(|scan| scan.map(|scan| scan.snapshot)).collect();
        let known = snapshots.iter().any(Option::is_some);
        let key = key.clone();
        let counting =
            known.then(|| tokio::task::spawn_blocking(move || Scanned::new(&key, snapshots)));
        async move {
            match counting {
                Some(counting) => counting.await.unwrap_or_default(),
                None => Scanned::default(),
            }
        }
    }

    /// Opens the destination's libvirt and looks around. Begins at once.
    fn look_there(
        &self,
        libvirt: &DestinationLibvirt,
    ) -> impl Future<Output = Result<DestinationInfo, ServiceError>> + use<> {
        let libvirt = libvirt.clone();
        let uri = libvirt.uri().to_owned();
        let asked = ask(&self.parts.hypervisor, move |hypervisor| {
            hypervisor.inspect_destination(&uri)
        });
        let answer = timeout(REACH_TIMEOUT, asked);
        let destination = self.request.destination.clone();
        async move {
            let unreachable = |reason: String| {
                if let Some(problem) = libvirt.problem() {
                    return problem;
                }
                let advice = match &destination.uri {
                    Some(uri) => format!("try `virsh -c {uri} list` as root on this host"),
                    None => format!("look into the log of its daemon on {}", destination.host),
                };
                ServiceError::DestinationUnreachable(format!(
                    "the destination's libvirt cannot be used: {reason}; {advice}"
                ))
            };
            answer
                .await
                .map_err(|_| {
                    unreachable(format!("no answer within {} s", REACH_TIMEOUT.as_secs()))
                })?
                .map_err(|error| unreachable(error.sentence().to_owned()))
        }
    }

    async fn look_here(&self) -> Result<Here, ServiceError> {
        let hypervisor = &self.parts.hypervisor;
        let request = self.request;
        let post_copy = request.policy.can_post_copy() || request.post_copy_resume;
        let wanted = request.parallel;
        let host = ask(hypervisor, move |hypervisor| {
            // In post-copy only if somebody asks for it: there it is newer than multifd itself.
            let (parallel, goes) = match wanted {
                Parallel::No => (None, true),
                Parallel::Connections(number) => (
                    Some(number),
                    !post_copy || hypervisor.post_copy_goes_parallel()?,
                ),
                Parallel::AsSuits => {
                    let suits = !post_copy && hypervisor.pages_go_parallel()?;
                    (PAGE_CONNECTIONS.filter(|_| suits), true)
                }
            };
            let rate = hypervisor.takes_switchover_rate()?;
            Ok((hypervisor.hostname()?, rate, parallel, goes))
        });
        let lane_members = self.members.len().div_ceil(LANES).max(1);
        let lanes: Vec<_> = self
            .members
            .chunks(lane_members)
            .map(|lane| {
                let uuids: Vec<Uuid> = lane.iter().map(|member| member.uuid).collect();
                let asked = ask(hypervisor, move |hypervisor| {
                    let about =
                        |uuid| Ok((hypervisor.running_job(uuid)?, hypervisor.domain_qemu(uuid)?));
                    uuids.into_iter().map(about).collect::<Result<Vec<_>, _>>()
                });
                (lane, asked)
            })
            .collect();
        let mut members = Vec::with_capacity(self.members.len());
        for (lane, asked) in lanes {
            for (member, (job, qemu)) in lane.iter().zip(asked.await?) {
                // A broken post-copy is a job that waits to go on.
                if !request.post_copy_resume {
                    check_idle(member, &job)?;
                }
                members.push(qemu);
            }
        }
        let (source_host, takes_switchover_rate, parallel, post_copy_goes_parallel) = host.await?;
        if !post_copy_goes_parallel {
            return Err(ServiceError::InvalidOption(
                "the option parallel does not go with post-copy before QEMU 10.1, and this host's is older; leave one of them out".into(),
            ));
        }
        Ok(Here {
            source_host,
            takes_switchover_rate,
            parallel,
            members,
        })
    }

    /// And whether QEMU is to be told when it may take itself for done.
    fn source_options(
        &self,
        here: Here,
        transport: Transport,
    ) -> Result<(SourceOptions, bool), ServiceError> {
        let policy = &self.request.policy;
        let hold = match self.members.len() {
            members if policy.holds(members) => Hold::Anything,
            members if policy.takes_turns(members) => Hold::Ack,
            _ => Hold::Nothing,
        };
        let held = hold != Hold::Nothing;
        let limit_passes = held && here.takes_switchover_rate;
        let can_hold = limit_passes || !here.members.iter().any(|member| member.emulated);
        if held && !can_hold {
            tracing::warn!(
                job = %self.job.simple(),
                "a member's processor is emulated (<domain type='qemu'>) and this libvirt is older than 11.1 or its QEMU older than 8.2: nobody is held: each switches over when QEMU finds it ready"
            );
        }
        let hold = if can_hold { hold } else { Hold::Nothing };
        let members: Vec<MemberOffer> = self
            .members
            .iter()
            .zip(&here.members)
            .map(|(member, qemu)| MemberOffer {
                uuid: member.uuid,
                name: member.name.clone(),
                memory_bytes: member.memory_bytes,
                fixed_owner: qemu.user.fixed.then_some(socket_owner(&qemu.user)),
            })
            .collect();
        let owners = here.members.iter().map(|qemu| socket_owner(&qemu.user));
        let options = SourceOptions {
            peer: self.request.peer.clone(),
            transport,
            offer: Offer {
                job: self.job,
                gang: self.request.gang().unwrap_or_default().to_owned(),
                source_host: here.source_host,
                window_budget_bytes: self.window_to_offer(&members)?,
                members,
            },
            runtime_dir: self.parts.runtime_dir.clone(),
            socket_owners: owners.collect(),
            techniques: self.request.techniques,
            workers: self.parts.workers.clone(),
            network: vmgang_engine::system(),
            connections: self.parts.connections,
            scanned: Scanned::default(),
            stage: None,
            keep_contents: self.parts.contents.keeps(),
            bandwidth_bytes_per_s: self.request.bandwidth_bytes_per_s,
            hold,
        };
        Ok((options, limit_passes))
    }

    fn window_to_offer(&self, members: &[MemberOffer]) -> Result<u64, ServiceError> {
        let available = (self.parts.available_memory)().map_err(|error| {
            ServiceError::Internal(format!(
                "this host's /proc/meminfo cannot be read: {error}; is /proc mounted?"
            ))
        })?;
        let guests = members.iter().fold(0, |sum: u64, member| {
            sum.saturating_add(member.memory_bytes)
        });
        Ok(budget::to_offer(
            self.parts.window_budget,
            guests,
            available,
        ))
    }
}

/// A libvirt job (dump, save, another migration) would make ours fail half-way.
fn check_idle(member: &DomainInfo, job: &JobStats) -> Result<(), ServiceError> {
    if job.active {
        return Err(ServiceError::Busy(format!(
            "domain {name} has a libvirt job running already (a migration, save or dump); wait for it or stop it with `virsh domjobabort {name}`",
            name = member.name
        )));
    }
    Ok(())
}

fn socket_owner(owner: &DomainQemuUser) -> SocketOwner {
    SocketOwner {
        uid: owner.user.uid,
        gid: owner.user.gid,
    }
}

/// Versions of libvirt that crash when they are asked to go on with a post-copy that arrives (they read
/// through a null pointer): seen with 11.3.0.
const RESUME_CRASHES: std::ops::Range<u32> = 11_003_000..11_004_000;

/// What can be told from a look at the destination.
fn check_room(
    request: &MigrateRequest,
    members: &[DomainInfo],
    found: &DestinationInfo,
    here: Option<Uuid>,
) -> Result<(), ServiceError> {
    let uri = &request.destination;
    if here.is_some() && here == found.host_uuid {
        return Err(ServiceError::InvalidDestination(format!(
            "the destination {uri} is this host itself (or a host with the same host_uuid in libvirtd.conf); name the other host"
        )));
    }
    if let Some(version) = found.libvirt_version
        && request.post_copy_resume
        && RESUME_CRASHES.contains(&version)
    {
        return Err(ServiceError::InvalidDestination(format!(
            "libvirt 11.3 on {uri} crashes when it is asked to go on with a post-copy; put another version there, which does not touch the guests, and try again"
        )));
    }
    for member in members {
        for there in &found.domains {
            if there.uuid == member.uuid && there.active && !request.post_copy_resume {
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
