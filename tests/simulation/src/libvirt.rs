//! The libvirts of both hosts: peer-to-peer migration step by step as libvirt's third protocol has
//! it, and the service's `Hypervisor` over that.
//!
//! Owns: who lets a guest run. Must not: know daemons, but for those that ask it; one that has died
//! asks in vain.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::sleep;
use uuid::Uuid;
use vmgang_libvirt::{
    Balloon, DomainInfo, DomainQemu, DomainQemuUser, DomainState, Failure, Fit, Hardware, JobStats,
    LibvirtError, ListedDomain, Membership, MigrateOptions, QemuUser, Versions,
};
use vmgang_service::hypervisor::{DestinationFit, DestinationInfo, Hypervisor, Verdict};

use crate::network::listen;
use crate::qemu;
use crate::world::{Guest, Here, Life, There, World, below_migrate};

/// One host's libvirt, as one daemon there uses it.
#[derive(Clone)]
pub struct Libvirt {
    pub world: Arc<World>,
    pub life: Arc<Life>,
    pub on_source: bool,
    pub user: QemuUser,
    /// The destination daemon's runtime directory.
    pub there_dir: PathBuf,
}

fn failed(domain: &str, message: impl Into<String>) -> LibvirtError {
    LibvirtError::Domain {
        action: "migrate",
        domain: domain.to_owned(),
        failure: Failure {
            code: 1,
            message: message.into(),
        },
    }
}

impl Libvirt {
    /// A daemon that is not there asks nothing.
    fn asked(&self) -> Result<(), LibvirtError> {
        match self.life.alive() {
            true => Ok(()),
            false => Err(LibvirtError::Host {
                action: "ask",
                failure: Failure {
                    code: 38,
                    message: "the daemon that asks has died".to_owned(),
                },
            }),
        }
    }

    /// Suspends a guest here, or lets it go on.
    fn pause(&self, uuid: Uuid, paused: bool) -> Result<(), LibvirtError> {
        let info = self.domain(uuid)?;
        let member = self.world.member(uuid).unwrap_or_default();
        let (here, migrating) = {
            let guest = self.world.guest(member);
            (guest.here, guest.migrating)
        };
        if migrating {
            return Err(failed(&info.name, "it migrates"));
        }
        match (here, paused) {
            (Here::Running, true) => self.world.set_here(member, Here::Paused),
            (Here::Paused, false) => self.world.set_here(member, Here::Running),
            _ => {}
        }
        Ok(())
    }

    fn info(&self, guest: &Guest) -> DomainInfo {
        let state = match (self.on_source, guest.here, guest.there) {
            (true, Here::Running, _) | (false, _, There::Running) => DomainState::Running,
            (true, Here::Paused, _) | (false, _, There::Incoming | There::Loaded) => {
                DomainState::Paused
            }
            _ => DomainState::ShutOff,
        };
        DomainInfo {
            name: guest.name.clone(),
            uuid: guest.uuid,
            id: (state != DomainState::ShutOff).then_some(1),
            state,
            persistent: true,
            memory_bytes: 0,
            membership: Ok(None),
        }
    }
}

