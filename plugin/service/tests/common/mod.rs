//! A host and a peer without libvirt or a network: what the tests of this crate serve the
//! D-Bus surface with. Records what it is asked; behaves as each test scripts it.

mod libvirt;
mod peer;
mod ram;
mod rig;
mod tunnel;

pub use ram::FakeRam;
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use {peer::Peer, ram::page, rig::Rig};

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tokio::sync::{Barrier, mpsc, watch};
use uuid::Uuid;
use vmgang_dedup::{
    BlockSnapshot, DigestKey, Fingerprinter, PAGE_BYTES, Page, PageDigest, Snapshot,
};
use vmgang_engine::{
    Hold, MemberCounters, MemberOutcome, Saved, SessionCounters, SessionEnd, SourceError,
    SourceEvent, SourceOptions,
};
use vmgang_libvirt::{
    Balloon, DomainInfo, DomainState, Fit, Hardware, ListedDomain, MigrateOptions, Versions,
};
use vmgang_service::config::RecallConfig;
use vmgang_service::guests::{self, GuestRam, Guests};
use vmgang_service::recall::Contents;
use vmgang_service::scans::Scans;
use vmgang_service::stages::Stages;
use vmgang_service::tunnel::{BoxFuture, OfferContents, Opened, Session, Tunnel};
use vmgang_snapshot::{Pace, ScanReport, SnapshotError};
use zbus::Variant;

pub const URI: &str = "qemu+tls://b/system";
pub type Options<'a> = HashMap<&'a str, Variant<'a>>;

/// How one domain behaves when it is migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Script {
    /// Gets ready, waits for the release, migrates.
    Good,
    /// libvirt refuses it at once.
    Refused,
    /// Copies for ever; only an abort ends it.
    NeverReady,
    /// Good, but only ready after 700 ms.
    Slow,
    /// Good, but its stream is not understood.
    Unreadable,
    /// Its QEMU never says SWITCHOVER_ACK, so nothing holds it.
    NoAck,
    /// Its stream ends although its guest was never stopped; libvirt says so later.
    EndsUnstopped,
    /// Its channel breaks at the very moment it is ready.
    BreaksWhenReady,
    /// Its channel breaks after the release, and the guest migrates all the same.
    BreaksAfterRelease,
    /// The session with the peer breaks while it copies.
    SessionLost,
    /// Dirties memory as fast as it can be sent, unless QEMU slows it down.
    Stalls,
    /// Does so whatever QEMU does; only post-copy helps.
    AlwaysStalls,
    /// Has still much to send after its first pass; only post-copy helps.
    Copying,
    /// libvirt gives it up after a while, and it stays paused.
    LeftPaused,
    /// libvirt saves it to a file just now.
    BeingSaved,
}

/// A scripted host. Clones share what changes.
#[derive(Clone)]
pub struct Fake {
    domains: Arc<Mutex<Vec<DomainInfo>>>,
    scripts: HashMap<String, Script>,
    /// The newest session, as both halves of the fake see it.
    wires: Arc<Mutex<Option<Wires>>>,
    pub most_at_once: Arc<Mutex<usize>>,
    running: Arc<Mutex<usize>>,
    pub transport: Result<(), String>,
    /// How long the peer takes to answer.
    pub connect_delay: Duration,
    /// How long opening a connection to libvirt takes before each abort.
    pub abort_delay: Duration,
    /// Calls to abort that have returned, and those of them that reached a domain's job.
    pub aborts: Arc<Mutex<(usize, Vec<String>)>>,
    /// Balloons by name, and what was asked of their guests: here, or at the destination.
    pub balloons: Arc<Mutex<HashMap<String, Balloon>>>,
    pub restored_there: Arc<Mutex<Vec<(String, u64, u32)>>>,
    /// Guests take their time to give memory up.
    pub balloons_are_slow: bool,
    /// Longest downtimes, in milliseconds, that held members were given.
    pub too_early: Arc<Mutex<Vec<u64>>>,
    /// Guests that were suspended.
    pub suspended: Arc<Mutex<Vec<String>>>,
    /// Migrations started.
    pub started: Arc<Mutex<usize>>,
    /// And how, by name.
    pub migrated_with: Arc<Mutex<HashMap<String, MigrateOptions>>>,
    /// Domains that somebody else migrates away, by name.
    pub others_migrate: Arc<Mutex<Vec<String>>>,
    /// How long libvirt takes to tell of one domain.
    pub domain_delay: Duration,
    /// What this host has available.
    pub available_bytes: u64,
    /// What the destination's libvirt lists.
    pub there: Vec<ListedDomain>,
    pub libvirt_there: Option<u32>,
    /// Hardware of domains by name, and whether the destination can run any of it.
    pub hardware: HashMap<String, Hardware>,
    pub fit: Fit,
    pub versions: Versions,
    pub versions_there: Versions,
    /// And what has migrated to it.
    arrived: Arc<Mutex<Vec<ListedDomain>>>,
    /// The page window of the newest offer.
    pub window_offered: Arc<Mutex<u64>>,
    /// The destination's libvirt answers only once the peer was called.
    pub answers_after_call: bool,
    calls: Arc<(Mutex<usize>, Condvar)>,
    /// Sessions that are open.
    pub sessions: Arc<AtomicUsize>,
    /// The peer tells how members ended once it was asked about so many.
    pub outcomes: Arc<Barrier>,
    /// Members that were let go and of which libvirt has told nothing since, and the most of them at once.
    pub let_go: Arc<Mutex<(usize, usize)>>,
    pub ram: FakeRam,
}

