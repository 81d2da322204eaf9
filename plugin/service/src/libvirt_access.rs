//! The libvirt of a job's destination: at its URI, or over the connection to its vmgangd.
//!
//! For the latter this host listens on `RUNTIME_DIR/libvirt/HOST-PORT.sock`, which only root can reach,
//! and libvirt here is given a URI that names that socket. Whoever connects is connected to the
//! destination's libvirt through the peer; what they say is not read.
//! Must not: decide who may use this host's libvirt, `access.rs` does.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};
use vmgang_engine::{LIBVIRT_CONNECTIONS_MAX, LibvirtConnection, PeerAddress};

use crate::coordinator::TransportSource;
use crate::destination::Destination;
use crate::error::ServiceError;

/// `sun_path` with its zero at the end.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Open sockets, by the peer that they lead to.
type Sockets = Arc<Mutex<HashMap<PeerAddress, Weak<Socket>>>>;

/// Makes destinations' libvirts reachable.
pub struct LibvirtAccess {
    runtime_dir: PathBuf,
    directory: PathBuf,
    transport: Arc<TransportSource>,
    sockets: Sockets,
}

/// How a destination's libvirt is reached. What was made for it goes with the last clone.
#[derive(Clone)]
pub struct DestinationLibvirt {
    uri: String,
    socket: Option<Arc<Socket>>,
}

struct Socket {
    peer: PeerAddress,
    path: PathBuf,
    /// Why the last connection was not carried.
    problem: Arc<Mutex<Option<ServiceError>>>,
    accepting: AbortHandle,
    all: Sockets,
}

impl DestinationLibvirt {
    /// What libvirt here opens.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Why the last connection over the peer came to nothing. libvirt knows only that it did.
    pub fn problem(&self) -> Option<ServiceError> {
        let socket = self.socket.as_ref()?;
        lock(&socket.problem).clone()
    }
}

