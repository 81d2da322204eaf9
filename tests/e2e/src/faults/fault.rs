//! What breaks, how it is broken, and how it is mended.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use vmgang_lab::{Daemon, Host};

use super::cell::{BUSY, Site};

/// One thing that breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    SourceVmgangd,
    DestinationVmgangd,
    SourceQemu,
    DestinationQemu,
    SourceLibvirtd,
    DestinationLibvirtd,
    LinkCut,
    LinkHalfOpen,
    LinkLoss,
    DestinationMemory,
    StateDiskFull,
    SystemBus,
}

/// New memory that the destination's daemon may still take.
const MEMORY_BYTES: u64 = 4 << 20;
/// How long libvirt may take to start a QEMU on the destination.
const PREPARES: Duration = Duration::from_secs(3);
const STATE_DIR: &str = "/var/lib/vmgang";
const TABLE: &str = "fault";

impl Fault {
    pub const ALL: [Fault; 12] = [
        Fault::SourceVmgangd,
        Fault::DestinationVmgangd,
        Fault::SourceQemu,
        Fault::DestinationQemu,
        Fault::SourceLibvirtd,
        Fault::DestinationLibvirtd,
        Fault::LinkCut,
        Fault::LinkHalfOpen,
        Fault::LinkLoss,
        Fault::DestinationMemory,
        Fault::StateDiskFull,
        Fault::SystemBus,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Fault::SourceVmgangd => "vmgangd on the source killed",
            Fault::DestinationVmgangd => "vmgangd on the destination killed",
            Fault::SourceQemu => "a member's QEMU on the source killed",
            Fault::DestinationQemu => "a member's QEMU on the destination killed",
            Fault::SourceLibvirtd => "libvirtd on the source killed",
            Fault::DestinationLibvirtd => "libvirtd on the destination killed",
            Fault::LinkCut => "link cut until the job has ended",
            Fault::LinkHalfOpen => "link half-open: the destination hears nothing",
            Fault::LinkLoss => "1 % of the packets lost, both ways",
            Fault::DestinationMemory => "vmgangd on the destination out of memory (cgroup)",
            Fault::StateDiskFull => "disk of the source's state directory full",
            Fault::SystemBus => "system bus of the source restarted",
        }
    }

    /// Whether it is over soon, as a service manager would restart what was killed; the others last
    /// until the job has ended.
    pub fn is_short(self) -> bool {
        matches!(
            self,
            Fault::SourceLibvirtd | Fault::DestinationLibvirtd | Fault::SystemBus
        )
    }

    /// Breaks it; false if there is nothing to break.
    pub fn strike(self, site: &Site<'_>) -> Result<bool> {
        let (source, destination) = (site.source, site.destination);
        match self {
            Fault::SourceVmgangd => source.vmgangd().kill()?,
            Fault::DestinationVmgangd => destination.vmgangd().kill()?,
            Fault::SourceQemu => return kill_qemu(source),
            Fault::DestinationQemu => {
                // libvirt starts it a moment after the daemons have met.
                let deadline = Instant::now() + PREPARES;
                while !kill_qemu(destination)? {
                    if Instant::now() > deadline {
                        return Ok(false);
                    }
                }
            }
            Fault::SourceLibvirtd => source.libvirtd().kill()?,
            Fault::DestinationLibvirtd => destination.libvirtd().kill()?,
            Fault::LinkCut => site.lab.partition(destination.name())?,
            Fault::LinkHalfOpen => filter(destination, "drop", &["iif lo accept"])?,
            Fault::LinkLoss => {
                let rules = ["iif lo accept", "numgen random mod 100 < 1 drop"];
                filter(source, "accept", &rules)?;
                filter(destination, "accept", &rules)?;
            }
            Fault::DestinationMemory => limit_memory(destination)?,
            Fault::StateDiskFull => {
                let size = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", STATE_DIR];
                source.run(&size)?;
                let fill = format!("cat /dev/zero > {STATE_DIR}/full 2>/dev/null; true");
                source.run(&["sh", "-c", &fill])?;
            }
            Fault::SystemBus => {
                let restart = "kill -9 $(cat /run/dbus/pid); rm -f /run/dbus/pid; \
                               dbus-daemon --system --fork";
                source.run(&["sh", "-c", restart])?;
            }
        }
        Ok(true)
    }

    /// Mends it, and starts whatever it has ended.
    pub fn mend(self, site: &Site<'_>) -> Result<()> {
        let (source, destination) = (site.source, site.destination);
        match self {
            Fault::LinkCut => site.lab.heal(destination.name())?,
            Fault::LinkHalfOpen => unfilter(destination)?,
            Fault::LinkLoss => {
                unfilter(source)?;
                unfilter(destination)?;
            }
            Fault::DestinationMemory => {
                // It goes with its last process.
                let _ = std::fs::remove_dir(cgroup());
            }
            Fault::StateDiskFull => {
                source.run(&["umount", "-l", STATE_DIR])?;
            }
            _ => {}
        }
        for host in [source, destination] {
            for daemon in [host.libvirtd(), host.vmgangd()] {
                restart(&daemon)?;
            }
        }
        Ok(())
    }
}

