//! What a real host has around vmgang: libvirt's hook, whatever has become of the daemon, and what the
//! administrator lets in.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    Ended, boot_all, clone_guest, expect_clean, expect_not_paused, expect_running, uri, verify_all,
    vmgang, wait_until, with_lab,
};
use vmgang_lab::{GuestSpec, Host, Lab};

const HOOK: &str = "/etc/libvirt/hooks/qemu.d/vmgang";
const POLICY: &str = "/etc/vmgang/incoming.toml";
/// More than a socket's queue holds, by far.
const TOO_MANY: &str = "600";

fn small(name: &str) -> GuestSpec {
    clone_guest(name).with_memory_mib(96).with_idle()
}

/// Starts a guest of this host, and ends it.
fn start_and_stop(host: &Host, name: &str) -> Result<()> {
    host.virsh(&["start", name])?;
    expect_running(host, &[name])?;
    host.virsh(&["destroy", name])?;
    expect_running(host, &[])
}

/// `virsh migrate` as administrators know it.
fn plain(from: &Host, to: &Host, guest: &str) -> Result<Ended> {
    let destination = uri(to);
    let words = ["virsh", "migrate", "--live", "--p2p", guest, &destination];
    Ok(from.exec(&words)?.into())
}

#[test]
fn the_hook_is_never_in_the_way() -> Result<()> {
    with_lab(None, never_in_the_way)
}

fn never_in_the_way(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    boot_all(a, &[small("one")])?;
    // A domain whose XML is longer than a pipe holds: the hook leaves the rest unread.
    let story = format!(
        "<description>{}</description><devices>",
        "long ".repeat(40_000)
    );
    let xml = small("still")
        .domain_xml()?
        .replacen("<devices>", &story, 1);
    b.define_xml("still", &xml)?;

    start_and_stop(b, "still").context("with a daemon that is well")?;
    let back_and_forth = || -> Result<()> {
        plain(a, b, "one")?.expect(0)?;
        expect_not_paused(b, &["one"])?;
        plain(b, a, "one")?.expect(0)?;
        expect_not_paused(a, &["one"])
    };
    back_and_forth().context("with a daemon that is well")?;

    let daemon = b.vmgangd();
    let pid = daemon.pid()?.context("vmgangd runs on b")?;
    b.kill(pid, "STOP")?;
    // As the hook is called; nobody reads what it says, until the queue is full.
    let flood = "for i in $(seq \"$1\"); do \"$0\" still release end - <\"$2\" || exit 1; done";
    b.run(&["sh", "-c", flood, HOOK, TOO_MANY, "/tmp/still.xml"])?;
    start_and_stop(b, "still").context("with a daemon that hangs")?;
    back_and_forth().context("with a daemon that hangs")?;
    b.kill(pid, "CONT")?;
    vmgang(b, &["status"])?.expect(0)?;

    daemon.kill()?;
    ensure!(b.file_exists("/run/vmgang/hook.sock"), "it had no time");
    start_and_stop(b, "still").context("with a daemon that was killed")?;
    back_and_forth().context("with a daemon that was killed")?;

    // Without a bus vmgangd does not run, and libvirtd ends, too; it can do without when it starts.
    b.bus().kill()?;
    wait_until("libvirtd has noticed that the bus is gone", || {
        Ok(!b.libvirtd().is_running()?)
    })?;
    b.libvirtd().start()?;
    start_and_stop(b, "still").context("without a bus")?;
    back_and_forth().context("without a bus")?;
    verify_all(a, &["one"])?;

    // Without the program, as when its package was removed and the script stayed.
    b.run(&["rm", "/usr/sbin/vmgang-hook"])?;
    start_and_stop(b, "still").context("without the program")
}

#[test]
fn what_libvirt_announces_is_taken_in_with_and_without_the_hook() -> Result<()> {
    with_lab(None, announced)
}

