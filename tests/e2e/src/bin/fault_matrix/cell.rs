//! One cell: a job, a fault in one of its phases, the checks, and a job afterwards.
//!
//! Owns: the order in which these happen, and getting the gang together again. Must not: know how
//! a fault strikes, how a phase is recognised or what is right.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{Ended, start_vmgang, uri, vmgang};
use vmgang_lab::{Host, HostChild};

use crate::checks::{self, Places, Told};
use crate::faults::{Armed, Fault, Healing, Struck};
use crate::gang::{self, GANG, GUESTS, LINK, Way};
use crate::phases::{Phase, Watch};
use crate::table::Cell;

/// A job has ended so long after any fault: silence is noticed after 20 s, by libvirt after 30 s, and
/// a connection of libvirt's that nobody answers should be given up by the kernel after 130 s.
const JOB_TIMEOUT: Duration = Duration::from_secs(170);

/// Runs a cell once. The gang is together and whole afterwards, wherever `next` says.
pub fn attempt<'l>(way: Way<'l>, fault: Fault, phase: Phase) -> Result<(Cell, Way<'l>)> {
    way.lab.shape(Some(LINK))?;
    let jobs_before = gang::history(way.from)?;
    let mut armed = Armed::new(fault, way)?;
    let watch = Watch::new(way)?;
    let mut job = start_vmgang(way.from, &["migrate", "--json", GANG, &uri(way.to)])?;
    let moment = watch.until(phase, fault.needs(), &mut job)?;
    let mut broken = Vec::new();
    let mut struck = Struck::default();
    if let Some(moment) = &moment {
        struck = armed.strike(phase, moment)?;
    }
    let at = Instant::now();
    let missed =
        moment.is_none() || struck.nothing || (fault != Fault::SourceVmgangd && watch.job_ended());
    let mut heal = |broken: &mut Vec<String>| {
        if moment.is_some()
            && let Err(error) = armed.heal()
        {
            broken.push(format!("{error:#}"));
        }
    };
    let (ended, at_end) = std::thread::scope(|scope| {
        let waiting = scope.spawn(move || end_of(job));
        if fault.healing() == Healing::Soon {
            heal(&mut broken);
        }
        let ended = waiting.join();
        ended.unwrap_or_else(|_| Err(anyhow::anyhow!("the thread that waited panicked")))
    })?;
    if fault.healing() == Healing::AfterTheJob {
        heal(&mut broken);
    }
    if ended.code == STILL_RUNNING {
        broken.push(format!(
            "the job had not ended {} s after the fault",
            JOB_TIMEOUT.as_secs()
        ));
    }
    drop(armed);
    restore(way)?;

    let mut places = checks::settle(way, &struck.lost)?;
    let told = Told::of(&ended, way.from, &jobs_before)?;
    let mut lost = struck.lost;
    lost.extend(killed_by_the_kernel(way, fault, &places));
    lost.retain(|name| !runs(&places, name));
    lost.dedup();
    broken.extend(checks::check_places(&told, &places, &lost));
    broken.extend(checks::check_told(&told, &places, &lost));
    let paused = resume_as_told(way, &told, &mut places)?;
    let source = places.values().filter(|p| p.runs_on_source()).count();
    let moved = places.values().filter(|p| p.runs_on_destination()).count();
    if fault.harmless() && moved != GUESTS.len() {
        broken.push("the fault is harmless, and the gang has not moved".to_owned());
    }
    broken.extend(checks::check_memory(way, &places));
    broken.extend(checks::check_left_behind(way)?);
    if let Err(error) = follow_up(way, &places) {
        broken.push(format!("a migration afterwards: {error:#}"));
    }
    let next = gather(way)?;

    let moment = moment.map(|moment| {
        let words = moment
            .iter()
            .map(|(name, here)| format!("{name} {}", here.word()));
        words.collect::<Vec<_>>().join(", ")
    });
    let cell = Cell {
        fault,
        phase,
        missed,
        source,
        moved,
        lost,
        paused,
        moment: moment.unwrap_or_else(|| "the job had ended".to_owned()),
        note: struck.note,
        job: told.state().to_owned(),
        sentence: told.sentence().map(str::to_owned),
        seconds: (at_end - at).as_secs_f64(),
        broken,
    };
    Ok((cell, next))
}

