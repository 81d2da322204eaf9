//! Bad input gets a sentence that says what is wrong, and changes nothing.

use anyhow::{Result, ensure};
use vmgang_e2e::{
    boot_all, clone_guest, expect_clean, expect_running, uri, verify_all, vmgang, wait_until,
    with_lab,
};
use vmgang_lab::{Authority, CertificateRequest, Host, Lab, pki};

/// Runs a command that must fail with this exit code and say all of these words.
fn refused(host: &Host, code: i32, arguments: &[&str], words: &[&str]) -> Result<()> {
    let ended = vmgang(host, arguments)?.expect(code)?;
    for word in words {
        ensure!(
            ended.stderr.contains(word),
            "`{word}` is missing: {ended:?}"
        );
    }
    ensure!(
        ended.stderr.lines().count() <= 10,
        "too many words: {ended:?}"
    );
    Ok(())
}

#[test]
fn bad_input_is_named_and_changes_nothing() -> Result<()> {
    with_lab(None, bad_input)
}

fn bad_input(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    boot_all(
        a,
        &[
            clone_guest("one").with_idle(),
            clone_guest("two").with_persistence(),
        ],
    )?;
    vmgang(a, &["gang", "add", "web", "one", "two"])?.expect(0)?;
    let to_b = uri(b);
    let before = a.guest("one").xml()?;

    // Gangs and domains.
    refused(a, 1, &["migrate", "nope", &to_b], &["nope"])?;
    refused(a, 1, &["gang", "show", "nope"], &["nope"])?;
    refused(
        a,
        1,
        &["migrate", "--domains", "one,ghost", &to_b],
        &["ghost"],
    )?;
    refused(a, 1, &["gang", "add", "web", "ghost"], &["ghost"])?;
    refused(a, 1, &["gang", "add", "no/slash", "one"], &["no/slash"])?;

    // Destinations.
    refused(
        a,
        1,
        &["migrate", "web", "qemu:///system"],
        &["qemu:///system", "host"],
    )?;
    refused(
        a,
        1,
        &["migrate", "web", "qemu+tls://nowhere/system"],
        &["nowhere"],
    )?;
    refused(a, 1, &["migrate", "web", &to_b, "--peer", "b:1"], &["b:1"])?;
    refused(
        a,
        1,
        &["migrate", "web", &to_b, "--peer", "b:port"],
        &["b:port"],
    )?;

    // Command lines.
    refused(a, 2, &["migrate", "web"], &["Usage"])?;
    refused(a, 2, &["migrate", "web", &to_b, "--wrong"], &["--wrong"])?;
    refused(
        a,
        2,
        &["migrate", "--domains", "one", "--all", &to_b],
        &["--all"],
    )?;

    // Metadata that does not fit the schema: somebody wrote it by hand.
    for bad in [
        "<member gang='no/slash'/>",
        "<member gang='web' order='first'/>",
        "<member/>",
    ] {
        a.virsh(&[
            "metadata",
            "one",
            "--uri",
            "https://vmgang.org/xmlns/domain/1.0",
            "--key",
            "vmgang",
            "--set",
            bad,
            "--live",
        ])?;
        refused(a, 1, &["migrate", "web", &to_b], &["one", "metadata"])?;
    }
    vmgang(a, &["gang", "remove", "web", "one"])?.expect(0)?;
    vmgang(a, &["gang", "add", "web", "one"])?.expect(0)?;

    // A gang whose members are all shut off.
    a.virsh(&["destroy", "two"])?;
    vmgang(a, &["gang", "remove", "web", "two"])?.expect(0)?;
    vmgang(a, &["gang", "add", "off", "two"])?.expect(0)?;
    refused(a, 1, &["migrate", "off", &to_b], &["off", "running"])?;

    // Certificates. Each is refused with a sentence of its own, by either side.
    let stranger = Authority::new("stranger")?;
    let ours = lab.authority()?;
    let wrong_host = CertificateRequest {
        host_name: "c".to_owned(),
        ..CertificateRequest::for_host(b)
    };
    let wrong_host = CertificateRequest {
        address: None,
        ..wrong_host
    };
    let expired = CertificateRequest {
        expired: true,
        ..CertificateRequest::for_host(b)
    };
    let wrong = [
        (
            &stranger,
            CertificateRequest::for_host(b),
            ["issued by CN=stranger", "/etc/pki/CA/cacert.pem"],
        ),
        (
            ours,
            wrong_host,
            ["is for c, not for b", "subjectAltName b"],
        ),
        (ours, expired, ["has expired on", "its server_certificate"]),
    ];
    for (number, (authority, request, words)) in wrong.into_iter().enumerate() {
        // libvirtd keeps the right ones: what is refused here is vmgangd's, which needs no restart.
        let credentials = authority.issue(&request)?;
        pki::install(b, &ours.certificate(), &credentials)?;
        let [what, then] = words;
        refused(a, 1, &["migrate", "web", &to_b], &[what, then, "b:16520"])?;
        wait_until("the destination's log says so as well", || {
            let log = b.vmgangd().log();
            Ok(log
                .matches("does not accept this host's certificate")
                .count()
                == number + 1)
        })?;
    }
    lab.install_certificates(b)?;

    // A peer that speaks another version of the protocol. Its frame header is frozen; what it
    // says in it is perl's.
    a.vmgangd().stop()?;
    let config = a.read_text("/etc/vmgang/vmgang.toml")?;
    a.write_file("/etc/vmgang/vmgang.toml", "tls = false\n")?;
    a.vmgangd().start()?;
    let other = "use IO::Socket; $s = IO::Socket::INET->new(LocalPort => 7000, Listen => 1, \
                 ReuseAddr => 1) or die; $c = $s->accept; \
                 print $c \"vmga\\x09\\x03\\0\\0\\0\\0\\0\\0\\x05\\0\\0\\0\\x01\\0\\x01\\x009\"; \
                 sysread $c, $_, 9999;";
    let mut peer = b.command(&["perl", "-e", other]).spawn()?;
    wait_until("the odd peer listens", || {
        Ok(b.run(&["ss", "-ltn"])?.contains(":7000"))
    })?;
    refused(
        a,
        1,
        &["migrate", "web", &to_b, "--peer", "b:7000"],
        &["version 9", "speaks 1"],
    )?;
    peer.kill()?;
    // Our plain daemon and a TLS one do not understand each other, and say so.
    refused(a, 1, &["migrate", "web", &to_b], &["b:16520"])?;
    a.vmgangd().stop()?;
    a.write_file("/etc/vmgang/vmgang.toml", config)?;
    a.vmgangd().start()?;

    // Nothing has changed: membership, guests, hosts; and a good command works at once.
    let metadata = |xml: &str| xml.split("<metadata>").nth(1).map(str::to_owned);
    ensure!(metadata(&a.guest("one").xml()?) == metadata(&before));
    expect_running(a, &["one"])?;
    expect_running(b, &[])?;
    expect_clean(a)?;
    expect_clean(b)?;
    vmgang(a, &["migrate", "--quiet", "web", &to_b])?.expect(0)?;
    verify_all(b, &["one"])
}
