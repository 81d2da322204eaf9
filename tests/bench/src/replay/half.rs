//! One half of a run, in a process of its own: started with a hidden argument, told what to do in
//! one line of JSON on standard input, answering with lines of JSON on standard output.
//!
//! It ends with its standard input, so nothing outlives the program that started it.
//! Must not: see the streams other than through the sockets.

use std::io::{BufRead, Read, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use uuid::Uuid;
use vmgang_engine::{
    Admission, DestinationHost, Hold, Listener, MemberOffer, MemberOutcome, Offer, PeerAddress,
    PeerName, Purpose, Scanned, SessionCounters, SocketOwner, SourceEvent, SourceOptions,
    SourceSession, TlsFiles, TlsIdentity, Transport, Workers,
};

use super::relay;

/// The hidden argument.
pub const HALF_ARGUMENT: &str = "__half";
/// The one job of a run.
pub const JOB: Uuid = Uuid::from_u128(0x7265_706c_6179);

/// What a half does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    Source,
    Destination,
    RelaySource,
    RelayDestination,
}

impl Role {
    fn thread_name(self) -> &'static str {
        match self {
            Role::Source | Role::RelaySource => "source-half",
            Role::Destination | Role::RelayDestination => "dest-half",
        }
    }
}

/// What a half is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HalfConfig {
    pub role: Role,
    /// Sockets are below it, as vmgangd makes them.
    pub runtime_dir: PathBuf,
    /// Where a source half connects to, on loopback.
    pub peer_port: u16,
    /// Names and memory in bytes, in order.
    pub members: Vec<(String, u64)>,
    /// As `--technique` takes it.
    pub techniques: String,
    pub window_bytes: u64,
    /// Authority, certificate and key, in one directory; `None` is plain.
    pub tls: Option<PathBuf>,
    /// Threads of the half's runtime, and as many that hash and compress.
    pub workers: usize,
    /// TCP connections of the session.
    pub connections: NonZeroUsize,
}

/// What a half says.
#[derive(Debug, Serialize, Deserialize)]
pub enum HalfSays {
    /// A destination half listens.
    Listening {
        port: u16,
    },
    /// A source half takes connections.
    Ready,
    /// All streams have ended in order.
    Ended(Box<HalfEnd>),
    Failed {
        error: String,
    },
}

/// What a half has used, and found out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HalfEnd {
    /// Of all its threads, from when it was ready to the end of the streams.
    pub cpu_seconds: f64,
    /// Most memory the process has had (VmHWM).
    pub peak_memory_bytes: u64,
    /// Bytes exchanged, both directions; a source half knows.
    pub wire_bytes: u64,
    /// Of a source half of vmgang.
    pub counters: Option<Counters>,
}

/// The engine's counters, in a form that can be sent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Counters {
    pub stream_bytes: u64,
    pub literal_bytes: u64,
    /// Bytes saved by each technique, by the names that `vmgang migrate --json` uses.
    pub saved: Vec<(String, i64)>,
}

impl Counters {
    fn new(counters: &SessionCounters) -> Self {
        let saved = &counters.saved;
        Self {
            stream_bytes: counters.qemu_stream_bytes,
            literal_bytes: counters.literal_bytes,
            saved: [
                ("zero", saved.zero),
                ("uniform", saved.uniform),
                ("intra_vm", saved.intra_vm),
                ("cross_vm", saved.cross_vm),
                ("staged", saved.staged),
                ("destination", saved.destination),
                ("sub_page", saved.sub_page),
                ("delta", saved.delta),
                ("compression", saved.compression),
            ]
            .map(|(name, bytes)| (name.to_owned(), bytes))
            .to_vec(),
        }
    }

