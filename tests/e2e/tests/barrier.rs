//! The gang switches over together: members that are ready early wait, running, until the last
//! one is; and until then everything can still be taken back.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    Ended, Versions, boot_all, clone_guest, expect_clean, expect_not_paused, expect_running,
    start_vmgang, uri, verify_all, vmgang, wait_until, with_lab,
};
use vmgang_lab::{GuestSpec, Host, HostChild, Lab};

const GUESTS: [&str; 3] = ["large", "small", "busy"];
/// Slow enough to act before the large guest is done.
const SLOW: u64 = 80_000_000;

#[test]
fn members_that_are_ready_wait_for_the_last() -> Result<()> {
    if !Versions::asked_for()?.holds_emulated() {
        eprintln!("emulated guests are not held by these versions");
        return Ok(());
    }
    with_lab(Some(SLOW), |lab| {
        let a = lab.host("a")?;
        let large = GuestSpec::new("large")
            .with_memory_mib(320)
            .with_fill("unique:100");
        let small = |name| clone_guest(name).with_memory_mib(96);
        boot_all(
            a,
            &[
                large,
                small("small").with_idle(),
                small("busy").with_dirty_rate(50),
            ],
        )?;
        vmgang(a, &[&["gang", "add", "web"], &GUESTS[..]].concat())?.expect(0)?;

        aborted_while_held(lab).context("an abort while held")?;
        together(lab).context("left alone")
    })
}

/// Starts the job, and waits until the small members are held while the QEMU of the large one, frozen,
/// has most of its memory still to send. Otherwise pacing would bring them all there together.
fn until_held(lab: &Lab) -> Result<HostChild> {
    let a = lab.host("a")?;
    let migrating = start_vmgang(a, &["migrate", "--json", "web", &uri(lab.host("b")?)])?;
    wait_until("the large member sends", || {
        let status = vmgang(a, &["status", "--json"])?.expect(0)?;
        let jobs: serde_json::Value = serde_json::from_str(&status.stdout)?;
        let members = jobs[0]["domains"].as_array().cloned().unwrap_or_default();
        let large = members.iter().find(|member| member["name"] == "large");
        Ok(large.is_some_and(|large| large["qemu_stream_bytes"].as_u64() > Some(1 << 20)))
    })?;
    a.guest("large").freeze()?;
    wait_until("the small members are held", || {
        let states = states(a)?;
        let is = |guest: &str, state: &str| states.get(guest).is_some_and(|s| s == state);
        ensure!(!is("large", "held"), "the large member was done first");
        Ok(is("small", "held") && is("busy", "held"))
    })?;
    Ok(migrating)
}

/// The state of each member of the running job; empty without one.
fn states(a: &Host) -> Result<HashMap<String, String>> {
    let status = vmgang(a, &["status", "--json"])?.expect(0)?;
    let jobs: serde_json::Value = serde_json::from_str(&status.stdout)?;
    let members = jobs[0]["domains"].as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok(members
        .iter()
        .map(|member| (text(&member["name"]), text(&member["state"])))
        .collect())
}

fn iterations(a: &Host, guest: &str) -> Result<u64> {
    let info = a.virsh(&["domjobinfo", guest])?;
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("Iteration:"));
    Ok(line.context("no iterations")?.trim().parse()?)
}

fn expect_back(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    expect_running(a, &GUESTS)?;
    wait_until("libvirt on b has cleaned up", || {
        Ok(b.domains()?.is_empty())
    })?;
    verify_all(a, &GUESTS)?;
    expect_clean(a)
}

fn aborted_while_held(lab: &Lab) -> Result<()> {
    let a = lab.host("a")?;
    let migrating = until_held(lab)?;
    // Held members run, and QEMU is kept from spinning: without back-pressure it makes
    // tens of thousands of passes a second, each an event for libvirtd.
    let (start, before) = (Instant::now(), iterations(a, "small")?);
    std::thread::sleep(Duration::from_secs(2));
    let passes = iterations(a, "small")? - before;
    let a_second = passes as f64 / start.elapsed().as_secs_f64();
    ensure!(a_second < 1000.0, "{a_second} passes a second while held");
    // Its socket empties by and by, and QEMU writes again only when a good part of it is empty.
    wait_until("a held member goes on with its passes", || {
        Ok(iterations(a, "small")? > before)
    })?;
    expect_not_paused(a, &["small", "busy"])?;
    a.guest("large").thaw()?;
    let job = vmgang(a, &["status", "--json"])?.stdout;
    let job: serde_json::Value = serde_json::from_str(&job)?;
    let asked = Instant::now();
    vmgang(a, &["abort", job[0]["job"].as_str().context("a job")?])?.expect(0)?;
    let ended = Ended::from(migrating.wait_with_output()?)
        .expect(4)?
        .job()?;
    eprintln!(
        "{a_second:.0} passes a second while held; abort took {:?}",
        asked.elapsed()
    );
    ensure!(
        ended.domains.iter().all(|d| d.state == "source"),
        "{ended:?}"
    );
    expect_back(lab)
}

fn together(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let mut migrating = until_held(lab)?;
    a.guest("large").thaw()?;
    let mut looks = 0;
    while migrating.try_wait()?.is_none() {
        let states = states(a)?;
        let any = |wanted: &[&str]| {
            states
                .values()
                .any(|state| wanted.contains(&state.as_str()))
        };
        ensure!(
            !(any(&["switching", "migrated"]) && any(&["copying"])),
            "somebody switched over before the last was ready: {states:?}"
        );
        looks += 1;
    }
    ensure!(looks > 3, "the job ended before it could be watched");
    let job = Ended::from(migrating.wait_with_output()?)
        .expect(0)?
        .job()?;
    ensure!(job.state == "completed", "{job:?}");
    expect_running(a, &[])?;
    expect_running(b, &GUESTS)?;
    verify_all(b, &GUESTS)
}
