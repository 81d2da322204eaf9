//! The two daemons: the real coordinator, admittance and engine, on simulated hosts.
//!
//! Must not: change what they do. A daemon that is killed is cut off from everything at once, its
//! files stay as they are, and what its tasks still do reaches nobody.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use uuid::Uuid;
use vmgang_engine::{
    Hold, Listener, MemberOutcome, SessionCounters, SessionEnd, SourceError, SourceEvent,
    SourceOptions, Transport, Workers,
};
use vmgang_libvirt::QemuUser;
use vmgang_service::announcements::Announcements;
use vmgang_service::config::{RecallConfig, TlsConfig, WindowBudget};
use vmgang_service::coordinator::{Coordinator, Parts};
use vmgang_service::guests::{Guests, Opened};
use vmgang_service::history::History;
use vmgang_service::hypervisor::Hypervisor;
use vmgang_service::libvirt_access::LibvirtAccess;
use vmgang_service::peers::{Admittance, Peers};
use vmgang_service::recall::Contents;
use vmgang_service::scans::Scans;
use vmgang_service::stages::Stages;
use vmgang_service::tunnel::{self, BoxFuture, Engine, OfferContents, Session, Tunnel};

use crate::libvirt::Libvirt;
use crate::network::{DaemonNetwork, Executor, Port};
use crate::world::{Life, World};

/// Where a host's daemon has its files.
#[derive(Debug, Clone)]
pub struct Directories {
    pub runtime: PathBuf,
    pub state: PathBuf,
}

impl Directories {
    pub fn below(host: &Path) -> Directories {
        Directories {
            runtime: host.join("r"),
            state: host.join("s"),
        }
    }

    pub fn make(&self) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.runtime)?;
        std::fs::create_dir_all(&self.state)
    }
}

/// Nobody's memory is looked at.
struct NoMemory;

impl Guests for NoMemory {
    fn open(&self, _: &[Uuid]) -> Vec<(Uuid, Opened)> {
        Vec::new()
    }
}

type Knowledge = (Arc<Scans>, Arc<Stages>, Arc<Contents>);

fn knowledge(libvirt: &Libvirt, available: u64) -> Knowledge {
    let scans = Scans::new(Arc::new(NoMemory));
    let contents = Contents::new(
        RecallConfig::default(),
        scans.clone(),
        Arc::new(libvirt.clone()),
        Box::new(move || Ok(available)),
    );
    (scans, Arc::default(), Arc::new(contents))
}

fn connections(most: u64) -> NonZeroUsize {
    NonZeroUsize::new(most as usize).unwrap_or(NonZeroUsize::MIN)
}

fn workers(world: &Arc<World>) -> Workers {
    Workers::given(Arc::new(Executor {
        world: world.clone(),
    }))
}

/// The daemon that the guests leave.
pub struct SourceDaemon {
    pub life: Arc<Life>,
    pub directories: Directories,
    pub coordinator: Arc<Coordinator>,
}

impl SourceDaemon {
    pub async fn start(
        world: &Arc<World>,
        directories: Directories,
        there: &Directories,
        user: QemuUser,
    ) -> std::io::Result<SourceDaemon> {
        let life = Life::new("a");
        let libvirt = Libvirt {
            world: world.clone(),
            life: life.clone(),
            on_source: true,
            user,
            there_dir: there.runtime.clone(),
        };
        vmgang_engine::sweep_runtime_dir(&directories.runtime)?;
        let available = world.plan.available.0;
        let (scans, stages, contents) = knowledge(&libvirt, available);
        let coordinator = Coordinator::open(Parts {
            hypervisor: Arc::new(libvirt),
            tunnel: Arc::new(Watched {
                world: world.clone(),
                life: life.clone(),
            }),
            transport: Arc::new(|| Ok(Transport::Plain)),
            libvirt_access: Arc::new(LibvirtAccess::new(
                &directories.runtime,
                Arc::new(|| Ok(Transport::Plain)),
            )?),
            tls: TlsConfig::Off,
            history: History::open(&directories.state)?,
            peers: Arc::default(),
            runtime_dir: directories.runtime.clone(),
            window_budget: WindowBudget::Auto,
            available_memory: Box::new(move || Ok(available)),
            workers: workers(world),
            connections: connections(world.plan.connections.0),
            scans,
            stages,
            contents,
        });
        Ok(SourceDaemon {
            coordinator: coordinator.await?,
            life,
            directories,
        })
    }
}

