//! A gang's migration from the first question to the exit code, seen as virsh's users expect it.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::request::Migration;
use super::{gang, percent};
use crate::progress::Display;
use crate::report::Report;
use crate::{exit, migrate, proxies};

/// Migrates, and says what went wrong after the job had begun; an error is from before.
pub fn run(migration: Migration) -> anyhow::Result<u8> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?
        .block_on(migrate_gang(migration))
}

async fn migrate_gang(migration: Migration) -> anyhow::Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch ctrl-C")?;
    let connection = proxies::connect().await?;
    let manager = proxies::manager(&connection).await?;
    let gang = gang::of_domain(&manager, &migration.domain).await?;
    let options = migration.options.into_iter().collect();
    let destination = &migration.destination;
    let asked = manager.migrate(&gang, destination, options);
    let path = migrate::unless_interrupted(&mut interrupt, asked).await?;
    let display = match migration.verbose {
        true => Display::Other(Box::new(|snapshot| {
            if let Some(hundredths) = percent::of_gang(snapshot) {
                percent::show(hundredths);
            }
        })),
        false => Display::Nothing,
    };
    let job = proxies::job(&connection, &path).await?;
    let Some(result) = migrate::follow(&job, &path, display, Some(interrupt)).await? else {
        return Ok(exit::ABORTED);
    };
    let report: Report =
        serde_json::from_str(&result).context("vmgangd's report cannot be read")?;
    let code = report.exit_code();
    match (migration.verbose, code == exit::MIGRATED) {
        (true, true) => percent::show(percent::WHOLE),
        // Below the line that virsh rewrites.
        (true, false) => eprintln!(),
        (false, _) => {}
    }
    if let Some(error) = &report.error {
        eprintln!("error: {error}");
    }
    if code == exit::PARTIAL {
        eprintln!(
            "error: a part of the gang '{gang}' has migrated; `vmgang history {}` says who is where",
            report.job
        );
    }
    Ok(code)
}
