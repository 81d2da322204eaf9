//! The moments of a job at which a fault can strike.
//!
//! Owns: how each phase is recognised from outside, and what was seen at that moment. Must not:
//! do anything to the job, or call a phase reached that was over.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use vmgang_e2e::{PATIENCE, vmgang};
use vmgang_lab::HostChild;

use crate::gang::{self, Here, Way};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    Handshake,
    FirstPass,
    Barrier,
    Switchover,
    Finish,
}

impl Phase {
    pub const ALL: [Phase; 5] = [
        Phase::Handshake,
        Phase::FirstPass,
        Phase::Barrier,
        Phase::Switchover,
        Phase::Finish,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Phase::Handshake => "handshake",
            Phase::FirstPass => "first pass",
            Phase::Barrier => "barrier",
            Phase::Switchover => "switchover",
            Phase::Finish => "finish",
        }
    }

    /// What is waited for.
    pub fn meaning(self) -> &'static str {
        match self {
            Phase::Handshake => {
                "the daemons' connection is there, the job is not or just so (for faults of a \
                 destination QEMU: that QEMU has just been started)"
            }
            Phase::FirstPass => "3 MB have been sent",
            Phase::Barrier => "two members are held, the third still copies",
            Phase::Switchover => "the gang was released and at least one guest is stopped",
            Phase::Finish => {
                "at least one member has migrated and is gone from the source, the job has not \
                 ended"
            }
        }
    }
}

/// Whose process has to be there for a fault to strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Nothing,
    SourceQemu,
    DestinationQemu,
}

/// The port of vmgangd, as the kernel writes it.
const PEER_PORT: &str = ":4088";
const ESTABLISHED: &str = "01";
const FIRST_PASS_BYTES: u64 = 3_000_000;
/// The member that has most to send.
const LARGE: &str = "large";
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// One job that is watched from its start.
pub struct Watch<'l> {
    way: Way<'l>,
    log_before: usize,
    sent_before: u64,
}

impl<'l> Watch<'l> {
    /// Before the job is started.
    pub fn new(way: Way<'l>) -> Result<Watch<'l>> {
        Ok(Watch {
            way,
            log_before: way.from.vmgangd().log().len(),
            sent_before: way.from.net_counters()?.tx_bytes,
        })
    }

    /// Waits for a phase; how the guests stood at that moment, or nothing if the job went by.
    pub fn until(
        &self,
        phase: Phase,
        needs: Needs,
        job: &mut HostChild,
    ) -> Result<Option<BTreeMap<&'static str, Here>>> {
        let deadline = Instant::now() + PATIENCE;
        // Pacing brings all of them to the end of their first passes together: for others to be held,
        // the QEMU of the large one must have no time for a while.
        let mut frozen = false;
        loop {
            if phase == Phase::Barrier && !frozen && self.sends(LARGE)? {
                self.way.from.guest(LARGE).freeze()?;
                frozen = true;
            }
            let moment = gang::moment(self.way.from);
            if self.is(phase, &moment, needs)? {
                if frozen {
                    // It has most of its memory to send.
                    self.way.from.guest(LARGE).thaw()?;
                }
                return Ok(Some(moment));
            }
            if job.try_wait()?.is_some() || self.job_ended() {
                return Ok(None);
            }
            ensure!(
                Instant::now() < deadline,
                "waited in vain for the phase {}",
                phase.title()
            );
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    fn is(
        &self,
        phase: Phase,
        moment: &BTreeMap<&'static str, Here>,
        needs: Needs,
    ) -> Result<bool> {
        let any = |wanted: Here| moment.values().any(|here| *here == wanted);
        Ok(match phase {
            Phase::Handshake if needs == Needs::DestinationQemu => {
                !gang::qemus(self.way.to)?.is_empty()
            }
            Phase::Handshake => self.connected()?,
            Phase::FirstPass => {
                let sent = self.way.from.net_counters()?.tx_bytes;
                sent > self.sent_before + FIRST_PASS_BYTES
            }
            Phase::Barrier => self.held()?,
            Phase::Switchover => any(Here::Stopped) && self.logged("released"),
            // libvirt ends a QEMU some time before it forgets the domain.
            Phase::Finish if needs == Needs::SourceQemu => {
                let left = gang::qemus(self.way.from)?.len();
                left > 0 && left < moment.len() && self.logged("released")
            }
            Phase::Finish => any(Here::Gone) && self.logged("released"),
        })
    }

    /// The daemon has said that the job ended.
    pub fn job_ended(&self) -> bool {
        self.logged("job ended")
    }

    fn logged(&self, words: &str) -> bool {
        let log = self.way.from.vmgangd().log();
        log.get(self.log_before..)
            .is_some_and(|new| new.contains(words))
    }

    /// The source's daemon has a connection to the destination's.
    fn connected(&self) -> Result<bool> {
        let process = self.way.from.pid();
        for kind in ["tcp", "tcp6"] {
            let table = std::fs::read_to_string(format!("/proc/{process}/net/{kind}"))?;
            let found = table.lines().any(|line| {
                let mut fields = line.split_whitespace().skip(2);
                let peer = fields.next().is_some_and(|peer| peer.ends_with(PEER_PORT));
                peer && fields.next() == Some(ESTABLISHED)
            });
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The members of the running job as it shows them.
    fn members(&self) -> Result<Vec<serde_json::Value>> {
        let status = vmgang(self.way.from, &["status", "--json"])?.expect(0)?;
        let jobs: serde_json::Value = serde_json::from_str(&status.stdout)?;
        Ok(jobs[0]["domains"].as_array().cloned().unwrap_or_default())
    }

    fn sends(&self, guest: &str) -> Result<bool> {
        let sends = |member: &serde_json::Value| {
            member["name"] == guest && member["qemu_stream_bytes"].as_u64() > Some(1 << 20)
        };
        Ok(self.members()?.iter().any(sends))
    }

    fn held(&self) -> Result<bool> {
        let members = self.members()?;
        let is = |guest: &str, state: &str| {
            members
                .iter()
                .any(|member| member["name"] == guest && member["state"] == state)
        };
        Ok(is("small", "held") && is("busy", "held") && is(LARGE, "copying"))
    }
}
