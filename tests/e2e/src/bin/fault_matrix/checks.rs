//! What must be true once the dust has settled, whatever the fault was.
//!
//! Owns: where each guest is, what the job has reported, and the list of what was broken. Must
//! not: put anything right that the report does not tell a person to.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmgang_e2e::{Ended, JobResult, PATIENCE, vmgang};
use vmgang_lab::Host;

use crate::gang::{self, GUESTS, Way};

/// How long libvirt may take to tidy up after a migration that broke.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// Where one guest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// libvirt's word for its state; nothing where there is no such domain.
    pub from: Option<String>,
    pub to: Option<String>,
}

const RUNNING: &str = "running";

impl Place {
    fn runs_at(state: &Option<String>) -> bool {
        state.as_deref() == Some(RUNNING)
    }

    pub fn runs_on_source(&self) -> bool {
        Self::runs_at(&self.from)
    }

    pub fn runs_on_destination(&self) -> bool {
        Self::runs_at(&self.to)
    }

    /// It runs on one host, and the other one knows nothing of it.
    pub fn settled(&self) -> bool {
        match (&self.from, &self.to) {
            (Some(state), None) | (None, Some(state)) => state == RUNNING,
            _ => false,
        }
    }

    fn words(&self) -> String {
        let word = |state: &Option<String>| state.clone().unwrap_or_else(|| "absent".to_owned());
        format!(
            "{} on the source, {} on the destination",
            word(&self.from),
            word(&self.to)
        )
    }
}

pub type Places = BTreeMap<&'static str, Place>;

/// Where every guest is, now.
fn places(way: Way<'_>) -> Result<Places> {
    let (from, to) = (gang::domains(way.from)?, gang::domains(way.to)?);
    Ok(GUESTS
        .into_iter()
        .map(|name| {
            let place = Place {
                from: from.get(name).cloned(),
                to: to.get(name).cloned(),
            };
            (name, place)
        })
        .collect())
}