fn announced(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    boot_all(a, &[small("one"), small("two")])?;
    for host in [a, b] {
        host.vmgangd().stop()?;
        host.vmgangd()
            .start_with(&[], &[("VMGANG_LOG", "info,vmgang_service=debug")])?;
    }
    let by_hook = |host: &Host| {
        host.vmgangd()
            .log()
            .matches("announced by libvirt's hook")
            .count()
    };
    let by_asking = |host: &Host| {
        host.vmgangd()
            .log()
            .matches("libvirt says that it is arriving")
            .count()
    };
    let domains = ["--domains", "one,two"];
    let migrate = |from: &Host, to: &Host| -> Result<()> {
        vmgang(
            from,
            &[&["migrate", "--quiet"], &domains[..], &[&uri(to)]].concat(),
        )?
        .expect(0)?;
        expect_running(to, &["one", "two"])?;
        expect_clean(to)
    };
    migrate(a, b)?;
    ensure!(
        (by_hook(b), by_asking(b)) == (2, 0),
        "{}",
        b.vmgangd().log()
    );
    ensure!(
        b.list_dir("/run/vmgang/expected")?.is_empty(),
        "nobody is on the way"
    );

    // A host on which the hook was not wanted.
    a.run(&["rm", HOOK])?;
    migrate(b, a)?;
    ensure!(
        (by_hook(a), by_asking(a)) == (0, 2),
        "{}",
        a.vmgangd().log()
    );
    verify_all(a, &["one", "two"])
}

#[test]
fn a_policy_refuses_what_does_not_come_through_vmgang() -> Result<()> {
    with_lab(Some(200_000_000), policy)
}

fn policy(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    boot_all(a, &[small("one"), small("two")])?;
    let both = ["one", "two"];
    let refused = |from: &Host, to: &Host, guest: &str| -> Result<()> {
        let ended = plain(from, to, guest)?.expect(1)?;
        ensure!(ended.stderr.contains(POLICY), "{ended:?}");
        expect_not_paused(from, &[guest])?;
        ensure!(
            !to.domains()?.contains(&guest.to_owned()),
            "{guest} is there"
        );
        Ok(())
    };
    b.write_file(POLICY, "require_vmgang = true\nexcept = ['tw*']\n")?;
    refused(a, b, "one")?;
    plain(a, b, "two")?.expect(0)?;
    plain(b, a, "two")?.expect(0)?;
    b.write_file(POLICY, "require_vmgang = true\n")?;
    refused(a, b, "two")?;

    // Starts on the host itself are not incoming migrations.
    b.boot(&small("own"))?;
    b.virsh(&["destroy", "own"])?;

    vmgang(a, &["migrate", "--quiet", "--domains", "one,two", &uri(b)])?.expect(0)?;
    expect_running(b, &both)?;
    verify_all(b, &both)?;
    vmgang(b, &["migrate", "--quiet", "--domains", "one,two", &uri(a)])?.expect(0)?;

    // What vmgangd expected when it was killed is no way in.
    lab.shape(Some(5_000_000))?;
    let migrating = vmgang_e2e::start_vmgang(a, &["migrate", "--domains", "one", &uri(b)])?;
    wait_until("the guest is expected", || {
        Ok(!b.list_dir("/run/vmgang/expected")?.is_empty())
    })?;
    b.vmgangd().kill()?;
    Ended::from(migrating.wait_with_output()?).expect(1)?;
    ensure!(
        !b.list_dir("/run/vmgang/expected")?.is_empty(),
        "it had no time"
    );
    wait_until("libvirt on b has cleaned up", || {
        Ok(b.domains()?.is_empty())
    })?;
    wait_until("libvirt on a has ended the job", || {
        Ok(a.virsh(&["domjobinfo", "one"])?.contains("None"))
    })?;
    lab.shape(None)?;
    refused(a, b, "one")?;
    b.vmgangd().start()?;
    ensure!(
        b.list_dir("/run/vmgang/expected")?.is_empty(),
        "of an earlier daemon"
    );

    // A policy with a mistake in it is the strictest, and the log says so.
    b.write_file(POLICY, "require_vmgang = flase\n")?;
    refused(a, b, "one")?;
    vmgang(a, &["migrate", "--quiet", "--domains", "one", &uri(b)])?.expect(0)?;
    b.vmgangd().restart()?;
    ensure!(b.vmgangd().log().contains(POLICY), "{}", b.vmgangd().log());
    b.write_file(POLICY, "")?;
    plain(a, b, "two")?.expect(0)?;
    verify_all(b, &both)
}
