//! A host and a peer without libvirt or a network: what the tests of this crate serve the
//! D-Bus surface with. Records what it is asked; behaves as each test scripts it.

mod peer;
mod ram;
mod tunnel;

#[allow(unused_imports, reason = "each test binary uses a part")]
pub use peer::Peer;

pub use ram::FakeRam;
#[allow(unused_imports, reason = "each test binary uses a part")]
pub use ram::page;
use tunnel::FakeTunnel;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Barrier, mpsc, watch};
use uuid::Uuid;
use vmgang_dedup::{
    BlockSnapshot, DigestKey, Fingerprinter, PAGE_BYTES, Page, PageDigest, Snapshot,
};
use vmgang_engine::{
    MemberCounters, MemberOutcome, Saved, SessionCounters, SessionEnd, SourceError, SourceEvent,
    SourceOptions, Transport, Workers,
};
use vmgang_libvirt::{
    Balloon, DomainInfo, DomainQemu, DomainQemuUser, DomainState, Failure, Fit, Hardware, JobStats,
    LibvirtError, ListedDomain, Membership, MigrateOptions, QemuUser, Versions,
};
use vmgang_service::bus;
use vmgang_service::config::{RecallConfig, TlsConfig, WindowBudget};
use vmgang_service::coordinator::{Coordinator, Parts, TransportSource};
use vmgang_service::guests::{self, GuestRam, Guests};
use vmgang_service::history::History;
use vmgang_service::hypervisor::{DestinationFit, DestinationInfo, Hypervisor, Verdict};
use vmgang_service::libvirt_access::LibvirtAccess;
use vmgang_service::peers::Peers;
use vmgang_service::recall::Contents;
use vmgang_service::scans::Scans;
use vmgang_service::stages::Stages;
use vmgang_service::tunnel::{BoxFuture, OfferContents, Opened, Session, Tunnel};
use vmgang_snapshot::{Pace, ScanReport, SnapshotError};
use zbus::{Connection, OwnedObjectPath, Proxy, Variant};

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

