//! Recording the migration streams of real guests.
//!
//! All guests of a mix migrate from one lab host to another at the same time, by stock virsh over
//! unix sockets, and a relay in between keeps what each QEMU writes. So a recorded stream is one of
//! libvirt's own migrations: same capabilities, return path, SWITCHOVER_ACK.
//! Must not: involve vmgang. What it makes of a stream is measured later.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{PATIENCE, boot_all, expect_running, uri};
use vmgang_lab::{Guest, Host, Lab};

use crate::gang::{Mix, RedisData};
use crate::streams::{RecordedMember, Recording, stream_file};
use crate::tap::Tap;

/// Where the sockets are, on both hosts.
const SOCKETS: &str = "/run/vmgang-record";

/// What to record.
#[derive(Debug, Clone)]
pub struct RecordOptions {
    pub mix: Mix,
    /// The mix, as users write it.
    pub mix_name: String,
    pub memory_mib: u64,
    /// Of the Debian mix.
    pub redis: RedisData,
    /// What each migration may send: low enough that guests that write need several passes.
    pub bandwidth_mib: u64,
    /// How long the guests work before they migrate.
    pub settle: Duration,
}

/// Boots the guests on host a, moves them to host b, and leaves their streams in `dir`.
pub fn record(lab: &Lab, options: &RecordOptions, dir: &Path) -> Result<Recording> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for host in [a, b] {
        // On the destination QEMU makes the sockets, as its own user.
        let install = "install -d -m 0770 -o root -g libvirt-qemu";
        host.run(&["sh", "-c", &format!("{install} {SOCKETS}")])?;
    }
    let guests = boot_all(a, &options.mix.guests(options.memory_mib, options.redis))?;
    std::thread::sleep(options.settle);
    let members = std::thread::scope(|scope| {
        let moves: Vec<_> = guests
            .iter()
            .map(|guest| scope.spawn(|| record_guest(guest, a, b, options, dir)))
            .collect();
        moves
            .into_iter()
            .map(|guest| {
                guest
                    .join()
                    .map_err(|_| anyhow::anyhow!("recording panicked"))?
            })
            .collect::<Result<Vec<_>>>()
    })?;
    let names: Vec<_> = guests.iter().map(Guest::name).collect();
    expect_running(b, &names)?;
    for guest in &guests {
        // Its own word that what went through the relay is its memory.
        guest.on(b).wait_for_report(PATIENCE)?;
    }
    let recording = Recording {
        mix: options.mix_name.clone(),
        qemu: qemu_version(a)?,
        bandwidth_mib: options.bandwidth_mib,
        members,
    };
    recording.save(dir)?;
    Ok(recording)
}

fn record_guest(
    guest: &Guest,
    a: &Host,
    b: &Host,
    options: &RecordOptions,
    dir: &Path,
) -> Result<RecordedMember> {
    let name = guest.name();
    let memory_mib = memory_mib(a, name)?;
    let socket = format!("{SOCKETS}/{name}.sock");
    let seen_from_here = |host: &Host| format!("/proc/{}/root{socket}", host.pid());
    let tap = Tap::listen(seen_from_here(a).as_ref(), seen_from_here(b).as_ref())?;
    let called_off = AtomicBool::new(false);
    let tapped = std::thread::scope(|scope| {
        let relay = scope.spawn(|| tap.relay(&stream_file(dir, name), &called_off));
        let migrated = a.virsh(&[
            "migrate",
            "--live",
            "--p2p",
            "--migrateuri",
            &format!("unix://{socket}"),
            "--bandwidth",
            &options.bandwidth_mib.to_string(),
            name,
            &uri(b),
        ]);
        called_off.store(true, Relaxed);
        let tapped = relay
            .join()
            .map_err(|_| anyhow::anyhow!("the relay panicked"))?;
        migrated.with_context(|| format!("guest {name} did not migrate; relay: {tapped:?}"))?;
        tapped?.with_context(|| format!("guest {name} migrated, but not through the relay"))
    })?;
    Ok(RecordedMember {
        guest: name.to_owned(),
        memory_mib,
        stream_bytes: tapped.stream_bytes,
        return_bytes: tapped.return_bytes,
        seconds: tapped.duration.as_secs_f64(),
        passes: number(
            &b.virsh(&["domjobinfo", name, "--completed"])?,
            "Iteration:",
        )
        .unwrap_or(0),
    })
}

fn memory_mib(host: &Host, guest: &str) -> Result<u64> {
    let info = host.virsh(&["dominfo", guest])?;
    let kib = number(&info, "Max memory:").with_context(|| format!("no memory in {info:?}"))?;
    Ok(kib / 1024)
}

/// The number after a label in virsh's output.
fn number(text: &str, label: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(label))?;
    line.split_whitespace().next()?.parse().ok()
}

fn qemu_version(host: &Host) -> Result<String> {
    let text = host.run(&["qemu-system-x86_64", "--version"])?;
    let first = text.lines().next().unwrap_or_default();
    ensure!(!first.is_empty(), "QEMU does not tell its version");
    // "QEMU emulator version 10.0.2 (Debian ...)"
    let version = first.split_whitespace().nth(3).unwrap_or(first);
    Ok(format!("QEMU {version}"))
}
