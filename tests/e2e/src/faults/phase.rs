//! The phases of a job, and how a cell meets one.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;
use serde_json::Value;
use vmgang_lab::{Host, HostChild};

use super::cell::{BUSY, LARGE, SMALL, Site};
use crate::vmgang;

/// When something breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Phase {
    /// The daemons know each other, and no guest has sent anything.
    Handshake,
    FirstPass,
    /// Two members are held for the third, which is not done.
    Barrier,
    /// The gang was let go, and a guest has stopped.
    Switchover,
    /// The first member runs at the destination.
    Finish,
}

const PATIENCE: Duration = Duration::from_secs(60);
/// What the large member has sent in the middle of its first pass.
const FIRST_PASS_BYTES: u64 = 2 << 20;

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

    /// Waits for it; false if the job has ended before. In the barrier the large member is frozen.
    pub fn reach(self, site: &Site<'_>, migrating: &mut HostChild) -> Result<bool> {
        let source = site.source;
        let mut wait = |done: &dyn Fn(&Value) -> bool| -> Result<bool> {
            let deadline = Instant::now() + PATIENCE;
            while Instant::now() < deadline {
                if let Some(job) = job(source)?
                    && done(&job)
                {
                    return Ok(true);
                }
                if migrating.try_wait()?.is_some() {
                    return Ok(false);
                }
            }
            Ok(false)
        };
        match self {
            Phase::Handshake => wait(&|_| true),
            Phase::FirstPass => wait(&|job| sent(job) > FIRST_PASS_BYTES),
            Phase::Barrier => {
                if !wait(&|job| sent(job) > FIRST_PASS_BYTES)? {
                    return Ok(false);
                }
                source.guest(LARGE).freeze()?;
                wait(&|job| {
                    [SMALL, BUSY]
                        .iter()
                        .all(|guest| state(job, guest) == "held")
                })
            }
            Phase::Switchover => wait(&|job| any(job, &["switching", "migrated"])),
            Phase::Finish => wait(&|job| any(job, &["migrated"])),
        }
    }
}

/// The running job.
fn job(host: &Host) -> Result<Option<Value>> {
    let status = vmgang(host, &["status", "--json"])?;
    let jobs: Value = serde_json::from_str(&status.stdout).unwrap_or_default();
    Ok(jobs.get(0).cloned())
}

fn member<'a>(job: &'a Value, guest: &str) -> Option<&'a Value> {
    let members = job["domains"].as_array()?;
    members.iter().find(|member| member["name"] == guest)
}

fn sent(job: &Value) -> u64 {
    let large = member(job, LARGE);
    large
        .and_then(|large| large["qemu_stream_bytes"].as_u64())
        .unwrap_or(0)
}

fn state<'a>(job: &'a Value, guest: &str) -> &'a str {
    let member = member(job, guest);
    member
        .and_then(|member| member["state"].as_str())
        .unwrap_or_default()
}

fn any(job: &Value, states: &[&str]) -> bool {
    [LARGE, SMALL, BUSY]
        .iter()
        .any(|guest| states.contains(&state(job, guest)))
}
