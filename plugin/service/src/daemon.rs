//! Puts the daemon together: libvirt, listener, bus, and an orderly end.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use vmgang_engine::{Listener, Workers, sweep_runtime_dir};
use vmgang_hook::{Expected, MEETING_PLACE, POLICY_PATH, Policy, socket_path};

use crate::access::{Access, AllowLists};
use crate::ambient;
use crate::announcements::Announcements;
use crate::bus;
use crate::certificates::{Certificates, ListenerTransports};
use crate::config::{Config, TlsConfig, WorkerCount};
use crate::coordinator::{Coordinator, Parts, TransportSource};
use crate::guests::Qemus;
use crate::history::History;
use crate::hypervisor::{Hypervisor, Libvirt, ask};
use crate::libvirt_access::LibvirtAccess;
use crate::memory;
use crate::metrics;
use crate::peers::{Admittance, Peers};
use crate::recall::Contents;
use crate::scans::Scans;
use crate::stages::Stages;
use crate::tunnel::Engine;
use crate::watchdog;

/// How often missing certificates are looked for again.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(10);
/// How often kept contents are looked at.
const TIDY_INTERVAL: Duration = Duration::from_secs(30);
/// Lets the last changes of aborted jobs reach those who watch.
const LAST_SIGNALS: Duration = Duration::from_millis(600);

