//! The destination half: whom to admit, with how much memory, and which peers were seen.
//! Runs on the engine's blocking pool, so it may ask libvirt directly.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;
use vmgang_engine::{Admission, DestinationHost, MemberOutcome, Offer, PeerName, SocketOwner};
use wildmatch::WildMatch;

use crate::config::WINDOW_BUDGET_MIN_BYTES;
use crate::hypervisor::Hypervisor;
use crate::memory::Memory;

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
    pub allow_peers: Vec<String>,
    pub window_budget_bytes: u64,
    pub memory: Box<dyn Fn() -> std::io::Result<Memory> + Send + Sync>,
    pub sessions: Mutex<BTreeMap<Uuid, Promised>>,
}

/// What a live session was promised.
#[derive(Debug)]
pub struct Promised {
    source: String,
    /// Its guests and its page window.
    memory_bytes: u64,
}

impl DestinationHost for Admittance {
    fn admit(&self, offer: &Offer, peer: &PeerName) -> Result<Admission, String> {
        check_allowed(&self.allow_peers, peer)?;
        let guests: u64 = offer
            .members
            .iter()
            .fold(0, |sum, member| sum.saturating_add(member.memory_bytes));
        let user = self
            .hypervisor
            .qemu_user()
            .map_err(|error| format!("the destination does not know its QEMU user: {error}"))?;
        let wanted = self.window_budget_bytes.min(offer.window_budget_bytes);
        let window_budget_bytes = self.promise(offer, guests, wanted)?;
        self.peers.connected_from(peer);
        tracing::info!(
            job = %offer.job.simple(), gang = offer.gang, source = offer.source_host,
            peer = describe(peer), members = offer.members.len(), window_budget_bytes,
            "incoming gang admitted"
        );
        Ok(Admission {
            window_budget_bytes,
            socket_owner: SocketOwner {
                uid: user.uid,
                gid: user.gid,
            },
        })
    }

    fn outcome(&self, member: Uuid) -> Option<MemberOutcome> {
        let stats = self.hypervisor.completed_job(member).ok()?;
        Some(MemberOutcome {
            downtime_ms: stats.downtime_ms,
            iterations: stats.iterations,
            memory_bytes: stats.memory_total_bytes,
        })
    }

    fn session_ended(&self, job: Uuid) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let source = sessions.remove(&job).map(|session| session.source);
        tracing::info!(job = %job.simple(), source, "incoming gang's session ended");
    }
}

impl Admittance {
    /// Checks the memory and takes it in one step, so that two offers never get the same.
    fn promise(&self, offer: &Offer, guests: u64, wanted: u64) -> Result<u64, String> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.contains_key(&offer.job) {
            return Err(format!(
                "the destination has a session for the job {} already; start the migration again",
                offer.job.simple()
            ));
        }
        let memory = (self.memory)()
            .map_err(|error| format!("the destination cannot read its /proc/meminfo: {error}"))?;
        // What arrived of a promise is taken off twice: too careful, for as long as it runs.
        let promised = sessions.values().fold(0, |sum: u64, session| {
            sum.saturating_add(session.memory_bytes)
        });
        let available = memory.available_bytes.saturating_sub(promised);
        let budget =
            budget_that_fits(guests, wanted, available).map_err(|error| match promised {
                0 => error,
                _ => format!(
                    "{error} (other jobs on their way there need {} MiB)",
                    mib(promised)
                ),
            })?;
        let promised = Promised {
            source: offer.source_host.clone(),
            memory_bytes: guests.saturating_add(budget),
        };
        sessions.insert(offer.job, promised);
        Ok(budget)
    }
}

fn describe(peer: &PeerName) -> String {
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

fn check_allowed(allow_peers: &[String], peer: &PeerName) -> Result<(), String> {
    if allow_peers.is_empty() {
        return Ok(());
    }
    let allowed = peer.certificate_names.iter().any(|name| {
        let name = name.to_ascii_lowercase();
        allow_peers
            .iter()
            .any(|pattern| WildMatch::new(&pattern.to_ascii_lowercase()).matches(&name))
    });
    if allowed {
        return Ok(());
    }
    Err(format!(
        "the peer {} is not allowed here; add a name of its certificate to allow_peers in the destination's vmgang.toml",
        describe(peer)
    ))
}

/// The page window shrinks before a gang is refused.
fn budget_that_fits(guests: u64, wanted: u64, available: u64) -> Result<u64, String> {
    let left = available.saturating_sub(guests);
    let budget = wanted.min(left);
    if budget >= WINDOW_BUDGET_MIN_BYTES.min(wanted) {
        return Ok(budget);
    }
    Err(format!(
        "the destination has {} MiB of memory available, but the guests need {} MiB and the page window at least {} MiB; free memory there or migrate fewer domains",
        mib(available),
        mib(guests),
        mib(WINDOW_BUDGET_MIN_BYTES)
    ))
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(names: &[&str]) -> PeerName {
        PeerName {
            address: "[::ffff:10.0.0.1]:5000".parse().expect("an address"),
            certificate_names: names.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn names_and_globs() {
        let allow = vec!["*.rack1.example".to_owned(), "host-b".to_owned()];
        assert!(check_allowed(&[], &peer(&[])).is_ok());
        assert!(check_allowed(&allow, &peer(&["Host-B"])).is_ok());
        assert!(check_allowed(&allow, &peer(&["x", "a.rack1.example"])).is_ok());
        let error = check_allowed(&allow, &peer(&["host-bb"])).expect_err("refused");
        assert!(
            error.contains("10.0.0.1 (host-bb)") && error.contains("allow_peers"),
            "{error}"
        );
        assert!(
            check_allowed(&allow, &peer(&[])).is_err(),
            "no certificate, no name"
        );
    }

    #[test]
    fn the_window_gives_way_before_the_gang() {
        const GIB: u64 = 1 << 30;
        assert_eq!(budget_that_fits(GIB, GIB, 4 * GIB), Ok(GIB));
        assert_eq!(budget_that_fits(GIB, 2 * GIB, 2 * GIB), Ok(GIB));
        assert_eq!(
            budget_that_fits(GIB, GIB, GIB + WINDOW_BUDGET_MIN_BYTES),
            Ok(WINDOW_BUDGET_MIN_BYTES)
        );
        let error = budget_that_fits(GIB, GIB, GIB).expect_err("too little");
        assert!(
            error.contains("1024 MiB") && error.contains("64 MiB"),
            "{error}"
        );
    }
}
