//! `vmgang doctor` on real hosts: what it finds, that it names a fix for it, and that a migration that
//! follows ends as the doctor's exit code said.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vmgang_e2e::{
    boot_all, clone_guest, expect_clean, expect_running, uri, verify_all, vmgang, with_lab,
};
use vmgang_lab::{CertificateRequest, Host, Lab, pki};

/// Where libvirt describes the processor of the lab's guests.
const CPU_MODEL: &str = "/usr/share/libvirt/cpu_map/x86_qemu64.xml";

/// A diagnosis that came with this exit code.
fn diagnose(host: &Host, code: i32, arguments: &[&str]) -> Result<Value> {
    let words = [&["doctor", "--json"], arguments].concat();
    let ended = vmgang(host, &words)?.expect(code)?;
    let diagnosis: Value = serde_json::from_str(&ended.stdout)?;
    ensure!(diagnosis["ready"] == (code == 0), "{diagnosis:#}");
    for finding in diagnosis["findings"].as_array().context("findings")? {
        let good = finding["level"] == "ok";
        let fix = finding["fix"].as_str().unwrap_or_default();
        ensure!(
            good == fix.is_empty(),
            "a fix for all but what is good: {finding}"
        );
    }
    Ok(diagnosis)
}

/// The subjects of findings of this check and level.
fn subjects<'a>(diagnosis: &'a Value, check: &str, level: &str) -> Vec<&'a str> {
    let findings = diagnosis["findings"].as_array();
    findings
        .into_iter()
        .flatten()
        .filter(|finding| finding["check"] == check && finding["level"] == level)
        .filter_map(|finding| finding["subject"].as_str())
        .collect()
}

/// The gang is refused, by the doctor for this check, and by a migration in the doctor's words.
fn refused(a: &Host, gang: &str, to: &str, check: &str) -> Result<Value> {
    let diagnosis = diagnose(a, 1, &[to, "--gang", gang])?;
    let findings = diagnosis["findings"].as_array().context("findings")?;
    let finding = findings
        .iter()
        .find(|finding| finding["check"] == check && finding["level"] == "refused");
    let finding = finding.with_context(|| format!("no {check}: {diagnosis:#}"))?;
    let migrated = vmgang(a, &["migrate", "--quiet", gang, to])?.expect(1)?;
    let what = finding["what"].as_str().unwrap_or_default();
    // What libvirt finds out only when the guest arrives has libvirt's words.
    ensure!(
        check == "cpu" || without_free(&migrated.stderr).contains(&without_free(what)),
        "{what}: {migrated:?}"
    );
    Ok(diagnosis)
}

/// The same words without the one figure that changes from one moment to the next: how much memory
/// the destination has free.
fn without_free(text: &str) -> String {
    match text.split_once(" MiB of memory available") {
        None => text.to_owned(),
        Some((before, after)) => {
            let before = before.trim_end_matches(|sign: char| sign.is_ascii_digit());
            format!("{before} MiB of memory available{after}")
        }
    }
}

#[test]
fn the_doctor_and_a_migration_agree() -> Result<()> {
    with_lab(None, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let special = clone_guest("special").with_idle().domain_xml()?;
        boot_all(
            a,
            &[
                clone_guest("one").with_idle(),
                clone_guest("two").with_idle().with_private_memory(),
            ],
        )?;
        vmgang(a, &["gang", "add", "web", "one", "two"])?.expect(0)?;
        let to_b = uri(b);
        healthy(a, b, &to_b)?;
        peers_and_names(a, b, &to_b)?;
        certificates(lab, a, &to_b)?;
        // A QEMU that only this host has.
        let qemu = "/usr/bin/qemu-system-x86_64";
        a.run(&["cp", qemu, "/usr/bin/qemu-special"])?;
        a.create_xml("special", &special.replace(qemu, "/usr/bin/qemu-special"))?;
        vmgang(a, &["gang", "add", "special", "special"])?.expect(0)?;
        let diagnosis = refused(a, "special", &to_b, "cpu")?;
        ensure!(subjects(&diagnosis, "cpu", "refused") == ["special"]);
        // The other gang does not suffer from it, but all together do.
        diagnose(a, 0, &[&to_b, "--gang", "web"])?;
        let all = diagnose(a, 1, &[&to_b])?;
        ensure!(
            all["gangs"] == serde_json::json!(["special", "web"]),
            "{all:#}"
        );
        processor(a, b, &to_b)?;
        too_large(a, &to_b)?;
        one_port(a, b)?;

        // Nothing was left anywhere, and a gang that the doctor let pass migrates.
        expect_running(a, &["one", "two", "special"])?;
        expect_running(b, &[])?;
        expect_clean(a)?;
        expect_clean(b)?;
        diagnose(a, 0, &[&to_b, "--gang", "web"])?;
        vmgang(a, &["migrate", "--quiet", "web", &to_b])?.expect(0)?;
        verify_all(b, &["one", "two"])
    })
}

