//! One port and one certificate are all that two hosts need: libvirt listens to nobody, and its control
//! of a migration goes over the connection between the daemons.

use anyhow::{Result, ensure};
use vmgang_e2e::{
    boot_all, clone_guest, expect_clean, expect_not_paused, expect_running, start_vmgang, uri,
    verify_all, vmgang, wait_until, with_lab,
};
use vmgang_lab::{Authority, CertificateRequest, Host, Lab, pki};

const GUESTS: [&str; 2] = ["one", "two"];
const CONFIG: &str = "/etc/vmgang/vmgang.toml";

#[test]
fn libvirts_own_control_goes_over_the_peers_connection() -> Result<()> {
    with_lab(None, one_port)
}

/// Nothing listens at a host but vmgangd.
fn close(host: &Host) -> Result<()> {
    host.libvirtd().stop()?;
    host.libvirtd().without("--listen").start()?;
    let listening = host.run(&["ss", "-Hltn"])?;
    ensure!(
        listening.lines().count() == 1 && listening.contains(":16520"),
        "host {} listens elsewhere: {listening}",
        host.name()
    );
    Ok(())
}

/// Has the daemon read a configuration while it runs.
fn reload(host: &Host, config: &str) -> Result<()> {
    const READ: &str = "the configuration was read again";
    let count = |log: String| log.matches(READ).count();
    let before = count(host.vmgangd().log());
    host.write_file(CONFIG, config)?;
    let Some(pid) = host.vmgangd().pid()? else {
        anyhow::bail!("vmgangd does not run on host {}", host.name());
    };
    host.kill(pid, "HUP")?;
    wait_until("the configuration is read again", || {
        Ok(count(host.vmgangd().log()) > before)
    })?;
    ensure!(
        host.vmgangd().pid()? == Some(pid),
        "it has not been restarted"
    );
    Ok(())
}

/// The guests are where they were, and nothing is left of what was refused.
fn refused(lab: &Lab, from: &Host, to: &Host, words: &[&str]) -> Result<()> {
    let ended = vmgang(from, &["migrate", "--all", to.name()])?.expect(1)?;
    for word in words {
        ensure!(
            ended.stderr.contains(word),
            "`{word}` is missing: {ended:?}"
        );
    }
    expect_running(from, &GUESTS)?;
    expect_not_paused(from, &GUESTS)?;
    expect_running(to, &[])?;
    lab.hosts().iter().try_for_each(nothing_left)
}

fn nothing_left(host: &Host) -> Result<()> {
    expect_clean(host)?;
    wait_until("the sockets for libvirt are gone", || {
        Ok(host
            .list_dir("/run/vmgang/libvirt")
            .unwrap_or_default()
            .is_empty())
    })
}

fn migrate(from: &Host, to: &Host) -> Result<()> {
    let job = vmgang(from, &["migrate", "--json", "--all", to.name()])?
        .expect(0)?
        .job()?;
    ensure!(
        job.state == "completed" && job.destination == to.name(),
        "{job:?}"
    );
    ensure!(job.domains.len() == GUESTS.len(), "{job:?}");
    expect_running(from, &[])?;
    expect_running(to, &GUESTS)?;
    verify_all(to, &GUESTS)?;
    nothing_left(from)
}

fn one_port(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    lab.each_host(|host| {
        close(host).map_err(|error| vmgang_lab::LabError::Request(error.to_string()))
    })?;
    boot_all(
        a,
        &[
            clone_guest("one").with_idle(),
            clone_guest("two").with_dirty_rate(100),
        ],
    )?;
    // The ways of old are closed.
    let closed = a.exec(&["virsh", "-c", &uri(b), "list"])?;
    ensure!(!closed.status.success(), "{closed:?}");

    // Nobody may unless somebody says so.
    let not_yours = [
        "(a)",
        "may not use the destination's libvirt",
        "allow_libvirt",
    ];
    refused(lab, a, b, &not_yours)?;
    reload(b, "allow_libvirt = ['c', 'aa']\n")?;
    refused(lab, a, b, &not_yours)?;
    reload(b, "allow_peers = ['a']\nallow_libvirt = ['A']\n")?;
    migrate(a, b)?;

    // The other way needs the other host's leave.
    refused(lab, b, a, &["(b)", "allow_libvirt"])?;
    reload(a, "allow_libvirt = ['*']\n")?;
    migrate(b, a)?;

    // A configuration that is not valid changes nothing; one that takes the name away does.
    b.write_file(CONFIG, "allow_peers = 'a'\n")?;
    if let Some(pid) = b.vmgangd().pid()? {
        b.kill(pid, "HUP")?;
    }
    wait_until("the bad configuration is noticed", || {
        Ok(b.vmgangd().log().contains("stays as it was"))
    })?;
    death(lab, a, b)?;
    reload(b, "allow_peers = ['c']\nallow_libvirt = ['a']\n")?;
    refused(lab, a, b, &["(a)", "not allowed here", "allow_peers"])?;
    reload(b, "allow_peers = ['a']\nallow_libvirt = ['a']\n")?;
    certificates(lab, a, b)?;
    migrate(a, b)
}

/// The daemon that carries libvirt's control dies in the middle.
fn death(lab: &Lab, a: &Host, b: &Host) -> Result<()> {
    let migrating = start_vmgang(a, &["migrate", "--json", "--bandwidth", "1", "--all", "b"])?;
    wait_until(
        "the guests are on their way",
        || Ok(b.domains()?.len() == 2),
    )?;
    b.vmgangd().kill()?;
    let output = migrating.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    expect_running(a, &GUESTS)?;
    expect_not_paused(a, &GUESTS)?;
    wait_until("the destination has let go", || Ok(b.domains()?.is_empty()))?;
    nothing_left(a)?;
    b.write_file(CONFIG, "allow_peers = ['a']\nallow_libvirt = ['a']\n")?;
    b.vmgangd().start()?;
    lab.hosts().iter().try_for_each(nothing_left)
}

/// What is wrong with the source's certificates is said at the source, which nothing restarts.
fn certificates(lab: &Lab, a: &Host, b: &Host) -> Result<()> {
    let stranger = Authority::new("stranger")?;
    let ours = lab.authority()?;
    let own = CertificateRequest::for_host(a);
    let expired = CertificateRequest {
        expired: true,
        ..own.clone()
    };
    for (authority, request, word) in [
        (&stranger, &own, "authority that is unknown there"),
        (ours, &expired, "it has expired"),
    ] {
        pki::install(a, &ours.certificate(), &authority.issue(request)?)?;
        refused(lab, a, b, &["/etc/pki/libvirt/clientcert.pem", word])?;
    }
    lab.install_certificates(a)?;
    // The authority is taken out of the destination's file, and put back.
    let theirs = b.read_text("/etc/pki/CA/cacert.pem")?;
    b.write_file("/etc/pki/CA/cacert.pem", stranger.certificate())?;
    refused(lab, a, b, &["authority that is unknown there"])?;
    // A file that is no certificate: the ones from before stay in use.
    b.write_file("/etc/pki/CA/cacert.pem", "nonsense")?;
    refused(lab, a, b, &["authority that is unknown there"])?;
    ensure!(b.vmgangd().log().contains("stay in use"));
    b.write_file("/etc/pki/CA/cacert.pem", theirs)?;
    Ok(())
}
