//! The faults: how each strikes and how it is healed.
//!
//! Owns: everything that is done to the hosts on purpose. Must not: judge what comes of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use vmgang_lab::{Daemon, Host, Loss, MemoryGroup};

use crate::gang::{self, Here, STATE_DIR, Way};
use crate::phases::{Needs, Phase};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    SourceVmgangd,
    DestinationVmgangd,
    SourceQemu,
    DestinationQemu,
    SourceLibvirtd,
    DestinationLibvirtd,
    LinkCut,
    HalfOpenForth,
    HalfOpenBack,
    Loss,
    DestinationMemory,
    StateDisk,
    SystemBus,
}

/// When what was broken is put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Healing {
    /// Soon, as systemd starts a killed service again.
    Soon,
    /// Not before the job has ended: it has to notice by itself.
    AfterTheJob,
}

/// How long a service manager takes.
const SOON: Duration = Duration::from_secs(1);
/// How long a daemon that lost its bus may take to end its jobs and itself.
const END_TIMEOUT: Duration = Duration::from_secs(90);
/// How long libvirtd may take to end after its bus; later it is taken to run on.
const LIBVIRTD_END_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the kernel may take to find whom to kill.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
const LOSS_PERCENT: u8 = 1;

impl Fault {
    pub const ALL: [Fault; 13] = [
        Fault::SourceVmgangd,
        Fault::DestinationVmgangd,
        Fault::SourceQemu,
        Fault::DestinationQemu,
        Fault::SourceLibvirtd,
        Fault::DestinationLibvirtd,
        Fault::LinkCut,
        Fault::HalfOpenForth,
        Fault::HalfOpenBack,
        Fault::Loss,
        Fault::DestinationMemory,
        Fault::StateDisk,
        Fault::SystemBus,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Fault::SourceVmgangd => "source vmgangd killed",
            Fault::DestinationVmgangd => "destination vmgangd killed",
            Fault::SourceQemu => "a source QEMU killed",
            Fault::DestinationQemu => "a destination QEMU killed",
            Fault::SourceLibvirtd => "source libvirtd killed",
            Fault::DestinationLibvirtd => "destination libvirtd killed",
            Fault::LinkCut => "link cut",
            Fault::HalfOpenForth => "link half-open, nothing arrives",
            Fault::HalfOpenBack => "link half-open, nothing comes back",
            Fault::Loss => "1 % of packets lost",
            Fault::DestinationMemory => "destination out of memory",
            Fault::StateDisk => "state directory full",
            Fault::SystemBus => "source system bus killed",
        }
    }

    /// How it is made and healed.
    pub fn meaning(self) -> &'static str {
        match self {
            Fault::SourceVmgangd | Fault::DestinationVmgangd => {
                "SIGKILL; started again a second later, as systemd does"
            }
            Fault::SourceQemu => {
                "SIGKILL of the QEMU that runs one member: of `small`, at the switchover of one whose \
                 guest is stopped, at the finish of one that has not migrated. The guest's only \
                 QEMU, so the guest is lost with or without vmgang, unless the other QEMU had \
                 everything already"
            }
            Fault::DestinationQemu => {
                "SIGKILL of the same member's QEMU on the destination; at the finish of one that \
                 has migrated, whose only QEMU it is"
            }
            Fault::SourceLibvirtd | Fault::DestinationLibvirtd => {
                "SIGKILL; started again a second later; QEMUs run on"
            }
            Fault::LinkCut => {
                "the destination's port on the switch is taken down; up again when the job has \
                 ended. A cut at the handshake once left a job that had not ended after 120 s, when \
                 the link came back; probably libvirtd was just connecting, and waited for its \
                 kernel to give up"
            }
            Fault::HalfOpenForth => {
                "the packet filter of the destination drops all it receives, without a word; taken \
                 back when the job has ended"
            }
            Fault::HalfOpenBack => {
                "the packet filter of the destination drops all it sends; taken back when the job \
                 has ended"
            }
            Fault::Loss => {
                "the packet filter of the destination drops one packet of a hundred at random, in \
                 both directions, until the job has ended"
            }
            Fault::DestinationMemory => {
                "a control group around the whole destination host is limited to what it uses at \
                 that moment, 64 MiB at least, and 48 MiB of that are taken by a process that cannot be killed: \
                 the kernel kills the largest other one (here vmgangd with its page window); lifted when the job has ended, and \
                 daemons that were killed are started again"
            }
            Fault::StateDisk => {
                "the source's `state_dir` is a file system of 1 MiB that is filled to the last \
                 byte; the daemon is restarted while it is full, then it is emptied"
            }
            Fault::SystemBus => {
                "SIGKILL of the source's dbus-daemon, with which libvirtd ends as well; bus and polkit \
                 are started again a second later, libvirtd and vmgangd when they have ended by \
                 themselves, as systemd does"
            }
        }
    }

    pub fn healing(self) -> Healing {
        match self {
            Fault::SourceVmgangd
            | Fault::DestinationVmgangd
            | Fault::SourceQemu
            | Fault::DestinationQemu
            | Fault::SourceLibvirtd
            | Fault::DestinationLibvirtd
            | Fault::SystemBus => Healing::Soon,
            Fault::LinkCut
            | Fault::HalfOpenForth
            | Fault::HalfOpenBack
            | Fault::Loss
            | Fault::DestinationMemory
            | Fault::StateDisk => Healing::AfterTheJob,
        }
    }

    pub fn needs(self) -> Needs {
        match self {
            Fault::SourceQemu => Needs::SourceQemu,
            Fault::DestinationQemu => Needs::DestinationQemu,
            _ => Needs::Nothing,
        }
    }

    /// Nothing is wrong with the job itself: it has to complete.
    pub fn harmless(self) -> bool {
        matches!(self, Fault::Loss | Fault::StateDisk)
    }
}

