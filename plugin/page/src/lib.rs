//! The result of a job as a page: one HTML file that needs nothing else, for light and dark screens of any
//! width. It has no script, and a policy that lets it fetch nothing.
//!
//! Must not: do I/O, or ask anybody. Names come from guests' owners; `maud` escapes everything.

mod figures;
mod lanes;
mod look;
mod over_time;
mod record;
mod sharing;
mod units;

use maud::{DOCTYPE, Markup, html};

use record::{Report, Timeline};

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
#[error("the {what} of the job cannot be read: {source}")]
pub struct Unreadable {
    what: &'static str,
    source: serde_json::Error,
}

/// What a page is made of, as vmgangd tells it.
pub struct Job<'a> {
    /// The report of the ended job.
    pub report: &'a str,
    /// What happened when; empty if that was not noted.
    pub timeline: &'a str,
    /// When it began, for people.
    pub started: &'a str,
    pub barrier_approximate: bool,
}

/// The whole page.
pub fn render(job: &Job<'_>) -> Result<String, Unreadable> {
    let unreadable = |what| move |source| Unreadable { what, source };
    let report: Report = serde_json::from_str(job.report).map_err(unreadable("report"))?;
    let timeline: Option<Timeline> = match job.timeline {
        "" => None,
        json => Some(serde_json::from_str(json).map_err(unreadable("timeline"))?),
    };
    let title = format!("{} to {}", report.who(), report.destination);
    Ok(html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'";
                title { (title) }
                style { (maud::PreEscaped(look::CSS)) }
            }
            body {
                header {
                    p.state data-state=(report.state) { (report.state) }
                    h1 { (title) }
                    p.quiet { (job.started) ", job " code { (report.job) } }
                }
                main { (body(&report, timeline.as_ref(), job.barrier_approximate)) }
            }
        }
    }
    .into_string())
}

fn body(report: &Report, timeline: Option<&Timeline>, barrier_approximate: bool) -> Markup {
    html! {
        (figures::tiles(report))
        @if let Some(error) = &report.error { p.error { (error) } }
        @if barrier_approximate {
            p.note { "The barrier was approximate: not every member could be held until all were ready." }
        }
        @match timeline {
            Some(timeline) => {
                (lanes::draw(report, timeline))
                (over_time::draw(report, timeline))
            }
            None => p.note { "What happened when was not noted for this job: it ran with an earlier version." }
        }
        (figures::where_the_bytes_went(report))
        @if let Some(timeline) = timeline { (sharing::draw(timeline)) }
        (figures::members(report))
    }
}
