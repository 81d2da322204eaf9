//! A running guest as tests see it.
//!
//! A guest tells about itself on its serial port. Each host has a file of its own for that, so
//! what a guest says after a migration is read on the host it moved to.

use std::fs::File;
use std::time::{Duration, Instant};

use crate::error::{LabError, Result, tail};
use crate::host::{Host, POLL_INTERVAL};
use crate::memory;
use crate::report::{self, Report};

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

    /// Its memory as QEMU holds it, to be read; what is written there damages the guest.
    pub fn memory(&self) -> Result<File> {
        memory::open(&self.host, &self.name)
    }

    /// Stops its QEMU itself, as if the host had no time for it, until `thaw`. libvirt gets no answer
    /// from it meanwhile.
    pub fn freeze(&self) -> Result<()> {
        self.signal_qemu("-STOP")
    }

    /// Lets its QEMU go on.
    pub fn thaw(&self) -> Result<()> {
        self.signal_qemu("-CONT")
    }

    fn signal_qemu(&self, signal: &str) -> Result<()> {
        let path = format!("/run/libvirt/qemu/{}.pid", self.name);
        let pid = self.host.read_text(path)?;
        let kill = format!("kill {signal} {}", pid.trim());
        self.host.run(&["sh", "-c", &kill]).map(drop)
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
