//! Sessions for migrations that somebody else starts: a client of libvirt has named a socket in
//! `<runtime_dir>/to/<peer>/`, and whoever migrates to that peer at the same time shares a session.
//!
//! The sockets are there before any session is, and outlive it; who owns them hands over their connections.
//! Must not: hold anybody. No gang was asked for, so each member switches over when its QEMU thinks fit.

use std::fmt;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;

use crate::network::QemuListener;
use crate::source::{Hold, SessionEnd, SourceError, SourceEvent, SourceOptions, SourceSession};
use crate::{MemberOutcome, SessionCounters};

/// A unix socket path is at most 107 bytes and its terminator.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Where the sockets are of domains that go to a host of that name, the same on both hosts; `None` if it is
/// no name of a directory.
pub fn ambient_directory(runtime_dir: &Path, host: &str) -> Option<PathBuf> {
    is_file_name(host).then(|| runtime_dir.join("to").join(host))
}

/// The socket of a domain that goes to a host of that name. `None` if one of the names cannot be that of a
/// file, or the path is too long for a socket.
pub fn ambient_socket(runtime_dir: &Path, host: &str, domain: &str) -> Option<PathBuf> {
    let directory = ambient_directory(runtime_dir, host)?;
    let path = directory.join(format!("{domain}.sock"));
    (is_file_name(domain) && path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX).then_some(path)
}

/// Names come from peers: none may lead out of the directory.
fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0'])
}

/// A member's socket: where it is, and what gives the connections that are made there.
pub struct AmbientSocket {
    pub path: PathBuf,
    pub connections: Box<dyn QemuListener>,
}

impl AmbientSocket {
    pub(crate) fn into_parts(self) -> (PathBuf, Box<dyn QemuListener>) {
        (self.path, self.connections)
    }
}

impl fmt::Debug for AmbientSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmbientSocket")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// An open session whose members come and go. Dropping it closes everything at once.
#[derive(Debug)]
pub struct AmbientSession(SourceSession);

impl AmbientSession {
    /// Connects to the peer. There is a socket for each member of the offer, in its order; the options'
    /// `runtime_dir`, `socket_owners`, `stage` and `hold` are without meaning here.
    pub async fn connect(
        options: SourceOptions,
        sockets: Vec<AmbientSocket>,
    ) -> Result<(Self, mpsc::UnboundedReceiver<SourceEvent>), SourceError> {
        let options = SourceOptions {
            hold: Hold::Nothing,
            stage: None,
            ..options
        };
        let (session, events) = SourceSession::open(options, Some(sockets)).await?;
        Ok((Self(session), events))
    }

    /// Connections of QEMUs that are open now.
    pub fn open_connections(&self) -> usize {
        self.0.open_channels()
    }

    /// Caps what is written to the peer.
    pub fn set_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.0.set_bandwidth(bytes_per_s);
    }

    /// What has been moved and saved so far.
    pub fn counters(&self) -> SessionCounters {
        self.0.counters()
    }

    /// Asks the destination's libvirt how a member's migration ended.
    pub async fn member_outcome(
        &self,
        member: usize,
    ) -> Result<Option<MemberOutcome>, SourceError> {
        self.0.member_outcome(member).await
    }

    /// Says goodbye to the peer, and returns the final counters once it has hung up.
    pub async fn close(self) -> SessionEnd {
        self.0.close().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_peers_lead_nowhere_else() {
        let run = Path::new("/run/vmgang");
        let found = ambient_socket(run, "b", "web 1");
        assert_eq!(found, Some("/run/vmgang/to/b/web 1.sock".into()));
        for (host, domain) in [
            ("", "web"),
            ("..", "web"),
            ("b/c", "web"),
            ("b", ""),
            ("b", "../../migrate/x"),
            ("b", ".."),
            ("b", "a\0b"),
            ("b", &"w".repeat(90)),
        ] {
            assert_eq!(
                ambient_socket(run, host, domain),
                None,
                "{host:?} {domain:?}"
            );
        }
    }
}