/// The daemon that they come to.
pub struct DestinationDaemon {
    pub life: Arc<Life>,
    pub directories: Directories,
    pub stop: Option<oneshot::Sender<()>>,
    pub serving: JoinHandle<()>,
}

impl DestinationDaemon {
    pub fn start(
        world: &Arc<World>,
        directories: Directories,
        user: QemuUser,
    ) -> std::io::Result<DestinationDaemon> {
        let life = Life::new("b");
        let libvirt = Libvirt {
            world: world.clone(),
            life: life.clone(),
            on_source: false,
            user,
            there_dir: directories.runtime.clone(),
        };
        vmgang_engine::sweep_runtime_dir(&directories.runtime)?;
        let available = world.plan.available.1;
        let (_, stages, contents) = knowledge(&libvirt, available);
        let admittance = Admittance {
            ambient_names: None,
            coordinator: None,
            hypervisor: Arc::new(libvirt) as Arc<dyn Hypervisor>,
            peers: Arc::new(Peers::default()),
            access: Arc::default(),
            libvirt_sockets: Vec::new(),
            window_budget: WindowBudget::Auto,
            connections: connections(world.plan.connections.1),
            available_memory: Box::new(move || Ok(available)),
            sessions: Mutex::new(BTreeMap::new()),
            announcements: Arc::new(Announcements::none()),
            expected: None,
            stages,
            contents,
            page_key: Box::new(|| Some(Transport::Plain.page_key())),
        };
        let network = DaemonNetwork {
            world: world.clone(),
            life: life.clone(),
        };
        let listener = Listener::new(Box::new(Port::open(world, &life)), Arc::new(network));
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(listener.serve(
            Transport::Plain,
            directories.runtime.clone(),
            workers(world),
            Arc::new(admittance),
            async {
                let _ = stopped.await;
            },
        ));
        Ok(DestinationDaemon {
            life,
            directories,
            stop: Some(stop),
            serving,
        })
    }
}

/// The real engine over the simulated network; releases are noted before they take effect.
struct Watched {
    world: Arc<World>,
    life: Arc<Life>,
}

impl Tunnel for Watched {
    fn connect(
        &self,
        mut options: SourceOptions,
    ) -> BoxFuture<'_, Result<tunnel::Opened, SourceError>> {
        if options.hold != Hold::Anything {
            self.world.wrong("the gang is not held".to_owned());
        }
        options.network = Arc::new(DaemonNetwork {
            world: self.world.clone(),
            life: self.life.clone(),
        });
        let members = options.offer.members.iter();
        let members = members.filter_map(|member| self.world.member(member.uuid));
        let members: Vec<usize> = members.collect();
        let world = self.world.clone();
        Box::pin(async move {
            let (session, events): (_, UnboundedReceiver<SourceEvent>) =
                Engine.connect(options).await?;
            world.step(format_args!("session open"));
            let session = WatchedSession {
                session,
                world,
                members,
            };
            Ok((Box::new(session) as Box<dyn Session>, events))
        })
    }
}

struct WatchedSession {
    session: Box<dyn Session>,
    world: Arc<World>,
    members: Vec<usize>,
}

impl WatchedSession {
    fn note(&self, member: usize) {
        self.world.released(member);
    }
}

impl Session for WatchedSession {
    fn migrate_uri(&self, member: usize) -> String {
        self.session.migrate_uri(member)
    }
    fn release_member(&self, member: usize) {
        self.note(self.members[member]);
        self.session.release_member(member);
    }
    fn restart_member(&self, member: usize) {
        self.world.begins_anew(self.members[member]);
        self.session.restart_member(member);
    }
    fn close_socket(&self, member: usize) {
        let uri = self.session.migrate_uri(member);
        let socket = PathBuf::from(uri.trim_start_matches("unix://"));
        self.world.net().sockets.remove(&socket);
        self.session.close_socket(member);
    }
    fn set_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.session.set_bandwidth(bytes_per_s);
    }
    fn counters(&self) -> SessionCounters {
        self.session.counters()
    }
    fn member_outcome(
        &self,
        member: usize,
    ) -> BoxFuture<'_, Result<Option<MemberOutcome>, SourceError>> {
        self.session.member_outcome(member)
    }
    fn has_stage(&self) -> bool {
        self.session.has_stage()
    }
    fn may_find_contents(&self) -> bool {
        self.session.may_find_contents()
    }
    fn offers(&self) -> Box<OfferContents> {
        self.session.offers()
    }
    fn close(self: Box<Self>) -> BoxFuture<'static, SessionEnd> {
        self.session.close()
    }
}
