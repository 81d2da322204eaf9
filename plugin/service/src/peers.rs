//! The destination half: whom to admit, with how much memory, and which peers were seen.
//! Runs on the engine's blocking pool, so it may ask libvirt directly.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;
use vmgang_engine::{
    Admission, DestinationHost, MemberOutcome, Offer, PageKey, PeerName, Purpose, ServeControl,
    SocketOwner,
};
use vmgang_hook::Expected;
use vmgang_libvirt::{DomainState, LibvirtError};

use crate::access::Access;
use crate::announcements::Announcements;
use crate::budget;
use crate::config::{WINDOW_BUDGET_MIN_BYTES, WindowBudget};
use crate::coordinator::Coordinator;
use crate::hypervisor::Hypervisor;
use crate::memory::AvailableMemory;
use crate::metrics::Incoming;
use crate::recall::Contents;
use crate::stages::Stages;

/// Peers this daemon has talked to since it started.
#[derive(Debug, Default)]
pub struct Peers {
    seen: Mutex<BTreeSet<String>>,
}

impl Peers {
    /// Notes a peer that this host connected to.
    pub fn connected(&self, address: &str) {
        self.note(address.to_owned());
    }

    fn connected_from(&self, peer: &PeerName) {
        self.note(describe(peer));
    }

    fn note(&self, peer: String) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(peer);
    }

    pub fn list(&self) -> Vec<String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.iter().cloned().collect()
    }
}

/// Decides about jobs that other hosts offer to this one.
pub struct Admittance {
    pub hypervisor: Arc<dyn Hypervisor>,
    pub peers: Arc<Peers>,
    pub access: Arc<Access>,
    /// Where this host's libvirt may listen.
    pub libvirt_sockets: Vec<PathBuf>,
    pub window_budget: WindowBudget,
    /// TCP connections of a session at most.
    pub connections: NonZeroUsize,
    /// What ambient migrations may call this host; `None` if it takes none.
    pub ambient_names: Option<Vec<String>>,
    pub available_memory: Box<AvailableMemory>,
    pub sessions: Mutex<BTreeMap<Uuid, Promised>>,
    pub stages: Arc<Stages>,
    pub contents: Arc<Contents>,
    /// Whom libvirt's hook has announced.
    pub announcements: Arc<Announcements>,
    /// Where the hook sees who comes through this daemon; `None`: nowhere.
    pub expected: Option<Expected>,
    /// Does what peers ask for; `None`: nothing.
    pub coordinator: Option<Arc<Coordinator>>,
    /// What digests are made with now, if it is known.
    pub page_key: Box<dyn Fn() -> Option<PageKey> + Send + Sync>,
}

/// What a live session was promised.
#[derive(Debug)]
pub struct Promised {
    source: String,
    /// Each guest's memory.
    guests: Vec<(Uuid, u64)>,
    window_bytes: u64,
}

impl Promised {
    /// What may still be taken of it. A guest that runs here already has its memory: that is not
    /// available any more. One on its way, and the window, count in full, though a part of them
    /// may have come: too careful, never too little.
    fn outstanding_bytes(&self, running: &BTreeSet<Uuid>) -> u64 {
        let guests = self
            .guests
            .iter()
            .filter(|(uuid, _)| !running.contains(uuid))
            .map(|(_, bytes)| *bytes);
        guests.fold(self.window_bytes, u64::saturating_add)
    }
}

impl DestinationHost for Admittance {
    fn admit(&self, offer: &Offer, purpose: Purpose, peer: &PeerName) -> Result<Admission, String> {
        self.access.check_peer(peer)?;
        if purpose == Purpose::Ambient {
            self.check_ambient(offer)?;
        }
        let user = self
            .hypervisor
            .qemu_user()
            .map_err(|error| format!("the destination does not know its QEMU user: {error}"))?;
        let window_budget_bytes = self.promise(offer, purpose)?;
        self.peers.connected_from(peer);
        tracing::info!(
            job = %offer.job.simple(), gang = offer.gang, source = offer.source_host,
            peer = describe(peer), members = offer.members.len(),
            window_offered_bytes = offer.window_budget_bytes,
            window_granted_bytes = window_budget_bytes,
            ?purpose, "incoming gang admitted"
        );
        match purpose {
            Purpose::Stage { seconds } => self.stages.arrives(offer, seconds),
            Purpose::Migrate { .. } | Purpose::Ambient => self.expect(offer),
        }
        let key = (self.page_key)();
        Ok(Admission {
            window_budget_bytes,
            socket_owner: SocketOwner {
                uid: user.uid,
                gid: user.gid,
            },
            connections: self.connections,
            recall: key.and_then(|key| self.contents.for_job(offer, &key)),
        })
    }