impl Hypervisor for Libvirt {
    fn answers_at_once(&self) -> bool {
        true
    }
    fn hostname(&self) -> Result<String, LibvirtError> {
        self.asked()?;
        Ok(if self.on_source { "a" } else { "b" }.into())
    }
    fn host_uuid(&self) -> Result<Uuid, LibvirtError> {
        self.asked()?;
        Ok(Uuid::from_u128(if self.on_source { 1 } else { 2 }))
    }
    fn domains(&self) -> Result<Vec<DomainInfo>, LibvirtError> {
        self.asked()?;
        let guests = self.world.guests().enumerate();
        Ok(guests
            .map(|(member, guest)| DomainInfo {
                memory_bytes: (self.world.plan.guests[member].pages * 4096) as u64,
                ..self.info(&guest)
            })
            .collect())
    }
    fn running(&self) -> Result<Vec<Uuid>, LibvirtError> {
        let running = self.domains()?.into_iter();
        let running = running.filter(|domain| domain.state == DomainState::Running);
        Ok(running.map(|domain| domain.uuid).collect())
    }
    fn domain(&self, uuid: Uuid) -> Result<DomainInfo, LibvirtError> {
        let mut domains = self.domains()?.into_iter();
        let found = domains.find(|domain| domain.uuid == uuid);
        found.ok_or(LibvirtError::NoSuchDomain {
            domain: uuid.to_string(),
        })
    }
    fn set_membership(&self, _: Uuid, _: Option<&Membership>) -> Result<(), LibvirtError> {
        self.asked()
    }
    fn qemu_user(&self) -> Result<QemuUser, LibvirtError> {
        self.asked()?;
        Ok(self.user)
    }
    fn domain_qemu(&self, _: Uuid) -> Result<DomainQemu, LibvirtError> {
        Ok(DomainQemu {
            user: DomainQemuUser {
                user: self.qemu_user()?,
                fixed: false,
            },
            emulated: false,
        })
    }
    fn takes_switchover_rate(&self) -> Result<bool, LibvirtError> {
        self.asked()?;
        Ok(true)
    }
    fn set_max_downtime(&self, uuid: Uuid, limit_ms: u64) -> Result<(), LibvirtError> {
        let info = self.domain(uuid)?;
        let member = self.world.member(uuid).unwrap_or_default();
        let set = {
            let mut guest = self.world.guest(member);
            guest.limit_ms = limit_ms;
            guest.migrating
        };
        self.world
            .step(format_args!("guest {member}: downtime {limit_ms} ms"));
        match set {
            true => Ok(()),
            false => Err(failed(&info.name, "no migration job is active")),
        }
    }
    fn pages_go_parallel(&self) -> Result<bool, LibvirtError> {
        Ok(true)
    }

    fn post_copy_goes_parallel(&self) -> Result<bool, LibvirtError> {
        self.asked()?;
        Ok(true)
    }
    fn start_post_copy(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let info = self.domain(uuid)?;
        Err(failed(&info.name, "post-copy is not simulated"))
    }
    fn suspend(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.pause(uuid, true)
    }
    fn resume(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.pause(uuid, false)
    }
    fn balloon(&self, _: Uuid) -> Result<Option<Balloon>, LibvirtError> {
        self.asked()?;
        Ok(None)
    }
    fn set_balloon_period(&self, _: Uuid, _: u32) -> Result<(), LibvirtError> {
        self.asked()
    }
    fn set_memory(&self, _: Uuid, _: u64) -> Result<(), LibvirtError> {
        self.asked()
    }
    fn restore_memory(&self, _: &str, _: Uuid, _: u64, _: u32) -> Result<(), LibvirtError> {
        self.asked()
    }
    fn running_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError> {
        self.asked()?;
        let member = self.world.member(uuid).unwrap_or_default();
        Ok(JobStats {
            active: self.world.guest(member).migrating,
            ..JobStats::default()
        })
    }
    fn completed_job(&self, _: Uuid) -> Result<JobStats, LibvirtError> {
        self.asked()?;
        Ok(JobStats {
            downtime_ms: (!self.on_source).then_some(5),
            ..JobStats::default()
        })
    }
    fn versions(&self) -> Result<Versions, LibvirtError> {
        Ok(Versions::default())
    }
    fn hardware(&self, _: Uuid) -> Result<Hardware, LibvirtError> {
        Ok(Hardware::default())
    }
    fn fit_destination(
        &self,
        _: &str,
        hardware: &[Hardware],
    ) -> Result<DestinationFit, LibvirtError> {
        Ok(DestinationFit {
            versions: Versions::default(),
            fits: vec![Fit::Fits; hardware.len()],
        })
    }
    fn inspect_destination(&self, _: &str) -> Result<DestinationInfo, LibvirtError> {
        self.asked()?;
        let there = |guest: &Guest| ListedDomain {
            name: guest.name.clone(),
            uuid: guest.uuid,
            active: guest.there != There::Nothing,
        };
        let guests = self.world.guests();
        Ok(DestinationInfo {
            host_uuid: Some(Uuid::from_u128(2)),
            libvirt_version: None,
            domains: guests
                .map(|guest| there(&guest))
                .filter(|domain| domain.active)
                .collect(),
        })
    }
    fn migrate(
        &self,
        uuid: Uuid,
        name: &str,
        options: MigrateOptions,
    ) -> Result<Verdict, LibvirtError> {
        self.asked()?;
        let member = self.world.member(uuid).unwrap_or_default();
        let (done, verdict) = oneshot::channel();
        let (world, there_dir) = (self.world.clone(), self.there_dir.clone());
        let life = self.life.clone();
        let name = name.to_owned();
        let socket = options.migrate_uri.trim_start_matches("unix://").to_owned();
        let domain = name.clone();
        world.guest(member).called = true;
        // In libvirtd, whatever becomes of the daemon.
        tokio::spawn(async move {
            let result = migrate(&world, member, Path::new(&socket), &there_dir).await;
            world.verdict(member, &result);
            let _ = done.send(result.map_err(|error| failed(&domain, error)));
            if world.runs_twice(member) {
                sleep(MISTAKEN).await;
                if world.runs_twice(member) && life.alive() {
                    world.wrong(format!("guest {member} goes on in two places"));
                }
            }
        });
        Ok(Box::pin(async move {
            verdict
                .await
                .unwrap_or(Err(LibvirtError::ThreadLost { domain: name }))
        }))
    }
    fn abort_job(&self, uuid: Uuid, answered: &AtomicBool) -> Result<(), LibvirtError> {
        let info = self.domain(uuid)?;
        if answered.load(SeqCst) {
            return Ok(());
        }
        let member = self.world.member(uuid).unwrap_or_default();
        if !self.world.guest(member).migrating {
            return Err(failed(&info.name, "no job is active on the domain"));
        }
        let world = self.world.clone();
        let delay = world.random().below(world.plan.abort_ms + 1);
        tokio::spawn(async move {
            sleep(Duration::from_millis(delay)).await;
            world.step(format_args!("libvirt cancels {member}"));
            world.guest(member).cancelled.send_replace(true);
        });
        Ok(())
    }
}

