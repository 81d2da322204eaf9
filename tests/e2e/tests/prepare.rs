//! Contents that are at the destination before a gang migrates: staged for it, left by it, or of
//! members that run there. The guests say themselves that no byte of their memory changed.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vmgang_e2e::{
    JobResult, Versions, boot_all, clone_guest, expect_clean, expect_running, uri, verify_all,
    vmgang, wait_until, with_lab,
};
use vmgang_lab::{Host, Lab};

const GUESTS: [&str; 3] = ["idle", "reader", "busy"];
const LATE: &str = "late";

#[test]
fn a_prepared_gang_moves_returns_and_follows_its_own() -> Result<()> {
    with_lab(Some(1_000_000_000), there_and_back)
}

fn there_and_back(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    boot_all(
        a,
        &[
            clone_guest("idle").with_idle(),
            clone_guest("reader").with_private_memory(),
            clone_guest("busy").with_dirty_rate(200),
        ],
    )?;
    vmgang(a, &[&["gang", "add", "web"], &GUESTS[..]].concat())?.expect(0)?;
    estimate(a)?;
    expire_and_drop(a, b)?;

    // A member that joins after the gang was prepared goes with it.
    let stage = prepare(a, b, "10m")?;
    ensure!(stage["found"] == 0, "nothing was there: {stage}");
    boot_all(a, &[clone_guest(LATE).with_idle()])?;
    vmgang(a, &["gang", "add", "web", LATE])?.expect(0)?;
    let everyone = [&GUESTS[..], &[LATE]].concat();
    let first = migrate(a, b, &["web"])?;
    ensure!(first.domains.len() == 4, "{first:?}");
    let saved = &first.bytes.saved;
    ensure!(saved.staged > 0 && saved.destination == 0, "{first:?}");
    // All but what three guests have written since and what the late one has for itself: a tenth
    // of its 160 MiB is its own, and another tenth compresses.
    let own = (160 << 20) / 5;
    ensure!(first.bytes.wire < own * 2, "{first:?}");
    expect_running(b, &everyone)?;
    verify_all(b, &everyone)?;
    for host in [a, b] {
        ensure!(stages(host)?.is_empty(), "the stage is taken");
        expect_clean(host)?;
    }

    if !Versions::asked_for()?.goes_back() {
        eprintln!("the rest goes back, which these versions do not");
        return Ok(());
    }
    // The way back within a minute: this host has kept what they had.
    let back = migrate(b, a, &["web"])?;
    let saved = &back.bytes.saved;
    ensure!(saved.destination > 0 && saved.staged == 0, "{back:?}");
    ensure!(
        back.bytes.wire * 4 < first.bytes.qemu_stream / 4,
        "{back:?}"
    );
    verify_all(a, &everyone)?;

    // Two members go ahead; what they have there need not be sent for the others. A daemon that
    // has just started has kept nothing of those.
    let ahead = migrate(a, b, &["--domains", "idle,late"])?;
    ensure!(ahead.gang.is_none(), "{ahead:?}");
    b.vmgangd().restart()?;
    estimate_gang(b, "web", 2)?;
    let rest = migrate(a, b, &["web"])?;
    ensure!(rest.domains.len() == 2, "{rest:?}");
    ensure!(rest.bytes.saved.destination > 0, "{rest:?}");
    expect_running(b, &everyone)?;
    verify_all(b, &everyone)?;
    for host in lab.hosts() {
        expect_clean(host)?;
    }
    Ok(())
}

fn migrate(from: &Host, to: &Host, what: &[&str]) -> Result<JobResult> {
    let destination = uri(to);
    let arguments = [&["migrate", "--json"], what, &[destination.as_str()]].concat();
    let job = vmgang(from, &arguments)?.expect(0)?.job()?;
    ensure!(job.state == "completed", "{job:?}");
    ensure!(
        job.bytes.saved.total() == job.bytes.qemu_stream as i64 - job.bytes.wire as i64,
        "{job:?}"
    );
    Ok(job)
}

