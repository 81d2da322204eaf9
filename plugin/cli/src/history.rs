//! `vmgang status` and `history`: jobs that run, and jobs that ended.

use serde_json::json;
use zbus::Connection;

use crate::arguments::{HistoryOptions, StatusOptions};
use crate::progress::{Display, Snapshot};
use crate::proxies::{self, JobLine, JobProxy};
use crate::report::Report;
use crate::stage::Stage;
use crate::{exit, migrate, stage, text};

fn ended(state: &str) -> bool {
    !matches!(state, "preparing" | "running" | "switching")
}

pub async fn status(connection: &Connection, options: StatusOptions) -> anyhow::Result<u8> {
    let manager = proxies::manager(connection).await?;
    let mut stages = stage::list(&manager).await?;
    let jobs = match &options.job {
        Some(id) => {
            if let Some(found) = stage::find(&stages, id) {
                match options.json {
                    true => println!("{}", found.to_json()),
                    false => print!("{}", stage::table(std::slice::from_ref(found))),
                }
                return Ok(exit::MIGRATED);
            }
            vec![proxies::find_job(connection, id).await?]
        }
        None => {
            let jobs = manager.list_jobs().await?;
            jobs.into_iter().filter(|job| !ended(&job.4)).collect()
        }
    };
    stages.retain(|stage| stage.live() && options.job.is_none());
    if options.watch {
        let Some(job) = jobs.first() else {
            println!("No job is running; `vmgang history` lists those that ended.");
            return Ok(exit::MIGRATED);
        };
        let proxy = proxies::job(connection, &job.0).await?;
        let display = Display::new(options.json);
        if let Some(result) = migrate::follow(&proxy, &job.0, display, None).await? {
            show_result(&proxy, &result, options.json).await?;
        }
        return Ok(exit::MIGRATED);
    }
    if options.json {
        let mut objects = Vec::new();
        for job in &jobs {
            objects.push(describe(connection, job).await?);
        }
        objects.extend(stages.iter().map(Stage::to_json));
        match (options.job.is_some(), objects.as_slice()) {
            (true, [one]) => println!("{one}"),
            _ => println!("{}", json!(objects)),
        }
        return Ok(exit::MIGRATED);
    }
    if jobs.is_empty() {
        println!("No job is running; `vmgang history` lists those that ended.");
    }
    for job in &jobs {
        let proxy = proxies::job(connection, &job.0).await?;
        let result = proxy.result().await?;
        println!("job {}: {} to {}", job.1, subject(job), job.3);
        if result.is_empty() {
            println!("  {}", snapshot(&proxy).await?.line());
        } else {
            show_result(&proxy, &result, false).await?;
        }
    }
    print!("{}", stage::table(&stages));
    Ok(exit::MIGRATED)
}

pub async fn history(connection: &Connection, options: HistoryOptions) -> anyhow::Result<u8> {
    if let Some(id) = &options.job {
        let job = proxies::find_job(connection, id).await?;
        let proxy = proxies::job(connection, &job.0).await?;
        let result = proxy.result().await?;
        if result.is_empty() {
            anyhow::bail!(
                "the job {} has not ended yet; see `vmgang status {}`",
                job.1,
                job.1
            );
        }
        show_result(&proxy, &result, options.json).await?;
        return Ok(exit::MIGRATED);
    }
    let jobs = proxies::manager(connection).await?.list_jobs().await?;
    let jobs: Vec<JobLine> = jobs.into_iter().filter(|job| ended(&job.4)).collect();
    if options.json {
        let jobs: Vec<_> = jobs
            .iter()
            .map(|(_, id, gang, destination, state, started)| {
                json!({
                    "job": id, "gang": (!gang.is_empty()).then_some(gang),
                    "destination": destination, "state": state, "started_unix_s": started,
                })
            })
            .collect();
        println!("{}", json!(jobs));
    } else if jobs.is_empty() {
        println!("No job has ended yet.");
    } else {
        let rows: Vec<_> = jobs
            .iter()
            .map(|job| {
                vec![
                    job.1.chars().take(8).collect(),
                    text::time(job.5),
                    job.4.clone(),
                    subject(job),
                    job.3.clone(),
                ]
            })
            .collect();
        print!(
            "{}",
            text::table(&["JOB", "STARTED", "STATE", "GANG", "DESTINATION"], &rows)
        );
    }
    Ok(exit::MIGRATED)
}

fn subject(job: &JobLine) -> String {
    if job.2.is_empty() {
        "(domains)".into()
    } else {
        job.2.clone()
    }
}

async fn show_result(job: &JobProxy<'_>, result: &str, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{result}");
    } else {
        let report: Report = serde_json::from_str(result)?;
        println!("job {}: {}", report.job, report.state);
        print!(
            "{}",
            report.summary(migrate::barrier_approximate(job).await)
        );
    }
    Ok(())
}

async fn snapshot(job: &JobProxy<'_>) -> anyhow::Result<Snapshot> {
    let (state, progress, statistics) =
        tokio::try_join!(job.state(), job.progress(), job.statistics())?;
    Ok(Snapshot::read(state, &progress, &statistics))
}

/// One job for `status --json`: its report if it has one, its progress otherwise.
async fn describe(connection: &Connection, job: &JobLine) -> anyhow::Result<serde_json::Value> {
    let proxy = proxies::job(connection, &job.0).await?;
    let result = proxy.result().await?;
    if !result.is_empty() {
        return Ok(serde_json::from_str(&result)?);
    }
    let snapshot = snapshot(&proxy).await?;
    let members: Vec<_> = snapshot
        .members
        .iter()
        .map(|member| {
            let mut described = json!({
                "name": member.name, "state": member.state, "memory_bytes": member.memory_bytes,
                "total_bytes": member.total_bytes, "remaining_bytes": member.remaining_bytes,
                "qemu_stream_bytes": member.qemu_stream_bytes, "throttled": member.throttled,
            });
            if member.dirtied_per_s > 0 {
                described["dirtied_per_s"] = json!(member.dirtied_per_s);
                described["carried_per_s"] = json!(member.carried_per_s);
            }
            described
        })
        .collect();
    Ok(json!({
        "job": job.1, "gang": (!job.2.is_empty()).then_some(&job.2), "destination": job.3,
        "state": snapshot.state, "elapsed_ms": snapshot.elapsed_ms,
        "bytes": {"qemu_stream": snapshot.qemu_stream_bytes, "wire": snapshot.wire_bytes},
        "domains": members,
    }))
}
