//! One cell of the matrix: a gang on its way, one thing broken in one phase, and the check of
//! everything that must hold whatever breaks.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgang_lab::{GuestSpec, Host, HostChild, Lab};

use super::{Fault, Phase};
use crate::{
    Ended, JobResult, PATIENCE, boot_all, clone_guest, expect_clean, start_vmgang, uri, vmgang,
};

pub(super) const LARGE: &str = "large";
pub(super) const SMALL: &str = "small";
/// Whose QEMU is killed.
pub(super) const BUSY: &str = "busy";
const GUESTS: [&str; 3] = [LARGE, SMALL, BUSY];

/// Slow enough to meet each phase.
const LINK: u64 = 120_000_000;
/// A job ends by itself: its peers are given up after 20 s of silence.
const JOB_ENDS: Duration = Duration::from_secs(120);
/// libvirt cleans up behind a broken migration.
const SETTLES: Duration = Duration::from_secs(90);
const ATTEMPTS: u32 = 3;

/// Where a cell happens.
pub struct Site<'a> {
    pub lab: &'a Lab,
    pub source: &'a Host,
    pub destination: &'a Host,
}

/// What became of a cell.
#[derive(Debug)]
pub struct Cell {
    pub fault: Fault,
    pub phase: Phase,
    /// In few words.
    pub outcome: String,
    /// What must not be.
    pub violations: Vec<String>,
}

/// Three guests that go through all cells, wherever they are.
pub struct Gang<'a> {
    lab: &'a Lab,
    /// The host they are on.
    at: String,
}

/// Where a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Source,
    Destination,
    Both,
    /// There, but not running.
    Paused,
    Nowhere,
}

fn spec(name: &str) -> GuestSpec {
    match name {
        LARGE => GuestSpec::new(name)
            .with_memory_mib(192)
            .with_fill("unique:60,zero:40")
            .with_verify_rate(20_000),
        SMALL => clone_guest(name)
            .with_memory_mib(96)
            .with_idle()
            .with_verify_rate(20_000),
        _ => clone_guest(name)
            .with_memory_mib(96)
            .with_dirty_rate(200)
            .with_verify_rate(20_000),
    }
}