fn prepare(from: &Host, to: &Host, time: &str) -> Result<Value> {
    let destination = uri(to);
    let ended = vmgang(
        from,
        &["prepare", "--json", "--for", time, "web", &destination],
    )?
    .expect(0)?;
    let stage: Value = serde_json::from_str(&ended.stdout).context("one JSON object")?;
    ensure!(stage["state"] == "fresh", "{stage}");
    ensure!(stage["contents"].as_u64() > Some(1000), "{stage}");
    let (bytes, wire) = (stage["bytes"].as_u64(), stage["wire_bytes"].as_u64());
    ensure!(wire > Some(0) && wire < bytes, "{stage}");
    Ok(stage)
}

fn stages(host: &Host) -> Result<Vec<Value>> {
    let ended = vmgang(host, &["status", "--json"])?.expect(0)?;
    let all: Vec<Value> = serde_json::from_str(&ended.stdout)?;
    Ok(all
        .into_iter()
        .filter(|one| one["stage"].is_string())
        .collect())
}

fn estimate(host: &Host) -> Result<()> {
    let estimate = estimate_gang(host, "web", GUESTS.len())?;
    let shared = &estimate["shared"];
    let whole = shared[0][0].as_u64().context("a number")?;
    for (row, column) in [(0, 1), (1, 2), (2, 0)] {
        // Half of each guest is the gang's.
        let pages = shared[row][column].as_u64().context("a number")?;
        ensure!(pages * 4 > whole && pages < whole, "{estimate}");
    }
    let migration = &estimate["migration"];
    let bytes = |key: &str| migration[key].as_u64().context("a number");
    ensure!(bytes("wire")? * 2 < bytes("qemu_stream")?, "{estimate}");
    ensure!(
        migration["saved"]["cross_vm"].as_i64() > Some(0),
        "{estimate}"
    );
    // As people see it, and as a picture.
    let shown = vmgang(host, &["estimate", "web", "--svg", "/tmp/web.svg"])?.expect(0)?;
    for word in ["idle", "SHARED", "over the wire"] {
        ensure!(shown.stdout.contains(word), "{shown:?}");
    }
    let picture = host.exec(&["cat", "/tmp/web.svg"])?;
    let picture = String::from_utf8(picture.stdout)?;
    ensure!(
        picture.starts_with("<svg") && picture.contains("reader"),
        "{picture}"
    );
    Ok(())
}

fn estimate_gang(host: &Host, gang: &str, members: usize) -> Result<Value> {
    let ended = vmgang(host, &["estimate", "--json", gang])?.expect(0)?;
    let estimate: Value = serde_json::from_str(&ended.stdout)?;
    let found = estimate["members"].as_array().map(Vec::len);
    ensure!(found == Some(members), "{estimate}");
    Ok(estimate)
}

/// A stage ends when its time is over, and when it is dropped, on both hosts.
fn expire_and_drop(a: &Host, b: &Host) -> Result<()> {
    let both = |count: usize| -> Result<bool> {
        Ok(stages(a)?.len() == count && stages(b)?.len() == count)
    };
    let stage = prepare(a, b, "45s")?;
    ensure!(both(1)?, "both hosts show it");
    let there = stages(b)?.remove(0);
    ensure!(
        there["stage"] == stage["stage"] && there["direction"] == "incoming",
        "{there}"
    );
    let again = vmgang(a, &["prepare", "--quiet", "web", &uri(b)])?.expect(1)?;
    ensure!(again.stderr.contains("already"), "{again:?}");
    wait_until("the stage has expired", || both(0))?;

    let id = prepare(a, b, "10m")?["stage"].to_string();
    let id = id.trim_matches('"').to_owned();
    let shown = vmgang(b, &["status"])?.expect(0)?;
    ensure!(shown.stdout.contains("from a"), "{shown:?}");
    vmgang(a, &["abort", &id[..8]])?.expect(0)?;
    wait_until("the stage is dropped", || both(0))
}
