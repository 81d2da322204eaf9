//! Nothing loses a VM: members that cannot migrate, requests to abort, and daemons killed in
//! the middle all leave every guest running and intact on the source.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    Ended, boot_all, clone_guest, expect_clean, expect_not_paused, expect_running, start_vmgang,
    uri, verify_all, vmgang, wait_until, with_lab,
};
use vmgang_lab::{Host, Lab, Signal};

const GUESTS: [&str; 3] = ["one", "two", "three"];
/// Slow enough that a test can act in the middle of the first pass.
const SLOW: u64 = 40_000_000;

fn with_gang(test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    with_lab(Some(SLOW), |lab| {
        boot_gang(lab.host("a")?)?;
        test(lab)
    })
}

fn boot_gang(a: &Host) -> Result<()> {
    boot_all(
        a,
        &[
            clone_guest("one").with_idle(),
            clone_guest("two"),
            clone_guest("three").with_dirty_rate(200),
        ],
    )?;
    vmgang(a, &[&["gang", "add", "web"], &GUESTS[..]].concat())?.expect(0)?;
    Ok(())
}

/// Starts the gang's migration and waits until its first pages have crossed.
fn under_way(lab: &Lab, arguments: &[&str]) -> Result<vmgang_lab::HostChild> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let before = b.net_counters()?.rx_bytes;
    let destination = uri(b);
    let child = start_vmgang(
        a,
        &[&["migrate"], arguments, &["web", &destination]].concat(),
    )?;
    wait_until("the migration has sent 5 MB", || {
        Ok(b.net_counters()?.rx_bytes > before + 5_000_000)
    })?;
    Ok(child)
}

/// Everything as before: on a, running, intact, not in a job; nothing on b.
fn expect_untouched(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    expect_running(a, &GUESTS)?;
    wait_until("libvirt on b has cleaned up", || {
        Ok(b.domains()?.is_empty())
    })?;
    expect_not_paused(a, &GUESTS)?;
    for guest in GUESTS {
        wait_until("libvirt on a has ended the member's job", || {
            Ok(a.virsh(&["domjobinfo", guest])?.contains("None"))
        })?;
    }
    verify_all(a, &GUESTS)
}

fn expect_all_clean(lab: &Lab) -> Result<()> {
    lab.hosts().iter().try_for_each(expect_clean)
}

#[test]
fn a_member_that_cannot_migrate_keeps_the_whole_gang() -> Result<()> {
    with_lab(Some(SLOW * 10), one_cannot)
}

fn one_cannot(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    // A disk on a's own file system: libvirt refuses to migrate it, but only when asked to.
    a.run(&[
        "qemu-img",
        "create",
        "-f",
        "raw",
        "/var/lib/libvirt/images/own.img",
        "1M",
    ])?;
    let disk = "<disk type='file' device='disk'><driver name='qemu' type='raw'/>\
                <source file='/var/lib/libvirt/images/own.img'/><target dev='vda' bus='virtio'/></disk>";
    boot_all(
        a,
        &[
            clone_guest("one").with_idle(),
            clone_guest("two").with_devices(disk),
            clone_guest("three").with_dirty_rate(200),
        ],
    )?;
    vmgang(a, &[&["gang", "add", "web"], &GUESTS[..]].concat())?.expect(0)?;
    let ended = vmgang(a, &["migrate", "--json", "web", &uri(b)])?.expect(1)?;
    // Refused before it began, or failed and taken back: either way one clear sentence.
    match ended.job() {
        Ok(job) => {
            ensure!(job.state == "failed", "{job:?}");
            ensure!(
                job.error.as_deref().is_some_and(|e| e.contains("two")),
                "{job:?}"
            );
            ensure!(job.domains.iter().all(|d| d.state == "source"), "{job:?}");
        }
        Err(_) => ensure!(ended.stderr.contains("two"), "{ended:?}"),
    }
    expect_untouched(lab)?;
    expect_all_clean(lab)?;
    // Without that member the others can go.
    let ended = vmgang(
        a,
        &["migrate", "--quiet", "--domains", "one,three", &uri(b)],
    )?
    .expect(0)?;
    ensure!(ended.stdout.is_empty(), "{ended:?}");
    expect_running(a, &["two"])?;
    verify_all(b, &["one", "three"])
}

#[test]
fn an_abort_puts_everything_back() -> Result<()> {
    with_gang(abort)
}

fn abort(lab: &Lab) -> Result<()> {
    let a = lab.host("a")?;

    // By the command.
    let migrating = under_way(lab, &["--json"])?;
    let status = vmgang(a, &["status", "--json"])?.expect(0)?;
    let jobs: serde_json::Value = serde_json::from_str(&status.stdout)?;
    let id = find_job(&jobs).ok_or_else(|| anyhow::anyhow!("no job in {status:?}"))?;
    let busy = vmgang(a, &["migrate", "--domains", "two", &uri(lab.host("b")?)])?.expect(1)?;
    ensure!(busy.stderr.contains("two"), "{busy:?}");
    let asked = Instant::now();
    vmgang(a, &["abort", &id])?.expect(0)?;
    let ended = Ended::from(migrating.wait_with_output()?).expect(4)?;
    let job = ended.job()?;
    ensure!(job.state == "aborted" && job.job == id, "{job:?}");
    ensure!(job.domains.iter().all(|d| d.state == "source"), "{job:?}");
    eprintln!("aborted after {:?}", asked.elapsed());
    expect_untouched(lab)?;
    expect_all_clean(lab)?;

    // By ctrl-C.
    let mut migrating = under_way(lab, &[])?;
    migrating.signal(Signal::INT)?;
    Ended::from(migrating.wait_with_output()?).expect(4)?;
    expect_untouched(lab)?;
    expect_all_clean(lab)
}

/// The id of the one job in whatever shape `status --json` has.
fn find_job(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::Array(items) => items.iter().find_map(find_job),
        serde_json::Value::Object(fields) => match fields.get("job").or_else(|| fields.get("id")) {
            Some(serde_json::Value::String(id)) => Some(id.clone()),
            _ => fields.values().find_map(find_job),
        },
        _ => None,
    }
}

fn kill(lab: &Lab, victim: &str) -> Result<()> {
    let a = lab.host("a")?;
    let mut migrating = under_way(lab, &["--json"])?;
    let killed: &Host = lab.host(victim)?;
    killed.vmgangd().kill()?;
    let status = migrating.wait_timeout(Duration::from_secs(60))?;
    ensure!(status.code() == Some(1), "vmgang ended with {status}");
    expect_untouched(lab)?;
    // The next daemon cleans up, remembers, and serves.
    killed.vmgangd().start()?;
    expect_all_clean(lab)?;
    let history = vmgang(a, &["history"])?.expect(0)?;
    ensure!(history.stdout.contains("web"), "{history:?}");
    Ok(())
}

#[test]
fn killed_daemons_leave_every_guest_on_the_source() -> Result<()> {
    with_gang(|lab| {
        for victim in ["a", "b"] {
            kill(lab, victim).with_context(|| format!("the daemon of {victim}"))?;
        }
        lab.shape(None)?;
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        vmgang(a, &["migrate", "--quiet", "web", &uri(b)])?.expect(0)?;
        verify_all(b, &GUESTS)
    })
}