impl LibvirtAccess {
    /// For sockets in `runtime_dir/libvirt`; those that an earlier daemon left there are removed.
    pub fn new(runtime_dir: &Path, transport: Arc<TransportSource>) -> io::Result<Self> {
        let directory = runtime_dir.join("libvirt");
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self {
            runtime_dir: runtime_dir.to_owned(),
            directory,
            transport,
            sockets: Sockets::default(),
        })
    }

    /// How a destination's libvirt is reached while the answer lives. Call it on a runtime.
    pub fn reach(
        &self,
        destination: &Destination,
        peer: &PeerAddress,
    ) -> Result<DestinationLibvirt, ServiceError> {
        if let Some(uri) = &destination.uri {
            return Ok(DestinationLibvirt {
                uri: uri.clone(),
                socket: None,
            });
        }
        let path = self.socket_path(peer)?;
        let mut sockets = lock(&self.sockets);
        let open = sockets.get(peer).and_then(Weak::upgrade);
        let socket = match open {
            Some(socket) => socket,
            None => {
                let socket = self.listen(peer, path).map_err(|error| {
                    ServiceError::Internal(format!(
                        "cannot make a socket for libvirt in {}: {error}; check runtime_dir in vmgang.toml, or name a libvirt URI instead of a host",
                        self.directory.display()
                    ))
                })?;
                sockets.insert(peer.clone(), Arc::downgrade(&socket));
                socket
            }
        };
        Ok(DestinationLibvirt {
            uri: format!("qemu+unix:///system?socket={}", escaped(&socket.path)),
            socket: Some(socket),
        })
    }

    fn socket_path(&self, peer: &PeerAddress) -> Result<PathBuf, ServiceError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if !peer.host.chars().all(plain) {
            return Err(ServiceError::InvalidDestination(format!(
                "the peer '{peer}' is neither a host name nor an address"
            )));
        }
        let name = format!("{}-{}.sock", peer.host, peer.port);
        let path = self.directory.join(name);
        if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(ServiceError::InvalidDestination(format!(
                "the host name {} is too long for a socket in {}; name a libvirt URI such as qemu+tls://{}/system instead of the host",
                peer.host,
                self.directory.display(),
                peer.host
            )));
        }
        Ok(path)
    }

    fn listen(&self, peer: &PeerAddress, path: PathBuf) -> io::Result<Arc<Socket>> {
        // QEMU's user has to walk through the one above.
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true);
        builder.mode(0o711).create(&self.runtime_dir)?;
        builder.mode(0o700).create(&self.directory)?;
        // It may be there, and the umask is anybody's.
        fs::set_permissions(&self.directory, fs::Permissions::from_mode(0o700))?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let problem = Arc::default();
        let accepting = tokio::spawn(accept(Carrier {
            listener,
            peer: peer.clone(),
            transport: self.transport.clone(),
            problem: Arc::clone(&problem),
        }));
        Ok(Arc::new(Socket {
            peer: peer.clone(),
            path,
            problem,
            accepting: accepting.abort_handle(),
            all: self.sockets.clone(),
        }))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Its connections are the task's, and end with it.
        self.accepting.abort();
        let mut all = lock(&self.all);
        // Another one may have been made in its place meanwhile.
        if all
            .get(&self.peer)
            .is_some_and(|socket| std::ptr::eq(socket.as_ptr(), self))
        {
            all.remove(&self.peer);
            if let Err(error) = fs::remove_file(&self.path) {
                tracing::debug!(socket = %self.path.display(), %error, "cannot be removed");
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole after each single change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As it stands in the query of a URI.
fn escaped(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let mut escaped = String::new();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b':' => escaped.push(char::from(byte)),
            byte if byte.is_ascii_alphanumeric() => escaped.push(char::from(byte)),
            byte => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

struct Carrier {
    listener: UnixListener,
    peer: PeerAddress,
    transport: Arc<TransportSource>,
    problem: Arc<Mutex<Option<ServiceError>>>,
}

async fn accept(carrier: Carrier) {
    let mut connections = JoinSet::new();
    loop {
        let connection = tokio::select! {
            accepted = carrier.listener.accept() => match accepted {
                Ok((connection, _)) => connection,
                Err(error) => {
                    tracing::warn!(peer = %carrier.peer, %error, "accepting libvirt failed");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        // The directory is closed to others; this holds even where somebody has opened it.
        let user = connection.peer_cred().map(|user| user.uid());
        let mine = rustix::process::geteuid().as_raw();
        if !matches!(user, Ok(uid) if uid == 0 || uid == mine) {
            tracing::warn!(peer = %carrier.peer, ?user, "refused another user's connection to libvirt");
            continue;
        }
        if connections.len() >= LIBVIRT_CONNECTIONS_MAX {
            tracing::warn!(peer = %carrier.peer, "too many connections to libvirt at once");
            continue;
        }
        connections.spawn(carry(
            connection,
            carrier.peer.clone(),
            carrier.transport.clone(),
            carrier.problem.clone(),
        ));
    }
}

async fn carry(
    mut connection: UnixStream,
    peer: PeerAddress,
    transport: Arc<TransportSource>,
    problem: Arc<Mutex<Option<ServiceError>>>,
) {
    let opened = match transport() {
        Ok(transport) => {
            LibvirtConnection::open(&*vmgang_engine::system(), &peer, &transport).await
        }
        Err(reason) => {
            *lock(&problem) = Some(ServiceError::TlsFailed(reason));
            return;
        }
    };
    match opened {
        Ok(opened) => {
            *lock(&problem) = None;
            if let Err(error) = opened.relay(&mut connection).await {
                tracing::debug!(%peer, %error, "a connection to the destination's libvirt broke");
            }
        }
        Err(error) => {
            tracing::warn!(%peer, %error, "cannot connect to the destination's libvirt");
            // Before the connection is closed, which is all that libvirt sees of it.
            *lock(&problem) = Some(error.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use vmgang_engine::Transport;

    fn access(runtime_dir: &Path) -> LibvirtAccess {
        LibvirtAccess::new(runtime_dir, Arc::new(|| Ok(Transport::Plain))).expect("a directory")
    }

    fn destination(text: &str) -> (Destination, PeerAddress) {
        let destination = Destination::parse(text).expect("valid");
        let peer = destination.peer();
        (destination, peer)
    }

    #[tokio::test]
    async fn a_uri_is_used_as_it_is_and_a_host_gets_a_socket_that_goes_with_its_last_user() {
        let dir = tempfile::tempdir().expect("a directory");
        let runtime_dir = dir.path().join("run");
        let access = access(&runtime_dir);
        let (there, peer) = destination("qemu+tls://b/system");
        let reached = access.reach(&there, &peer).expect("reached");
        assert_eq!(reached.uri(), "qemu+tls://b/system");
        assert!(!runtime_dir.exists());

        let (there, peer) = destination("b");
        let first = access.reach(&there, &peer).expect("reached");
        let second = access.reach(&there, &peer).expect("reached");
        let socket = runtime_dir.join("libvirt/b-16520.sock");
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        assert_eq!((first.uri(), second.uri()), (&*uri, &*uri));
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&socket), 0o600);
        assert_eq!(mode(&runtime_dir.join("libvirt")), 0o700);
        assert_eq!(mode(&runtime_dir), 0o711, "QEMU walks through it");
        drop(first);
        assert!(socket.exists());
        drop(second);
        assert!(!socket.exists());
        access.reach(&there, &peer).expect("again");
    }

    #[tokio::test]
    async fn names_that_fit_no_socket_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let access = access(dir.path());
        let (there, peer) = destination(&"b".repeat(120));
        let error = access.reach(&there, &peer).err().expect("refused");
        assert!(error.sentence().contains("too long"), "{error:?}");
        let (there, _) = destination("b");
        let peer = "b?socket=x:1".parse().expect("what a peer option may be");
        let error = access.reach(&there, &peer).err().expect("refused");
        assert!(error.sentence().contains("neither"), "{error:?}");
    }

    #[tokio::test]
    async fn why_nothing_was_carried_is_known_when_the_connection_is_closed() {
        let dir = tempfile::tempdir().expect("a directory");
        let access = access(dir.path());
        let (there, mut peer) = destination("b");
        peer.host = "127.0.0.1".into();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        peer.port = closed.local_addr().expect("bound").port();
        drop(closed);
        let reached = access.reach(&there, &peer).expect("reached");
        let path = dir
            .path()
            .join(format!("libvirt/127.0.0.1-{}.sock", peer.port));
        let mut libvirt = UnixStream::connect(path).await.expect("listens");
        let _ = libvirt.write_all(b"hello").await;
        let mut bytes = Vec::new();
        let _ = libvirt.read_to_end(&mut bytes).await;
        let Some(ServiceError::PeerUnreachable(why)) = reached.problem() else {
            panic!("another problem: {:?}", reached.problem());
        };
        assert!(why.contains(&peer.to_string()), "{why}");
    }

    #[test]
    fn paths_in_uris() {
        assert_eq!(escaped(Path::new("/run/a b&c")), "/run/a%20b%26c");
    }
}
