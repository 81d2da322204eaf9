//! `vmgang history JOB --html`: fetches what the page is made of and writes the file. What it looks like is
//! `vmgang_page`'s.

use std::path::Path;

use anyhow::Context;

use crate::proxies::{JobLine, JobProxy};
use crate::{migrate, text};

pub async fn write(
    file: &Path,
    job: &JobLine,
    proxy: &JobProxy<'_>,
    report: &str,
) -> anyhow::Result<()> {
    let timeline = proxy.get_timeline().await?;
    let page = vmgang_page::render(&vmgang_page::Job {
        report,
        timeline: &timeline,
        started: &text::time(job.5),
        barrier_approximate: migrate::barrier_approximate(proxy).await,
    })
    .context(migrate::REPORT_UNREADABLE)?;
    std::fs::write(file, page).with_context(|| {
        format!(
            "cannot write the page to {}; name a file that can be written",
            file.display()
        )
    })
}
