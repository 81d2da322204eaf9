//! What the engine takes from the operating system: connections to peers, the sockets of QEMUs,
//! and secrets. A trait, so that both halves of a session are also run where these are simulated.
//!
//! Must not: know frames or sessions.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use uuid::Uuid;

use crate::peer;
use crate::{PeerAddress, SocketOwner};

/// Bytes the kernel may hold for a destination QEMU that is busy: a few frames, so that one wake-up
/// of ours moves more than one of them.
const SOCKET_BYTES: usize = 512 * 1024;

/// A connection to a peer.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Both directions of a connection to a QEMU. Dropping the writer ends its direction.
pub type QemuConnection = (
    Box<dyn AsyncRead + Send + Unpin>,
    Box<dyn AsyncWrite + Send + Unpin>,
);

/// Something that takes its time.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'a>>;

/// Where connections come from.
pub trait Network: Send + Sync + fmt::Debug + 'static {
    /// Connects to a peer.
    fn connect(&self, peer: &PeerAddress) -> Pending<'static, Box<dyn Connection>>;
    /// Listens where a member's source QEMU is to connect. Its user can reach the socket, but not
    /// replace it: the directory is root's.
    fn listen(&self, socket: &Path, owner: SocketOwner) -> io::Result<Box<dyn QemuListener>>;
    /// Connects to a member's destination QEMU.
    fn connect_qemu(&self, socket: &Path, owner: SocketOwner) -> Pending<'static, QemuConnection>;
    /// Connects to this host's libvirt, which listens there. Not where there is none.
    fn connect_libvirt(&self, socket: &Path) -> Pending<'static, Box<dyn Connection>> {
        let _ = socket;
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }
    /// 16 bytes nobody else can guess.
    fn secret(&self) -> [u8; 16];
}

/// Where a member's source QEMU connects.
pub trait QemuListener: Send {
    /// The next connection that may come. Cancel-safe.
    fn accept(&mut self) -> Pending<'_, QemuConnection>;
}

/// Where peers connect.
pub trait PeerListener: Send {
    /// The next connection, and where it comes from. Cancel-safe.
    fn accept(&mut self) -> Pending<'_, (Box<dyn Connection>, SocketAddr)>;
    /// Where it listens.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

/// The operating system's.
pub fn system() -> Arc<dyn Network> {
    Arc::new(System)
}

#[derive(Debug)]
struct System;

impl Network for System {
    fn connect(&self, peer: &PeerAddress) -> Pending<'static, Box<dyn Connection>> {
        let PeerAddress { host, port } = peer.clone();
        Box::pin(async move {
            let stream = TcpStream::connect((host.as_str(), port)).await?;
            peer::configure(&stream)?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    }

    fn listen(&self, socket: &Path, owner: SocketOwner) -> io::Result<Box<dyn QemuListener>> {
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        std::os::unix::fs::chown(socket, Some(owner.uid), Some(owner.gid))?;
        Ok(Box::new(Owned { listener, owner }))
    }

    fn connect_qemu(&self, socket: &Path, owner: SocketOwner) -> Pending<'static, QemuConnection> {
        Box::pin(connect_qemu(socket.to_owned(), owner))
    }

    fn connect_libvirt(&self, socket: &Path) -> Pending<'static, Box<dyn Connection>> {
        let socket = socket.to_owned();
        Box::pin(async move {
            let stream = UnixStream::connect(socket).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    }

    fn secret(&self) -> [u8; 16] {
        // Version 4 UUIDs carry 122 bits of the system's randomness each.
        Uuid::new_v4().into_bytes()
    }
}

/// A listener that serves one user, and root.
struct Owned {
    listener: UnixListener,
    owner: SocketOwner,
}

impl QemuListener for Owned {
    fn accept(&mut self) -> Pending<'_, QemuConnection> {
        Box::pin(async {
            loop {
                let (connection, _) = self.listener.accept().await?;
                // libvirtd connects as root, QEMU as its own user.
                match connection.peer_cred() {
                    Ok(peer) if peer.uid() == 0 || peer.uid() == self.owner.uid => {
                        return Ok(halves(connection));
                    }
                    Ok(peer) => {
                        tracing::warn!(uid = peer.uid(), "refused a connection of another user");
                    }
                    Err(error) => {
                        tracing::warn!(%error, "refused a connection of an unknown user");
                    }
                }
            }
        })
    }
}

impl PeerListener for TcpListener {
    fn accept(&mut self) -> Pending<'_, (Box<dyn Connection>, SocketAddr)> {
        Box::pin(async {
            let (stream, address) = TcpListener::accept(self).await?;
            peer::configure(&stream)?;
            Ok((Box::new(stream) as Box<dyn Connection>, address))
        })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        TcpListener::local_addr(self)
    }
}

/// Connects to what listens there, if it is a socket of that user. The directory is QEMU's:
/// a guest that has broken out could put a link to another socket into it.
async fn connect_qemu(socket: PathBuf, owner: SocketOwner) -> io::Result<QemuConnection> {
    if !std::fs::symlink_metadata(&socket)?.file_type().is_socket() {
        return Err(io::Error::other("there is something else in its place"));
    }
    let connection = UnixStream::connect(socket).await?;
    widen(&connection);
    match connection.peer_cred()?.uid() {
        uid if uid == owner.uid => Ok(halves(connection)),
        uid => Err(io::Error::other(format!("user {uid} listens in its place"))),
    }
}

fn halves(connection: UnixStream) -> QemuConnection {
    let (reader, writer) = connection.into_split();
    (Box::new(reader), Box::new(writer))
}

/// Without permission for more than the host's limit, it stays at that.
fn widen(connection: &UnixStream) {
    use rustix::net::sockopt;
    if sockopt::set_socket_send_buffer_size_force(connection, SOCKET_BYTES).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(connection, SOCKET_BYTES);
    }
}
