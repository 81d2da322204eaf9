//! Puts the daemon together: libvirt, listener, bus, and an orderly end.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use vmgang_engine::{Listener, TlsIdentity, Transport, Workers, sweep_runtime_dir};

use crate::bus;
use crate::config::{Config, TlsConfig, WorkerCount};
use crate::coordinator::{Coordinator, Parts};
use crate::guests::Qemus;
use crate::history::History;
use crate::hypervisor::{Hypervisor, Libvirt, ask};
use crate::memory;
use crate::peers::{Admittance, Peers};
use crate::recall::Contents;
use crate::scans::Scans;
use crate::stages::Stages;
use crate::tunnel::Engine;

/// How often missing certificates are looked for again.
const CERTIFICATE_INTERVAL: Duration = Duration::from_secs(10);
/// How often kept contents are looked at.
const TIDY_INTERVAL: Duration = Duration::from_secs(30);
/// Lets the last changes of aborted jobs reach those who watch.
const LAST_SIGNALS: Duration = Duration::from_millis(600);

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: Config) -> anyhow::Result<()> {
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
    let tls = config.tls.clone();
    if tls == TlsConfig::Off {
        tracing::warn!(
            "tls = false: guest memory crosses the network unencrypted, and any host may send guests here"
        );
    }

    let scans = Scans::new(Arc::new(Qemus));
    let page_key = {
        let tls = tls.clone();
        move || transport(&tls).ok().map(|transport| transport.page_key())
    };
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
        transport: Box::new({
            let tls = tls.clone();
            move || transport(&tls)
        }),
        history,
        peers: peers.clone(),
        runtime_dir: config.runtime_dir.clone(),
        window_budget: config.window_budget,
        available_memory: Box::new(memory::available_bytes),
        workers: workers.clone(),
        connections: config.connections.0,
        scans,
        stages: stages.clone(),
        contents: contents.clone(),
    })
    .await
    .context("cannot read the job history")?;

    let admittance = Arc::new(Admittance {
        hypervisor,
        peers,
        allow_peers: config.allow_peers.clone(),
        window_budget: config.window_budget,
        connections: config.connections.0,
        available_memory: Box::new(memory::available_bytes),
        sessions: Mutex::new(BTreeMap::new()),
        stages,
        contents,
        page_key: Box::new(page_key),
    });
    tokio::spawn(tidy(coordinator.clone(), admittance.clone()));
    let (stop, stopping) = watch::channel(false);
    let listening = match transport(&tls) {
        Ok(transport) => {
            let listener = bind(config.listen).await?;
            tokio::spawn(serve_peers(
                listener,
                transport,
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
                tls,
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
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "vmgangd is ready");

    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let bus_lost = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = connection.closed() => true,
    };
    notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping: running jobs are aborted");
    coordinator.shutdown().await;
    let _ = stop.send(true);
    tokio::time::sleep(LAST_SIGNALS).await;
    listening.abort();
    anyhow::ensure!(!bus_lost, "the connection to the system bus was lost");
    Ok(())
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

/// How peers are talked to, or which file is missing.
fn transport(tls: &TlsConfig) -> Result<Transport, String> {
    let paths = match tls {
        TlsConfig::Off => return Ok(Transport::Plain),
        TlsConfig::On(paths) => paths,
    };
    let missing: Vec<String> = paths
        .missing()
        .into_iter()
        .map(|path| path.display().to_string())
        .collect();
    if !missing.is_empty() {
        return Err(format!(
            "peers are talked to over TLS, but there is no {}; put the certificates of libvirt's qemu+tls there, or name other files under [tls] in vmgang.toml",
            missing.join(", no ")
        ));
    }
    TlsIdentity::load(&paths.files())
        .map(Transport::Tls)
        .map_err(|error| error.to_string())
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
    transport: Transport,
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
        .serve(transport, config.runtime_dir, workers, admittance, shutdown)
        .await;
}

/// Waits for certificates, then listens.
async fn listen_later(
    tls: TlsConfig,
    config: Config,
    workers: Workers,
    admittance: Arc<Admittance>,
    stopping: watch::Receiver<bool>,
) {
    loop {
        tokio::time::sleep(CERTIFICATE_INTERVAL).await;
        let Ok(transport) = transport(&tls) else {
            continue;
        };
        match bind(config.listen).await {
            Ok(listener) => {
                return serve_peers(listener, transport, config, workers, admittance, stopping)
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
