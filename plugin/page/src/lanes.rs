//! One lane a member: what it did when, from the job's start to its end.

use maud::{Markup, html};

use crate::record::{Member, Report, Timeline};
use crate::units;

/// What would be too short to be seen is so wide, in percent.
const WIDTH_MIN: f64 = 0.7;

const LEGEND: [(&str, &str); 5] = [
    ("waiting", "waits for its turn"),
    ("ballooning", "gives memory up"),
    ("copying", "sends its memory"),
    ("held", "is held for the others, or its turn"),
    ("switching", "guest is stopped"),
];

pub(crate) fn draw(report: &Report, timeline: &Timeline) -> Markup {
    let end_ms = timeline.end_ms(report);
    let phases = || timeline.members.iter().flat_map(|member| &member.phases);
    let seen = |word: &str| phases().any(|phase| phase.phase == word && phase.at_ms < end_ms);
    html! {
        section {
            h2 { "Who did what when" }
            ul.legend {
                @for (word, means) in LEGEND.iter().filter(|(word, _)| seen(word)) {
                    li { i.swatch data-phase=(word) {} (means) }
                }
            }
            div.lanes {
                @for member in &timeline.members {
                    div.lane {
                        span.name title=(member.name) { (member.name) }
                        span.pause { (pause(report, member)) }
                        svg width="100%" height="20" role="img" aria-label=(member.name) {
                            line x1="0" x2="100%" y1="10" y2="10" class="rail" {}
                            @for (at, width, phase) in bars(member, end_ms) {
                                rect x=(percent(at)) width=(percent(width)) y="3" height="14" data-phase=(phase) {
                                    title { (phase) }
                                }
                            }
                            @if let Some(at_ms) = timeline.switching_ms {
                                @let at = percent(units::percent_of(at_ms, end_ms));
                                line x1=(at) x2=(at) y1="0" y2="20" class="released" {}
                            }
                        }
                    }
                }
                div.lane {
                    svg.axis width="100%" height="18" { (axis(end_ms, 13)) }
                }
            }
            @if let Some(at_ms) = timeline.switching_ms {
                p.quiet { "The dashed line, after " (units::time(at_ms)) ": the switchover begins." }
            }
        }
    }
}

/// The times below a picture.
pub(crate) fn axis(end_ms: u64, y: u32) -> Markup {
    html! {
        @for tick in units::ticks(end_ms) {
            @let at = units::percent_of(tick, end_ms);
            @let anchor = match at { 0.0..3.0 => "start", 3.0..94.0 => "middle", _ => "end" };
            text x=(percent(at)) y=(y) text-anchor=(anchor) { (units::tick(tick)) }
        }
    }
}

pub(crate) fn percent(number: f64) -> String {
    format!("{number:.2}%")
}

/// Each phase with its beginning and width in percent. What a member does at its end is no bar.
fn bars(member: &Member, end_ms: u64) -> Vec<(f64, f64, &str)> {
    let ends = member.phases.iter().skip(1).map(|phase| phase.at_ms);
    let ends = ends.chain([end_ms]);
    let phases = member.phases.iter().zip(ends);
    phases
        .filter(|(phase, _)| !matches!(phase.phase.as_str(), "migrated" | "source" | "failed"))
        .map(|(phase, end)| {
            let at = units::percent_of(phase.at_ms.min(end_ms), end_ms);
            let width = units::percent_of(end.saturating_sub(phase.at_ms), end_ms);
            let width = match phase.phase.as_str() {
                "switching" => width.max(WIDTH_MIN),
                _ => width,
            };
            (
                at.min(100.0 - width.min(100.0)),
                width.min(100.0),
                phase.phase.as_str(),
            )
        })
        .collect()
}

fn pause(report: &Report, member: &Member) -> String {
    let domain = report.domains.iter().find(|one| one.uuid == member.uuid);
    match domain {
        Some(domain) => match domain.downtime_ms {
            Some(ms) => format!("paused {}", units::time(ms)),
            None => domain.state.clone(),
        },
        None => String::new(),
    }
}
