//! A source and a destination on one machine, and what plays QEMU at both ends.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use vmgang_engine::{
    Admission, DestinationHost, Hold, Listener, MemberOffer, MemberOutcome, Offer, PeerAddress,
    PeerName, Purpose, Recall, Scanned, SocketOwner, SourceEvent, SourceOptions, SourceSession,
    Techniques, Transport, Workers,
};
use vmgang_stream::synthetic::StreamBuilder;

pub const JOB: Uuid = Uuid::from_u128(0xabc);
pub const ACK: [u8; 4] = [0, 7, 0, 0];
pub const SOON: Duration = Duration::from_secs(20);

pub struct Host {
    pub owner: SocketOwner,
    pub refuse: Option<String>,
    pub budget: u64,
    /// TCP connections a session may have.
    pub connections: NonZeroUsize,
    pub ended: Mutex<Vec<Uuid>>,
    pub peers: Mutex<Vec<PeerName>>,
    pub recall: Mutex<Option<Arc<dyn Recall>>>,
    /// Contents staged, and found among them.
    pub staged: Mutex<(u64, u64)>,
    /// Who wanted its libvirt is told so.
    pub libvirt: Mutex<Result<Vec<PathBuf>, String>>,
    /// What libvirt says of each member.
    pub announced: Mutex<Result<(), String>>,
    /// Who was asked about.
    pub asked: Mutex<Vec<Uuid>>,
}

impl DestinationHost for Host {
    fn admit(
        &self,
        offer: &Offer,
        _purpose: Purpose,
        peer: &PeerName,
    ) -> Result<Admission, String> {
        self.peers.lock().unwrap().push(peer.clone());
        match &self.refuse {
            Some(reason) => Err(reason.clone()),
            None => Ok(Admission {
                window_budget_bytes: self.budget.min(offer.window_budget_bytes),
                socket_owner: self.owner,
                connections: self.connections,
                recall: self.recall.lock().unwrap().clone(),
            }),
        }
    }

    fn announced(&self, member: Uuid) -> Result<(), String> {
        self.asked.lock().unwrap().push(member);
        self.announced.lock().unwrap().clone()
    }

    fn staged(&self, _job: Uuid, contents: u64, found: u64) {
        let mut staged = self.staged.lock().unwrap();
        *staged = (staged.0 + contents, staged.1 + found);
    }

    fn outcome(&self, member: Uuid) -> Option<MemberOutcome> {
        (member == member_uuid(0)).then_some(MemberOutcome {
            downtime_ms: Some(42),
            iterations: Some(3),
            memory_bytes: None,
        })
    }

    fn session_ended(&self, job: Uuid) {
        self.ended.lock().unwrap().push(job);
    }

    fn libvirt_sockets(&self, peer: &PeerName) -> Result<Vec<PathBuf>, String> {
        self.peers.lock().unwrap().push(peer.clone());
        self.libvirt.lock().unwrap().clone()
    }
}

pub fn member_uuid(member: usize) -> Uuid {
    Uuid::from_u128(0x100 + member as u128)
}

pub fn me() -> SocketOwner {
    use std::os::unix::fs::MetadataExt;
    let here = tempfile::tempdir().unwrap();
    let meta = std::fs::metadata(here.path()).unwrap();
    SocketOwner {
        uid: meta.uid(),
        gid: meta.gid(),
    }
}

/// A listening destination on loopback, and a place for the source's sockets.
pub struct Pair {
    pub source_dir: TempDir,
    pub destination_dir: TempDir,
    pub port: u16,
    pub host: Arc<Host>,
    pub stop: Option<oneshot::Sender<()>>,
}

impl Pair {
    pub async fn new(transport: Transport, refuse: Option<&str>, budget: u64) -> Self {
        Self::with_connections(transport, refuse, budget, NonZeroUsize::MIN).await
    }

