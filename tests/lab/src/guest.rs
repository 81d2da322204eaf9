//! Guests of the lab: what one is made of, and a running one as tests see it.
//!
//! A guest tells about itself on its serial port. Each host has a file of its own for that, so
//! what a guest says after a migration is read on the host it moved to.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use crate::error::{LabError, Result, tail};
use crate::host::{Host, POLL_INTERVAL};
use crate::report::{self, Report};

/// Where every host sees the guests' kernel.
pub(crate) const KERNEL_PATH: &str = "/usr/lib/vmgang-lab/vmlinux";
/// Where every host sees the guests' initramfs.
pub(crate) const INITRAMFS_PATH: &str = "/usr/lib/vmgang-lab/initramfs";

/// Kernel options that make a boot under emulation short and change nothing tests look at.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet mitigations=off tsc=reliable \
                              random.trust_cpu=on cryptomgr.notests rcupdate.rcu_expedited=1 \
                              audit=0 apparmor=0 oops=panic";

/// How a guest is made. See `tests/guest` for what its memory recipe means.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    name: String,
    uuid: Option<String>,
    memory_mib: u64,
    vcpus: u32,
    fill: Option<String>,
    group_seed: u64,
    dirty_pages_per_second: u64,
    verify_pages_per_second: Option<u64>,
    idle: bool,
    metadata: String,
    extra_devices: String,
    shared_memory: bool,
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
            verify_pages_per_second: None,
            idle: false,
            metadata: String::new(),
            extra_devices: String::new(),
            shared_memory: true,
            persistent: false,
        }
    }

    pub fn name(&self) -> &str {
        &self.name
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

    /// Guests with the same group seed have their `same` pages in common. 1 unless set.
    pub fn with_group_seed(mut self, seed: u64) -> GuestSpec {
        self.group_seed = seed;
        self
    }

    pub fn with_dirty_rate(mut self, pages_per_second: u64) -> GuestSpec {
        self.dirty_pages_per_second = pages_per_second;
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

    /// The domain is defined before it is started, and stays defined when it ends.
    pub fn with_persistence(mut self) -> GuestSpec {
        self.persistent = true;
        self
    }

    fn command_line(&self) -> String {
        let digest = blake3::hash(self.name.as_bytes());
        let mut seed = [0; 8];
        seed.copy_from_slice(&digest.as_bytes()[16..24]);
        let mut line = format!(
            "{KERNEL_OPTIONS} vmgang.id={} vmgang.seed={} vmgang.group={}",
            self.name,
            u64::from_le_bytes(seed),
            self.group_seed
        );
        let mut add = |key: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = write!(line, " vmgang.{key}={value}");
        };
        if let Some(fill) = &self.fill {
            add("fill", fill.clone());
        }
        if self.dirty_pages_per_second > 0 {
            add("dirty", self.dirty_pages_per_second.to_string());
        }
        if let Some(rate) = self.verify_pages_per_second {
            add("verify", rate.to_string());
        }
        if self.idle {
            add("idle", "1".to_owned());
        }
        line
    }

    /// The libvirt domain.
    pub fn domain_xml(&self) -> Result<String> {
        self.check()?;
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
    <initrd>{INITRAMFS_PATH}</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{serial}' append='off'/></serial>
    <video><model type='none'/></video>
    <memballoon model='none'/>
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
        if self.memory_mib < 96 {
            return Err(LabError::Request(format!(
                "guest {}: {} MiB is too little for its kernel; give at least 96",
                self.name, self.memory_mib
            )));
        }
        Ok(())
    }
}

/// The file on each host that a guest's serial port is written to.
pub(crate) fn serial_path(guest: &str) -> String {
    format!("/var/log/libvirt/qemu/{guest}.serial.log")
}

/// A guest as seen on one host.
#[derive(Clone, Debug)]
pub struct Guest {
    host: Host,
    name: String,
}

