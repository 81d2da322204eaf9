//! A lab leaves nothing behind, not even when its owner is killed and can clean up nothing.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgang_lab::state::{self, LabState};
use vmgang_lab::{Cache, GuestSpec, Host, Lab, LabOptions};

const KINDS: [&str; 5] = ["pid", "mnt", "net", "uts", "ipc"];

/// The namespaces of some hosts, as the kernel names them.
fn namespaces(hosts: &[Host]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for host in hosts {
        for kind in KINDS {
            let path = format!("/proc/{}/ns/{kind}", host.pid());
            let link = fs::read_link(&path).with_context(|| path)?;
            found.insert(link.to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// Processes of the machine, dead ones included, that are in one of these namespaces.
fn processes_in(namespaces: &BTreeSet<String>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let inside = KINDS.iter().any(|kind| {
            fs::read_link(path.join("ns").join(kind))
                .is_ok_and(|link| namespaces.contains(&*link.to_string_lossy()))
        });
        if inside {
            found.push(fs::read_to_string(path.join("comm")).unwrap_or_default());
        }
    }
    Ok(found)
}

fn wait_until_gone(namespaces: &BTreeSet<String>) -> Result<()> {
    let started = Instant::now();
    loop {
        let left = processes_in(namespaces)?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            started.elapsed() < Duration::from_secs(15),
            "left: {left:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn interfaces() -> Result<BTreeSet<String>> {
    fs::read_dir("/sys/class/net")?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn mounts_of_the_cache() -> Result<usize> {
    let cache = Cache::open()?;
    let dir = cache.dir().display().to_string();
    Ok(fs::read_to_string("/proc/self/mounts")?
        .matches(&dir)
        .count())
}

/// The owner of a lab; killed also when the test fails before it comes to that.
struct Owner(Child);

impl Drop for Owner {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_owner_takes_everything_along() -> Result<()> {
    let name = format!("killed-{}", std::process::id());
    let (links, mounts) = (interfaces()?, mounts_of_the_cache()?);
    let mut owner = Owner(
        Command::new(env!("CARGO_BIN_EXE_lab"))
            .args(["--lab", &name, "up", "--foreground"])
            .stdout(Stdio::piped())
            .spawn()?,
    );
    let output = owner.0.stdout.take().context("a pipe")?;
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    ensure!(line.contains("is up"), "{line}");

    let lab = LabState::load(&name)?.context("a state file")?.attach()?;
    let guest = lab.host("a")?.boot(&GuestSpec::new("g1"))?;
    guest.wait_for_report(Duration::from_secs(60))?;
    let inside = namespaces(lab.hosts())?;
    let alive = processes_in(&inside)?;
    for process in ["libvirtd", "virtlogd", "dbus-daemon"] {
        ensure!(
            alive.iter().filter(|name| name.trim() == process).count() == 2,
            "{alive:?}"
        );
    }
    ensure!(
        alive.iter().any(|name| name.starts_with("qemu")),
        "{alive:?}"
    );
    ensure!(interfaces()? == links, "the machine's network has changed");
    ensure!(
        mounts_of_the_cache()? == mounts,
        "a mount is visible outside"
    );

    owner.0.kill()?;
    owner.0.wait()?;
    wait_until_gone(&inside)?;
    ensure!(interfaces()? == links);
    ensure!(mounts_of_the_cache()? == mounts);
    // The file it could not remove does not pass for a running lab, and goes with the first look.
    ensure!(LabState::load(&name)?.is_none());
    state::remove(&name)?;
    Ok(())
}

#[test]
fn a_dropped_lab_is_gone_and_its_neighbour_is_not() -> Result<()> {
    let first = Lab::start(&LabOptions::default())?;
    let second = Lab::start(&LabOptions::default())?;
    let inside = namespaces(first.hosts())?;
    // A command that nobody waits for must not keep its host alive.
    let forgotten = first.host("a")?.command(&["sleep", "1000"]).spawn()?;
    drop(forgotten);
    let started = Instant::now();
    drop(first);
    ensure!(
        processes_in(&inside)?.is_empty(),
        "{:?}",
        processes_in(&inside)?
    );
    ensure!(
        started.elapsed() < Duration::from_secs(8),
        "{:?}",
        started.elapsed()
    );
    second.host("b")?.virsh(&["list"])?;
    Ok(())
}