/// How long a guest may run twice by libvirt's mistake.
const MISTAKEN: Duration = Duration::from_secs(1);

/// Prepare, perform, finish, confirm.
async fn migrate(
    world: &Arc<World>,
    member: usize,
    socket: &Path,
    there_dir: &Path,
) -> Result<(), String> {
    let pause = || {
        let ms = world.random().below(4);
        sleep(Duration::from_millis(ms))
    };
    {
        let mut guest = world.guest(member);
        guest.written.clear();
        guest.returned.clear();
        (guest.read, guest.return_read, guest.whole) = (0, 0, false);
        (guest.first_pass_done, guest.ack_said) = (false, false);
        guest.cancelled.send_replace(false);
        guest.destination_dies.send_replace(false);
    }
    if world.guest(member).here != Here::Running {
        return Err("domain is not running".to_owned());
    }
    pause().await;
    let far = there_dir.join(below_migrate(socket));
    let accepting =
        listen(world, &far, None).map_err(|error| format!("Failed to bind socket: {error}"))?;
    world.set_there(member, There::Incoming);
    // Dropped, it is a QEMU that was killed.
    let mut incoming = tokio::task::JoinSet::new();
    incoming.spawn({
        let mut dies = world.guest(member).destination_dies.subscribe();
        let qemu = qemu::destination(world.clone(), member, accepting);
        async move {
            tokio::select! {
                biased;
                _ = dies.wait_for(|dies| *dies) => {}
                () = qemu => {}
            }
        }
    });
    pause().await;
    world.guest(member).migrating = true;
    let performed = qemu::source(world, member, socket).await;
    world.guest(member).migrating = false;
    if world.guest(member).here == Here::Dead {
        incoming.shutdown().await;
        world.set_there(member, There::Nothing);
        return Err("the source QEMU has ended unexpectedly".to_owned());
    }
    pause().await;
    let loaded = world.guest(member).there == There::Loaded;
    let finished = match performed {
        Ok(()) if loaded && !*world.guest(member).destination_dies.borrow() => {
            world.set_there(member, There::Running);
            Ok(())
        }
        Ok(()) => Err("the guest could not be started there".to_owned()),
        Err(error) => Err(error),
    };
    pause().await;
    match finished {
        Ok(()) if world.plan.verdict_lost == Some(member) => {
            // libvirt takes that for a failure, and lets it go on here.
            world.goes_on_by_mistake(member);
            Err("the connection to the destination's libvirtd was lost".to_owned())
        }
        Ok(()) => {
            world.set_here(member, Here::Gone);
            Ok(())
        }
        Err(error) => {
            incoming.shutdown().await;
            world.set_there(member, There::Nothing);
            pause().await;
            if world.guest(member).here == Here::Dead {
                return Err("the source QEMU has ended unexpectedly".to_owned());
            }
            world.set_here(member, Here::Running);
            Err(error)
        }
    }
}
