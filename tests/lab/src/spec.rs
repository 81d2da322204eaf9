//! What a guest is made of: its memory, its devices, and what it does with them.

use std::fmt::Write as _;

use crate::error::{LabError, Result};
use crate::guest::serial_path;
use crate::role::Role;
use crate::userland;

/// Where every host sees the guests' kernel.
pub(crate) const KERNEL_PATH: &str = "/usr/lib/vmgang-lab/vmlinux";
/// Where every host sees the guests' initramfs.
pub(crate) const INITRAMFS_PATH: &str = "/usr/lib/vmgang-lab/initramfs";

/// What kernel, archive and unpacked userland need at the same time, and a little data.
const DEBIAN_MEMORY_MIB_MIN: u64 = 320;

/// Kernel options that make a boot under emulation short and change nothing tests look at.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet mitigations=off tsc=reliable no_timer_check \
                              random.trust_cpu=on cryptomgr.notests rcupdate.rcu_expedited=1 \
                              audit=0 apparmor=0 oops=panic";

/// How a guest is made. Without a role it is one that fills memory by a recipe and checks it, see
/// `tests/guest`; with one it is a Debian, see `tests/workload`.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    name: String,
    uuid: Option<String>,
    memory_mib: u64,
    vcpus: u32,
    fill: Option<String>,
    group_seed: u64,
    dirty_pages_per_second: u64,
    hot_pages: u64,
    stamp_ms: u64,
    verify_pages_per_second: Option<u64>,
    idle: bool,
    role: Option<Role>,
    request_rate: Option<u64>,
    data_mib: Option<u64>,
    benchmark_values: bool,
    check_seconds: Option<u64>,
    report_ms: Option<u64>,
    metadata: String,
    extra_devices: String,
    shared_memory: bool,
    balloon: bool,
    memory_percent: Option<u64>,
    freed_percent: Option<u64>,
    persistent: bool,
}

impl GuestSpec {
    /// A transient guest of 128 MiB with shared (memfd) memory and the default recipe.
    pub fn new(name: &str) -> GuestSpec {
        GuestSpec {
            name: name.to_owned(),
            uuid: None,
            memory_mib: 128,
            vcpus: 1,
            fill: None,
            group_seed: 1,
            dirty_pages_per_second: 0,
            hot_pages: 0,
            stamp_ms: 0,
            verify_pages_per_second: None,
            idle: false,
            role: None,
            request_rate: None,
            data_mib: None,
            benchmark_values: false,
            check_seconds: None,
            report_ms: None,
            metadata: String::new(),
            extra_devices: String::new(),
            shared_memory: true,
            balloon: false,
            memory_percent: None,
            freed_percent: None,
            persistent: false,
        }
    }

