//! The gang that is moved, the two hosts it moves between, and what is seen of both from outside.
//!
//! Owns: how the guests are made and booted, and the questions that the other files ask a host.
//! Must not: know faults or phases, or decide whether what it sees is right.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use vmgang_e2e::{boot_all, install_tree, vmgang};
use vmgang_lab::{GuestSpec, Host, Lab, LabOptions};

pub const GANG: &str = "web";
pub const GUESTS: [&str; 3] = ["large", "small", "busy"];
/// The large guest takes long enough on it that the others are held for seconds.
pub const LINK: u64 = 80_000_000;

pub const STATE_DIR: &str = "/var/lib/vmgang";
/// Enough for the records of a run.
const STATE_BYTES: u64 = 1 << 20;
const CONFIGURATION: &str = "/etc/vmgang/vmgang.toml";
/// Every job has to send everything, whatever was sent before it.
const NOTHING_KEPT: &str =
    "\n[scan]\ninterval_s = 0\n[recall]\nresidents = false\ncheckpoints = false\n";

/// Which way the gang moves now.
#[derive(Clone, Copy)]
pub struct Way<'l> {
    pub lab: &'l Lab,
    pub from: &'l Host,
    pub to: &'l Host,
}

impl<'l> Way<'l> {
    pub fn back(self) -> Way<'l> {
        Way {
            from: self.to,
            to: self.from,
            ..self
        }
    }
}

/// Two hosts, their daemons started with a small state directory and nothing to recall.
pub fn options() -> Result<LabOptions> {
    Ok(LabOptions {
        link_bits_per_second: Some(LINK),
        install_tree: Some(install_tree()?),
        start_vmgangd: false,
        ..LabOptions::default()
    })
}

pub fn start_daemons(lab: &Lab) -> Result<()> {
    for host in lab.hosts() {
        let configuration = host.read_text(CONFIGURATION).unwrap_or_default();
        host.write_file(CONFIGURATION, configuration + NOTHING_KEPT)?;
        host.mount_small(STATE_DIR, STATE_BYTES)?;
        host.vmgangd().start()?;
    }
    Ok(())
}

fn spec(name: &str) -> GuestSpec {
    let guest = GuestSpec::new(name);
    match name {
        "large" => guest
            .with_memory_mib(160)
            .with_fill("unique:100")
            .with_verify_rate(8000),
        "small" => guest
            .with_memory_mib(96)
            .with_fill("zero:60,same:20,unique:20")
            .with_idle()
            .with_verify_rate(6000),
        _ => guest
            .with_memory_mib(96)
            .with_fill("zero:60,same:20,unique:20")
            .with_dirty_rate(50)
            .with_verify_rate(6000),
    }
}

/// Boots guests of the gang and makes them its members.
pub fn boot(host: &Host, names: &[&str]) -> Result<()> {
    let specs: Vec<_> = names.iter().map(|name| spec(name)).collect();
    boot_all(host, &specs)?;
    vmgang(host, &[&["gang", "add", GANG], names].concat())?.expect(0)?;
    Ok(())
}

/// Every domain that libvirt on a host knows, with its state in libvirt's words.
pub fn domains(host: &Host) -> Result<BTreeMap<String, String>> {
    let list = host.virsh(&["list", "--all"])?;
    Ok(list
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let _id = words.next()?;
            let name = words.next()?.to_owned();
            Some((name, words.collect::<Vec<_>>().join(" ")))
        })
        .collect())
}

/// Every QEMU of a guest on a host, by the guest's name, with its process id there. libvirt is not
/// asked.
pub fn qemus(host: &Host) -> Result<BTreeMap<String, u32>> {
    let mut found = BTreeMap::new();
    for entry in host.list_dir("/proc")? {
        let Ok(process) = entry.parse::<u32>() else {
            continue;
        };
        // A process may end at any moment.
        let Ok(words) = host.read_file(format!("/proc/{process}/cmdline")) else {
            continue;
        };
        let words = String::from_utf8_lossy(&words);
        let mut words = words.split('\0');
        if words
            .next()
            .is_none_or(|program| !program.contains("qemu-system"))
        {
            continue;
        }
        let named = words.find_map(|word| word.strip_prefix("guest=")?.split(',').next());
        if let Some(name) = named {
            found.insert(name.to_owned(), process);
        }
    }
    Ok(found)
}

/// How a guest stands on the source, by the file in which libvirtd keeps that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    Running,
    Stopped,
    Gone,
}

impl Here {
    pub fn word(self) -> &'static str {
        match self {
            Here::Running => "running",
            Here::Stopped => "stopped",
            Here::Gone => "gone",
        }
    }
}

/// How the gang's guests stand on a host at one moment. Takes well under a millisecond, which
/// asking libvirt does not.
pub fn moment(host: &Host) -> BTreeMap<&'static str, Here> {
    GUESTS
        .into_iter()
        .map(|name| {
            let status = host.read_text(format!("/run/libvirt/qemu/{name}.xml"));
            let here = match status {
                Ok(text) if text.contains("<domstatus state='running'") => Here::Running,
                Ok(_) => Here::Stopped,
                Err(_) => Here::Gone,
            };
            (name, here)
        })
        .collect()
}

/// The ids of all jobs that have ended, as a host's daemon tells.
pub fn history(host: &Host) -> Result<Vec<String>> {
    let ended = vmgang(host, &["history", "--json"])?.expect(0)?;
    let jobs: Vec<serde_json::Value> = serde_json::from_str(&ended.stdout)?;
    jobs.iter()
        .map(|job| {
            Ok(job["job"]
                .as_str()
                .context("a job without an id")?
                .to_owned())
        })
        .collect()
}

/// Whether the last QEMU of a guest on a host was killed, and not by libvirt.
pub fn crashed(host: &Host, guest: &str) -> bool {
    let log = host.read_text(format!("/var/log/libvirt/qemu/{guest}.log"));
    let last = log.unwrap_or_default();
    let last = last.lines().rfind(|line| line.contains("shutting down"));
    last.is_some_and(|line| line.contains("reason=crashed"))
}