/// What a fault has done.
#[derive(Debug, Default)]
pub struct Struck {
    /// Members whose only QEMU was killed.
    pub lost: Vec<String>,
    /// There was nothing left to strike.
    pub nothing: bool,
    /// What was hit, where that is not always the same.
    pub note: Option<String>,
}

/// A fault that is ready to strike.
pub struct Armed<'l> {
    fault: Fault,
    way: Way<'l>,
    /// Of the daemon that is going to be killed: looking for it takes time.
    process: Option<u32>,
    memory: Option<MemoryGroup>,
}

impl<'l> Armed<'l> {
    /// Before the job is started.
    pub fn new(fault: Fault, way: Way<'l>) -> Result<Armed<'l>> {
        let mut armed = Armed {
            fault,
            way,
            process: None,
            memory: None,
        };
        if let Some((daemon, _)) = armed.daemon() {
            armed.process = Some(
                daemon
                    .pid()?
                    .context("the daemon to be killed does not run")?,
            );
        }
        if fault == Fault::DestinationMemory {
            armed.memory = Some(MemoryGroup::of(way.to)?);
        }
        Ok(armed)
    }

    fn daemon(&self) -> Option<(Daemon, &'l Host)> {
        let (from, to) = (self.way.from, self.way.to);
        Some(match self.fault {
            Fault::SourceVmgangd => (from.vmgangd(), from),
            Fault::DestinationVmgangd => (to.vmgangd(), to),
            Fault::SourceLibvirtd => (from.libvirtd(), from),
            Fault::DestinationLibvirtd => (to.libvirtd(), to),
            Fault::SystemBus => (from.bus(), from),
            _ => return None,
        })
    }

    pub fn strike(
        &mut self,
        phase: Phase,
        moment: &BTreeMap<&'static str, Here>,
    ) -> Result<Struck> {
        let (from, to) = (self.way.from, self.way.to);
        let mut struck = Struck::default();
        match self.fault {
            Fault::SourceVmgangd
            | Fault::DestinationVmgangd
            | Fault::SourceLibvirtd
            | Fault::DestinationLibvirtd
            | Fault::SystemBus => {
                if let (Some((_, host)), Some(process)) = (self.daemon(), self.process) {
                    host.kill(process, "KILL")?;
                }
            }
            Fault::SourceQemu | Fault::DestinationQemu => {
                self.kill_qemu(phase, moment, &mut struck)?;
            }
            Fault::LinkCut => self.way.lab.partition(to.name())?,
            Fault::HalfOpenForth => to.lose_packets(Some(Loss::Incoming))?,
            Fault::HalfOpenBack => to.lose_packets(Some(Loss::Outgoing))?,
            Fault::Loss => to.lose_packets(Some(Loss::Percent(LOSS_PERCENT)))?,
            Fault::DestinationMemory => self.exhaust(&mut struck)?,
            Fault::StateDisk => from.fill_disk(&format!("{STATE_DIR}/full"))?,
        }
        Ok(struck)
    }

    fn kill_qemu(
        &self,
        phase: Phase,
        moment: &BTreeMap<&'static str, Here>,
        struck: &mut Struck,
    ) -> Result<()> {
        let source = self.fault == Fault::SourceQemu;
        let host = if source { self.way.from } else { self.way.to };
        let qemus = gang::qemus(host)?;
        let fits = |name: &str| match (phase, moment.get(name)) {
            // Just after the first one was started there may be no other yet.
            (Phase::Handshake, _) => true,
            (Phase::Switchover, here) => here == Some(&Here::Stopped),
            (Phase::Finish, here) => source != (here == Some(&Here::Gone)),
            _ => name == "small",
        };
        let Some((name, process)) = qemus.iter().rfind(|(name, _)| fits(name)) else {
            struck.nothing = true;
            struck.note = Some("there was no such QEMU any more".to_owned());
            return Ok(());
        };
        host.kill(*process, "KILL")?;
        struck.note = Some(format!("of {name}"));
        let gone = || gang::moment(self.way.from).get(name.as_str()) == Some(&Here::Gone);
        if source || gone() {
            struck.lost.push(name.clone());
        }
        Ok(())
    }

    fn exhaust(&mut self, struck: &mut Struck) -> Result<()> {
        let to = self.way.to;
        let running = || -> Result<BTreeMap<String, u32>> {
            let mut running = gang::qemus(to)?;
            for (name, daemon) in [("vmgangd", to.vmgangd()), ("libvirtd", to.libvirtd())] {
                if let Some(process) = daemon.pid()? {
                    running.insert(name.to_owned(), process);
                }
            }
            Ok(running)
        };
        let before = running()?;
        let memory = self.memory.as_mut().context("no control group")?;
        memory.exhaust()?;
        let deadline = Instant::now() + KILL_TIMEOUT;
        loop {
            let now = running()?;
            let gone: Vec<&String> = before
                .iter()
                .filter(|(name, process)| now.get(*name) != Some(process))
                .map(|(name, _)| name)
                .collect();
            if !gone.is_empty() {
                let names: Vec<&str> = gone.iter().map(|name| name.as_str()).collect();
                struck.note = Some(format!("first to be killed: {}", names.join(", ")));
                let here = gang::moment(self.way.from);
                let only = gone
                    .into_iter()
                    .filter(|name| here.get(name.as_str()) == Some(&Here::Gone));
                struck.lost.extend(only.cloned());
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the kernel killed nobody");
        }
    }

    /// Puts everything right again.
    pub fn heal(&mut self) -> Result<()> {
        let (from, to) = (self.way.from, self.way.to);
        if self.fault.healing() == Healing::Soon {
            std::thread::sleep(SOON);
        }
        match self.fault {
            Fault::SourceVmgangd
            | Fault::DestinationVmgangd
            | Fault::SourceLibvirtd
            | Fault::DestinationLibvirtd => {
                if let Some((daemon, _)) = self.daemon() {
                    daemon.start()?;
                }
            }
            Fault::SourceQemu | Fault::DestinationQemu => {}
            Fault::LinkCut => self.way.lab.heal(to.name())?,
            Fault::HalfOpenForth | Fault::HalfOpenBack | Fault::Loss => to.lose_packets(None)?,
            Fault::DestinationMemory => {
                if let Some(mut memory) = self.memory.take() {
                    memory.relieve()?;
                }
                for daemon in [to.bus(), to.libvirtd(), to.vmgangd()] {
                    if !daemon.is_running()? {
                        daemon.start()?;
                    }
                }
            }
            Fault::StateDisk => {
                let restarted = from.vmgangd().restart();
                from.run(&["sh", "-c", "rm -f \"$0\"/full*", STATE_DIR])?;
                restarted.context("vmgangd was restarted while its state directory was full")?;
            }
            Fault::SystemBus => {
                from.bus().start()?;
                if !from.polkitd().is_running()? {
                    from.polkitd().start()?;
                }
                // libvirtd ends with the bus it was connected to, as all that use GLib's does; it
                // may take a while. Started by hand as systemd's socket does.
                let deadline = Instant::now() + LIBVIRTD_END_TIMEOUT;
                while from.libvirtd().is_running()? && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(100));
                }
                if !from.libvirtd().is_running()? {
                    from.libvirtd().start()?;
                }
                let deadline = Instant::now() + END_TIMEOUT;
                while from.vmgangd().is_running()? {
                    ensure!(
                        Instant::now() < deadline,
                        "vmgangd lost the bus and neither ended nor came back"
                    );
                    std::thread::sleep(Duration::from_millis(100));
                }
                from.vmgangd().start()?;
            }
        }
        Ok(())
    }
}
