//! The peer listener: sessions that other hosts open to this one.
//!
//! Owns: accepting, TLS, the handshake, and asking the [`DestinationHost`] whether a job
//! may come. Must not: touch a stream; `destination_session` does, and `stage_session` for stages.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;
use vmgang_wire::{Frame, Hello, RefuseCode, WireError};

use crate::answers::Recall;
use crate::connection::{FrameReader, ReadError};
use crate::control::{self, CONTROL_CONNECTIONS_MAX, ServeControl};
use crate::join::Grants;
use crate::libvirt_rpc::{self, LIBVIRT_CONNECTIONS_MAX};
use crate::network::{Connection, Network, PeerListener, system};
use crate::offer::Purpose;
use crate::peer::{self, PeerName};
use crate::stages::Stages;
use crate::tls::{Transport, Transports, certificate_names};
use crate::tls_refusal::{End, explain};
use crate::{MemberOutcome, Offer, PageKey, SocketOwner, Workers};
use crate::{destination_session, stage_session};

/// A peer that has not said who it is after so long is hung up on.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that have not finished their handshake.
const HANDSHAKES_MAX: usize = 64;

/// What the destination grants a job.
#[derive(Clone)]
pub struct Admission {
    /// At most what the offer asks for.
    pub window_budget_bytes: u64,
    /// The user QEMU runs as on this host.
    pub socket_owner: SocketOwner,
    /// TCP connections that its session may have at most.
    pub connections: NonZeroUsize,
    /// Where contents are looked for that the source offers, made with the same page key.
    pub recall: Option<Arc<dyn Recall>>,
}

/// The host that jobs arrive at. Calls may block; they run on threads of their own.
pub trait DestinationHost: Send + Sync + 'static {
    /// Whether a job may come. The error is a sentence for the person who started it.
    fn admit(&self, offer: &Offer, purpose: Purpose, peer: &PeerName) -> Result<Admission, String>;
    /// Whether libvirt on this host has itself announced that this member comes. Asked once, before
    /// anything connects to its QEMU. The error is why not.
    fn announced(&self, member: Uuid) -> Result<(), String>;
    /// The same of a member whose socket bears its name: it is the domain of that name that comes.
    fn announced_by_name(&self, member: Uuid, name: &str) -> Result<(), String> {
        let _ = name;
        self.announced(member)
    }
    /// A stage has got so many contents more, of them so many that were found on this host.
    fn staged(&self, job: Uuid, contents: u64, found: u64);
    /// How a member's migration ended, if libvirt here knows.
    fn outcome(&self, member: Uuid) -> Option<MemberOutcome>;
    /// The session of an admitted job is over.
    fn session_ended(&self, job: Uuid);
    /// Where this host's libvirt may listen, for a peer that may use it. The error is a sentence for
    /// the person who wanted that.
    fn libvirt_sockets(&self, peer: &PeerName) -> Result<Vec<PathBuf>, String> {
        let _ = peer;
        Err("this host offers its libvirt to nobody".to_owned())
    }
    /// What serves a peer that has a request to this host's vmgangd itself. The error likewise.
    fn control(&self, peer: PeerName) -> Result<ServeControl, String> {
        let _ = peer;
        Err("this host takes requests from nobody".to_owned())
    }
}

/// A listening vmgangd.
pub struct Listener {
    peers: Box<dyn PeerListener>,
    network: Arc<dyn Network>,
}

struct Service {
    transports: Box<dyn Transports>,
    runtime_dir: PathBuf,
    workers: Workers,
    network: Arc<dyn Network>,
    host: Arc<dyn DestinationHost>,
    grants: Grants,
    stages: Stages,
    libvirt_connections: Arc<Semaphore>,
    control_connections: Arc<Semaphore>,
}

impl Listener {
    /// Starts to listen.
    pub async fn bind(listen: SocketAddr) -> io::Result<Self> {
        let peers = TcpListener::bind(listen).await?;
        Ok(Self::new(Box::new(peers), system()))
    }

    /// Listens there, and connects to QEMUs over that network.
    pub fn new(peers: Box<dyn PeerListener>, network: Arc<dyn Network>) -> Self {
        Self { peers, network }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.peers.local_addr()
    }

