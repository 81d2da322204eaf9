//! vmgangd as systemd starts it: what it tells systemd, and what the journal gets. Real sockets stand
//! where systemd's are on a booted machine.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{PATIENCE, allow_libvirt, boot_all, clone_guest, vmgang, with_lab};
use vmgang_lab::Host;

const NOTIFY: &str = "/run/notify";
const JOURNAL: &str = "/run/systemd/journal/socket";
/// The file that the lab gives vmgangd as its stderr.
const LOG: &str = "/var/log/vmgangd.log";

#[test]
fn systemd_and_the_journal_are_told() -> Result<()> {
    with_lab(None, |lab| {
        allow_libvirt(lab)?;
        let a = lab.host("a")?;
        a.vmgangd().stop()?;
        a.run(&["mkdir", "-p", "/run/systemd/journal"])?;
        let (systemd, journal) = (listen(a, NOTIFY)?, listen(a, JOURNAL)?);
        let stderr = std::fs::metadata(on_host(a, LOG))?;
        let stream = format!("{}:{}", stderr.dev(), stderr.ino());
        let before = a.vmgangd().log();
        a.vmgangd().start_with(
            &[],
            &[
                ("NOTIFY_SOCKET", NOTIFY),
                ("WATCHDOG_USEC", "400000"),
                ("VMGANG_LOG", "vmgang_service=debug"),
                ("JOURNAL_STREAM", &stream),
            ],
        )?;
        expect(&systemd, |told| told.trim_end() == "READY=1")?;
        // More than once: it goes on.
        for _ in 0..3 {
            expect(&systemd, |told| told.trim_end() == "WATCHDOG=1")?;
        }

        boot_all(a, &[clone_guest("vm1").with_memory_mib(96).with_idle()])?;
        vmgang(a, &["gang", "add", "web", "vm1"])?.expect(0)?;
        let job = vmgang(a, &["migrate", "web", "b", "--json"])?;
        let job = job.expect(0)?.job()?.job;
        let started = expect(&journal, |record| {
            has(record, "VMGANG_JOB", &job) && record.contains("job started")
        })?;
        ensure!(has(&started, "VMGANG_GANG", "web"), "{started}");
        ensure!(has(&started, "PRIORITY", "6"), "{started}");
        // What is about a guest of it names both.
        expect(&journal, |record| {
            has(record, "VMGANG_JOB", &job) && has(record, "VMGANG_DOMAIN", "vm1")
        })?;
        ensure!(a.vmgangd().log() == before, "stderr got it as well");

        a.vmgangd().stop()?;
        expect(&systemd, |told| told.trim_end() == "STOPPING=1")?;
        Ok(())
    })
}

/// A path of the host, from here.
fn on_host(host: &Host, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root{path}", host.pid()))
}

/// What is sent to a path of the host. Read at once, because nobody else may have to wait for it.
fn listen(host: &Host, path: &str) -> Result<Receiver<String>> {
    let socket = UnixDatagram::bind(on_host(host, path))
        .with_context(|| format!("cannot listen on {path} of {}", host.name()))?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while let Ok(length) = socket.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if sender.send(text).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// The first one from now that is it.
fn expect(told: &Receiver<String>, is_it: impl Fn(&str) -> bool) -> Result<String> {
    let mut others = String::new();
    loop {
        let text = told
            .recv_timeout(PATIENCE)
            .with_context(|| format!("it did not come; what came was {others}"))?;
        if is_it(&text) {
            return Ok(text);
        }
        others.push_str(&text);
    }
}

/// Whether a record of the journal has a field of that value.
fn has(record: &str, name: &str, value: &str) -> bool {
    // Between them is the length of the value, in eight bytes.
    let field = format!("{name}\n");
    record.match_indices(&field).any(|(at, _)| {
        let rest = &record.as_bytes()[at + field.len()..];
        rest.get(8..)
            .is_some_and(|rest| rest.starts_with(format!("{value}\n").as_bytes()))
    })
}
