//! Ambient mode: clients that know nothing of vmgang have their migrations de-duplicated by naming a socket,
//! `--migrateuri unix:///run/vmgang/to/PEER/DOMAIN.sock`.
//!
//! Owns: the directories, a listening socket for each domain on its way to each peer, and where this host's
//! QEMUs listen for what arrives. A connection goes to the peer's session, see `ambient/session.rs`.
//! Must not: start, hold or judge a migration; the client and libvirt do.

mod session;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;
use uuid::Uuid;
use vmgang_engine::{SocketOwner, ambient_directory, ambient_socket};
use vmgang_libvirt::DomainInfo;

use crate::announcements::Announcements;
use crate::config::AmbientConfig;
use crate::coordinator::Coordinator;
use crate::error::ServiceError;
use crate::hypervisor::{Hypervisor, ask};
use session::Route;

/// How often domains are looked for of which libvirt's hook does not tell: those that were defined and
/// have not been started.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// What keeps a connection from being taken may be over by then.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Sockets of this host's domains.
struct Sockets {
    runtime_dir: PathBuf,
    hypervisor: Arc<dyn Hypervisor>,
    routes: Vec<Arc<Route>>,
    /// By name: whose they are, and what listens.
    domains: BTreeMap<String, (Identity, Vec<AbortHandle>)>,
}

/// What a domain's sockets depend on.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity {
    uuid: Uuid,
    /// Its QEMU's user is known from then on.
    active: bool,
}

/// Makes the directories, and serves what connects there for as long as the daemon lives.
pub async fn run(
    config: AmbientConfig,
    coordinator: Arc<Coordinator>,
    announcements: Arc<Announcements>,
) {
    let parts = coordinator.parts.clone();
    let names = config.names();
    let routes: Vec<Arc<Route>> = config
        .peers
        .iter()
        // One file may serve all hosts.
        .filter(|peer| !names.contains(&peer.host))
        .map(|peer| {
            Arc::new(Route::new(
                peer.clone(),
                config.linger(),
                coordinator.clone(),
            ))
        })
        .collect();
    let made = make_directories(&parts.runtime_dir, &routes, &names, &parts.hypervisor).await;
    if let Err(error) = made {
        tracing::error!(error, "no ambient migrations to or from this host");
        return;
    }
    tracing::info!(
        peers = routes
            .iter()
            .map(|route| route.name())
            .collect::<Vec<_>>()
            .join(" "),
        names = names.join(" "),
        "ambient migrations are on"
    );
    let mut sockets = Sockets {
        runtime_dir: parts.runtime_dir.clone(),
        hypervisor: parts.hypervisor.clone(),
        routes,
        domains: BTreeMap::new(),
    };
    loop {
        if let Err(error) = sockets.look().await {
            tracing::debug!(error = error.sentence(), "ambient sockets stay as they are");
        }
        // Either way there may be something new.
        let _ = tokio::time::timeout(LOOK_INTERVAL, announcements.changed()).await;
    }
}

/// Removes all sockets: nobody serves them any more.
pub fn clear(runtime_dir: &Path) {
    match fs::remove_dir_all(runtime_dir.join("to")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "ambient sockets are left behind");
        }
        _ => {}
    }
}

/// Starts from nothing: what an earlier daemon left is of no use.
async fn make_directories(
    runtime_dir: &Path,
    routes: &[Arc<Route>],
    names: &[String],
    hypervisor: &Arc<dyn Hypervisor>,
) -> Result<(), String> {
    let user = loop {
        match ask(hypervisor, |hypervisor| hypervisor.qemu_user()).await {
            Ok(user) => break user,
            Err(error) => tracing::debug!(error = error.sentence(), "QEMU's user is not known yet"),
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    };
    let all = runtime_dir.join("to");
    let describe = |error: io::Error| format!("cannot make {}: {error}", all.display());
    match fs::remove_dir_all(&all) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(describe(error)),
        _ => {}
    }
    let passable = |path: &Path| DirBuilder::new().recursive(true).mode(0o711).create(path);
    passable(&all).map_err(describe)?;
    let directory = |name: &str| {
        ambient_directory(runtime_dir, name).ok_or_else(|| {
            format!("{name:?} cannot be the name of a directory; check [ambient] in vmgang.toml")
        })
    };
    for route in routes {
        passable(&directory(route.name())?).map_err(describe)?;
    }
    for name in names {
        // Here it is QEMU that makes the sockets.
        let own = directory(name)?;
        DirBuilder::new()
            .mode(0o700)
            .create(&own)
            .map_err(describe)?;
        chown(&own, Some(user.uid), Some(user.gid)).map_err(describe)?;
    }
    Ok(())
}