    /// A Debian guest of 1 GiB with real servers; otherwise as [`GuestSpec::new`].
    pub fn debian(name: &str, role: Role) -> GuestSpec {
        GuestSpec {
            memory_mib: 1024,
            role: Some(role),
            ..GuestSpec::new(name)
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The role of a Debian guest.
    pub fn role(&self) -> Option<Role> {
        self.role
    }

    /// Derived from the name unless set with [`GuestSpec::with_uuid`].
    pub fn uuid(&self) -> String {
        self.uuid.clone().unwrap_or_else(|| {
            let digest = blake3::hash(self.name.as_bytes());
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&digest.as_bytes()[..16]);
            uuid::Builder::from_custom_bytes(bytes)
                .into_uuid()
                .to_string()
        })
    }

    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    pub fn with_uuid(mut self, uuid: &str) -> GuestSpec {
        self.uuid = Some(uuid.to_owned());
        self
    }

    pub fn with_memory_mib(mut self, memory_mib: u64) -> GuestSpec {
        self.memory_mib = memory_mib;
        self
    }

    pub fn with_vcpus(mut self, vcpus: u32) -> GuestSpec {
        self.vcpus = vcpus;
        self
    }

    /// Shares of page kinds in percent, such as `zero:20,same:60,unique:20`. The kinds are zero,
    /// uniform, same, similar, repeat, unique, compressible and sametext.
    pub fn with_fill(mut self, fill: &str) -> GuestSpec {
        self.fill = Some(fill.to_owned());
        self
    }

    /// Guests with the same group seed have their `same` pages in common, and nginx guests their
    /// web root. 1 unless set.
    pub fn with_group_seed(mut self, seed: u64) -> GuestSpec {
        self.group_seed = seed;
        self
    }

    pub fn with_dirty_rate(mut self, pages_per_second: u64) -> GuestSpec {
        self.dirty_pages_per_second = pages_per_second;
        self
    }

    /// Only so many pages are rewritten, again and again.
    pub fn with_hot_pages(mut self, pages: u64) -> GuestSpec {
        self.hot_pages = pages;
        self
    }

    /// The guest writes a line to its serial port that often, see `Stamps`.
    pub fn with_stamps(mut self, milliseconds: u64) -> GuestSpec {
        self.stamp_ms = milliseconds;
        self
    }

    /// How fast the guest checks its memory, in pages per second.
    pub fn with_verify_rate(mut self, pages_per_second: u64) -> GuestSpec {
        self.verify_pages_per_second = Some(pages_per_second);
        self
    }

    /// After its first complete check the guest sleeps long and checks slowly.
    pub fn with_idle(mut self) -> GuestSpec {
        self.idle = true;
        self
    }

    /// Requests per second of a Debian guest's load.
    pub fn with_request_rate(mut self, requests_per_second: u64) -> GuestSpec {
        self.request_rate = Some(requests_per_second);
        self
    }

    /// How much data a Debian guest's server holds. A share of its memory unless set.
    pub fn with_data_mib(mut self, data_mib: u64) -> GuestSpec {
        self.data_mib = Some(data_mib);
        self
    }

    /// A redis guest holds the values of redis-benchmark instead of mixed ones.
    pub fn with_benchmark_values(mut self) -> GuestSpec {
        self.benchmark_values = true;
        self
    }

    /// How long a Debian guest takes to check all its data once. 60 unless set.
    pub fn with_check_seconds(mut self, seconds: u64) -> GuestSpec {
        self.check_seconds = Some(seconds);
        self
    }

    /// How often the guest reports, in milliseconds. 1000 unless set, 100 at least.
    pub fn with_report_ms(mut self, milliseconds: u64) -> GuestSpec {
        self.report_ms = Some(milliseconds);
        self
    }

    /// XML that goes into the domain's `<metadata>`.
    pub fn with_metadata(mut self, xml: &str) -> GuestSpec {
        self.metadata.push_str(xml);
        self
    }

    /// XML that goes into the domain's `<devices>`.
    pub fn with_devices(mut self, xml: &str) -> GuestSpec {
        self.extra_devices.push_str(xml);
        self
    }

    /// QEMU keeps the memory to itself instead of in a shared memfd.
    pub fn with_private_memory(mut self) -> GuestSpec {
        self.shared_memory = false;
        self
    }

    /// The guest has a memory balloon, and a driver for it.
    pub fn with_balloon(mut self) -> GuestSpec {
        self.balloon = true;
        self
    }

    /// So much of its memory is filled and checked, in percent; 75 unless set.
    pub fn with_memory_percent(mut self, percent: u64) -> GuestSpec {
        self.memory_percent = Some(percent);
        self
    }

    /// So much of its memory was written to and is free again, in percent.
    pub fn with_freed_percent(mut self, percent: u64) -> GuestSpec {
        self.freed_percent = Some(percent);
        self
    }

    /// The domain is defined before it is started, and stays defined when it ends.
    pub fn with_persistence(mut self) -> GuestSpec {
        self.persistent = true;
        self
    }

    /// What makes it, in one line: its memory, and its orders as the kernel's command line has them.
    pub fn recipe(&self) -> String {
        let line = self.command_line();
        let orders = line
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("vmgang."));
        let orders: Vec<&str> = orders.collect();
        format!("{} MiB {}", self.memory_mib, orders.join(" "))
    }