    /// Serves peers until `shutdown`, which ends every session.
    pub async fn serve(
        mut self,
        transports: impl Transports,
        runtime_dir: PathBuf,
        workers: Workers,
        host: Arc<dyn DestinationHost>,
        shutdown: impl Future<Output = ()>,
    ) {
        let service = Arc::new(Service {
            transports: Box::new(transports),
            runtime_dir,
            workers,
            network: self.network,
            host,
            grants: Grants::default(),
            stages: Stages::default(),
            libvirt_connections: Arc::new(Semaphore::new(LIBVIRT_CONNECTIONS_MAX)),
            control_connections: Arc::new(Semaphore::new(CONTROL_CONNECTIONS_MAX)),
        });
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let mut sessions = JoinSet::new();
        tokio::pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                biased;
                accepted = self.peers.accept() => accepted,
                () = &mut shutdown => break,
            };
            while sessions.try_join_next().is_some() {}
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting a peer failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(permit) = handshakes.clone().try_acquire_owned() else {
                tracing::warn!(peer = %address, "hung up: too many handshakes at once");
                continue;
            };
            let service = service.clone();
            sessions.spawn(async move {
                if let Err(reason) = service.greet(stream, address, permit).await {
                    tracing::warn!(peer = %address, %reason, "peer connection ended");
                }
            });
        }
        sessions.shutdown().await;
    }
}

