//! Members' memory balloons: before a job each guest gives up what it does not need, so that it
//! is not sent; after the job it gets that back, wherever it runs then.
//!
//! Owns how much a guest is left with, and what has to be given back. Must not: take from a guest of
//! which it is not known how much it needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use vmgang_libvirt::{Balloon, DomainInfo, DomainState};

use crate::error::ServiceError;
use crate::hypervisor::{Hypervisor, ask};
use crate::libvirt_access::DestinationLibvirt;

const MIB: u64 = 1 << 20;
/// A guest is left with what it uses and this share of its maximum, in percent, or so much.
const MARGIN_PERCENT: u64 = 10;
const MARGIN_BYTES: u64 = 64 * MIB;
/// And with never less than this share of its maximum, or than so much.
const FLOOR_PERCENT: u64 = 25;
const FLOOR_BYTES: u64 = 128 * MIB;
/// Less is not worth a guest's trouble.
const WORTH_BYTES: u64 = 16 * MIB;

/// A libvirt connection serves five calls at a time.
const LANES: usize = 3;
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// How long a guest may take to tell what it could do without.
const TELL_TIMEOUT: Duration = Duration::from_secs(10);
/// It is asked that often, in seconds.
const TELL_PERIOD_S: u32 = 1;
/// How long a guest may give up nothing more before it is taken at its word.
const STEP_TIMEOUT: Duration = Duration::from_secs(3);
const SHRINK_TIMEOUT: Duration = Duration::from_secs(60);
const GIVE_BACK_ATTEMPTS: u32 = 5;
const GIVE_BACK_PAUSE: Duration = Duration::from_secs(1);

/// A guest as it was before: kept on disk, so that also a daemon that was killed gives back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    pub uuid: Uuid,
    pub name: String,
    pub memory_bytes: u64,
    pub period_s: u32,
}

/// How much memory a guest is left with; `None` if it does not tell what it needs, or needs it all.
fn target(balloon: &Balloon) -> Option<u64> {
    let share = |percent: u64| balloon.maximum_bytes / 100 * percent;
    let used = balloon.current_bytes.saturating_sub(balloon.usable_bytes?);
    let needed = used.saturating_add(share(MARGIN_PERCENT).max(MARGIN_BYTES));
    let target = needed
        .max(share(FLOOR_PERCENT).max(FLOOR_BYTES))
        .next_multiple_of(MIB);
    (target.saturating_add(WORTH_BYTES) <= balloon.current_bytes).then_some(target)
}

/// How the balloons of members that run and have one are now. Changes nothing.
pub(crate) async fn look(
    hypervisor: &Arc<dyn Hypervisor>,
    members: &[DomainInfo],
) -> Result<Vec<Before>, ServiceError> {
    let mut found = Vec::new();
    for member in members {
        let uuid = member.uuid;
        let balloon = match member.state {
            DomainState::Running => ask(hypervisor, move |h| h.balloon(uuid)).await?,
            // It would not answer.
            _ => None,
        };
        match balloon {
            Some(balloon) => found.push(Before {
                uuid,
                name: member.name.clone(),
                memory_bytes: balloon.current_bytes,
                period_s: balloon.period_s,
            }),
            None => tracing::info!(
                domain = member.name,
                "does not run, or has no memory balloon: moves with all its memory"
            ),
        }
    }
    Ok(found)
}

/// Lets guests give up what they do not need. Returns how many bytes each gave up. Ends early, within
/// a moment, when told to `stop`; nothing is asked of libvirt any more when it has returned.
pub(crate) async fn shrink(
    hypervisor: &Arc<dyn Hypervisor>,
    guests: &[Before],
    stop: &AtomicBool,
) -> Vec<u64> {
    let shrinking: Vec<_> = guests
        .iter()
        .map(|guest| async move {
            match shrink_one(hypervisor, guest, stop).await {
                Ok(given) => given,
                Err(error) => {
                    let error = error.sentence();
                    tracing::warn!(domain = guest.name, error, "its balloon cannot be used");
                    0
                }
            }
        })
        .collect();
    stream::iter(shrinking).buffered(LANES).collect().await
}

async fn shrink_one(
    hypervisor: &Arc<dyn Hypervisor>,
    guest: &Before,
    stop: &AtomicBool,
) -> Result<u64, ServiceError> {
    let uuid = guest.uuid;
    let look = || async move {
        let balloon = ask(hypervisor, move |h| h.balloon(uuid)).await?;
        balloon.ok_or_else(|| ServiceError::Internal("the memory balloon is gone".into()))
    };
    ask(hypervisor, move |h| {
        h.set_balloon_period(uuid, TELL_PERIOD_S)
    })
    .await?;
    let asked_unix_s = unix_seconds();
    let until = Instant::now() + TELL_TIMEOUT;
    let mut now = look().await?;
    while now.usable_bytes.is_none() || now.told_unix_s <= asked_unix_s {
        if stop.load(Relaxed) {
            return Ok(0);
        }
        if Instant::now() > until {
            tracing::info!(
                domain = guest.name,
                "does not tell what it needs (does its system have a driver for the memory balloon?): moves with all its memory"
            );
            return Ok(0);
        }
        sleep(LOOK_INTERVAL).await;
        now = look().await?;
    }
    let before = now.current_bytes;
    let Some(target) = target(&now) else {
        return Ok(0);
    };
    ask(hypervisor, move |h| h.set_memory(uuid, target)).await?;
    let began = Instant::now();
    let mut step = began;
    while now.current_bytes > target && !stop.load(Relaxed) {
        if step.elapsed() > STEP_TIMEOUT || began.elapsed() > SHRINK_TIMEOUT {
            break;
        }
        sleep(LOOK_INTERVAL).await;
        let then = std::mem::replace(&mut now, look().await?);
        if now.current_bytes < then.current_bytes {
            step = Instant::now();
        }
    }
    let given = before.saturating_sub(now.current_bytes);
    tracing::info!(
        domain = guest.name,
        before_bytes = before,
        target_bytes = target,
        given_bytes = given,
        "gave up memory for its move"
    );
    Ok(given)
}

