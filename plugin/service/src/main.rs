//! vmgangd: migrates gangs of virtual machines as one job. Reads its arguments and configuration,
//! sets up the log, and runs the daemon.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::prelude::*;
use vmgang_service::config::Config;
use vmgang_service::journal::Journal;
use vmgang_service::memory;

/// Migrates gangs of virtual machines as one job.
#[derive(Parser)]
#[command(name = "vmgangd", version)]
struct Arguments {
    /// Configuration file [default: /etc/vmgang/vmgang.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// How long calls of libvirt that hang may hold up the end.
const LAST_CALLS: Duration = Duration::from_secs(1);

fn main() -> anyhow::Result<()> {
    memory::keep_little();
    let arguments = Arguments::parse();
    start_log();
    let config = Config::load(arguments.config.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(vmgang_service::daemon::run(config, arguments.config));
    runtime.shutdown_timeout(LAST_CALLS);
    ended
}

/// To the journal where systemd has connected stderr with it, to stderr otherwise.
fn start_log() {
    let journal = Journal::of_stderr();
    let stderr = journal.is_none().then(|| {
        tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(false)
    });
    let filter = EnvFilter::try_from_env("VMGANG_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::registry()
        .with(filter)
        .with(journal)
        .with(stderr)
        .init();
}
