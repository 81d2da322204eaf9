//! Members give up what memory they do not need before they move, and have it back after, also when
//! the job does not succeed and when the daemon does not live to see its end.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    Ended, boot_all, expect_clean, expect_running, start_vmgang, uri, verify_all, vmgang,
    wait_until, with_lab,
};
use vmgang_lab::{GuestSpec, Host, HostChild};

const GUESTS: [&str; 2] = ["ballooned", "plain"];
const MEMORY_MIB: u64 = 512;
const MEMORY_KIB: u64 = MEMORY_MIB << 10;
const LINK: u64 = 400_000_000;

/// It needs a third of its memory, and has written to most of the rest.
fn wasteful(name: &str) -> GuestSpec {
    GuestSpec::new(name)
        .with_memory_mib(MEMORY_MIB)
        .with_freed_percent(60)
        .with_memory_percent(20)
        .with_idle()
}

#[test]
fn slowly_guests_give_up_what_they_do_not_need_and_have_it_back() -> Result<()> {
    with_lab(Some(LINK), |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        boot_all(
            a,
            &[wasteful("ballooned").with_balloon(), wasteful("plain")],
        )?;
        aborted(a, b).context("aborted")?;
        daemon_killed(a, b).context("the daemon killed")?;
        moves(a, b)
    })
}

fn moves(a: &Host, b: &Host) -> Result<()> {
    let words = ["migrate", "--json", "--all", "--balloon", &uri(b)];
    let job = vmgang(a, &words)?.expect(0)?.job()?;
    expect_running(b, &GUESTS)?;
    expect_clean(a)?;
    let [ballooned, plain] = &job.domains[..] else {
        anyhow::bail!("{job:?}");
    };
    // It keeps what it uses, a margin, and the floor.
    let given = ballooned.ballooned_bytes.context("a figure")?;
    ensure!(given > 200 << 20 && given <= 384 << 20, "{job:?}");
    ensure!(plain.ballooned_bytes.is_none(), "{job:?}");
    ensure!(
        plain.qemu_stream_bytes > ballooned.qemu_stream_bytes + (150 << 20),
        "{job:?}"
    );
    has_all(b)?;
    verify_all(b, &GUESTS)
}

fn memory_kib(host: &Host) -> Result<u64> {
    let stats = host.virsh(&["dommemstat", "ballooned"])?;
    let actual = stats.lines().find_map(|line| line.strip_prefix("actual "));
    Ok(actual.context("a balloon")?.trim().parse()?)
}

/// The guest has all its memory, and is not asked about it any more.
fn has_all(host: &Host) -> Result<()> {
    wait_until("the guest has its memory back", || {
        Ok(memory_kib(host)? == MEMORY_KIB)
    })?;
    let xml = host.virsh(&["dumpxml", "ballooned"])?;
    ensure!(!xml.contains("<stats period"), "{xml}");
    Ok(())
}

/// Starts a job that takes long, and waits until the guest has given up memory and moves.
fn under_way(a: &Host, b: &Host) -> Result<HostChild> {
    let words = ["migrate", "--json", "--all", "--balloon"];
    let migrating = start_vmgang(a, &[&words[..], &["--bandwidth", "1", &uri(b)]].concat())?;
    wait_until("the guest has given up memory, and moves", || {
        let status = vmgang(a, &["status", "--json"])?.expect(0)?.stdout;
        Ok(memory_kib(a)? < MEMORY_KIB && status.contains("copying"))
    })?;
    Ok(migrating)
}

fn aborted(a: &Host, b: &Host) -> Result<()> {
    let migrating = under_way(a, b)?;
    let jobs = vmgang(a, &["status", "--json"])?.expect(0)?.stdout;
    let jobs: serde_json::Value = serde_json::from_str(&jobs)?;
    vmgang(a, &["abort", jobs[0]["job"].as_str().context("a job")?])?.expect(0)?;
    Ended::from(migrating.wait_with_output()?).expect(4)?;
    expect_running(a, &GUESTS)?;
    has_all(a)
}

fn daemon_killed(a: &Host, b: &Host) -> Result<()> {
    let mut migrating = under_way(a, b)?;
    a.vmgangd().kill()?;
    migrating.wait()?;
    a.vmgangd().start()?;
    expect_running(a, &GUESTS)?;
    has_all(a)
}