/// Gives guests back what they had, wherever they run. Returns those for which that could not be done.
pub(crate) async fn give_back(
    hypervisor: &Arc<dyn Hypervisor>,
    guests: Vec<Before>,
    destination: &DestinationLibvirt,
) -> Vec<Before> {
    let mut left = guests;
    for attempt in 0..GIVE_BACK_ATTEMPTS {
        if left.is_empty() {
            break;
        }
        if attempt > 0 {
            sleep(GIVE_BACK_PAUSE).await;
        }
        left = attempt_to_give_back(hypervisor, left, destination).await;
    }
    left
}

/// The same once, without patience.
pub(crate) async fn attempt_to_give_back(
    hypervisor: &Arc<dyn Hypervisor>,
    guests: Vec<Before>,
    destination: &DestinationLibvirt,
) -> Vec<Before> {
    let uri = destination.uri().to_owned();
    let there = ask(hypervisor, move |h| h.inspect_destination(&uri)).await;
    let mut left = Vec::new();
    for guest in guests {
        let uuid = guest.uuid;
        let here = ask(hypervisor, move |h| h.domain(uuid)).await;
        let here = match here {
            Ok(domain) => Ok(domain.active()),
            Err(ServiceError::UnknownDomain(_)) => Ok(false),
            Err(error) => Err(error),
        };
        let there = match &there {
            Ok(found) => Ok(found
                .domains
                .iter()
                .any(|domain| domain.uuid == uuid && domain.active)),
            Err(error) => Err(error),
        };
        // While it arrives it is on both; one that is nowhere has been shut off, and forgets by itself.
        let given = match (here, there) {
            (Ok(true), _) => to_guest(hypervisor, &guest, None).await,
            (_, Ok(true)) => to_guest(hypervisor, &guest, Some(destination.uri())).await,
            (Ok(false), Ok(false)) => Ok(()),
            (Err(error), _) => Err(error.sentence().to_owned()),
            (_, Err(error)) => Err(error.sentence().to_owned()),
        };
        if let Err(error) = given {
            tracing::warn!(
                domain = guest.name,
                error,
                "cannot get its memory back yet; by hand: `virsh setmem --live {} {}KiB` where it runs",
                guest.name,
                guest.memory_bytes / 1024
            );
            left.push(guest);
        }
    }
    left
}

async fn to_guest(
    hypervisor: &Arc<dyn Hypervisor>,
    guest: &Before,
    destination: Option<&str>,
) -> Result<(), String> {
    let Before {
        uuid,
        memory_bytes,
        period_s,
        ..
    } = *guest;
    let uri = destination.map(str::to_owned);
    ask(hypervisor, move |h| match uri {
        None => {
            h.set_memory(uuid, memory_bytes)?;
            h.set_balloon_period(uuid, period_s)
        }
        Some(uri) => h.restore_memory(&uri, uuid, memory_bytes, period_s),
    })
    .await
    .map_err(|error| error.sentence().to_owned())
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn balloon(current_bytes: u64, usable_bytes: Option<u64>) -> Balloon {
        Balloon {
            maximum_bytes: 4 * GIB,
            current_bytes,
            usable_bytes,
            told_unix_s: 0,
            period_s: 0,
        }
    }

    #[test]
    fn a_guest_is_left_with_what_it_uses_and_a_margin() {
        let left = target(&balloon(4 * GIB, Some(2 * GIB)));
        let margin = 4 * GIB / 10;
        assert!(left.is_some_and(|left| left >= 2 * GIB + margin - 100));
        assert!(left.is_some_and(|left| left <= 2 * GIB + margin + MIB));
    }

    #[test]
    fn and_never_with_less_than_the_floor() {
        assert_eq!(target(&balloon(4 * GIB, Some(4 * GIB))), Some(GIB));
        assert_eq!(target(&balloon(4 * GIB, Some(u64::MAX))), Some(GIB));
        let small = Balloon {
            maximum_bytes: 256 * MIB,
            ..balloon(256 * MIB, Some(250 * MIB))
        };
        assert_eq!(target(&small), Some(FLOOR_BYTES));
    }

    #[test]
    fn nothing_is_taken_where_nothing_is_known_or_nothing_is_left() {
        assert_eq!(target(&balloon(4 * GIB, None)), None);
        assert_eq!(target(&balloon(4 * GIB, Some(0))), None);
        assert_eq!(target(&balloon(GIB, Some(GIB))), None, "at its floor");
        assert_eq!(target(&balloon(0, Some(0))), None);
    }
}
