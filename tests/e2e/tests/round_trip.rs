//! Four guests go to the other host and come back, and say themselves that no byte of their
//! memory changed.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    JobResult, Versions, boot_all, clone_guest, expect_clean, expect_running, uri, verify_all,
    vmgang, with_lab,
};
use vmgang_lab::{Host, Lab};

const GUESTS: [&str; 4] = ["idle", "reader", "steady", "busy"];

fn migrate(lab: &Lab, from: &Host, to: &Host, what: &[&str]) -> Result<JobResult> {
    let before = from.net_counters()?;
    let destination = uri(to);
    let arguments = [&["migrate", "--json"], what, &[destination.as_str()]].concat();
    let job = vmgang(from, &arguments)?.expect(0)?.job()?;
    let after = from.net_counters()?;

    ensure!(job.state == "completed" && job.error.is_none(), "{job:?}");
    ensure!(job.destination == destination, "{job:?}");
    ensure!(job.domains.len() == GUESTS.len(), "{job:?}");
    let mut stream = 0;
    for domain in &job.domains {
        ensure!(
            domain.state == "migrated" && domain.error.is_none(),
            "{domain:?}"
        );
        ensure!(domain.downtime_ms.is_some(), "{domain:?}");
        ensure!(domain.iterations.is_some(), "{domain:?}");
        ensure!(
            domain.uuid == to.virsh(&["domuuid", &domain.name])?.trim(),
            "{domain:?}"
        );
        stream += domain.qemu_stream_bytes;
    }
    ensure!(job.switchover_spread_ms.is_some(), "{job:?}");

    // The books balance, and agree with what others counted.
    let bytes = &job.bytes;
    ensure!(
        bytes.saved.total() == bytes.qemu_stream as i64 - bytes.wire as i64,
        "{bytes:?}"
    );
    ensure!(bytes.qemu_stream == stream, "{job:?}");
    let link = (after.tx_bytes - before.tx_bytes) + (after.rx_bytes - before.rx_bytes);
    // Ethernet, IP and TCP headers, and libvirt's own calls, come on top.
    ensure!(
        link >= bytes.wire && link < bytes.wire + bytes.wire / 8 + 2_000_000,
        "the link carried {link} bytes, the daemons say {}",
        bytes.wire
    );

    // Half of each guest is the same on all: stock sends it four times.
    ensure!(bytes.wire * 100 <= bytes.qemu_stream * 40, "{bytes:?}");
    ensure!(bytes.saved.uniform > 0 && bytes.saved.zero > 0, "{bytes:?}");
    ensure!(bytes.saved.compression > 0, "{bytes:?}");
    ensure!(bytes.saved.staged == 0, "{bytes:?}");

    expect_running(from, &[])?;
    expect_running(to, &GUESTS)?;
    verify_all(to, &GUESTS)?;
    for host in lab.hosts() {
        expect_clean(host)?;
    }
    Ok(job)
}

#[test]
fn a_gang_moves_and_returns_with_its_memory_intact() -> Result<()> {
    with_lab(Some(1_000_000_000), round_trip)
}

fn round_trip(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    boot_all(
        a,
        &[
            clone_guest("idle").with_idle(),
            clone_guest("reader"),
            clone_guest("steady")
                .with_dirty_rate(20)
                .with_private_memory(),
            clone_guest("busy").with_dirty_rate(400).with_persistence(),
        ],
    )?;
    verify_all(a, &GUESTS)?;
    vmgang(a, &[&["gang", "add", "web"], &GUESTS[..]].concat())?.expect(0)?;
    let listed = vmgang(a, &["gang", "list"])?.expect(0)?;
    ensure!(listed.stdout.contains("web"), "{listed:?}");

    // Chosen one by one, techniques are used whatever the processors have to do: the kernels of the
    // guests differ by little in many pages.
    let techniques = "uniform,page,rehash,delta,similar,sub-page,zstd-frame";
    let options = [
        "--persistent",
        "--undefinesource",
        "--technique",
        techniques,
    ];
    let job = migrate(lab, a, b, &[&options[..], &["web"]].concat())?;
    ensure!(job.gang.as_deref() == Some("web"), "{job:?}");
    let saved = &job.bytes.saved;
    ensure!(
        saved.delta > 0 && saved.sub_page > 0 && saved.cross_vm > 0 && saved.destination == 0,
        "{job:?}"
    );

    if !Versions::asked_for()?.goes_back() {
        eprintln!("the rest goes back, which these versions do not");
        return Ok(());
    }
    // Membership travelled with the guests; they leave that gang for another.
    let shown = vmgang(b, &["gang", "show", "web"])?.expect(0)?;
    for guest in GUESTS {
        ensure!(shown.stdout.contains(guest), "{shown:?}");
    }
    vmgang(b, &[&["gang", "remove", "web"], &GUESTS[..]].concat())?.expect(0)?;
    vmgang(b, &[&["gang", "add", "back"], &GUESTS[..]].concat())?.expect(0)?;
    // Contents of the same guests are here still, whatever their gang is called now.
    let job = migrate(lab, b, a, &["back"])?;
    ensure!(job.gang.as_deref() == Some("back"), "{job:?}");
    ensure!(job.bytes.saved.destination > 0, "{job:?}");

    // What was is on record.
    let history = vmgang(b, &["history", &job.job])?.expect(0)?;
    ensure!(history.stdout.contains("completed"), "{history:?}");
    let status = vmgang(a, &["status"])?.expect(0)?;
    ensure!(!status.stdout.contains(&job.job), "{status:?}");
    job.domains.first().context("there are members")?;
    Ok(())
}