    fn command_line(&self) -> String {
        let digest = blake3::hash(self.name.as_bytes());
        let mut seed = [0; 8];
        seed.copy_from_slice(&digest.as_bytes()[16..24]);
        let seed = u64::from_le_bytes(seed);
        let mut line = format!(
            "{KERNEL_OPTIONS} vmgang.id={} vmgang.seed={seed}",
            self.name
        );
        let mut add = |key: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = write!(line, " vmgang.{key}={value}");
        };
        add("group", self.group_seed.to_string());
        if let Some(milliseconds) = self.report_ms {
            add("report_ms", milliseconds.to_string());
        }
        if let Some(role) = self.role {
            add("role", role.to_string());
            let rate = self.request_rate.unwrap_or(role.default_rate());
            add("rate", rate.to_string());
            let data_mib = self
                .data_mib
                .unwrap_or(role.default_data_mib(self.memory_mib));
            add("data", data_mib.to_string());
            if self.benchmark_values {
                add("values", "benchmark".to_owned());
            }
            if let Some(seconds) = self.check_seconds {
                add("check", seconds.to_string());
            }
            // On a tmpfs, which may take half the memory, the userland would not fit.
            line.push_str(" rootfstype=ramfs");
            return line;
        }
        if let Some(fill) = &self.fill {
            add("fill", fill.clone());
        }
        if self.dirty_pages_per_second > 0 {
            add("dirty", self.dirty_pages_per_second.to_string());
        }
        if self.hot_pages > 0 {
            add("hot", self.hot_pages.to_string());
        }
        if self.stamp_ms > 0 {
            add("stamp_ms", self.stamp_ms.to_string());
        }
        if let Some(rate) = self.verify_pages_per_second {
            add("verify", rate.to_string());
        }
        if self.balloon {
            add("modules", "1".to_owned());
        }
        if let Some(percent) = self.freed_percent {
            add("freed", percent.to_string());
        }
        if let Some(percent) = self.memory_percent {
            add("memory", percent.to_string());
        }
        if self.idle {
            add("idle", "1".to_owned());
        }
        line
    }

    /// The libvirt domain.
    pub fn domain_xml(&self) -> Result<String> {
        self.check()?;
        let initramfs = match self.role {
            Some(_) => userland::path_on_host()?,
            None => INITRAMFS_PATH.to_owned(),
        };
        let backing = if self.shared_memory {
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
        } else {
            ""
        };
        let metadata = if self.metadata.is_empty() {
            String::new()
        } else {
            format!("<metadata>{}</metadata>", self.metadata)
        };
        Ok(format!(
            "<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  {metadata}
  <memory unit='MiB'>{memory}</memory>
  {backing}
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{KERNEL_PATH}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{serial}' append='off'/></serial>
    <video><model type='none'/></video>
    <memballoon model='{balloon}'/>
    {devices}
  </devices>
</domain>
",
            name = self.name,
            uuid = self.uuid(),
            memory = self.memory_mib,
            vcpus = self.vcpus,
            command_line = self.command_line(),
            serial = serial_path(&self.name),
            balloon = if self.balloon { "virtio" } else { "none" },
            devices = self.extra_devices,
        ))
    }

    /// A name goes into XML, a file name and a kernel command line.
    fn check(&self) -> Result<()> {
        let plain = |text: &str, more: &str| {
            text.chars()
                .all(|letter| letter.is_ascii_alphanumeric() || more.contains(letter))
        };
        if self.name.is_empty() || !plain(&self.name, "-_.") || self.name.starts_with(['-', '.']) {
            return Err(LabError::Request(format!(
                "{:?} cannot name a guest; use letters, digits, and - _ . inside",
                self.name
            )));
        }
        if let Some(fill) = self.fill.as_ref().filter(|fill| !plain(fill, ":,")) {
            return Err(LabError::Request(format!(
                "{fill:?} is not a recipe; write for example zero:20,same:60,unique:20"
            )));
        }
        let (memory_min, what) = match self.role {
            Some(_) => (DEBIAN_MEMORY_MIB_MIN, "a Debian userland"),
            None => (96, "its kernel"),
        };
        if self.memory_mib < memory_min {
            return Err(LabError::Request(format!(
                "guest {}: {} MiB is too little for {what}; give at least {memory_min}",
                self.name, self.memory_mib
            )));
        }
        let of_a_recipe = self.fill.is_some()
            || self.dirty_pages_per_second > 0
            || self.hot_pages > 0
            || self.stamp_ms > 0
            || self.verify_pages_per_second.is_some()
            || self.idle;
        let of_a_role =
            self.request_rate.is_some() || self.data_mib.is_some() || self.check_seconds.is_some();
        if self.benchmark_values && self.role != Some(Role::Redis) {
            return Err(LabError::Request(format!(
                "guest {}: only redis holds the values of redis-benchmark",
                self.name
            )));
        }
        match self.role {
            Some(role) if of_a_recipe => Err(LabError::Request(format!(
                "guest {}: the role {role} has no memory recipe and no dirty or verify rate",
                self.name
            ))),
            None if of_a_role => Err(LabError::Request(format!(
                "guest {}: a request rate, data and a check time need a role",
                self.name
            ))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_depends_on_the_name_alone() {
        let uuid = GuestSpec::new("g1").uuid();
        assert_eq!(uuid, GuestSpec::new("g1").with_memory_mib(512).uuid());
        assert_ne!(uuid, GuestSpec::new("g2").uuid());
        let own = "11111111-2222-4333-8444-555555555555";
        assert_eq!(GuestSpec::new("g1").with_uuid(own).uuid(), own);
    }

    #[test]
    fn the_xml_holds_what_was_asked_for() {
        let xml = GuestSpec::new("g1")
            .with_memory_mib(256)
            .with_fill("zero:50")
            .with_dirty_rate(100)
            .with_report_ms(250)
            .with_idle()
            .with_metadata("<x:y xmlns:x='urn:x'/>")
            .domain_xml()
            .expect("a good guest");
        for part in [
            "<memory unit='MiB'>256<",
            "vmgang.fill=zero:50",
            "vmgang.dirty=100",
            "vmgang.report_ms=250",
            "vmgang.idle=1",
            "<metadata><x:y xmlns:x='urn:x'/></metadata>",
            "memfd",
        ] {
            assert!(xml.contains(part), "{part} is missing in {xml}");
        }
        let recipe = GuestSpec::new("g1").with_dirty_rate(7).recipe();
        assert!(recipe.starts_with("128 MiB id=g1 seed=") && recipe.ends_with(" dirty=7"));
        let private = GuestSpec::new("g1").with_private_memory().domain_xml();
        assert!(!private.expect("a good guest").contains("memfd"));
    }

    #[test]
    fn a_debian_guest_boots_the_debian_archive_with_its_role() {
        let xml = GuestSpec::debian("r1", Role::Redis)
            .with_request_rate(7)
            .with_benchmark_values()
            .domain_xml()
            .expect("a good guest");
        for part in [
            "<memory unit='MiB'>1024<",
            "vmgang.role=redis",
            "vmgang.rate=7",
            "vmgang.data=300",
            "vmgang.values=benchmark",
            "<initrd>/usr/lib/vmgang-lab/guests/debian-",
        ] {
            assert!(xml.contains(part), "{part} is missing in {xml}");
        }
    }

    #[test]
    fn a_recipe_and_a_role_do_not_mix() {
        let debian = || GuestSpec::debian("g1", Role::Idle);
        for wrong in [
            debian().with_fill("zero:50"),
            debian().with_dirty_rate(5),
            debian().with_idle(),
            debian().with_benchmark_values(),
            debian().with_memory_mib(256),
            GuestSpec::new("g1").with_request_rate(5),
            GuestSpec::new("g1").with_data_mib(5),
        ] {
            assert!(wrong.domain_xml().is_err(), "{wrong:?}");
        }
        assert!(debian().domain_xml().is_ok());
    }

    #[test]
    fn refuses_names_and_recipes_that_would_break_out() {
        for name in ["", "a b", "a<b", "../a", "-a", "a'b"] {
            assert!(GuestSpec::new(name).domain_xml().is_err(), "{name}");
        }
        let spec = GuestSpec::new("g1").with_fill("zero:5 init=/bin/sh");
        assert!(spec.domain_xml().is_err());
        assert!(
            GuestSpec::new("g1")
                .with_memory_mib(8)
                .domain_xml()
                .is_err()
        );
    }
}