impl Hypervisor for Fake {
    fn hostname(&self) -> Result<String, LibvirtError> {
        Ok("a".into())
    }
    fn host_uuid(&self) -> Result<Uuid, LibvirtError> {
        Ok(Uuid::from_u128(1))
    }
    fn domains(&self) -> Result<Vec<DomainInfo>, LibvirtError> {
        Ok(self.domains.lock().expect("lock").clone())
    }
    fn running(&self) -> Result<Vec<Uuid>, LibvirtError> {
        let domains = self.domains.lock().expect("lock");
        let running = domains.iter().filter(|d| d.state == DomainState::Running);
        Ok(running.map(|d| d.uuid).collect())
    }
    fn domain(&self, uuid: Uuid) -> Result<DomainInfo, LibvirtError> {
        std::thread::sleep(self.domain_delay);
        let domains = self.domains.lock().expect("lock");
        domains
            .iter()
            .find(|d| d.uuid == uuid)
            .cloned()
            .ok_or(LibvirtError::NoSuchDomain {
                domain: uuid.to_string(),
            })
    }
    fn set_membership(&self, uuid: Uuid, member: Option<&Membership>) -> Result<(), LibvirtError> {
        let mut domains = self.domains.lock().expect("lock");
        if let Some(domain) = domains.iter_mut().find(|d| d.uuid == uuid) {
            domain.membership = Ok(member.cloned());
        }
        Ok(())
    }
    fn qemu_user(&self) -> Result<QemuUser, LibvirtError> {
        Ok(QemuUser { uid: 0, gid: 0 })
    }
    fn takes_switchover_rate(&self) -> Result<bool, LibvirtError> {
        Ok(true)
    }
    fn post_copy_goes_parallel(&self) -> Result<bool, LibvirtError> {
        Ok(false)
    }
    fn set_max_downtime(&self, uuid: Uuid, limit_ms: u64) -> Result<(), LibvirtError> {
        let (wires, member) = self.wires_of(uuid);
        let released = wires.released.borrow()[member];
        let unheld = self.scripts[&self.domain(uuid)?.name] == Script::NoAck;
        if limit_ms != 1 && !released && !unheld {
            // A panic here would end in the daemon's log.
            self.too_early.lock().expect("lock").push(limit_ms);
        }
        wires.limits.send_modify(|limits| limits[member] = limit_ms);
        Ok(())
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
    fn start_post_copy(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let (wires, member) = self.wires_of(uuid);
        wires
            .post_copy
            .send_modify(|post_copy| post_copy[member] = true);
        Ok(())
    }
    fn suspend(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let name = self.domain(uuid)?.name;
        self.suspended.lock().expect("lock").push(name);
        // A guest that does not run dirties nothing.
        let (wires, member) = self.wires_of(uuid);
        let _ = wires.events.send(SourceEvent::PassDone {
            member,
            sent_bytes: 0,
            took: Duration::from_millis(1),
        });
        Ok(())
    }
    fn resume(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.domain(uuid).map(drop)
    }
    fn balloon(&self, uuid: Uuid) -> Result<Option<Balloon>, LibvirtError> {
        let mut balloons = self.balloons.lock().expect("lock");
        Ok(balloons.get_mut(&self.domain(uuid)?.name).map(|balloon| {
            balloon.told_unix_s += u64::from(balloon.period_s) * 1_000_000_000;
            *balloon
        }))
    }
    fn set_balloon_period(&self, uuid: Uuid, seconds: u32) -> Result<(), LibvirtError> {
        let mut balloons = self.balloons.lock().expect("lock");
        if let Some(balloon) = balloons.get_mut(&self.domain(uuid)?.name) {
            balloon.period_s = seconds;
        }
        Ok(())
    }
    fn set_memory(&self, uuid: Uuid, bytes: u64) -> Result<(), LibvirtError> {
        let mut balloons = self.balloons.lock().expect("lock");
        if let Some(balloon) = balloons.get_mut(&self.domain(uuid)?.name) {
            balloon.current_bytes = match bytes < balloon.current_bytes && self.balloons_are_slow {
                true => balloon.current_bytes - (balloon.current_bytes - bytes) / 2,
                false => bytes,
            };
        }
        Ok(())
    }
    fn restore_memory(
        &self,
        _: &str,
        uuid: Uuid,
        bytes: u64,
        period_s: u32,
    ) -> Result<(), LibvirtError> {
        let name = self.domain(uuid)?.name;
        self.restored_there
            .lock()
            .expect("lock")
            .push((name, bytes, period_s));
        Ok(())
    }
    fn running_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError> {
        let domains = self.domains()?;
        let domain = domains.iter().find(|domain| domain.uuid == uuid);
        let name = domain.map_or("", |domain| &domain.name);
        let outgoing = self.others_migrate.lock().expect("lock");
        let outgoing = outgoing.iter().any(|other| other == name);
        Ok(JobStats {
            active: outgoing || self.scripts.get(name) == Some(&Script::BeingSaved),
            outgoing,
            ..JobStats::default()
        })
    }
    fn completed_job(&self, _: Uuid) -> Result<JobStats, LibvirtError> {
        Ok(JobStats {
            iterations: Some(4),
            ..JobStats::default()
        })
    }
    fn versions(&self) -> Result<Versions, LibvirtError> {
        Ok(self.versions)
    }
    fn hardware(&self, uuid: Uuid) -> Result<Hardware, LibvirtError> {
        let name = self.domain(uuid)?.name;
        Ok(self.hardware.get(&name).cloned().unwrap_or_default())
    }
    fn fit_destination(
        &self,
        _: &str,
        hardware: &[Hardware],
    ) -> Result<DestinationFit, LibvirtError> {
        Ok(DestinationFit {
            versions: self.versions_there,
            fits: vec![self.fit.clone(); hardware.len()],
        })
    }
    fn inspect_destination(&self, uri: &str) -> Result<DestinationInfo, LibvirtError> {
        let failed = |message: &str| {
            Err(LibvirtError::Connect {
                uri: uri.into(),
                failure: Failure {
                    code: 38,
                    message: message.into(),
                },
            })
        };
        if self.answers_after_call {
            let calls = self.calls.0.lock().expect("lock");
            let called = self
                .calls
                .1
                .wait_timeout_while(calls, Duration::from_secs(10), |calls| *calls == 0);
            if called.expect("lock").1.timed_out() {
                return failed("nobody called the peer meanwhile");
            }
        }
        if uri.contains("unreachable") {
            return failed("no route");
        }
        // As libvirt would; whoever carries that has nobody behind.
        if let Some(path) = uri.strip_prefix("qemu+unix:///system?socket=") {
            use std::io::Read;
            let socket = std::os::unix::net::UnixStream::connect(path);
            let read = socket.and_then(|mut socket| socket.read(&mut [0; 8]));
            assert_eq!(read.expect("a socket that is closed"), 0);
            return failed("End of file while reading data");
        }
        let same = uri.contains("myself");
        Ok(DestinationInfo {
            host_uuid: Some(Uuid::from_u128(if same { 1 } else { 2 })),
            libvirt_version: self.libvirt_there,
            domains: [
                self.there.clone(),
                self.arrived.lock().expect("lock").clone(),
            ]
            .concat(),
        })
    }
    fn migrate(
        &self,
        uuid: Uuid,
        name: &str,
        options: MigrateOptions,
    ) -> Result<Verdict, LibvirtError> {
        assert!(
            options.migrate_uri.starts_with("unix:///fake/"),
            "{options:?}"
        );
        let script = self.scripts[name];
        *self.started.lock().expect("lock") += 1;
        let mut migrated_with = self.migrated_with.lock().expect("lock");
        migrated_with.insert(name.to_owned(), options.clone());
        drop(migrated_with);
        let name = name.to_owned();
        let (wires, member) = self.wires_of(uuid);
        let held = options.switchover_mib_s == Some(1);
        assert!(held || wires.released.borrow()[member]);
        let fake = self.clone();
        let failed = move |message: &str| LibvirtError::Domain {
            action: "migrate",
            domain: name.clone(),
            failure: Failure {
                code: 1,
                message: message.into(),
            },
        };
        Ok(Box::pin(async move {
            if script == Script::Refused {
                return Err(failed("this domain cannot be migrated"));
            }
            {
                let mut running = fake.running.lock().expect("lock");
                *running += 1;
                let mut most = fake.most_at_once.lock().expect("lock");
                *most = (*most).max(*running);
            }
            let event = |event| wires.events.send(event).is_ok();
            let pass = |sent_bytes| SourceEvent::PassDone {
                member,
                sent_bytes,
                took: Duration::from_secs(1),
            };
            let stalls = match script {
                Script::Stalls => !options.auto_converge,
                script => matches!(script, Script::AlwaysStalls | Script::Copying),
            };
            let passes = if script == Script::Copying { 1 } else { 30 };
            let ready = matches!(
                script,
                Script::Good | Script::Slow | Script::BreaksWhenReady | Script::BreaksAfterRelease
            ) || (script == Script::Stalls && !stalls);
            event(SourceEvent::ChannelOpened { member });
            match script {
                Script::Slow => tokio::time::sleep(Duration::from_millis(700)).await,
                Script::Unreadable => {
                    event(SourceEvent::Unreadable { member });
                    event(SourceEvent::AckWithheld { member });
                }
                Script::NoAck => {
                    event(SourceEvent::FirstPassDone { member });
                }
                Script::EndsUnstopped => {
                    event(SourceEvent::StreamEnded { member });
                }
                Script::SessionLost => {
                    let error = "connection reset".into();
                    event(SourceEvent::SessionFailed { error });
                }
                _ => {}
            }
            if ready {
                event(SourceEvent::AckWithheld { member });
                event(SourceEvent::FirstPassDone { member });
                event(pass(0));
            }
            if stalls {
                event(SourceEvent::AckWithheld { member });
                event(SourceEvent::FirstPassDone { member });
                for _ in 0..passes {
                    event(pass(1 << 30));
                }
            }
            if script == Script::BreaksWhenReady {
                let error = "digest mismatch".into();
                event(SourceEvent::MemberFailed { member, error });
            }
            let gives_up = matches!(script, Script::EndsUnstopped | Script::LeftPaused);
            let mut released = wires.released.subscribe();
            let mut limits = wires.limits.subscribe();
            let mut aborted = wires.aborted.subscribe();
            let result = tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(200)), if gives_up => {
                    if script == Script::LeftPaused {
                        let mut domains = fake.domains.lock().expect("lock");
                        let domain = domains.iter_mut().find(|d| d.uuid == uuid).expect("there");
                        domain.state = DomainState::Paused;
                    }
                    Err(failed("the stream ended early"))
                }
                () = async {
                    if matches!(script, Script::NeverReady | Script::SessionLost) {
                        std::future::pending::<()>().await;
                    }
                    if script != Script::NoAck {
                        let _ = released.wait_for(|released| released[member]).await;
                    }
                    if stalls {
                        let mut post_copy = wires.post_copy.subscribe();
                        let _ = post_copy.wait_for(|post_copy| post_copy[member]).await;
                    }
                    // QEMU has more to send than a held member may have left.
                    if held {
                        let _ = limits.wait_for(|limits| limits[member] >= 1000).await;
                    }
                } => {
                    event(SourceEvent::GuestStopped { member, at: Instant::now() });
                    if script == Script::BreaksAfterRelease {
                        let error = "the peer hung up".into();
                        event(SourceEvent::MemberFailed { member, error });
                    } else {
                        event(SourceEvent::StreamEnded { member });
                    }
                    let mut domains = fake.domains.lock().expect("lock");
                    let domain = domains.iter_mut().find(|d| d.uuid == uuid).expect("there");
                    domain.id = None;
                    domain.state = DomainState::ShutOff;
                    fake.arrived.lock().expect("lock").push(ListedDomain {
                        name: domain.name.clone(),
                        uuid,
                        active: true,
                    });
                    Ok(())
                }
                _ = aborted.wait_for(|aborted| aborted[member]) => Err(failed("canceled by client")),
            };
            *fake.running.lock().expect("lock") -= 1;
            result
        }))
    }
    fn abort_job(&self, uuid: Uuid, answered: &AtomicBool) -> Result<(), LibvirtError> {
        std::thread::sleep(self.abort_delay);
        self.aborts.lock().expect("lock").0 += 1;
        if answered.load(Ordering::SeqCst) {
            return Ok(());
        }
        let name = self.domain(uuid)?.name;
        self.aborts.lock().expect("lock").1.push(name);
        let (wires, member) = self.wires_of(uuid);
        wires.aborted.send_modify(|aborted| aborted[member] = true);
        Ok(())
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

/// A served D-Bus surface and a client of it, joined by a socket pair.
pub struct Rig {
    pub fake: Fake,
    pub client: Connection,
    /// Serves for as long as it lives.
    _server: Connection,
    pub coordinator: Arc<Coordinator>,
    pub state_dir: tempfile::TempDir,
}

impl Rig {
    pub async fn new(fake: Fake) -> Rig {
        Rig::after(fake, tempfile::tempdir().expect("a directory")).await
    }

    /// With what an earlier daemon has left.
    pub async fn after(fake: Fake, state_dir: tempfile::TempDir) -> Rig {
        let transport: Arc<TransportSource> = {
            let transport = fake.transport.clone();
            Arc::new(move || transport.clone().map(|()| Transport::Plain))
        };
        let available_bytes = fake.available_bytes;
        let (scans, stages, contents) = knowledge(&fake);
        let coordinator = Coordinator::open(Parts {
            hypervisor: Arc::new(fake.clone()),
            tunnel: Arc::new(FakeTunnel(fake.clone())),
            transport: transport.clone(),
            libvirt_access: Arc::new(
                LibvirtAccess::new(state_dir.path(), transport).expect("a directory"),
            ),
            tls: TlsConfig::Off,
            history: History::open(state_dir.path()).expect("opens"),
            peers: Arc::new(Peers::default()),
            runtime_dir: state_dir.path().to_owned(),
            window_budget: WindowBudget::Auto,
            available_memory: Box::new(move || Ok(available_bytes)),
            workers: Workers::per_processor().expect("threads"),
            connections: std::num::NonZeroUsize::MIN,
            scans,
            stages,
            contents,
        })
        .await
        .expect("opens");
        let (one, other) = UnixStream::pair().expect("a pair");
        let server = zbus::connection::Builder::unix_stream(one)
            .server(zbus::Guid::generate())
            .p2p();
        let client = zbus::connection::Builder::unix_stream(other)
            .p2p()
            .method_timeout(Duration::from_secs(20));
        let (server, client) =
            tokio::join!(bus::serve(server, coordinator.clone()), client.build());
        Rig {
            fake,
            client: client.expect("connects"),
            _server: server.expect("serves"),
            coordinator,
            state_dir,
        }
    }
}

impl Rig {
    pub async fn manager(&self) -> Proxy<'_> {
        zbus::proxy::Builder::new(&self.client)
            .destination("org.vmgang.VMGang1")
            .path("/org/vmgang/VMGang1")
            .interface("org.vmgang.Manager1")
            .build()
            .await
            .expect("a proxy")
    }

    pub async fn job(&self, path: &OwnedObjectPath) -> Proxy<'_> {
        zbus::proxy::Builder::new(&self.client)
            .destination("org.vmgang.VMGang1")
            .path(path.clone())
            .interface("org.vmgang.Job1")
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .expect("a proxy")
    }

    pub async fn migrate(
        &self,
        gang: &str,
        uri: &str,
        options: Options<'_>,
    ) -> zbus::Result<OwnedObjectPath> {
        self.manager()
            .await
            .call("Migrate", &(gang, uri, options))
            .await
    }

    /// The job's report, once there is one.
    pub async fn report(&self, path: &OwnedObjectPath) -> serde_json::Value {
        let job = self.job(path).await;
        for _ in 0..500 {
            let result: String = job.get_property("Result").await.expect("a result");
            if !result.is_empty() {
                let too_early = self.fake.too_early.lock().expect("lock").clone();
                assert!(too_early.is_empty(), "held, and yet {too_early:?} ms");
                return serde_json::from_str(&result).expect("JSON");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the job does not end");
    }
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