/// Runs until SIGTERM or SIGINT. SIGHUP has `path`, or the default file, read again for what can change
/// meanwhile.
pub async fn run(config: Config, path: Option<PathBuf>) -> anyhow::Result<()> {
    let mut reload = signal(SignalKind::hangup()).context("cannot catch SIGHUP")?;
    let swept = sweep_runtime_dir(&config.runtime_dir)
        .with_context(|| format!("cannot tidy {}", config.runtime_dir.display()))?;
    if swept > 0 {
        tracing::warn!(jobs = swept, "removed sockets that an earlier daemon left");
    }
    let history = History::open(&config.state_dir)
        .with_context(|| format!("cannot use state_dir {}", config.state_dir.display()))?;
    memory::available_bytes().context("cannot read /proc/meminfo")?;
    let workers = match config.workers {
        WorkerCount::Auto => Workers::per_processor(),
        WorkerCount::Threads(threads) => Workers::new(threads),
    }
    .context("cannot start the worker threads")?;
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(Libvirt::new(&config.libvirt_uri));
    tokio::spawn(look_at_qemu(hypervisor.clone()));
    let peers = Arc::new(Peers::default());
    let certificates = Arc::new(Certificates::new(config.tls.clone()));
    if config.tls == TlsConfig::Off {
        tracing::warn!(
            "tls = false: guest memory crosses the network unencrypted, and any host may send guests here"
        );
    }

    let scans = Scans::new(Arc::new(Qemus));
    let page_key = {
        let certificates = certificates.clone();
        move || Some(certificates.transport().ok()?.page_key())
    };
    let transport: Arc<TransportSource> = {
        let certificates = certificates.clone();
        Arc::new(move || certificates.transport())
    };
    let libvirt_access = LibvirtAccess::new(&config.runtime_dir, transport.clone())
        .with_context(|| format!("cannot tidy {}", config.runtime_dir.display()))?;
    scans
        .run(config.scan, hypervisor.clone(), page_key.clone())
        .context("cannot start the thread that scans guests")?;
    let stages = Arc::new(Stages::default());
    let contents = Arc::new(Contents::new(
        config.recall,
        scans.clone(),
        hypervisor.clone(),
        Box::new(memory::available_bytes),
    ));

    let coordinator = Coordinator::open(Parts {
        hypervisor: hypervisor.clone(),
        tunnel: Arc::new(Engine),
        transport,
        libvirt_access: Arc::new(libvirt_access),
        tls: config.tls.clone(),
        history,
        peers: peers.clone(),
        runtime_dir: config.runtime_dir.clone(),
        window_budget: config.window_budget,
        available_memory: Box::new(memory::available_bytes),
        workers: workers.clone(),
        connections: config.connections.0,
        scans: scans.clone(),
        stages: stages.clone(),
        contents: contents.clone(),
    })
    .await
    .context("cannot read the job history")?;

    let access = Arc::new(Access::new(allow_lists(&config)));
    let (announcements, expected) = meet_hook(scans);
    let admittance = Arc::new(Admittance {
        hypervisor,
        announcements: announcements.clone(),
        expected,
        peers,
        access: access.clone(),
        libvirt_sockets: config.libvirt_sockets.clone(),
        coordinator: Some(coordinator.clone()),
        ambient_names: config.ambient.is_on().then(|| config.ambient.names()),
        window_budget: config.window_budget,
        connections: config.connections.0,
        available_memory: Box::new(memory::available_bytes),
        sessions: Mutex::new(BTreeMap::new()),
        stages,
        contents,
        page_key: Box::new(page_key),
    });
    tokio::spawn(tidy(coordinator.clone(), admittance.clone()));
    let (jobs, arriving) = (coordinator.clone(), admittance.clone());
    let look = move || {
        let _ = (jobs.is_busy(), arriving.is_busy());
    };
    if let Some(file) = config.metrics_file.0.clone() {
        tokio::spawn(metrics::run(file, coordinator.clone(), admittance.clone()));
    }
    let runtime_dir = config.runtime_dir.clone();
    let ambient = config.ambient.clone();
    let ambient = ambient
        .is_on()
        .then(|| tokio::spawn(ambient::run(ambient, coordinator.clone(), announcements)));
    let (stop, stopping) = watch::channel(false);
    let listening = match certificates.for_listener() {
        Ok(transports) => {
            let listener = bind(config.listen).await?;
            tokio::spawn(serve_peers(
                listener,
                transports,
                config.clone(),
                workers,
                admittance,
                stopping,
            ))
        }
        Err(reason) => {
            tracing::warn!(
                reason,
                "not listening for peers yet; only local requests are served"
            );
            tokio::spawn(listen_later(
                certificates,
                config.clone(),
                workers,
                admittance,
                stopping,
            ))
        }
    };

    let connection = bus::serve(
        zbus::connection::Builder::system().name(bus::BUS_NAME),
        coordinator.clone(),
    )
    .await
    .with_context(|| {
        format!(
            "cannot become {} on the system bus; check that it runs and that its policy allows it",
            bus::BUS_NAME
        )
    })?;
    notify(&[sd_notify::NotifyState::Ready]);
    tokio::spawn(watchdog::answer(look));
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "vmgangd is ready");

    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let bus_lost = loop {
        tokio::select! {
            _ = terminate.recv() => break false,
            _ = interrupt.recv() => break false,
            () = connection.closed() => break true,
            _ = reload.recv() => read_again(&config, path.as_deref(), &access),
        }
    };
    notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping: running jobs are aborted");
    if let Some(ambient) = &ambient {
        ambient.abort();
    }
    coordinator.shutdown().await;
    if ambient.is_some() {
        ambient::clear(&runtime_dir);
    }
    // Peers that had asked for a job hear its end, too.
    tokio::time::sleep(LAST_SIGNALS).await;
    let _ = stop.send(true);
    listening.abort();
    anyhow::ensure!(!bus_lost, "the connection to the system bus was lost");
    Ok(())
}

/// Meets libvirt's hook where it looks for this daemon. Without it libvirt is asked instead, and a
/// policy lets nothing in.
fn meet_hook(scans: Arc<Scans>) -> (Arc<Announcements>, Option<Expected>) {
    if let Err(error) = Policy::load(Path::new(POLICY_PATH)) {
        tracing::error!(%error, "only migrations through vmgang are let in until this is put right");
    }
    let place = Path::new(MEETING_PLACE);
    // First what is expected, then the socket, which says that it counts.
    let left = move |uuid| scans.forget(&[uuid].into());
    let met = Expected::open(place)
        .and_then(|expected| Ok((Announcements::listen(&socket_path(place), left)?, expected)));
    let (announcements, expected) = match met {
        Ok(met) => met,
        Err(error) => {
            tracing::error!(
                %error, "no socket for libvirt's hook in {MEETING_PLACE}; libvirt is asked instead"
            );
            return (Arc::new(Announcements::none()), None);
        }
    };
    let announcements = Arc::new(announcements);
    let heard = announcements.clone();
    tokio::spawn(async move {
        if let Err(error) = heard.run().await {
            tracing::error!(%error, "libvirt's hook is not heard any more");
        }
    });
    (announcements, Some(expected))
}