fn healthy(a: &Host, b: &Host, to_b: &str) -> Result<()> {
    let diagnosis = diagnose(a, 0, &[to_b])?;
    ensure!(diagnosis["destination"] == to_b && diagnosis["peer"] == "b:16520");
    ensure!(subjects(&diagnosis, "peer", "ok") == ["b:16520"]);
    ensure!(
        subjects(&diagnosis, "cpu", "ok") == ["one", "two"],
        "{diagnosis:#}"
    );
    ensure!(subjects(&diagnosis, "memory_backing", "advice") == ["two"]);
    ensure!(
        subjects(&diagnosis, "certificates", "ok").len() == 3,
        "{diagnosis:#}"
    );
    ensure!(!subjects(&diagnosis, "directory", "ok").is_empty());
    // For people.
    let told = vmgang(a, &["doctor", to_b])?.expect(0)?.stdout;
    ensure!(
        told.lines().all(|line| line.chars().count() <= 80),
        "{told}"
    );
    ensure!(told.ends_with("would not be refused.\n"), "{told}");
    // One host alone needs nobody.
    let alone = diagnose(a, 0, &[])?;
    ensure!(alone["destination"].is_null() && alone["gangs"] == serde_json::json!(["web"]));
    vmgang(a, &["doctor", "--peer", "b:1"])?.expect(2)?;
    // A host with nothing on it can be asked, too.
    diagnose(b, 0, &[&uri(a)])?;
    expect_clean(a)?;
    expect_clean(b)
}

/// More memory than both hosts have; its guest does not run, so that it takes none.
fn too_large(a: &Host, to_b: &str) -> Result<()> {
    let large = clone_guest("large");
    let xml = large.with_memory_mib(64 << 10).domain_xml()?;
    a.write_file("/root/large.xml", xml)?;
    a.virsh(&["create", "--paused", "/root/large.xml"])?;
    vmgang(a, &["gang", "add", "large", "large"])?.expect(0)?;
    let diagnosis = refused(a, "large", to_b, "peer")?;
    let told = diagnosis.to_string();
    ensure!(told.contains("free memory there"), "{diagnosis:#}");
    a.virsh(&["destroy", "large"])?;
    Ok(())
}

/// A bare host name as destination.
fn one_port(a: &Host, b: &Host) -> Result<()> {
    let diagnosis = refused(a, "web", "b", "peer")?;
    let told = diagnosis.to_string();
    ensure!(told.contains("allow_libvirt"), "{diagnosis:#}");
    b.write_file("/etc/vmgang/vmgang.toml", "allow_libvirt = ['a']\n")?;
    b.vmgangd().restart()?;
    let diagnosis = diagnose(a, 0, &["b", "--gang", "web"])?;
    ensure!(
        subjects(&diagnosis, "destination", "ok") == ["b"],
        "{diagnosis:#}"
    );
    Ok(())
}

fn peers_and_names(a: &Host, b: &Host, to_b: &str) -> Result<()> {
    b.vmgangd().stop()?;
    refused(a, "web", to_b, "peer")?;
    b.libvirtd().stop()?;
    let both = refused(a, "web", to_b, "destination")?;
    ensure!(subjects(&both, "peer", "refused") == ["b"], "{both:#}");
    b.libvirtd().start()?;
    b.vmgangd().start()?;

    let namesake = clone_guest("one").with_uuid("7d3b2b62-0a8f-4d3a-8a4c-0f1e2d3c4b5a");
    b.define_xml("one", &namesake.domain_xml()?)?;
    refused(a, "web", to_b, "destination")?;
    b.virsh(&["undefine", "one"])?;

    // QEMU's user could not walk to the sockets here: gangs that come would fail, those that go do not.
    a.run(&["chmod", "0700", "/run/vmgang"])?;
    let shut = diagnose(a, 0, &[to_b])?;
    ensure!(
        subjects(&shut, "directory", "warning") == ["/run/vmgang"],
        "{shut:#}"
    );
    a.run(&["chmod", "0711", "/run/vmgang"])?;
    Ok(())
}

fn certificates(lab: &Lab, a: &Host, to_b: &str) -> Result<()> {
    let authority = lab.authority()?;
    let install = |request: &CertificateRequest| -> Result<()> {
        let credentials = authority.issue(request)?;
        Ok(pki::install(a, &authority.certificate(), &credentials)?)
    };
    let soon = CertificateRequest {
        days_left: Some(5),
        ..CertificateRequest::for_host(a)
    };
    install(&soon)?;
    let diagnosis = diagnose(a, 0, &[to_b])?;
    let warned = subjects(&diagnosis, "certificates", "warning");
    ensure!(
        warned.len() == 2 && warned[1].ends_with("clientcert.pem"),
        "{warned:?}"
    );
    let expired = CertificateRequest {
        expired: true,
        ..soon
    };
    install(&expired)?;
    // Both ways to b use it.
    let diagnosis = diagnose(a, 1, &[to_b, "--gang", "web"])?;
    let refused = subjects(&diagnosis, "certificates", "refused");
    ensure!(
        refused
            .iter()
            .any(|subject| subject.ends_with("clientcert.pem")),
        "{diagnosis:#}"
    );
    vmgang(a, &["migrate", "--quiet", "web", to_b])?.expect(1)?;
    lab.install_certificates(a)?;
    Ok(())
}

/// The destination's libvirt takes the guests' processor for one that its QEMU cannot give.
fn processor(a: &Host, b: &Host, to_b: &str) -> Result<()> {
    let model = b.read_text(CPU_MODEL)?;
    let more = model.replace("</model>", "<feature name='avx512f'/></model>");
    ensure!(more != model, "{model}");
    b.write_file(CPU_MODEL, more)?;
    b.libvirtd().restart()?;
    let diagnosis = refused(a, "web", to_b, "cpu")?;
    ensure!(subjects(&diagnosis, "cpu", "refused") == ["one", "two"]);
    b.write_file(CPU_MODEL, model)?;
    b.libvirtd().restart()?;
    Ok(())
}
