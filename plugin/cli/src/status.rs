//! `vmgang status`: jobs that run and stages that are kept.

use serde_json::json;
use zbus::Connection;

use crate::arguments::StatusOptions;
use crate::history::{ended, show_result};
use crate::progress::Display;
use crate::proxies::{self, JobLine, JobProxy};
use crate::snapshot::{Snapshot, saved_percent};
use crate::stage::Stage;
use crate::{exit, migrate, paint, stage, text};

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
        let display = Display::new(options.json, &job.1);
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
        if result.is_empty() {
            print!("{}", picture(&job.1, &snapshot(&proxy).await?));
        } else {
            show_result(&proxy, &result, false).await?;
        }
    }
    print!("{}", stage::table(&stages));
    Ok(exit::MIGRATED)
}

/// A running job, at one moment.
fn picture(job: &str, snapshot: &Snapshot) -> String {
    let row = |name: String, state: &str, permille: u64, stream: u64, wire: u64| {
        let saved = saved_percent(stream, wire);
        vec![
            name,
            paint::state(state),
            format!("{}%", permille / 10),
            text::bytes(stream),
            text::bytes(wire),
            saved.map_or("-".into(), |saved| format!("{saved}%")),
        ]
    };
    let mut rows = vec![row(
        "gang".to_owned(),
        &snapshot.state,
        snapshot.permille(),
        snapshot.qemu_stream_bytes,
        snapshot.wire_bytes,
    )];
    for member in &snapshot.members {
        let name = text::plain(&member.name);
        let (stream, wire) = (member.qemu_stream_bytes, member.wire_bytes);
        let mut row = row(name, &member.state, member.permille(), stream, wire);
        row.extend(member.trouble());
        rows.push(row);
    }
    let time = text::milliseconds(snapshot.elapsed_ms);
    let header = ["MEMBER", "PHASE", "DONE", "STREAM", "WIRE", "SAVED", ""];
    format!(
        "job {job}: {}, for {time}\n{}",
        snapshot.subject(),
        text::table(&header, &rows)
    )
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
                "qemu_stream_bytes": member.qemu_stream_bytes,
                "wire_bytes": member.wire_bytes, "throttled": member.throttled,
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
