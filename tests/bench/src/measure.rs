//! One measured move.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use vmgang_e2e::{expect_running, verify_all};
use vmgang_lab::{Host, Lab};

use crate::contender::Contender;

/// What a move took.
#[derive(Debug, Clone, Serialize)]
pub struct Move {
    pub contender: String,
    pub seconds: f64,
    /// Both directions on the source's interface, all headers included.
    pub link_bytes: u64,
    /// As libvirt on the destination tells, in the order of the gang.
    pub downtime_ms: Vec<u64>,
}

impl Move {
    /// Mean of the guests' downtimes.
    pub fn downtime_mean_ms(&self) -> f64 {
        self.downtime_ms.iter().sum::<u64>() as f64 / self.downtime_ms.len() as f64
    }

    /// Longest of the guests' downtimes.
    pub fn downtime_max_ms(&self) -> u64 {
        self.downtime_ms.iter().copied().max().unwrap_or(0)
    }
}

/// Moves the gang from a to b, and brings it back (over an unlimited link, unmeasured) to where
/// the next contender starts. `verify`: every guest checks all its memory in between.
pub fn there_and_back(
    lab: &Lab,
    guests: &[&str],
    contender: Contender,
    link: Option<u64>,
    verify: bool,
) -> Result<Move> {
    let moved = there(lab, guests, contender, link)?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    if verify {
        verify_all(b, guests)?;
    }
    lab.shape(None)?;
    Contender::StockParallel.migrate(guests, b, a)?;
    expect_running(a, guests)?;
    Ok(moved)
}

/// Moves the gang from a to b.
pub fn there(lab: &Lab, guests: &[&str], contender: Contender, link: Option<u64>) -> Result<Move> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    lab.shape(link)?;
    let before = a.net_counters()?;
    let start = Instant::now();
    contender.migrate(guests, a, b)?;
    let seconds = start.elapsed().as_secs_f64();
    let after = a.net_counters()?;
    let downtime_ms = guests
        .iter()
        .map(|guest| downtime_ms(b, guest))
        .collect::<Result<_>>()?;
    let running = b.domains()?;
    let arrived = |guest: &&str| running.iter().any(|name| name == guest);
    ensure!(
        guests.iter().all(arrived),
        "of {guests:?} only {running:?} arrived"
    );
    Ok(Move {
        contender: contender.title().to_owned(),
        seconds,
        link_bytes: after.tx_bytes - before.tx_bytes + after.rx_bytes - before.rx_bytes,
        downtime_ms,
    })
}

fn downtime_ms(host: &Host, guest: &str) -> Result<u64> {
    let info = host.virsh(&["domjobinfo", guest, "--completed"])?;
    info.lines()
        .find_map(|line| line.strip_prefix("Total downtime:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("no downtime of {guest} in {info:?}"))
}