impl<'a> Gang<'a> {
    pub fn boot(lab: &'a Lab) -> Result<Gang<'a>> {
        let gang = Gang {
            lab,
            at: "a".to_owned(),
        };
        gang.boot_missing(&GUESTS)?;
        Ok(gang)
    }

    fn boot_missing(&self, guests: &[&str]) -> Result<()> {
        let host = self.lab.host(&self.at)?;
        let specs: Vec<GuestSpec> = guests.iter().map(|guest| spec(guest)).collect();
        boot_all(host, &specs)?;
        vmgang(host, &[&["gang", "add", "web"], guests].concat())?.expect(0)?;
        Ok(())
    }

    /// Runs one cell, and brings everything back to order for the next one.
    pub fn run(&mut self, fault: Fault, phase: Phase) -> Result<Cell> {
        let mut cell = None;
        for attempt in 1..=ATTEMPTS {
            let (tried, met) = self.attempt(fault, phase)?;
            cell = Some(tried);
            if met {
                break;
            }
            eprintln!("  the phase was over before the fault (attempt {attempt})");
        }
        cell.context("an attempt")
    }

    fn attempt(&mut self, fault: Fault, phase: Phase) -> Result<(Cell, bool)> {
        let there = if self.at == "a" { "b" } else { "a" };
        let site = Site {
            lab: self.lab,
            source: self.lab.host(&self.at)?,
            destination: self.lab.host(there)?,
        };
        self.lab.shape(Some(LINK))?;
        let words = ["migrate", "--json", "web", &uri(site.destination)];
        let mut migrating = start_vmgang(site.source, &words)?;
        let reached = phase.reach(&site, &mut migrating)?;
        let struck = reached && fault.strike(&site)?;
        // With nothing left of what is to break, another attempt would find the same.
        let met = reached;
        if phase == Phase::Barrier {
            // Its QEMU may be the one that was killed, or already be elsewhere.
            let _ = site.source.guest(LARGE).thaw();
        }
        if struck && fault.is_short() {
            std::thread::sleep(Duration::from_secs(1));
            fault.mend(&site)?;
        }
        let ended = end(migrating)?;
        if struck && !fault.is_short() {
            fault.mend(&site)?;
        }
        self.lab.shape(None)?;
        let mut cell = Cell {
            fault,
            phase,
            outcome: String::new(),
            violations: Vec::new(),
        };
        let found = settle(&site)?;
        let expected_loss = struck && matches!(fault, Fault::SourceQemu | Fault::DestinationQemu);
        self.judge(&site, &mut cell, &found, ended.as_ref(), expected_loss);
        if !met {
            cell.outcome = format!("not met: {}", cell.outcome);
        } else if !struck {
            cell.outcome = format!("nothing to break: {}", cell.outcome);
        }
        self.tidy(&site, &found)?;
        Ok((cell, met))
    }

    fn judge(
        &self,
        site: &Site<'_>,
        cell: &mut Cell,
        found: &BTreeMap<&str, Place>,
        ended: Option<&Ended>,
        expected_loss: bool,
    ) {
        let count = |place: Place| found.values().filter(|at| **at == place).count();
        let (here, there) = (count(Place::Source), count(Place::Destination));
        let mut words = Vec::new();
        for (number, word) in [(here, "stayed"), (there, "moved")] {
            if number > 0 {
                words.push(format!("{number} {word}"));
            }
        }
        for (guest, place) in found {
            match place {
                Place::Source | Place::Destination => {}
                Place::Nowhere if expected_loss && *guest == BUSY => {
                    words.push("1 lost with its only QEMU".into());
                }
                place => {
                    words.push(format!("{guest} {place:?}").to_lowercase());
                    cell.violations.push(format!("{guest} is {place:?}"));
                }
            }
        }
        match ended {
            Some(ended) => {
                words.push(format!("exit {}", ended.code));
                if let Ok(job) = ended.job() {
                    let lost = |guest: &str| expected_loss && guest == BUSY;
                    cell.violations.extend(lies(&job, found, lost));
                }
            }
            None => cell.violations.push("the job did not end".into()),
        }
        cell.outcome = words.join(", ");
        for (guest, place) in found {
            let host = match place {
                Place::Source => site.source,
                Place::Destination => site.destination,
                _ => continue,
            };
            match host.guest(guest).verify(PATIENCE) {
                Ok(report) if report.bad == 0 => {}
                Ok(report) => cell.violations.push(format!("{guest}: {report:?}")),
                Err(error) => cell.violations.push(format!("{guest}: {error}")),
            }
        }
        for host in [site.source, site.destination] {
            if let Err(error) = expect_clean(host) {
                cell.violations.push(error.to_string());
            }
        }
    }

    /// All three on one host again, in the gang.
    fn tidy(&mut self, site: &Site<'_>, found: &BTreeMap<&str, Place>) -> Result<()> {
        let moved = found.values().filter(|at| **at == Place::Destination);
        let (home, away) = match moved.count() >= 2 {
            true => (site.destination, site.source),
            false => (site.source, site.destination),
        };
        self.at = home.name().to_owned();
        let mut missing = Vec::new();
        for guest in GUESTS {
            let active = |host: &Host| -> Result<bool> {
                Ok(host.domains()?.iter().any(|name| name == guest))
            };
            if !active(home)? && active(away)? {
                let words = ["migrate", "--live", "--p2p", guest, &uri(home)];
                away.virsh(&words)?;
            } else if !active(home)? {
                missing.push(guest);
            }
        }
        if !missing.is_empty() {
            self.boot_missing(&missing)?;
        }
        let gang = vmgang(home, &["gang", "show", "web", "--json"])?.expect(0)?;
        ensure!(
            GUESTS.iter().all(|guest| gang.stdout.contains(guest)),
            "{gang:?}"
        );
        Ok(())
    }
}

/// Waits for the command to end; `None` if it does not.
fn end(mut migrating: HostChild) -> Result<Option<Ended>> {
    let deadline = Instant::now() + JOB_ENDS;
    while Instant::now() < deadline {
        if migrating.try_wait()?.is_some() {
            return Ok(Some(Ended::from(migrating.wait_with_output()?)));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    migrating.kill()?;
    Ok(None)
}

/// What the report says that is not so. It cannot know of a guest that was lost afterwards.
fn lies(
    job: &JobResult,
    found: &BTreeMap<&str, Place>,
    lost: impl Fn(&str) -> bool,
) -> Vec<String> {
    let told = job.domains.iter().filter_map(|domain| {
        let place = found.get(domain.name.as_str())?;
        if *place == Place::Nowhere && lost(&domain.name) {
            return None;
        }
        let is_so = match domain.state.as_str() {
            "migrated" => *place == Place::Destination,
            "source" => *place == Place::Source,
            _ => true,
        };
        (!is_so).then(|| {
            format!(
                "the report says {} of {}, which is {place:?}",
                domain.state, domain.name
            )
        })
    });
    told.collect()
}

/// Where each guest is, as soon as each runs in one place, or after a while.
fn settle(site: &Site<'_>) -> Result<BTreeMap<&'static str, Place>> {
    let deadline = Instant::now() + SETTLES;
    loop {
        let found = places(site)?;
        let settled = |place: &Place| matches!(place, Place::Source | Place::Destination);
        if found.values().all(settled) || Instant::now() > deadline {
            return Ok(found);
        }
        // A guest that is nowhere will be nowhere.
        let gone = |place: &Place| settled(place) || *place == Place::Nowhere;
        if found.values().all(gone) && Instant::now() + SETTLES > deadline + Duration::from_secs(20)
        {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn places(site: &Site<'_>) -> Result<BTreeMap<&'static str, Place>> {
    let state = |host: &Host, guest: &str| -> Option<String> {
        let answer = host.exec(&["virsh", "-q", "domstate", guest]).ok()?;
        let text = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
        (answer.status.success() && text != "shut off").then_some(text)
    };
    let place = |guest: &&'static str| {
        let (here, there) = (state(site.source, guest), state(site.destination, guest));
        let runs = |state: &Option<String>| state.as_deref() == Some("running");
        let place = match (runs(&here), runs(&there)) {
            (true, true) => Place::Both,
            // Active on both while libvirt is not done: one runs, and the other waits.
            (true, false) if there.is_none() => Place::Source,
            (false, true) if here.is_none() => Place::Destination,
            _ if here.is_none() && there.is_none() => Place::Nowhere,
            _ => Place::Paused,
        };
        (*guest, place)
    };
    Ok(GUESTS.iter().map(place).collect())
}
