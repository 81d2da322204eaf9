//! The vmgangd of another host, on loopback: the engine's real listener, which takes in everybody.
//! Must not: judge what comes.

use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use uuid::Uuid;
use vmgang_engine::{
    Admission, DestinationHost, Listener, MemberOutcome, Offer, PeerName, Purpose, ServeControl,
    SocketOwner, Transport, Workers,
};
use vmgang_service::coordinator::Coordinator;

pub struct Peer {
    pub port: u16,
    /// Where its QEMUs listen.
    pub runtime_dir: tempfile::TempDir,
}

struct Host {
    owner: SocketOwner,
    coordinator: Option<Arc<Coordinator>>,
}

impl Peer {
    /// Listens for as long as the test runs. Requests are for the coordinator, if there is one.
    pub async fn listen(coordinator: Option<Arc<Coordinator>>) -> Peer {
        let runtime_dir = tempfile::tempdir().expect("a directory");
        let meta = std::fs::metadata(runtime_dir.path()).expect("there");
        let host = Host {
            owner: SocketOwner {
                uid: meta.uid(),
                gid: meta.gid(),
            },
            coordinator,
        };
        let listener = Listener::bind(([127, 0, 0, 1], 0).into()).await;
        let listener = listener.expect("listens");
        let port = listener.local_addr().expect("an address").port();
        let directory: PathBuf = runtime_dir.path().to_owned();
        let workers = Workers::per_processor().expect("threads");
        let host = Arc::new(host);
        tokio::spawn(listener.serve(
            Transport::Plain,
            directory,
            workers,
            host,
            std::future::pending(),
        ));
        Peer { port, runtime_dir }
    }
}

impl DestinationHost for Host {
    fn admit(&self, offer: &Offer, _: Purpose, _: &PeerName) -> Result<Admission, String> {
        Ok(Admission {
            window_budget_bytes: offer.window_budget_bytes.min(1 << 20),
            socket_owner: self.owner,
            connections: NonZeroUsize::MIN,
            recall: None,
        })
    }

    fn announced(&self, _: Uuid) -> Result<(), String> {
        Ok(())
    }

    fn staged(&self, _: Uuid, _: u64, _: u64) {}

    fn outcome(&self, _: Uuid) -> Option<MemberOutcome> {
        None
    }

    fn session_ended(&self, _: Uuid) {}

    fn control(&self, peer: PeerName) -> Result<ServeControl, String> {
        let coordinator = self.coordinator.clone().ok_or("nobody is there")?;
        Ok(Box::new(move |connection| {
            Box::pin(coordinator.obey(peer, connection))
        }))
    }
}