impl Guest {
    pub(crate) fn new(host: Host, name: &str) -> Guest {
        Guest {
            host,
            name: name.to_owned(),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The same guest as seen on another host.
    pub fn on(&self, host: &Host) -> Guest {
        Guest::new(host.clone(), &self.name)
    }

    /// The newest report on this host; `None` before the first. An error when the guest has found
    /// damage in its memory or could not start.
    pub fn report(&self) -> Result<Option<Report>> {
        let (report, faults) = report::read_log(&self.serial()?);
        match faults.into_iter().next() {
            Some(line) => Err(self.fault(line)),
            None => match report {
                Some(report) if report.bad > 0 => Err(self.fault(format!(
                    "bad={}: damaged pages, found on a host it was on before",
                    report.bad
                ))),
                report => Ok(report),
            },
        }
    }

    /// Every line about damage, for a closer look; `report` already fails when there is one.
    pub fn faults(&self) -> Result<Vec<String>> {
        Ok(report::read_log(&self.serial()?).1)
    }

    /// What it has written since it started or arrived here; empty when it is not here yet.
    pub fn serial(&self) -> Result<String> {
        if !self.host.file_exists(serial_path(&self.name)) {
            return Ok(String::new());
        }
        self.host.serial(&self.name)
    }

    /// Waits for a report that fulfils `done`.
    pub fn wait_for(
        &self,
        what: &str,
        timeout: Duration,
        done: impl Fn(&Report) -> bool,
    ) -> Result<Report> {
        let deadline = Instant::now() + timeout;
        loop {
            let report = self.report()?;
            if let Some(report) = report.as_ref().filter(|report| done(report)) {
                return Ok(report.clone());
            }
            if Instant::now() >= deadline {
                let last = report.map_or_else(
                    || {
                        format!(
                            "no report; serial ends: {:?}",
                            tail(&self.serial().unwrap_or_default(), 400)
                        )
                    },
                    |report| format!("{report:?}"),
                );
                return Err(LabError::Timeout {
                    what: format!(
                        "{what} from guest {} on host {}",
                        self.name,
                        self.host.name()
                    ),
                    after: timeout,
                    last,
                });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until the guest has filled its memory and reports.
    pub fn wait_for_report(&self, timeout: Duration) -> Result<Report> {
        self.wait_for("a first report", timeout, |_| true)
    }

    /// Waits until every managed page has been checked once more from now on, and found intact.
    pub fn verify(&self, timeout: Duration) -> Result<Report> {
        let started = Instant::now();
        let now = self.wait_for("a report", timeout, |_| true)?;
        // What was checked between that report and now is not counted on.
        let next = self.wait_for("a newer report", timeout, |report| {
            report.uptime_ms > now.uptime_ms
        })?;
        let target = next.checked + next.pages;
        self.wait_for(
            "a complete check of its memory",
            timeout.saturating_sub(started.elapsed()),
            |report| report.checked >= target,
        )
    }

    pub fn is_running(&self) -> Result<bool> {
        Ok(self.host.domains()?.contains(&self.name))
    }

    /// The live XML of its domain.
    pub fn xml(&self) -> Result<String> {
        self.host.virsh(&["dumpxml", &self.name])
    }

    /// Ends the guest at once.
    pub fn destroy(&self) -> Result<()> {
        self.host.virsh(&["destroy", &self.name]).map(drop)
    }

    fn fault(&self, line: String) -> LabError {
        LabError::Guest {
            guest: self.name.clone(),
            host: self.host.name().to_owned(),
            line,
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
            .with_idle()
            .with_metadata("<x:y xmlns:x='urn:x'/>")
            .domain_xml()
            .expect("a good guest");
        for part in [
            "<memory unit='MiB'>256<",
            "vmgang.fill=zero:50",
            "vmgang.dirty=100",
            "vmgang.idle=1",
            "<metadata><x:y xmlns:x='urn:x'/></metadata>",
            "memfd",
        ] {
            assert!(xml.contains(part), "{part} is missing in {xml}");
        }
        let private = GuestSpec::new("g1").with_private_memory().domain_xml();
        assert!(!private.expect("a good guest").contains("memfd"));
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
