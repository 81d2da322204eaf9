//! There and back: what a job has taken away, `vmgang return` brings back, from the host that they left.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    boot_all, clone_guest, expect_clean, expect_not_paused, expect_running, start_vmgang, uri,
    verify_all, vmgang, wait_until, with_lab,
};
use vmgang_lab::{Host, Lab};

#[test]
fn what_a_job_has_taken_away_comes_back() -> Result<()> {
    with_lab(None, there_and_back)
}

/// Lets the hosts use each other's libvirt. Without a restart, which would forget what guests had.
fn trust(host: &Host) -> Result<()> {
    host.write_file("/etc/vmgang/vmgang.toml", "allow_libvirt = ['a', 'b']\n")?;
    let pid = host.vmgangd().pid()?.context("vmgangd does not run")?;
    host.kill(pid, "HUP")?;
    wait_until("the configuration is read again", || {
        Ok(host.vmgangd().log().contains("was read again"))
    })
}

/// Migrates a gang away and gives the job's id.
fn send(from: &Host, destination: &str) -> Result<String> {
    let words = ["migrate", "--json", "web", destination];
    let job = vmgang(from, &words)?.expect(0)?.job()?;
    Ok(job.job)
}

fn there_and_back(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let guests = ["one", "two", "three"];
    let specs = guests.map(|name| clone_guest(name).with_idle());
    boot_all(a, &specs)?;
    vmgang(a, &["gang", "add", "web", "one", "two", "three"])?.expect(0)?;
    let first = send(a, &uri(b))?;

    // Only who may use the other host's libvirt may have guests brought back.
    let refused = vmgang(a, &["return", &first])?.expect(1)?;
    ensure!(refused.stderr.contains("allow_libvirt"), "{refused:?}");
    expect_running(b, &["one", "three", "two"])?;
    for host in [a, b] {
        trust(host)?;
    }

    // One has been stopped meanwhile, and a newcomer has joined: both are named, the rest comes.
    b.virsh(&["destroy", "three"])?;
    boot_all(b, &[clone_guest("new").with_idle()])?;
    vmgang(b, &["gang", "add", "web", "new"])?.expect(0)?;
    let back = vmgang(a, &["return", "--json", &first[..8]])?.expect(0)?;
    for part in ["three is not there any more", "new has joined the gang"] {
        ensure!(back.stderr.contains(part), "{part}: {back:?}");
    }
    let job = back.job()?;
    ensure!(job.state == "completed", "{job:?}");
    ensure!(job.domains.len() == 2, "{job:?}");
    // What the members had when they left was kept here.
    ensure!(job.bytes.saved.destination > 0, "{job:?}");
    expect_running(a, &["one", "two"])?;
    expect_running(b, &["new"])?;
    verify_all(a, &["one", "two"])?;
    // It is in both hosts' histories, and nothing is left.
    for host in [a, b] {
        let told = vmgang(host, &["history", "--json", &job.job])?.expect(0)?;
        ensure!(told.job()?.domains.len() == 2, "{told:?}");
        expect_clean(host)?;
    }
    let again = vmgang(a, &["return", &first])?.expect(1)?;
    ensure!(again.stderr.contains("three"), "{again:?}");

    // The same with a bare host name, and an abort from here.
    let second = send(a, "b")?;
    let running = start_vmgang(a, &["return", "--json", "--bandwidth", "1", &second])?;
    let mut id = String::new();
    wait_until("the way back is shown", || {
        let jobs = vmgang(a, &["status", "--json"])?.expect(0)?.stdout;
        let jobs: serde_json::Value = serde_json::from_str(&jobs)?;
        id = jobs[0]["job"].as_str().unwrap_or_default().to_owned();
        Ok(jobs[0]["domains"][0]["state"] == "copying")
    })?;
    vmgang(a, &["abort", &id])?.expect(0)?;
    let aborted = vmgang_e2e::Ended::from(running.wait_with_output()?).expect(4)?;
    ensure!(aborted.job()?.state == "aborted", "{aborted:?}");
    expect_running(b, &["new", "one", "two"])?;
    expect_not_paused(b, &["one", "two"])?;

    // The other daemon is not there: nothing happens, and the sentence says where to look.
    b.vmgangd().stop()?;
    let gone = vmgang(a, &["return", &second])?.expect(1)?;
    ensure!(gone.stderr.contains("vmgangd on b"), "{gone:?}");
    b.vmgangd().start()?;
    vmgang(a, &["return", &second])?.expect(0)?;
    expect_running(a, &["one", "two"])?;
    verify_all(a, &["one", "two"])
}