/// No program ends with it.
const STILL_RUNNING: i32 = -2;

/// Waits for the command; the job is left alone when that takes too long.
fn end_of(mut job: HostChild) -> Result<(Ended, Instant)> {
    let in_time = job.wait_timeout(JOB_TIMEOUT).is_ok();
    let at = Instant::now();
    if !in_time {
        job.kill()?;
    }
    let mut ended = Ended::from(job.wait_with_output()?);
    if !in_time {
        ended.code = STILL_RUNNING;
    }
    Ok((ended, at))
}

fn runs(places: &Places, name: &str) -> bool {
    places
        .get(name)
        .is_some_and(|place| place.runs_on_source() || place.runs_on_destination())
}

/// Members that had migrated and that the kernel killed when the destination had no memory.
fn killed_by_the_kernel(way: Way<'_>, fault: Fault, places: &Places) -> Vec<String> {
    if fault != Fault::DestinationMemory {
        return Vec::new();
    }
    let absent = places
        .iter()
        .filter(|(_, place)| place.from.is_none() && place.to.is_none());
    absent
        .filter(|(name, _)| gang::crashed(way.to, name))
        .map(|(name, _)| (*name).to_owned())
        .collect()
}

/// Does for each paused guest what its report says; gives their names.
fn resume_as_told(way: Way<'_>, told: &Told, places: &mut Places) -> Result<Vec<String>> {
    let mut resumed = Vec::new();
    for (name, place) in places.iter_mut() {
        if checks::paused_and_told(told, name, place) {
            way.from.virsh(&["resume", name])?;
            place.from = Some("running".to_owned());
            resumed.push((*name).to_owned());
        }
    }
    Ok(resumed)
}

/// Every daemon runs and serves; whoever does not was left so by a fault that could not be healed.
fn restore(way: Way<'_>) -> Result<()> {
    for host in [way.from, way.to] {
        for daemon in [host.bus(), host.libvirtd(), host.vmgangd()] {
            if !daemon.is_running()? {
                daemon.start()?;
            }
            daemon.wait_ready()?;
        }
    }
    Ok(())
}

/// Moves what is left on the source to the destination, or all of it back.
fn follow_up(way: Way<'_>, places: &Places) -> Result<()> {
    way.lab.shape(None)?;
    let left: Vec<&str> = places
        .iter()
        .filter(|(_, place)| place.runs_on_source())
        .map(|(name, _)| *name)
        .collect();
    let there = places.values().any(|place| place.runs_on_destination());
    let way = if left.is_empty() { way.back() } else { way };
    let names = left.join(",");
    let domains = ["--domains", &names];
    let what: &[&str] = match left.is_empty() {
        true if !there => return Ok(()),
        false if left.len() < GUESTS.len() => &domains,
        _ => &[GANG],
    };
    let destination = uri(way.to);
    let words = [&["migrate", "--json"], what, &[destination.as_str()]].concat();
    let job = vmgang(way.from, &words)?.expect(0)?.job()?;
    ensure!(job.state == "completed", "{job:?}");
    Ok(())
}

/// The gang whole on one host, booting what is missing; the way from there to the other one.
fn gather(way: Way<'_>) -> Result<Way<'_>> {
    let names = |host: &Host| -> Result<Vec<String>> {
        let domains = gang::domains(host)?.into_iter();
        Ok(domains.map(|(name, _)| name).collect())
    };
    let (from, to) = (names(way.from)?, names(way.to)?);
    let (next, elsewhere, mut here) = if from.len() > to.len() {
        (way, to, from)
    } else {
        (way.back(), from, to)
    };
    for name in elsewhere {
        next.to.guest(&name).destroy()?;
    }
    // One that is here and does not run is no use to the next cell.
    for (name, state) in gang::domains(next.from)? {
        if state != "running" {
            next.from.guest(&name).destroy()?;
            here.retain(|known| *known != name);
        }
    }
    let missing: Vec<&str> = GUESTS
        .into_iter()
        .filter(|name| !here.iter().any(|known| known == name))
        .collect();
    if !missing.is_empty() {
        gang::boot(next.from, &missing).context("boot what is missing")?;
    }
    Ok(next)
}