impl Sockets {
    /// Listens for domains that are new, and no more for those that are gone.
    async fn look(&mut self) -> Result<(), ServiceError> {
        let found = ask(&self.hypervisor, |hypervisor| hypervisor.domains()).await?;
        let identities: BTreeMap<&str, Identity> = found
            .iter()
            .map(|domain| (&*domain.name, Identity::of(domain)))
            .collect();
        let (runtime_dir, routes) = (&self.runtime_dir, &self.routes);
        self.domains.retain(|name, (identity, listening)| {
            let same = identities.get(&**name) == Some(identity);
            if !same {
                for task in listening {
                    task.abort();
                }
                for route in routes {
                    let socket = ambient_socket(runtime_dir, route.name(), name);
                    // It may be gone; that is what is wanted.
                    let _ = socket.map(fs::remove_file);
                }
            }
            same
        });
        for domain in &found {
            if !self.domains.contains_key(&domain.name) {
                let Some(listening) = self.listen(domain).await else {
                    continue;
                };
                let entry = (Identity::of(domain), listening);
                self.domains.insert(domain.name.clone(), entry);
            }
        }
        Ok(())
    }

    /// `None`: not now.
    async fn listen(&self, domain: &DomainInfo) -> Option<Vec<AbortHandle>> {
        let owner = match self.owner(domain).await {
            Ok(owner) => owner,
            Err(error) => {
                let error = error.sentence();
                tracing::warn!(domain = domain.name, error, "no ambient sockets for it yet");
                return None;
            }
        };
        let listen = |route: &Arc<Route>| {
            let socket = ambient_socket(&self.runtime_dir, route.name(), &domain.name)
                .ok_or_else(|| io::Error::other("the path would be too long for a socket"))?;
            match fs::remove_file(&socket) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            vmgang_engine::system().listen(&socket, owner)
        };
        let mut listening = Vec::new();
        for route in &self.routes {
            match listen(route) {
                Ok(mut listener) => {
                    let (route, uuid) = (route.clone(), domain.uuid);
                    let task = tokio::spawn(async move {
                        loop {
                            match listener.accept().await {
                                Ok(connection) => route.take(uuid, connection).await,
                                Err(error) => {
                                    tracing::warn!(peer = route.name(), %error, "accepting an ambient connection failed");
                                    tokio::time::sleep(ACCEPT_PAUSE).await;
                                }
                            }
                        }
                    });
                    listening.push(task.abort_handle());
                }
                Err(error) => tracing::warn!(
                    domain = domain.name, peer = route.name(), %error, "no ambient socket for it"
                ),
            }
        }
        Some(listening)
    }

    /// The user of the domain's QEMU, or of all QEMUs as long as it has none.
    async fn owner(&self, domain: &DomainInfo) -> Result<SocketOwner, ServiceError> {
        let (uuid, active) = (domain.uuid, domain.active());
        let user = ask(&self.hypervisor, move |hypervisor| match active {
            true => Ok(hypervisor.domain_qemu(uuid)?.user.user),
            false => hypervisor.qemu_user(),
        });
        let user = user.await?;
        Ok(SocketOwner {
            uid: user.uid,
            gid: user.gid,
        })
    }
}

impl Identity {
    fn of(domain: &DomainInfo) -> Identity {
        Identity {
            uuid: domain.uuid,
            active: domain.active(),
        }
    }
}