/// Lets go of kept contents when their time has come, and while no gang is under way of memory that
/// was freed.
async fn tidy(coordinator: Arc<Coordinator>, admittance: Arc<Admittance>) {
    loop {
        tokio::time::sleep(TIDY_INTERVAL).await;
        admittance.contents.tidy();
        if !coordinator.is_busy() && !admittance.is_busy() {
            let _ = tokio::task::spawn_blocking(memory::trim).await;
        }
    }
}

/// Has libvirt look at this host's QEMUs now: it starts each that it does not know yet, and the
/// first job, from here or to here, would wait for that.
async fn look_at_qemu(hypervisor: Arc<dyn Hypervisor>) {
    let asked = ask(&hypervisor, |hypervisor| {
        hypervisor.takes_switchover_rate()?;
        hypervisor.qemu_user()
    });
    if let Err(error) = asked.await {
        let error = error.sentence();
        tracing::debug!(error, "libvirt has not told about its QEMU yet");
    }
}

fn allow_lists(config: &Config) -> AllowLists {
    AllowLists {
        peers: config.allow_peers.clone(),
        libvirt: config.allow_libvirt.clone(),
    }
}

/// Takes from the configuration what can change while the daemon runs. A file that is not valid changes
/// nothing.
fn read_again(started_with: &Config, path: Option<&Path>, access: &Access) {
    if let Ok(now) = sd_notify::NotifyState::monotonic_usec_now() {
        notify(&[sd_notify::NotifyState::Reloading, now]);
    }
    match Config::load(path) {
        Ok(config) => {
            let lists = allow_lists(&config);
            let (peers, libvirt) = (lists.peers.join(" "), lists.libvirt.join(" "));
            let changed = access.replace(lists);
            tracing::info!(
                changed,
                allow_peers = peers,
                allow_libvirt = libvirt,
                "the configuration was read again"
            );
            let rest = Config {
                allow_peers: started_with.allow_peers.clone(),
                allow_libvirt: started_with.allow_libvirt.clone(),
                ..config
            };
            if rest != *started_with {
                tracing::warn!(
                    "other keys than allow_peers and allow_libvirt have changed as well; they take effect when vmgangd is restarted"
                );
            }
        }
        Err(error) => tracing::error!(%error, "the configuration stays as it was"),
    }
    notify(&[sd_notify::NotifyState::Ready]);
}

async fn bind(listen: SocketAddr) -> anyhow::Result<Listener> {
    let bound = Listener::bind(listen).await;
    // A host without IPv6 cannot have the default address.
    let bound = match bound {
        Err(error)
            if listen.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
                && error.kind() != std::io::ErrorKind::AddrInUse =>
        {
            Listener::bind((Ipv4Addr::UNSPECIFIED, listen.port()).into()).await
        }
        other => other,
    };
    let listener = bound.with_context(|| {
        format!("cannot listen on {listen}; is another vmgangd running, or `listen` wrong in vmgang.toml?")
    })?;
    tracing::info!(%listen, "listening for peers");
    Ok(listener)
}

async fn serve_peers(
    listener: Listener,
    transports: ListenerTransports,
    config: Config,
    workers: Workers,
    admittance: Arc<Admittance>,
    mut stopping: watch::Receiver<bool>,
) {
    let shutdown = async move {
        // An error means the daemon is gone, which is an end as well.
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    listener
        .serve(
            transports,
            config.runtime_dir,
            workers,
            admittance,
            shutdown,
        )
        .await;
}

/// Waits for certificates, then listens.
async fn listen_later(
    certificates: Arc<Certificates>,
    config: Config,
    workers: Workers,
    admittance: Arc<Admittance>,
    stopping: watch::Receiver<bool>,
) {
    loop {
        tokio::time::sleep(CERTIFICATE_INTERVAL).await;
        let Ok(transports) = certificates.for_listener() else {
            continue;
        };
        match bind(config.listen).await {
            Ok(listener) => {
                return serve_peers(listener, transports, config, workers, admittance, stopping)
                    .await;
            }
            Err(error) => tracing::error!(error = format!("{error:#}"), "not listening for peers"),
        }
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(states);
}