    pub async fn with_connections(
        transport: Transport,
        refuse: Option<&str>,
        budget: u64,
        connections: NonZeroUsize,
    ) -> Self {
        let destination_dir = tempfile::tempdir().unwrap();
        let host = Arc::new(Host {
            owner: me(),
            refuse: refuse.map(str::to_owned),
            budget,
            connections,
            ended: Mutex::default(),
            peers: Mutex::default(),
            recall: Mutex::default(),
            staged: Mutex::default(),
            libvirt: Mutex::new(Err("libvirt is not for you".to_owned())),
            announced: Mutex::new(Ok(())),
            asked: Mutex::default(),
        });
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stop, stopped) = oneshot::channel::<()>();
        let workers = Workers::per_processor().unwrap();
        let (dir, serving) = (destination_dir.path().to_owned(), host.clone());
        tokio::spawn(listener.serve(transport, dir, workers, serving, async {
            let _ = stopped.await;
        }));
        Self {
            source_dir: tempfile::tempdir().unwrap(),
            destination_dir,
            port,
            host,
            stop: Some(stop),
        }
    }

    pub fn options(&self, members: usize, transport: Transport) -> SourceOptions {
        SourceOptions {
            peer: PeerAddress {
                host: "127.0.0.1".to_owned(),
                port: self.port,
            },
            transport,
            offer: Offer {
                job: JOB,
                gang: "web".to_owned(),
                source_host: "a".to_owned(),
                window_budget_bytes: 64 << 20,
                members: (0..members)
                    .map(|i| MemberOffer {
                        uuid: member_uuid(i),
                        name: format!("g{i}"),
                        memory_bytes: 1 << 20,
                        fixed_owner: None,
                    })
                    .collect(),
            },
            runtime_dir: self.source_dir.path().to_owned(),
            socket_owners: vec![me(); members],
            techniques: Techniques::ALL,
            workers: Workers::per_processor().unwrap(),
            network: vmgang_engine::system(),
            bandwidth_bytes_per_s: None,
            connections: NonZeroUsize::MIN,
            hold: Hold::Nothing,
            scanned: Scanned::default(),
            stage: None,
            keep_contents: false,
        }
    }

    pub fn socket(dir: &Path, member: usize) -> PathBuf {
        dir.join(format!("migrate/{}/{member}/stream.sock", JOB.simple()))
    }

    /// What the destination's libvirt does in Prepare: a QEMU that listens.
    pub fn destination_qemu(&self, member: usize) -> UnixListener {
        UnixListener::bind(Self::socket(self.destination_dir.path(), member)).unwrap()
    }

    pub async fn source_qemu(&self, session: &SourceSession, member: usize) -> UnixStream {
        let path = Self::socket(self.source_dir.path(), member);
        assert_eq!(
            session.migrate_uri(member),
            format!("unix://{}", path.display())
        );
        UnixStream::connect(path).await.unwrap()
    }
}

pub fn page(seed: u64) -> [u8; 4096] {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = [0; 4096];
    for byte in &mut page {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
    page
}

/// A guest of `pages` pages: a third zero, a third the same on all guests (every tenth of it
/// uniform), a third its own.
pub fn guest_stream(member: usize, pages: usize) -> Vec<u8> {
    let first: Vec<_> = (0..pages as u64)
        .map(|i| match i % 3 {
            0 => None,
            1 if i % 30 == 1 => Some([i as u8 | 1; 4096]),
            1 => Some(page(i)),
            _ => Some(page(i + 1_000_000 * (member as u64 + 1))),
        })
        .collect();
    let dirty: Vec<_> = (0..20.min(pages))
        .map(|i| (i, page(i as u64 + 77)))
        .collect();
    StreamBuilder::migration(&first, &dirty)
}

/// Reads all the stream of one destination QEMU, answering with `reply` at its start.
pub async fn swallow(listener: UnixListener, reply: &[u8]) -> Vec<u8> {
    let (mut connection, _) = listener.accept().await.unwrap();
    // Whoever has gone already does not want it.
    let _ = connection.write_all(reply).await;
    let mut bytes = Vec::new();
    connection.read_to_end(&mut bytes).await.unwrap();
    bytes
}

pub async fn event(
    events: &mut mpsc::UnboundedReceiver<SourceEvent>,
    wanted: impl Fn(&SourceEvent) -> bool,
) -> SourceEvent {
    let find = async {
        loop {
            let event = events.recv().await.expect("the session goes on");
            if wanted(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(SOON, find)
        .await
        .expect("the event comes")
}