#[derive(Clone)]
struct Wires {
    events: mpsc::UnboundedSender<SourceEvent>,
    released: watch::Sender<Vec<bool>>,
    /// Longest downtimes in milliseconds.
    limits: watch::Sender<Vec<u64>>,
    aborted: watch::Sender<Vec<bool>>,
    post_copy: watch::Sender<Vec<bool>>,
    members: Vec<Uuid>,
}

pub fn domain(name: &str, active: bool) -> DomainInfo {
    DomainInfo {
        name: name.into(),
        uuid: Uuid::new_v4(),
        id: active.then_some(1),
        state: if active {
            DomainState::Running
        } else {
            DomainState::ShutOff
        },
        persistent: true,
        memory_bytes: 1 << 30,
        membership: Ok(None),
    }
}

impl Fake {
    pub fn new(domains: &[(&str, Script)]) -> Fake {
        Fake {
            domains: Arc::new(Mutex::new(
                domains.iter().map(|(name, _)| domain(name, true)).collect(),
            )),
            scripts: domains.iter().map(|(n, s)| ((*n).to_owned(), *s)).collect(),
            wires: Arc::default(),
            most_at_once: Arc::default(),
            running: Arc::default(),
            transport: Ok(()),
            connect_delay: Duration::ZERO,
            abort_delay: Duration::ZERO,
            aborts: Arc::default(),
            balloons: Arc::default(),
            restored_there: Arc::default(),
            balloons_are_slow: false,
            too_early: Arc::default(),
            suspended: Arc::default(),
            started: Arc::default(),
            migrated_with: Arc::default(),
            others_migrate: Arc::default(),
            domain_delay: Duration::ZERO,
            available_bytes: 64 << 30,
            there: Vec::new(),
            libvirt_there: Some(11_002_000),
            hardware: HashMap::new(),
            fit: Fit::Fits,
            versions: Versions {
                libvirt: 11_002_000,
                qemu: 10_000_000,
            },
            versions_there: Versions {
                libvirt: 11_002_000,
                qemu: 10_000_000,
            },
            arrived: Arc::default(),
            window_offered: Arc::default(),
            answers_after_call: false,
            calls: Arc::default(),
            sessions: Arc::default(),
            outcomes: Arc::new(Barrier::new(1)),
            let_go: Arc::default(),
            ram: FakeRam::default(),
        }
    }

    pub fn push(&self, domain: DomainInfo) {
        self.domains.lock().expect("lock").push(domain);
    }

    /// Changes what libvirt says of a domain.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut DomainInfo)) {
        let mut domains = self.domains.lock().expect("lock");
        let domain = domains.iter_mut().find(|domain| domain.name == name);
        change(domain.expect("there"));
    }

    /// The open session, and which of its members a domain is.
    fn wires_of(&self, uuid: Uuid) -> (Wires, usize) {
        let wires = self.wires.lock().expect("lock").clone();
        let wires = wires.expect("a session is open");
        let member = wires.members.iter().position(|m| *m == uuid);
        (wires, member.expect("offered"))
    }

    pub fn active_names(&self) -> Vec<String> {
        let domains = self.domains.lock().expect("lock");
        domains
            .iter()
            .filter(|d| d.active())
            .map(|d| d.name.clone())
            .collect()
    }
}

/// What a host knows of memory, with nothing known yet.
pub fn knowledge(fake: &Fake) -> (Arc<Scans>, Arc<Stages>, Arc<Contents>) {
    let scans = Scans::new(Arc::new(fake.ram.clone()));
    let available_bytes = fake.available_bytes;
    let contents = Contents::new(
        RecallConfig::default(),
        scans.clone(),
        Arc::new(fake.clone()),
        Box::new(move || Ok(available_bytes)),
    );
    (scans, Arc::new(Stages::default()), Arc::new(contents))
}

pub fn error_of<T: std::fmt::Debug>(result: zbus::Result<T>) -> (String, String) {
    match result.expect_err("refused") {
        zbus::Error::MethodError(name, text, _) => (name.to_string(), text.unwrap_or_default()),
        other => panic!("not a named error: {other:?}"),
    }
}

pub fn names(report: &serde_json::Value, field: &str) -> Vec<String> {
    let domains = report["domains"].as_array().expect("domains");
    domains
        .iter()
        .map(|d| d[field].as_str().unwrap_or("-").to_owned())
        .collect()
}
