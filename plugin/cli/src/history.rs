//! `vmgang history`: jobs that have ended, and what became of one.

use anyhow::Context;
use futures_util::future::join_all;
use serde_json::json;
use zbus::Connection;

use crate::arguments::HistoryOptions;
use crate::proxies::{self, JobLine, JobProxy};
use crate::report::Report;
use crate::snapshot::saved_percent;
use crate::{exit, migrate, page, paint, text};

pub fn ended(state: &str) -> bool {
    !matches!(state, "preparing" | "running" | "switching")
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
        if let Some(file) = &options.html {
            page::write(file, &job, &proxy, &result).await?;
        }
        match (&options.html, options.json) {
            (Some(file), false) => println!("Wrote {}.", file.display()),
            (_, json) => show_result(&proxy, &result, json).await?,
        }
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
        let reports = join_all(jobs.iter().map(|job| report(connection, job))).await;
        let rows: Vec<_> = jobs
            .iter()
            .zip(reports)
            .map(|(job, report)| row(job, report))
            .collect();
        let header = [
            "JOB",
            "STARTED (UTC)",
            "STATE",
            "GANG",
            "TO",
            "TIME",
            "WIRE",
            "SAVED",
        ];
        print!("{}", text::table(&header, &rows));
    }
    Ok(exit::MIGRATED)
}

async fn report(connection: &Connection, job: &JobLine) -> Option<Report> {
    let proxy = proxies::job(connection, &job.0).await.ok()?;
    serde_json::from_str(&proxy.result().await.ok()?).ok()
}

/// What became of a job, in a line of the list; the report of one that this program cannot read is left out.
fn row(job: &JobLine, report: Option<Report>) -> Vec<String> {
    let (_, id, gang, destination, state, started) = job;
    let mut row = vec![
        id.chars().take(8).collect(),
        text::date(*started),
        paint::state(state),
        match gang.as_str() {
            "" => "(domains)".to_owned(),
            gang => text::plain(gang),
        },
        text::plain(text::host(destination)),
    ];
    if let Some(report) = report {
        let saved = saved_percent(report.bytes.qemu_stream, report.bytes.wire);
        row.extend([
            text::milliseconds(report.elapsed_ms),
            text::bytes(report.bytes.wire),
            saved.map_or("-".into(), |saved| format!("{saved}%")),
        ]);
    }
    row
}

pub async fn show_result(job: &JobProxy<'_>, result: &str, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{result}");
    } else {
        let report: Report = serde_json::from_str(result).context(migrate::REPORT_UNREADABLE)?;
        println!("job {}: {}", report.job, paint::state(&report.state));
        print!(
            "{}",
            report.summary(migrate::barrier_approximate(job).await)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_one_line_of_80_columns() {
        let path = zbus::OwnedObjectPath::try_from("/a").expect("a path");
        let (gang, uri) = (
            "a-gang".to_owned(),
            "qemu+tls://b.example.org/system".to_owned(),
        );
        let job: JobLine = (path, "0123456789".into(), gang, uri, "completed".into(), 0);
        let report: Report = serde_json::from_str(
            r#"{"job":"0123456789","gang":"a-gang","destination":"b","state":"completed","error":null,
            "elapsed_ms":5300,"switchover_spread_ms":null,"domains":[],
            "bytes":{"qemu_stream":1000,"wire":190,"literal":0,"saved":{}}}"#,
        )
        .expect("valid");
        let line = row(&job, Some(report)).join("  ");
        assert_eq!(
            line,
            "01234567  1970-01-01 00:00  completed  a-gang  b.example.org  5.3 s  190 B  81%"
        );
        assert!(line.len() <= 80);
        assert_eq!(row(&job, None).len(), 5, "without what is not known");
    }
}
