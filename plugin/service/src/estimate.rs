//! What a migration of a gang would send, and who shares how much with whom.
//!
//! Owns: the JSON object of `Estimate`, whose names are a contract. Must not: change anything; it
//! reads the guests' memory twice.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;
use vmgang_dedup::{Census, PAGE_BYTES, PageState, Snapshot};
use vmgang_engine::{Estimator, PageKey, Techniques};
use vmgang_libvirt::DomainInfo;

use crate::budget;
use crate::coordinator::Parts;
use crate::error::ServiceError;
use crate::gangs;
use crate::hypervisor::ask;
use crate::report::Bytes;
use crate::request::Selection;
use crate::scans::Scan;

/// A scan that is no older is taken as it is.
const FRESH: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize)]
struct Estimate {
    gang: String,
    scanned_unix_s: u64,
    members: Vec<Member>,
    /// Pages of the row's member whose content the column's has, too.
    shared: Vec<Vec<u64>>,
    migration: Bytes,
}

/// Counts of pages, but for the memory.
#[derive(Debug, Serialize)]
struct Member {
    name: String,
    uuid: Uuid,
    memory_bytes: u64,
    pages: u64,
    zero: u64,
    uniform: u64,
    content: u64,
    distinct: u64,
    intra_vm: u64,
    cross_vm: u64,
    stable: u64,
    scans: u32,
}

/// Estimates a migration of the gang's running members.
pub(crate) async fn estimate(parts: &Arc<Parts>, gang: &str) -> Result<String, ServiceError> {
    let domains = ask(&parts.hypervisor, |hypervisor| hypervisor.domains()).await?;
    let members = gangs::select(&Selection::Gang(gang.to_owned()), &domains)?;
    let key = (parts.transport)()
        .map_err(ServiceError::TlsFailed)?
        .page_key();
    let (parts, gang) = (parts.clone(), gang.to_owned());
    let work = move || estimate_members(&parts, gang, &members, &key);
    match tokio::task::spawn_blocking(work).await {
        Ok(estimate) => estimate,
        Err(error) => Err(ServiceError::Internal(format!(
            "the estimate failed ({error}); see the log of vmgangd"
        ))),
    }
}

fn estimate_members(
    parts: &Parts,
    gang: String,
    members: &[DomainInfo],
    key: &PageKey,
) -> Result<String, ServiceError> {
    let uuids: Vec<Uuid> = members.iter().map(|member| member.uuid).collect();
    let mut scans = Vec::with_capacity(members.len());
    let results = parts.scans.scan_now(&uuids, key, FRESH);
    for (member, result) in members.iter().zip(results) {
        scans.push(result.map_err(|problem| {
            ServiceError::Internal(format!(
                "the memory of domain {} cannot be read: {problem}",
                member.name
            ))
        })?);
    }
    let snapshots: Vec<&Snapshot> = scans.iter().map(|scan| &*scan.snapshot).collect();
    let census = Census::of(&snapshots);
    let count = members.len();
    let shares = census.shares().iter().zip(members).zip(&snapshots);
    let estimate = Estimate {
        scanned_unix_s: scans.iter().map(|scan| scan.unix_s).min().unwrap_or(0),
        members: shares
            .map(|((shares, member), snapshot)| Member {
                name: member.name.clone(),
                uuid: member.uuid,
                memory_bytes: member.memory_bytes,
                pages: shares.pages,
                zero: shares.zero,
                uniform: shares.uniform,
                content: shares.content,
                distinct: shares.distinct,
                intra_vm: shares.intra_vm,
                cross_vm: shares.cross_vm,
                stable: shares.stable,
                scans: snapshot.scans(),
            })
            .collect(),
        shared: (0..count)
            .map(|row| {
                (0..count)
                    .map(|column| census.shared_with(row, column))
                    .collect()
            })
            .collect(),
        migration: migration(parts, members, &scans, key)
            .map_err(|error| ServiceError::Internal(format!("the estimate failed: {error}")))?,
        gang,
    };
    // Plain structs with string keys cannot fail to serialise.
    Ok(serde_json::to_string(&estimate).unwrap_or_default())
}

/// One pass over the members' memory as it is now.
fn migration(
    parts: &Parts,
    members: &[DomainInfo],
    scans: &[Scan],
    key: &PageKey,
) -> std::io::Result<Bytes> {
    let available = (parts.available_memory)()?;
    let guests = members
        .iter()
        .fold(0u64, |sum, member| sum.saturating_add(member.memory_bytes));
    let window = budget::to_offer(parts.window_budget, guests, available);
    let mut estimator = Estimator::new(key, members.len(), window, Techniques::default())?;
    let mut page = [0; PAGE_BYTES];
    for (member, scan) in scans.iter().enumerate() {
        estimator.member(member)?;
        for (number, block) in scan.snapshot.blocks().iter().enumerate() {
            let mut zeros = 0..0;
            for at in 0..block.pages() {
                match block.state(at) {
                    PageState::Hole | PageState::Uniform(0) => {
                        zeros.end = at + 1;
                        continue;
                    }
                    PageState::Uniform(fill) => page = [fill; PAGE_BYTES],
                    PageState::Content(_) => {
                        let read = scan.memory.read_page(number, at, &mut page);
                        read.map_err(std::io::Error::other)?;
                    }
                }
                if !zeros.is_empty() {
                    estimator.zeros(zeros.start as u64, zeros.len());
                }
                estimator.page(at as u64, &page)?;
                zeros = at + 1..at + 1;
            }
            if !zeros.is_empty() {
                estimator.zeros(zeros.start as u64, zeros.len());
            }
        }
    }
    Ok(Bytes::from(&estimator.finish()?))
}