fn restart(daemon: &Daemon) -> Result<()> {
    if !daemon.is_running()? {
        daemon.start()?;
    }
    Ok(())
}

fn kill_qemu(host: &Host) -> Result<bool> {
    let path = format!("/run/libvirt/qemu/{BUSY}.pid");
    let Ok(pid) = host.read_text(path) else {
        return Ok(false);
    };
    let kill = format!("kill -9 {}", pid.trim());
    Ok(host.exec(&["sh", "-c", &kill])?.status.success())
}

/// Filters what arrives at a host: everything that no rule lets through, or only what a rule drops.
fn filter(host: &Host, policy: &str, rules: &[&str]) -> Result<()> {
    host.run(&["nft", "add", "table", "inet", TABLE])?;
    let chain = format!("{{ type filter hook input priority 0; policy {policy}; }}");
    host.run(&["nft", "add", "chain", "inet", TABLE, "arriving", &chain])?;
    for rule in rules {
        host.run(&["nft", &format!("add rule inet {TABLE} arriving {rule}")])?;
    }
    Ok(())
}

fn unfilter(host: &Host) -> Result<()> {
    host.run(&["nft", "delete", "table", "inet", TABLE])?;
    Ok(())
}

/// Of this process, so that two runs do not meet.
fn cgroup() -> PathBuf {
    let memory = PathBuf::from("/sys/fs/cgroup/memory");
    let root = match memory.is_dir() {
        true => memory,
        false => PathBuf::from("/sys/fs/cgroup"),
    };
    root.join(format!("vmgang-fault-{}", std::process::id()))
}

/// Lets the host's vmgangd take hardly any more memory. What it has is not counted.
fn limit_memory(host: &Host) -> Result<()> {
    let pid = host.vmgangd().pid()?.context("vmgangd runs")?;
    let pid = pid_on_machine(host, pid)?;
    let cgroup = cgroup();
    std::fs::create_dir_all(&cgroup).context("cannot make a cgroup")?;
    let limit = match cgroup.join("memory.limit_in_bytes").exists() {
        true => "memory.limit_in_bytes",
        false => "memory.max",
    };
    std::fs::write(cgroup.join(limit), MEMORY_BYTES.to_string())?;
    std::fs::write(cgroup.join("cgroup.procs"), pid.to_string())?;
    Ok(())
}

/// The machine's number for a process of a host.
fn pid_on_machine(host: &Host, pid: u32) -> Result<u32> {
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let wanted = namespace(host.pid());
    let processes = std::fs::read_dir("/proc")?.filter_map(|entry| {
        let name = entry.ok()?.file_name();
        name.to_str()?.parse::<u32>().ok()
    });
    let is_it = |candidate: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{candidate}/status"));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let inside = line.and_then(|line| line.split_whitespace().last()?.parse().ok());
        inside == Some(pid) && namespace(*candidate) == wanted
    };
    let mut processes = processes.filter(is_it);
    processes.next().context("the daemon's process")
}
