//! The daemon of a scripted host, without its process: served on D-Bus, with a client.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vmgang_engine::{Transport, Workers};
use vmgang_service::bus;
use vmgang_service::config::{TlsConfig, WindowBudget};
use vmgang_service::coordinator::{Coordinator, Parts, TransportSource};
use vmgang_service::history::History;
use vmgang_service::libvirt_access::LibvirtAccess;
use vmgang_service::peers::Peers;
use zbus::{Connection, OwnedObjectPath, Proxy};

use super::tunnel::FakeTunnel;
use super::{Fake, Options, knowledge};

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
