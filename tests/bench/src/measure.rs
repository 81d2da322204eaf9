//! One measured move.
//!
//! Owns: what is read before, during and after it, from outside of whoever moves the guests.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use vmgang_e2e::{JobResult, expect_running, uri, verify_all, vmgang};
use vmgang_lab::{Host, Lab};

use crate::congestion::{Congestion, Delivered};
use crate::contender::{Contender, parallel};
use crate::cost::{Cost, Meter};
use crate::gang::GANG;
use crate::load::{Load, Watch};

/// Between preparing and the migration.
const PREPARED_FOR: Duration = Duration::from_secs(10);

/// What a move took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Move {
    pub contender: String,
    pub seconds: f64,
    /// Both directions on the source's interface, all headers included, other traffic left out.
    pub link_bytes: u64,
    /// As libvirt on the destination tells, in the order of the gang.
    pub downtime_ms: Vec<u64>,
    pub cost: Cost,
    /// Of guests that were watched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<Load>,
    /// The other traffic on the link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub congestion: Option<Delivered>,
    /// What preparing took, which is in no other figure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Preparation>,
    /// What vmgang told about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<Told>,
}

/// What `vmgang prepare` took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Preparation {
    pub seconds: f64,
    pub link_bytes: u64,
}

/// Of vmgang's own figures, those that cannot be seen from outside, in bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Told {
    pub qemu_stream: u64,
    pub wire: u64,
    pub saved_zero: i64,
    pub saved_uniform: i64,
    pub saved_intra_vm: i64,
    pub saved_cross_vm: i64,
    pub saved_other: i64,
}

impl From<JobResult> for Told {
    fn from(job: JobResult) -> Self {
        let saved = &job.bytes.saved;
        let named = saved.zero + saved.uniform + saved.intra_vm + saved.cross_vm;
        Self {
            qemu_stream: job.bytes.qemu_stream,
            wire: job.bytes.wire,
            saved_zero: saved.zero,
            saved_uniform: saved.uniform,
            saved_intra_vm: saved.intra_vm,
            saved_cross_vm: saved.cross_vm,
            saved_other: saved.total() - named,
        }
    }
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

/// Under which circumstances guests are moved.
#[derive(Debug, Clone, Copy, Default)]
pub struct Circumstances {
    /// What the link carries, in bits per second.
    pub link: Option<u64>,
    /// How much of that is other traffic.
    pub congestion: Option<u64>,
    /// Guests have something to do and are watched.
    pub watch: bool,
}

/// Moves guests from a to b, and brings them back (over an unlimited link, unmeasured) to where
/// the next contender starts. `verify`: every guest checks all its memory in between.
pub fn there_and_back(
    lab: &Lab,
    guests: &[&str],
    contender: Contender,
    circumstances: Circumstances,
    verify: bool,
) -> Result<Move> {
    let moved = there(lab, guests, contender, circumstances)?;
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    if verify {
        verify_all(b, guests)?;
    }
    lab.shape(None)?;
    // As fast as it goes.
    parallel(guests, b, a, &["--parallel"])?;
    expect_running(b, &[])?;
    Ok(moved)
}

/// Moves guests from a to b.
pub fn there(
    lab: &Lab,
    guests: &[&str],
    contender: Contender,
    circumstances: Circumstances,
) -> Result<Move> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    lab.shape(circumstances.link)?;
    let prepared = match contender {
        Contender::Prepared => Some(prepare(a, b)?),
        _ => None,
    };
    let congestion = circumstances
        .congestion
        .map(|rate| Congestion::start(lab, rate))
        .transpose()?;
    let watch = circumstances
        .watch
        .then(|| Watch::start(lab, guests))
        .transpose()?;

    let other_before = congestion.as_ref().map(Congestion::so_far);
    let before = a.net_counters()?;
    let meter = Meter::start(lab)?;
    let start = Instant::now();
    let job = contender.migrate(guests, a, b)?;
    let seconds = start.elapsed().as_secs_f64();
    let cost = meter.finish()?;
    let counted = a.net_counters()?.since(&before);
    let other = congestion
        .as_ref()
        .zip(other_before)
        .map(|(now, before)| since(&now.so_far(), &before));
    let load = watch.map(|watch| watch.finish(lab, guests)).transpose()?;

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
    // What waits in the link's queue at the beginning is no tenth.
    ensure!(
        other.as_ref().is_none_or(|other| other.share() < 1.1),
        "more of the other traffic has arrived than was sent: {other:?}"
    );
    let received = other.as_ref().map_or(0, |other| other.received_bytes);
    Ok(Move {
        contender: contender.title().to_owned(),
        seconds,
        link_bytes: (counted.tx_bytes + counted.rx_bytes).saturating_sub(received),
        downtime_ms,
        cost,
        load,
        congestion: other,
        prepared,
        job: job.map(Told::from),
    })
}

fn since(now: &Delivered, before: &Delivered) -> Delivered {
    Delivered {
        sent_bytes: now.sent_bytes - before.sent_bytes,
        received_bytes: now.received_bytes - before.received_bytes,
    }
}

fn prepare(from: &Host, to: &Host) -> Result<Preparation> {
    let before = from.net_counters()?;
    let start = Instant::now();
    vmgang(from, &["prepare", "--json", GANG, &uri(to)])?.expect(0)?;
    let seconds = start.elapsed().as_secs_f64();
    let counted = from.net_counters()?.since(&before);
    std::thread::sleep(PREPARED_FOR);
    Ok(Preparation {
        seconds,
        link_bytes: counted.tx_bytes + counted.rx_bytes,
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
