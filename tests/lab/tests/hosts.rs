//! What a host of the lab promises: commands, files, cable, certificates and daemons of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgang_lab::{Authority, CertificateRequest, Lab, LabError, LabOptions, Signal, pki};

fn lab_of_two() -> Result<Lab> {
    Ok(Lab::start(&LabOptions::default())?)
}

#[test]
fn commands_and_files_stay_inside_their_host() -> Result<()> {
    let lab = lab_of_two()?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    ensure!(a.run(&["cat", "/proc/sys/kernel/hostname"])?.trim() == "a");
    ensure!(a.exec(&["sh", "-c", "exit 7"])?.status.code() == Some(7));

    let error = a.run(&["sh", "-c", "echo broken >&2; false"]);
    let error = error.err().context("the command fails")?.to_string();
    ensure!(
        error.contains("host a") && error.contains("broken"),
        "{error}"
    );

    a.write_file("/var/lib/new/place/file", "content")?;
    ensure!(a.read_text("/var/lib/new/place/file")? == "content");
    ensure!(!b.file_exists("/var/lib/new/place/file"));
    // An absolute link is followed on the host, never on the machine.
    a.run(&["ln", "-s", "/etc/hostname", "/tmp/link"])?;
    ensure!(a.read_text("/tmp/link")? == "a\n");

    let mut sleeper = a
        .command(&["sleep", "1000"])
        .stdout(Stdio::null())
        .spawn()?;
    sleeper.signal(Signal::TERM)?;
    ensure!(!sleeper.wait_timeout(Duration::from_secs(5))?.success());
    ensure!(!a.file_exists("/dev/kvm"));

    let logs = tempfile::tempdir()?;
    lab.dump_logs(logs.path())?;
    for host in ["a", "b"] {
        let log = fs::read_to_string(logs.path().join(host).join("libvirtd.log"))?;
        ensure!(log.contains("libvirt version"), "{log}");
    }
    Ok(())
}

#[test]
fn a_cable_can_be_pulled_slowed_and_read() -> Result<()> {
    let lab = lab_of_two()?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let connect = ["timeout", "2", "bash", "-c", "</dev/tcp/b/16514"];
    a.run(&connect)?;
    lab.partition("b")?;
    ensure!(!a.exec(&connect)?.status.success());
    lab.heal("b")?;
    let healed = Instant::now();
    while !a.exec(&connect)?.status.success() {
        ensure!(healed.elapsed() < Duration::from_secs(10), "b stays away");
    }

    // Two megabytes at eight megabits a second take about two seconds.
    lab.shape(Some(8_000_000))?;
    let (before, start) = (a.net_counters()?, Instant::now());
    let mut sink = b
        .command(&[
            "perl",
            "-MIO::Socket",
            "-e",
            "$|=1; $s = IO::Socket::INET->new(LocalPort => 5000, Listen => 1) or die; \
             print \"ready\\n\"; $c = $s->accept; $n += length while <$c>; print $n",
        ])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut ready = [0; 6];
    let pipe = sink.child_mut().stdout.as_mut().context("a pipe")?;
    std::io::Read::read_exact(pipe, &mut ready)?;
    let send = "head -c 2000000 /dev/zero >/dev/tcp/b/5000";
    a.run(&["bash", "-c", send])?;
    let received = String::from_utf8(sink.wait_with_output()?.stdout)?;
    ensure!(received == "2000000", "{received}");
    let elapsed = start.elapsed();
    ensure!(elapsed > Duration::from_millis(1300), "{elapsed:?}");
    let sent = a.net_counters()?.since(&before).tx_bytes;
    ensure!((2_000_000..2_400_000).contains(&sent), "{sent} bytes");
    lab.shape(None)?;
    Ok(())
}

#[test]
fn only_the_right_certificates_open_libvirt() -> Result<()> {
    let lab = lab_of_two()?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let uri = b.libvirt_uri();
    let connect = ["virsh", "-c", uri.as_str(), "list"];
    a.run(&connect)?;

    let authority = lab.authority()?;
    let right = CertificateRequest::for_host(b);
    let expired = CertificateRequest {
        expired: true,
        ..right.clone()
    };
    let misnamed = CertificateRequest {
        host_name: "elsewhere".to_owned(),
        address: None,
        ..right.clone()
    };
    let stranger = Authority::new("a stranger")?;
    for wrong in [
        authority.issue(&misnamed)?,
        stranger.issue(&right)?,
        authority.issue(&expired)?,
    ] {
        pki::install(b, &authority.certificate(), &wrong)?;
        b.libvirtd().stop()?;
        // libvirtd checks its own certificate first; what it lets pass, the client must refuse.
        let words = match b.libvirtd().start() {
            Err(error) => error.to_string(),
            Ok(()) => {
                let refused = a.exec(&connect)?;
                ensure!(!refused.status.success());
                String::from_utf8(refused.stderr)?
            }
        };
        ensure!(words.contains("certificate"), "{words}");
    }
    lab.install_certificates(b)?;
    b.libvirtd().restart()?;
    a.run(&connect)?;
    Ok(())
}

#[test]
fn an_installed_daemon_can_be_started_killed_and_found() -> Result<()> {
    let tree = tempfile::tempdir()?;
    let sbin = tree.path().join("usr/sbin");
    fs::create_dir_all(&sbin)?;
    let program = sbin.join("vmgangd");
    // It waits without a child, which would bear its name for a moment.
    fs::write(
        &program,
        "#!/bin/sh\n[ -p /tmp/never ] || mkfifo /tmp/never\necho it runs: $*\nread word </tmp/never\n",
    )?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let lab = Lab::start(&LabOptions {
        hosts: vec!["a".to_owned()],
        install_tree: Some(tree.path().to_owned()),
        start_vmgangd: false,
        ..LabOptions::default()
    })?;
    let daemon = lab.host("a")?.vmgangd();
    ensure!(daemon.is_installed());
    ensure!(!daemon.is_running()?);
    daemon.launch(&["--one"], &[])?;
    let started = Instant::now();
    while !daemon.log().contains("it runs: --one") {
        ensure!(started.elapsed() < Duration::from_secs(10), "no log");
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(daemon.is_running()?);
    let second = daemon.launch(&[], &[]);
    ensure!(matches!(second, Err(LabError::Request(_))), "{second:?}");
    daemon.kill()?;
    ensure!(!daemon.is_running()?);
    // It never takes its name on the bus, so waiting for that fails, and says why.
    fs::write(&program, "#!/bin/sh\necho no configuration\nexit 1\n")?;
    let error = daemon.start().err().context("it ends at once")?.to_string();
    ensure!(error.contains("no configuration"), "{error}");
    Ok(())
}
