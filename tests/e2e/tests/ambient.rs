//! Clients that know nothing of vmgang name a socket, and what they migrate is de-duplicated: `virsh
//! migrate` with a `--migrateuri`, several at a time or one after the other.

use std::process::{Output, Stdio};

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    JobResult, boot_all, clone_guest, expect_not_paused, expect_running, uri, verify_all, vmgang,
    wait_until, with_lab,
};
use vmgang_lab::{Host, HostChild, Lab};

const CONFIG: &str = "/etc/vmgang/vmgang.toml";
/// One file for both hosts.
const AMBIENT: &str = "[ambient]\npeers = ['a', 'b']\nlinger_s = 15\n";

#[test]
fn clients_that_know_nothing_of_vmgang_share_its_sessions() -> Result<()> {
    with_lab(None, ambient)
}

fn configure(host: &Host, config: &str) -> Result<()> {
    host.write_file(CONFIG, config)?;
    Ok(host.vmgangd().restart()?)
}

fn socket(to: &Host, guest: &str) -> String {
    format!("/run/vmgang/to/{}/{guest}.sock", to.name())
}

fn start(from: &Host, to: &Host, guest: &str, more: &[&str]) -> Result<HostChild> {
    let socket = socket(to, guest);
    wait_until("the socket is there", || {
        Ok(from.exec(&["test", "-S", &socket])?.status.success())
    })?;
    let (uri, socket) = (uri(to), format!("unix://{socket}"));
    let words = ["virsh", "migrate", "--live", "--migrateuri", &socket];
    let words = [&words[..], more, &[guest, &uri]].concat();
    let piped = Stdio::piped;
    Ok(from
        .command(&words)
        .stdout(piped())
        .stderr(piped())
        .spawn()?)
}

fn end(child: HostChild) -> Result<Output> {
    Ok(child.wait_with_output()?)
}

fn migrated(child: HostChild) -> Result<()> {
    let output = end(child)?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// The newest job, once it has ended.
fn ended_job(host: &Host) -> Result<JobResult> {
    let mut id = String::new();
    wait_until("the session ends", || {
        let jobs = vmgang(host, &["history", "--json"])?.expect(0)?.stdout;
        let jobs: serde_json::Value = serde_json::from_str(&jobs)?;
        let running = vmgang(host, &["status", "--json"])?.expect(0)?.stdout;
        id = jobs[0]["job"].as_str().unwrap_or_default().to_owned();
        Ok(running.trim() == "[]" && !id.is_empty())
    })?;
    vmgang(host, &["history", "--json", &id])?.expect(0)?.job()
}

fn names(job: &JobResult, state: &str) -> Vec<String> {
    let domains = job.domains.iter().filter(|domain| domain.state == state);
    let mut names: Vec<_> = domains.map(|domain| domain.name.clone()).collect();
    names.sort();
    names
}

fn ambient(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    boot_all(
        a,
        &[
            clone_guest("one").with_idle(),
            clone_guest("two").with_dirty_rate(100),
        ],
    )?;

    // The destination has not been configured: the client is told, and the guest stays.
    configure(a, AMBIENT)?;
    // A daemon that does not know this host by that name makes no directory, so QEMU cannot listen.
    let output = end(start(a, b, "one", &["--p2p"])?)?;
    ensure!(!output.status.success(), "{output:?}");
    expect_not_paused(a, &["one"])?;

    // Two at the same time, with a client that migrates by itself and one that lets libvirtd.
    configure(b, AMBIENT)?;
    configure(a, AMBIENT)?;
    let both = [
        start(a, b, "one", &["--p2p"])?,
        start(a, b, "two", &["--verbose"])?,
    ];
    both.into_iter().try_for_each(migrated)?;
    // A guest that was started meanwhile has its socket at once, though the session is older; and a gang's
    // own job has nothing to do with all this.
    boot_all(a, &[clone_guest("three").with_idle()])?;
    migrated(start(a, b, "three", &["--p2p"])?)?;
    expect_running(a, &[])?;
    expect_running(b, &["one", "two", "three"])?;
    verify_all(b, &["one", "two", "three"])?;
    let job = ended_job(a)?;
    let jobs = vmgang(a, &["history", "--json"])?.expect(0)?.stdout;
    let jobs: Vec<serde_json::Value> = serde_json::from_str(&jobs)?;
    let all: Vec<JobResult> = jobs
        .iter()
        .map(|job| {
            let id = job["job"].as_str().context("a job's id")?;
            vmgang(a, &["history", "--json", id])?.expect(0)?.job()
        })
        .collect::<Result<_>>()?;
    ensure!(job.state == "completed", "{job:?}");
    let shared = all
        .iter()
        .find(|job| names(job, "migrated") == ["one", "two"])
        .with_context(|| format!("no session of both: {all:?}"))?;
    ensure!(shared.destination == "b (ambient)", "{shared:?}");
    let bytes = &shared.bytes;
    ensure!(bytes.saved.cross_vm > 0, "{bytes:?}");
    ensure!(bytes.wire * 100 <= bytes.qemu_stream * 50, "{bytes:?}");
    ensure!(
        bytes.saved.total() == bytes.qemu_stream as i64 - bytes.wire as i64,
        "{bytes:?}"
    );
    ensure!(
        shared.domains.iter().all(|d| d.downtime_ms.is_some()),
        "{shared:?}"
    );
    ensure!(
        all.iter().any(|job| names(job, "migrated") == ["three"]),
        "{all:?}"
    );

    // Back the same way, one after the other: the second finds what the first has sent.
    for guest in ["one", "three"] {
        migrated(start(b, a, guest, &["--p2p"])?)?;
    }
    verify_all(a, &["one", "three"])?;
    let back = ended_job(b)?;
    ensure!(names(&back, "migrated") == ["one", "three"], "{back:?}");
    ensure!(back.bytes.saved.cross_vm > 0, "{back:?}");

    // An abort of the session is one of the client's migration.
    let slow = start(a, b, "one", &["--p2p", "--bandwidth", "1"])?;
    let mut id = String::new();
    wait_until("the session is shown", || {
        let jobs = vmgang(a, &["status", "--json"])?.expect(0)?.stdout;
        let jobs: serde_json::Value = serde_json::from_str(&jobs)?;
        id = jobs[0]["job"].as_str().unwrap_or_default().to_owned();
        Ok(jobs[0]["domains"][0]["name"] == "one")
    })?;
    vmgang(a, &["abort", &id])?;
    let output = end(slow)?;
    ensure!(!output.status.success(), "{output:?}");
    expect_running(a, &["one", "three"])?;
    expect_not_paused(a, &["one", "three"])?;
    let aborted = ended_job(a)?;
    ensure!(aborted.state == "aborted", "{aborted:?}");
    ensure!(names(&aborted, "source") == ["one"], "{aborted:?}");
    verify_all(a, &["one"])?;

    // Who stops being asked for leaves nothing behind.
    a.virsh(&["destroy", "three"])?;
    let gone = socket(b, "three");
    wait_until("its socket is gone", || {
        Ok(!a.exec(&["test", "-e", &gone])?.status.success())
    })?;
    a.vmgangd().stop()?;
    ensure!(a.list_dir("/run/vmgang/to").is_err(), "sockets are left");
    Ok(())
}