    fn announced(&self, member: Uuid) -> Result<(), String> {
        if self.announcements.is_arriving(member) {
            tracing::debug!(%member, "announced by libvirt's hook");
            return Ok(());
        }
        // No hook, or its message was lost.
        match self.hypervisor.domain(member) {
            // Paused while it arrives. One that goes on in post-copy runs, and has no hook called again.
            Ok(domain) if domain.active() => {
                tracing::debug!(%member, "libvirt says that it is arriving");
                Ok(())
            }
            Ok(_) | Err(LibvirtError::NoSuchDomain { .. }) => {
                Err("libvirt there has not announced this domain".to_owned())
            }
            Err(error) => Err(format!(
                "libvirt there cannot say whether it comes: {error}"
            )),
        }
    }

    fn announced_by_name(&self, member: Uuid, name: &str) -> Result<(), String> {
        self.announced(member)?;
        match self.hypervisor.domain(member) {
            // A guest that arrives does not run yet.
            Ok(domain) if domain.name == name && domain.state == DomainState::Paused => Ok(()),
            Ok(_) => Err(format!(
                "libvirt there has not announced a domain '{name}' with that UUID"
            )),
            Err(error) => Err(format!(
                "libvirt there cannot say whether it comes: {error}"
            )),
        }
    }

    fn staged(&self, job: Uuid, contents: u64, found: u64) {
        self.stages.grows(job, contents, found);
    }

    fn outcome(&self, member: Uuid) -> Option<MemberOutcome> {
        let stats = self.hypervisor.completed_job(member).ok()?;
        Some(MemberOutcome {
            downtime_ms: stats.downtime_ms,
            iterations: stats.iterations,
            memory_bytes: stats.memory_total_bytes,
        })
    }

    fn libvirt_sockets(&self, peer: &PeerName) -> Result<Vec<PathBuf>, String> {
        self.access.check_libvirt(peer)?;
        self.peers.connected_from(peer);
        Ok(self.libvirt_sockets.clone())
    }

    fn control(&self, peer: PeerName) -> Result<ServeControl, String> {
        self.access.check_control(&peer)?;
        self.peers.connected_from(&peer);
        let Some(coordinator) = self.coordinator.clone() else {
            return Err("this host takes requests from nobody".to_owned());
        };
        Ok(Box::new(move |connection| {
            Box::pin(coordinator.obey(peer, connection))
        }))
    }

    fn session_ended(&self, job: Uuid) {
        self.stages.leaves(job);
        if let Some(expected) = &self.expected {
            expected.forget(job);
        }
        let ended = self.sessions().remove(&job);
        let source = ended.map(|session| {
            let guests = session.guests.iter().map(|(uuid, _)| *uuid);
            self.announcements.forget(guests);
            session.source
        });
        tracing::info!(job = %job.simple(), source, "incoming gang's session ended");
    }
}

impl Admittance {
    /// Whether migrations that a client starts by itself may come, under that name.
    fn check_ambient(&self, offer: &Offer) -> Result<(), String> {
        match &self.ambient_names {
            Some(names) if names.contains(&offer.gang) => Ok(()),
            Some(names) => Err(format!(
                "the destination is not called '{}' but '{}' in the paths of ambient migrations; name it so in [ambient] of vmgang.toml here, or set `names` there",
                offer.gang,
                names.join("' or '")
            )),
            None => Err("ambient migrations are off at the destination; name its peers in [ambient] of its vmgang.toml".to_owned()),
        }
    }

    /// Lets the hook know that these come through vmgang.
    fn expect(&self, offer: &Offer) {
        let members: Vec<Uuid> = offer.members.iter().map(|member| member.uuid).collect();
        if let Some(expected) = &self.expected
            && let Err(error) = expected.expect(offer.job, &members)
        {
            // Without a policy it makes no difference; with one the hook refuses, and says why.
            tracing::warn!(job = %offer.job.simple(), %error, "cannot tell libvirt's hook who is coming");
        }
    }

    /// What is promised to sessions that are open now.
    pub fn promised(&self) -> Incoming {
        let sessions = self.sessions();
        Incoming {
            sessions: sessions.len(),
            window_bytes: sessions.values().fold(0, |sum: u64, session| {
                sum.saturating_add(session.window_bytes)
            }),
        }
    }