impl Service {
    async fn greet(
        &self,
        stream: Box<dyn Connection>,
        address: SocketAddr,
        handshake: OwnedSemaphorePermit,
    ) -> Result<(), String> {
        let mut name = PeerName {
            address,
            certificate_names: Vec::new(),
        };
        let transport = self.transports.current();
        let page_key = transport.page_key();
        match &transport {
            Transport::Plain => self.handshake(stream, name, page_key, handshake).await,
            Transport::Tls(identity) => {
                let acceptor = tokio_rustls::TlsAcceptor::from(identity.server.clone());
                let stream = peer::read_ahead(stream);
                let stream = timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream))
                    .await
                    .map_err(|_| "no TLS handshake".to_owned())?
                    .map_err(|error| {
                        let why = explain(&error, End::Destination, &identity.files);
                        format!("no secure connection: {why}")
                    })?;
                let certificates = stream.get_ref().1.peer_certificates().unwrap_or(&[]);
                name.certificate_names = certificates
                    .first()
                    .map(certificate_names)
                    .unwrap_or_default();
                self.handshake(stream, name, page_key, handshake).await
            }
        }
    }

    async fn handshake(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
        name: PeerName,
        page_key: PageKey,
        handshake: OwnedSemaphorePermit,
    ) -> Result<(), String> {
        let (reader, mut writer) = tokio::io::split(stream);
        let mut reader = FrameReader::new(reader);
        let hello = match timeout(HANDSHAKE_TIMEOUT, reader.next()).await {
            Err(_) => return Err("no handshake".to_owned()),
            Ok(Ok(Frame::Hello(hello))) => hello,
            Ok(Ok(Frame::Join(join))) => {
                drop(handshake);
                return match self.grants.join(&join, &name.certificate_names) {
                    Ok(joined) => joined.serve(reader, writer).await,
                    Err(reason) => {
                        refuse(&mut writer, RefuseCode::Offer, reason).await;
                        Err(format!("refused to join job {}: {reason}", join.job))
                    }
                };
            }
            Ok(Ok(Frame::Libvirt)) => {
                drop(handshake);
                let relayed = self.relay_libvirt(name, reader, &mut writer);
                return match relayed.await {
                    Ok(()) => Ok(()),
                    Err(reason) => {
                        refuse(&mut writer, RefuseCode::Offer, &reason).await;
                        Err(format!("refused a connection to libvirt: {reason}"))
                    }
                };
            }
            Ok(Ok(Frame::Control)) => {
                drop(handshake);
                let Ok(_connection) = self.control_connections.try_acquire() else {
                    let reason =
                        "it serves as many requests as it can; wait until others have ended";
                    refuse(&mut writer, RefuseCode::Offer, reason).await;
                    return Err(format!("refused a request: {reason}"));
                };
                return match self.host.control(name) {
                    Ok(serve) => {
                        control::serve(reader, writer, serve).await;
                        Ok(())
                    }
                    Err(reason) => {
                        refuse(&mut writer, RefuseCode::Offer, &reason).await;
                        Err(format!("refused a request: {reason}"))
                    }
                };
            }
            Ok(Ok(_)) => {
                let reason = "the first frame is none of HELLO, JOIN, LIBVIRT and CONTROL";
                refuse(&mut writer, RefuseCode::Protocol, reason).await;
                return Err(reason.to_owned());
            }
            Ok(Err(ReadError::Wire(WireError::Version { theirs }))) => {
                refuse(
                    &mut writer,
                    RefuseCode::Version,
                    &vmgang_wire::VERSION.to_string(),
                )
                .await;
                return Err(format!("it speaks protocol version {theirs}"));
            }
            Ok(Err(error)) => return Err(error.to_string()),
        };
        drop(handshake);
        let certificate_names = name.certificate_names.clone();
        match self.admit(&hello, name).await {
            Ok(admission) => {
                let mut session = destination_session::Job {
                    page_key,
                    hello,
                    admission,
                    window: None,
                    host: self.host.clone(),
                    runtime_dir: self.runtime_dir.clone(),
                    workers: self.workers.clone(),
                    network: self.network.clone(),
                    grants: self.grants.clone(),
                    certificate_names,
                };
                let stage = match session.hello.purpose {
                    vmgang_wire::Purpose::Migrate { stage } => stage,
                    vmgang_wire::Purpose::Ambient => None,
                    vmgang_wire::Purpose::Stage { seconds } => {
                        let job = session.hello.job;
                        let held = self.stages.hold(job, &session.certificate_names);
                        return stage_session::run(session, seconds, held, reader, writer).await;
                    }
                };
                if let Some(stage) = stage {
                    session.window = self.stages.take(stage, &session.certificate_names).await;
                }
                destination_session::run(session, reader, writer).await
            }
            Err(reason) => {
                refuse(&mut writer, RefuseCode::Offer, &reason).await;
                Err(format!("refused job {}: {reason}", hello.job))
            }
        }
    }

    /// Carries a connection to this host's libvirt, to its end. The error is why it was refused.
    async fn relay_libvirt(
        &self,
        name: PeerName,
        reader: FrameReader<impl AsyncRead + Unpin>,
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), String> {
        let _connection = self.libvirt_connections.try_acquire().map_err(|_| {
            format!("it carries {LIBVIRT_CONNECTIONS_MAX} connections to its libvirt already; wait until other migrations have ended")
        })?;
        let host = self.host.clone();
        let address = name.address;
        let sockets = self
            .workers
            .blocking(move || host.libvirt_sockets(&name))
            .await
            .map_err(|_| "the destination daemon failed while checking the peer".to_owned())??;
        let libvirt = libvirt_rpc::connect_local(&*self.network, &sockets).await?;
        tracing::info!(peer = %address, "the peer uses this host's libvirt");
        libvirt_rpc::serve(reader, writer, libvirt).await;
        Ok(())
    }

    async fn admit(&self, hello: &Hello, name: PeerName) -> Result<Admission, String> {
        let host = self.host.clone();
        let offer = Offer::from_hello(hello);
        let offered = offer.window_budget_bytes;
        let purpose = hello.purpose.into();
        let admission = self
            .workers
            .blocking(move || host.admit(&offer, purpose, &name))
            .await
            .map_err(|_| "the destination daemon failed while checking the offer".to_owned())??;
        Ok(Admission {
            window_budget_bytes: admission.window_budget_bytes.min(offered),
            ..admission
        })
    }
}

/// Says why, as far as the peer still listens.
async fn refuse(writer: &mut (impl AsyncWrite + Unpin), code: RefuseCode, text: &str) {
    let mut bytes = Vec::new();
    Frame::Refuse {
        code,
        text: text.to_owned(),
    }
    .encode(&mut bytes);
    let _ = writer.write_all(&bytes).await;
    let _ = writer.shutdown().await;
}
