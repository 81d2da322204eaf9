//! `vmgang migrate`: starts a job, shows its progress, and ends as the job ends.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context;
use futures_util::{Stream, StreamExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use zbus::{Connection, OwnedObjectPath, Variant};

use crate::arguments::{JobOptions, MigrateOptions, OnFailure, OnStall};
use crate::progress::Display;
use crate::proxies::{self, JobProxy};
use crate::report::Report;
use crate::snapshot::{self, Snapshot};
use crate::{exit, text};

/// Why a report may not be what this program expects, and what helps.
pub const REPORT_UNREADABLE: &str = "vmgangd's report cannot be read; vmgang and vmgangd may be of different versions, then `systemctl restart vmgangd`";
/// How often a job is looked at, besides whenever it tells of a change.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

pub async fn run(connection: &Connection, options: MigrateOptions) -> anyhow::Result<u8> {
    let (gang, destination) = match options.gang_and_destination() {
        Ok(both) => both,
        Err(usage) => usage.exit(),
    };
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch ctrl-C")?;
    let manager = proxies::manager(connection).await?;
    let asked = manager.migrate(gang, destination, dictionary(&options));
    let path = unless_interrupted(&mut interrupt, asked).await?;
    to_the_end(connection, &path, &options.job, interrupt).await
}

/// Shows a job that has started, prints its result, and gives its exit code.
pub async fn to_the_end(
    connection: &Connection,
    path: &OwnedObjectPath,
    options: &JobOptions,
    interrupt: Signal,
) -> anyhow::Result<u8> {
    let JobOptions { quiet, json, .. } = *options;
    let display = Display::new(quiet || json, id(path));
    let job = proxies::job(connection, path).await?;
    let Some(result) = follow(&job, path, display, Some(interrupt)).await? else {
        return Ok(exit::ABORTED);
    };
    let report: Report = serde_json::from_str(&result).context(REPORT_UNREADABLE)?;
    if json {
        println!("{result}");
    } else if !quiet {
        print!("{}", report.summary(barrier_approximate(&job).await));
    } else if let Some(error) = &report.error {
        eprintln!("{}", text::complaint(error));
    }
    Ok(report.exit_code())
}

/// Asks for a job. Ctrl-C before there is one simply ends this program.
pub async fn unless_interrupted<T>(
    interrupt: &mut Signal,
    asked: impl Future<Output = zbus::Result<T>>,
) -> anyhow::Result<T> {
    tokio::select! {
        job = asked => Ok(job?),
        _ = interrupt.recv() => anyhow::bail!(
            "interrupted before the job had started; `vmgang status` shows whether it did"
        ),
    }
}

/// Asked of the daemon, because the report has no field for it.
pub async fn barrier_approximate(job: &JobProxy<'_>) -> bool {
    let statistics = job.statistics().await;
    statistics.is_ok_and(|statistics| snapshot::barrier_approximate(&statistics))
}

/// The part that every job is told.
pub fn dictionary_of_job(options: &JobOptions) -> HashMap<&'static str, Variant<'_>> {
    let mut dictionary = HashMap::new();
    for (name, number) in [
        ("bandwidth", options.bandwidth),
        ("timeout", options.timeout),
    ] {
        if let Some(number) = number {
            dictionary.insert(name, Variant::from(number));
        }
    }
    if options.postcopy {
        dictionary.insert("postcopy", Variant::from(true));
    }
    if options.on_failure == OnFailure::Continue {
        dictionary.insert("on-failure", Variant::from("continue"));
    }
    if let Some(switchover) = options.switchover {
        dictionary.insert("switchover", Variant::from(switchover.as_str()));
    }
    dictionary
}

fn dictionary(options: &MigrateOptions) -> HashMap<&'static str, Variant<'_>> {
    let mut dictionary = dictionary_of_job(&options.job);
    if let Some(domains) = &options.domains {
        dictionary.insert("domains", Variant::from(domains.clone()));
    }
    for (name, on) in [
        ("all", options.all),
        ("persistent", options.persistent),
        ("undefinesource", options.undefinesource),
        ("suspend", options.suspend),
        ("timeout-suspend", options.timeout_suspend),
        ("timeout-postcopy", options.timeout_postcopy),
        ("postcopy-resume", options.postcopy_resume),
        ("auto-converge", options.auto_converge),
        ("balloon", options.balloon),
        ("unsafe", options.unsafe_disks),
        ("copy-storage-all", options.copy_storage_all),
        ("copy-storage-inc", options.copy_storage_inc),
    ] {
        if on {
            dictionary.insert(name, Variant::from(true));
        }
    }
    for (name, number) in [
        ("concurrency", options.concurrency),
        ("parallel", options.parallel),
    ] {
        if let Some(number) = number {
            dictionary.insert(name, Variant::from(number));
        }
    }
    for (name, text) in [("peer", &options.peer), ("technique", &options.technique)] {
        if let Some(text) = text {
            dictionary.insert(name, Variant::from(text.as_str()));
        }
    }
    if options.on_stall != OnStall::Throttle {
        dictionary.insert("on-stall", Variant::from(options.on_stall.as_str()));
    }
    dictionary
}

/// A job's id is the end of its path.
fn id(path: &OwnedObjectPath) -> &str {
    path.as_str().rsplit('/').next().unwrap_or_default()
}

/// Shows a job's progress until it ends, and returns its report. The first ctrl-C asks the job
/// to abort, the second leaves it alone and returns nothing.
pub async fn follow(
    job: &JobProxy<'_>,
    path: &OwnedObjectPath,
    mut display: Display,
    mut interrupt: Option<Signal>,
) -> anyhow::Result<Option<String>> {
    let id = id(path).to_owned();
    let mut abort_asked = false;
    let mut poll = tokio::time::interval(POLL_INTERVAL);
    // Before the first look, so that no change is missed; without them, polling will do.
    let mut changes = proxies::changes(job).await.ok();
    loop {
        let look_again = async {
            tokio::select! {
                _ = poll.tick() => {}
                () = changed(&mut changes) => {}
            }
        };
        tokio::select! {
            () = look_again => match look(job).await {
                Ok(Look::Ended(result)) => {
                    display.finish();
                    return Ok(Some(result));
                }
                Ok(Look::Running(snapshot)) => display.show(&snapshot),
                Err(error) => {
                    display.finish();
                    anyhow::bail!(
                        "lost vmgangd while the job {id} ran ({}); members that had not switched over stay on the source, and `vmgang history {id}` tells more once the daemon runs again",
                        proxies::sentence(&error)
                    );
                }
            },
            () = interrupted(&mut interrupt) => {
                if abort_asked {
                    display.finish();
                    eprintln!("The job goes on without this program; look at it with `vmgang status {id} --watch`.");
                    return Ok(None);
                }
                abort_asked = true;
                display.say("Aborting; ctrl-C again leaves the job running and ends this program.");
                if let Err(error) = job.abort().await {
                    // It may have ended just now, which the next look tells.
                    display.say(&proxies::sentence(&error.into()));
                }
            }
        }
    }
}

enum Look {
    Ended(String),
    Running(Snapshot),
}

async fn look(job: &JobProxy<'_>) -> anyhow::Result<Look> {
    let result = job.result().await?;
    if !result.is_empty() {
        return Ok(Look::Ended(result));
    }
    let (state, progress, statistics) =
        tokio::try_join!(job.state(), job.progress(), job.statistics())?;
    Ok(Look::Running(Snapshot::read(state, &progress, &statistics)))
}

/// The next change that the job tells of.
async fn changed<S: Stream + Unpin>(changes: &mut Option<S>) {
    if let Some(stream) = changes
        && stream.next().await.is_some()
    {
        return;
    }
    *changes = None;
    std::future::pending().await
}

async fn interrupted(interrupt: &mut Option<Signal>) {
    match interrupt {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}