    /// Whether a gang is on its way to here.
    pub fn is_busy(&self) -> bool {
        !self.sessions().is_empty()
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<Uuid, Promised>> {
        // Each change is one insert or remove, whole even if a thread died around it.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guests that run here. Nobody waits for the sessions while libvirt is asked.
    fn running(&self) -> BTreeSet<Uuid> {
        if self.sessions().is_empty() {
            return BTreeSet::new();
        }
        match self.hypervisor.running() {
            Ok(running) => running.into_iter().collect(),
            Err(error) => {
                tracing::debug!(%error, "cannot tell which promised guests have arrived");
                BTreeSet::new()
            }
        }
    }

    /// Checks the memory and takes it in one step, so that two offers never get the same.
    fn promise(&self, offer: &Offer, purpose: Purpose) -> Result<u64, String> {
        let running = self.running();
        let mut sessions = self.sessions();
        if sessions.contains_key(&offer.job) {
            return Err(format!(
                "the destination has a session for the job {} already; start the migration again",
                offer.job.simple()
            ));
        }
        let available = (self.available_memory)()
            .map_err(|error| format!("the destination cannot read its /proc/meminfo: {error}"))?;
        // What was staged for it becomes its own: the window stays what it is.
        let stage = match purpose {
            Purpose::Migrate { stage: Some(stage) } => sessions.get(&stage),
            _ => None,
        };
        let taken = stage.map_or(0, |stage| stage.window_bytes);
        let promised = sessions.values().fold(0, |sum: u64, session| {
            sum.saturating_add(session.outstanding_bytes(&running))
        });
        let promised = promised.saturating_sub(taken);
        let guests: Vec<(Uuid, u64)> = offer
            .members
            .iter()
            .map(|member| (member.uuid, member.memory_bytes))
            .collect();
        let guests_bytes = guests
            .iter()
            .fold(0, |sum: u64, (_, bytes)| sum.saturating_add(*bytes));
        let left = available.saturating_sub(promised);
        // Of all that run at the source a few may come, and libvirt sees to their memory.
        let left = match purpose {
            Purpose::Ambient => left.saturating_add(guests_bytes),
            Purpose::Migrate { .. } | Purpose::Stage { .. } => left,
        };
        let granted = grant(
            self.window_budget,
            offer.window_budget_bytes,
            guests_bytes,
            left,
        );
        // A part of it is filled, and not available for that reason.
        let granted = match granted {
            Ok(_) if taken > 0 && taken <= offer.window_budget_bytes => Ok(taken),
            granted => granted,
        };
        let window_bytes = granted.map_err(|error| match promised {
            0 => error,
            _ => format!(
                "{error} (other jobs on their way there need {} MiB)",
                mib(promised)
            ),
        })?;
        tracing::debug!(
            job = %offer.job.simple(), available_bytes = available, promised_bytes = promised,
            window_offered_bytes = offer.window_budget_bytes, window_granted_bytes = window_bytes,
            "memory promised"
        );
        let promised = Promised {
            source: offer.source_host.clone(),
            // A stage brings none yet, and of an ambient session's nobody knows who comes.
            guests: match purpose {
                Purpose::Migrate { .. } => guests,
                Purpose::Stage { .. } | Purpose::Ambient => Vec::new(),
            },
            window_bytes,
        };
        sessions.insert(offer.job, promised);
        Ok(window_bytes)
    }
}

/// A peer by its address and the names it has shown.
pub(crate) fn describe(peer: &PeerName) -> String {
    let ip = unmapped(peer.address);
    if peer.certificate_names.is_empty() {
        ip
    } else {
        format!("{ip} ({})", peer.certificate_names.join(", "))
    }
}

/// IPv4 peers of a dual-stack listener, as people write them.
fn unmapped(address: SocketAddr) -> String {
    address.ip().to_canonical().to_string()
}

/// The window a job gets, or why it gets none.
fn grant(limit: WindowBudget, offered: u64, guests: u64, available: u64) -> Result<u64, String> {
    budget::to_grant(limit, offered, guests, available).ok_or_else(|| {
        format!(
            "the destination has {} MiB of memory available, but the guests need {} MiB and the page window at least {} MiB; free memory there or migrate fewer domains",
            mib(available),
            mib(guests),
            mib(WINDOW_BUDGET_MIN_BYTES)
        )
    })
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_how_much_is_missing() {
        const GIB: u64 = 1 << 30;
        let error = grant(WindowBudget::Auto, GIB, GIB, GIB).expect_err("too little");
        assert!(
            error.contains("1024 MiB") && error.contains("64 MiB"),
            "{error}"
        );
    }

    #[test]
    fn what_has_arrived_is_not_promised_any_more() {
        let [a, b] = [1, 2].map(Uuid::from_u128);
        let promised = Promised {
            source: "a".into(),
            guests: vec![(a, 100), (b, 20)],
            window_bytes: 3,
        };
        let outstanding =
            |running: &[Uuid]| promised.outstanding_bytes(&running.iter().copied().collect());
        assert_eq!(outstanding(&[]), 123);
        assert_eq!(outstanding(&[a, Uuid::from_u128(3)]), 23);
        assert_eq!(outstanding(&[a, b]), 3, "the session goes on");
    }
}