    /// All savings together.
    pub fn saved_total(&self) -> i64 {
        self.saved.iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Where a member's socket is.
pub fn socket(config: &HalfConfig, member: usize) -> PathBuf {
    config
        .runtime_dir
        .join(format!("migrate/{}/{member}/stream.sock", JOB.simple()))
}

/// Does what it is told, if this process was started as a half; `false` if it was not.
pub fn serve_if_asked() -> bool {
    if std::env::args_os().nth(1).as_deref() != Some(HALF_ARGUMENT.as_ref()) {
        return false;
    }
    if let Err(error) = serve() {
        say(&HalfSays::Failed {
            error: format!("{error:#}"),
        });
    }
    true
}

fn say(what: &HalfSays) {
    // Without anyone to tell it to, the end of standard input ends this process as well.
    if let Ok(line) = serde_json::to_string(what) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

fn serve() -> Result<()> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let config: HalfConfig = serde_json::from_str(&line).context("not a configuration")?;
    std::thread::spawn(|| {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.workers)
        .thread_name(config.role.thread_name())
        .enable_all()
        .build()?;
    let end = runtime.block_on(async {
        // Its own task, so that nothing of it runs on this thread.
        let task = match config.role {
            Role::Source => tokio::spawn(source(config)),
            Role::Destination => tokio::spawn(destination(config)),
            Role::RelaySource => tokio::spawn(relay_source(config)),
            Role::RelayDestination => tokio::spawn(relay_destination(config)),
        };
        task.await
    })??;
    say(&HalfSays::Ended(Box::new(end)));
    Ok(())
}

async fn source(config: HalfConfig) -> Result<HalfEnd> {
    let members = config.members.len();
    let options = SourceOptions {
        peer: PeerAddress {
            host: "127.0.0.1".to_owned(),
            port: config.peer_port,
        },
        transport: transport(&config)?,
        offer: Offer {
            job: JOB,
            gang: "replay".to_owned(),
            source_host: "replay".to_owned(),
            window_budget_bytes: config.window_bytes,
            members: config
                .members
                .iter()
                .enumerate()
                .map(|(index, (name, memory_bytes))| MemberOffer {
                    uuid: Uuid::from_u128(index as u128 + 1),
                    name: name.clone(),
                    memory_bytes: *memory_bytes,
                    fixed_owner: None,
                })
                .collect(),
        },
        runtime_dir: config.runtime_dir.clone(),
        socket_owners: vec![this_user(); members],
        techniques: config.techniques.parse()?,
        workers: workers(&config)?,
        network: vmgang_engine::system(),
        bandwidth_bytes_per_s: None,
        connections: config.connections,
        hold: Hold::Nothing,
        scanned: Scanned::default(),
        stage: None,
        keep_contents: false,
    };
    let (session, mut events) = SourceSession::connect(options).await?;
    let before = cpu_seconds();
    say(&HalfSays::Ready);
    let mut ended = 0;
    while ended < members {
        match events.recv().await {
            Some(SourceEvent::StreamEnded { .. }) => ended += 1,
            Some(SourceEvent::MemberFailed { member, error }) => {
                bail!("member {member} failed: {error}")
            }
            Some(SourceEvent::SessionFailed { error }) => bail!("the session failed: {error}"),
            Some(_) => {}
            None => bail!("the session has ended"),
        }
    }
    let cpu_seconds = cpu_seconds() - before;
    let counters = session.close().await.counters;
    Ok(HalfEnd {
        cpu_seconds,
        peak_memory_bytes: peak_memory_bytes()?,
        wire_bytes: counters.wire_bytes,
        counters: Some(Counters::new(&counters)),
    })
}

/// Admits the one job and notes when it is over.
struct Host {
    window_bytes: u64,
    connections: NonZeroUsize,
    ended: Mutex<Option<oneshot::Sender<f64>>>,
}

impl DestinationHost for Host {
    fn admit(
        &self,
        offer: &Offer,
        _purpose: Purpose,
        _peer: &PeerName,
    ) -> Result<Admission, String> {
        Ok(Admission {
            window_budget_bytes: self.window_bytes.min(offer.window_budget_bytes),
            socket_owner: this_user(),
            connections: self.connections,
            recall: None,
        })
    }

    fn announced(&self, _member: Uuid) -> Result<(), String> {
        Ok(())
    }

    fn staged(&self, _job: Uuid, _contents: u64, _found: u64) {}

    fn outcome(&self, _member: Uuid) -> Option<MemberOutcome> {
        None
    }

    fn session_ended(&self, _job: Uuid) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ended) = ended.take() {
            let _ = ended.send(cpu_seconds());
        }
    }
}

async fn destination(config: HalfConfig) -> Result<HalfEnd> {
    let transport = transport(&config)?;
    let listener = Listener::bind(([127, 0, 0, 1], 0).into()).await?;
    let port = listener.local_addr()?.port();
    let (ended, has_ended) = oneshot::channel();
    let (stop, stopped) = oneshot::channel::<()>();
    let host = Host {
        window_bytes: config.window_bytes,
        connections: config.connections,
        ended: Mutex::new(Some(ended)),
    };
    let serving = tokio::spawn(listener.serve(
        transport,
        config.runtime_dir.clone(),
        workers(&config)?,
        Arc::new(host),
        async {
            let _ = stopped.await;
        },
    ));
    let before = cpu_seconds();
    say(&HalfSays::Listening { port });
    let after = has_ended.await.context("the listener has ended")?;
    let peak_memory_bytes = peak_memory_bytes()?;
    let _ = stop.send(());
    serving.await?;
    Ok(HalfEnd {
        cpu_seconds: after - before,
        peak_memory_bytes,
        wire_bytes: 0,
        counters: None,
    })
}

async fn relay_source(config: HalfConfig) -> Result<HalfEnd> {
    make_socket_dirs(&config)?;
    let listeners = (0..config.members.len())
        .map(|member| Ok(tokio::net::UnixListener::bind(socket(&config, member))?))
        .collect::<Result<Vec<_>>>()?;
    let before = cpu_seconds();
    say(&HalfSays::Ready);
    let wire_bytes = relay::source(listeners, config.peer_port).await?;
    relay_end(before, wire_bytes)
}

async fn relay_destination(config: HalfConfig) -> Result<HalfEnd> {
    make_socket_dirs(&config)?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
    let port = listener.local_addr()?.port();
    let sockets = (0..config.members.len())
        .map(|member| socket(&config, member))
        .collect();
    let before = cpu_seconds();
    say(&HalfSays::Listening { port });
    let wire_bytes = relay::destination(listener, sockets).await?;
    relay_end(before, wire_bytes)
}

fn relay_end(before: f64, wire_bytes: u64) -> Result<HalfEnd> {
    Ok(HalfEnd {
        cpu_seconds: cpu_seconds() - before,
        peak_memory_bytes: peak_memory_bytes()?,
        wire_bytes,
        counters: None,
    })
}

fn make_socket_dirs(config: &HalfConfig) -> Result<()> {
    for member in 0..config.members.len() {
        let path = socket(config, member);
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)
                .with_context(|| format!("cannot make {}", dir.display()))?;
        }
    }
    Ok(())
}

fn transport(config: &HalfConfig) -> Result<Transport> {
    let Some(dir) = &config.tls else {
        return Ok(Transport::Plain);
    };
    let (certificate, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    Ok(Transport::Tls(TlsIdentity::load(&TlsFiles {
        ca: dir.join("ca.pem"),
        server_certificate: certificate.clone(),
        server_key: key.clone(),
        client_certificate: certificate,
        client_key: key,
    })?))
}

fn workers(config: &HalfConfig) -> Result<Workers> {
    let threads = NonZeroUsize::new(config.workers).context("a half has at least one worker")?;
    Ok(Workers::new(threads)?)
}

fn this_user() -> SocketOwner {
    SocketOwner {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    }
}

/// Processor time of all threads this process has had.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn peak_memory_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok())
        .ok_or_else(|| anyhow!("/proc/self/status tells no VmHWM"))?;
    Ok(kib * 1024)
}