/// Waits until every guest runs in one place, no migration is under way and no QEMU is without a
/// domain; gives the places as they are when that takes too long. `lost` is not waited for.
pub fn settle(way: Way<'_>, lost: &[String]) -> Result<Places> {
    let deadline = Instant::now() + SETTLE_TIMEOUT;
    loop {
        let now = places(way)?;
        let done = now.iter().all(|(name, place)| {
            place.settled() || (lost.iter().any(|lost| lost == name) && !place_is_busy(place))
        });
        let quiet = idle(way.from)? && idle(way.to)?;
        if (done && quiet && strays(way)?.is_empty()) || Instant::now() > deadline {
            return Ok(now);
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}

fn place_is_busy(place: &Place) -> bool {
    place.from.is_some() || place.to.is_some()
}

/// No domain of the host has a job.
fn idle(host: &Host) -> Result<bool> {
    for name in gang::domains(host)?.keys() {
        // A domain that has just gone has no job.
        let info = host.exec(&["virsh", "-q", "domjobinfo", name])?;
        let text = String::from_utf8_lossy(&info.stdout);
        if info.status.success() && !text.contains("None") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// QEMUs that no domain accounts for.
fn strays(way: Way<'_>) -> Result<Vec<String>> {
    let mut strays = Vec::new();
    for host in [way.from, way.to] {
        let domains = gang::domains(host)?;
        for name in gang::qemus(host)?.into_keys() {
            if !domains.contains_key(&name) {
                strays.push(format!(
                    "a QEMU of {name} without a domain on {}",
                    host.name()
                ));
            }
        }
    }
    Ok(strays)
}

/// What a job has said at its end.
#[derive(Debug)]
pub enum Told {
    Report(Box<JobResult>),
    /// The request was refused, or ended before there was a job.
    Refused(String),
    /// There was a job, and there is no report.
    Nothing(String),
}

impl Told {
    /// From what the command has printed or, if it lost its daemon, from the history.
    pub fn of(ended: &Ended, from: &Host, jobs_before: &[String]) -> Result<Told> {
        if let Ok(report) = ended.job() {
            return Ok(Told::Report(Box::new(report)));
        }
        let before: BTreeSet<_> = jobs_before.iter().collect();
        let jobs = gang::history(from)?;
        let words = ended.stderr.trim().to_owned();
        let Some(id) = jobs.iter().find(|id| !before.contains(id)) else {
            let refused = !words.contains("while the job");
            return Ok(match refused {
                true => Told::Refused(words),
                false => Told::Nothing(words),
            });
        };
        let shown = vmgang(from, &["history", id, "--json"])?.expect(0)?;
        Ok(Told::Report(Box::new(shown.job()?)))
    }

    pub fn state(&self) -> &str {
        match self {
            Told::Report(report) => &report.state,
            Told::Refused(_) => "refused",
            Told::Nothing(_) => "no report",
        }
    }

    pub fn sentence(&self) -> Option<&str> {
        match self {
            Told::Report(report) => report.error.as_deref(),
            Told::Refused(words) | Told::Nothing(words) => Some(words),
        }
    }
}

/// Compares what was told with where the guests are.
pub fn check_told(told: &Told, places: &Places, lost: &[String]) -> Vec<String> {
    let is_lost = |name: &str| lost.iter().any(|lost| lost == name);
    let mut broken = Vec::new();
    let report = match told {
        Told::Report(report) => report,
        Told::Refused(words) => {
            let untouched = places
                .iter()
                .all(|(name, place)| is_lost(name) || (place.runs_on_source() && place.settled()));
            if !untouched {
                broken.push(format!(
                    "refused ({words}), but not every guest is on the source"
                ));
            }
            return broken;
        }
        Told::Nothing(words) => return vec![format!("no report of the job: {words}")],
    };
    let count = |state: &str| report.domains.iter().filter(|d| d.state == state).count();
    let all = report.domains.len();
    let due = match (count("migrated"), count("source")) {
        (migrated, _) if migrated == all => "completed",
        (_, source) if source == all => "failed",
        _ => "partial",
    };
    let state = match report.state.as_str() {
        "aborted" => "failed",
        state => state,
    };
    if state != due {
        broken.push(format!(
            "the report says {}, its members say {due}",
            report.state
        ));
    }
    if (report.state == "completed") != report.error.is_none() {
        broken.push(format!(
            "the report says {} with the error {:?}",
            report.state, report.error
        ));
    }
    for (name, place) in places {
        let Some(domain) = report.domains.iter().find(|domain| domain.name == *name) else {
            broken.push(format!("the report does not name {name}"));
            continue;
        };
        let right = match domain.state.as_str() {
            "migrated" => place.runs_on_destination() || is_lost(name),
            "source" => place.runs_on_source(),
            "failed" => domain.error.as_ref().is_some_and(|error| !error.is_empty()),
            _ => false,
        };
        if !right {
            broken.push(format!(
                "the report says {name} is {} ({:?}), but it is {}",
                domain.state,
                domain.error,
                place.words()
            ));
        }
    }
    broken
}

/// Each guest runs in one place; one that does not is lost with its only QEMU, or waits paused
/// for somebody who was told to resume it.
pub fn check_places(told: &Told, places: &Places, lost: &[String]) -> Vec<String> {
    let mut broken = Vec::new();
    for (name, place) in places {
        if place.settled() {
            continue;
        }
        let is_lost = lost.iter().any(|lost| lost == name);
        if is_lost && !place_is_busy(place) {
            continue;
        }
        if paused_and_told(told, name, place) {
            continue;
        }
        broken.push(format!("{name} is {}", place.words()));
    }
    broken
}

/// The guest waits on the source, nowhere else, and the report says so.
pub fn paused_and_told(told: &Told, name: &str, place: &Place) -> bool {
    let Told::Report(report) = told else {
        return false;
    };
    let domain = report.domains.iter().find(|domain| domain.name == name);
    place.from.as_deref() == Some("paused")
        && place.to.is_none()
        && domain.is_some_and(|domain| {
            let error = domain.error.as_deref().unwrap_or_default();
            domain.state == "failed" && error.contains("paused")
        })
}

/// Nothing of the job is left on either host.
pub fn check_left_behind(way: Way<'_>) -> Result<Vec<String>> {
    let mut broken = strays(way)?;
    for host in [way.from, way.to] {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let left = host.list_dir("/run/vmgang/migrate").unwrap_or_default();
            if left.is_empty() {
                break;
            }
            if Instant::now() > deadline {
                broken.push(format!(
                    "{left:?} left in /run/vmgang/migrate on {}",
                    host.name()
                ));
                break;
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        let status = vmgang(host, &["status", "--json"])?;
        if status.code != 0 || status.stdout.trim() != "[]" {
            broken.push(format!(
                "vmgangd on {} still shows a job: {}{}",
                host.name(),
                status.stdout.trim(),
                status.stderr.trim()
            ));
        }
    }
    Ok(broken)
}

/// Has every guest that runs check all its memory once more.
pub fn check_memory(way: Way<'_>, places: &Places) -> Vec<String> {
    let verify = |name: &'static str, place: &Place| -> Result<()> {
        let host = if place.runs_on_source() {
            way.from
        } else {
            way.to
        };
        let guest = host.guest(name);
        let report = guest
            .verify(PATIENCE)
            .with_context(|| format!("memory of {name} on {}", host.name()))?;
        anyhow::ensure!(report.bad == 0, "{name} found damaged pages: {report:?}");
        Ok(())
    };
    std::thread::scope(|scope| {
        let running = places
            .iter()
            .filter(|(_, place)| place.runs_on_source() || place.runs_on_destination());
        let checks: Vec<_> = running
            .map(|(name, place)| scope.spawn(move || verify(name, place)))
            .collect();
        checks
            .into_iter()
            .filter_map(|check| match check.join() {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(format!("{error:#}")),
                Err(_) => Some("a check of memory panicked".to_owned()),
            })
            .collect()
    })
}
