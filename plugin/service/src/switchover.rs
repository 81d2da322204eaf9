//! How much unsent memory a held member's QEMU may have left when it takes itself for done.
//!
//! QEMU looks for pages dirtied anew, and switches over as soon as it may, when what it still
//! has to send is less than rate x longest downtime. Left alone it estimates the rate from how
//! fast its socket is drained, which says nothing of a member that is held. So vmgang sets both:
//! less than a page while held, so that every pass is sent whole before the next one begins,
//! and at the release what the member's own stream has shown it can carry in
//! [`DOWNTIME_MS`]. Why passes must be whole is in `docs/decisions/0007`.
//!
//! Must not: decide when members are held or released.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::hypervisor::{Hypervisor, ask};

/// The rate QEMU is told to reckon with: the lowest that libvirt can say.
pub const RATE_MIB_S: u64 = 1;
/// QEMU divides with truncation, too.
const RATE_BYTES_PER_MS: u64 = RATE_MIB_S * 1024 * 1024 / 1000;
/// Longest downtime of a held member: 1048 bytes, less than a page.
const HELD_MS: u64 = 1;
/// What the guest is to be stopped for at most: QEMU's own default.
const DOWNTIME_MS: u64 = 300;
/// Let go below this however slow the stream was: 256 pages are dirtied in no time.
const UNSENT_BYTES_MIN: u64 = 1 << 20;
/// libvirt's upper limit.
const LIMIT_MS_MAX: u64 = 2_000_000;
/// Shorter samples say nothing about a rate.
const SAMPLE_MIN: Duration = Duration::from_millis(200);

const ATTEMPTS: u32 = 5;
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The fastest each member's stream has flowed.
#[derive(Debug)]
pub(crate) struct StreamRates {
    last: Option<(Instant, Vec<u64>)>,
    bytes_per_ms: Vec<u64>,
}

impl StreamRates {
    pub(crate) fn new(members: usize) -> StreamRates {
        StreamRates {
            last: None,
            bytes_per_ms: vec![0; members],
        }
    }

    /// Takes note of how many stream bytes each member's QEMU has written by now.
    pub(crate) fn sample(&mut self, now: Instant, stream_bytes: impl Iterator<Item = u64>) {
        let Some((then, before)) = &mut self.last else {
            self.last = Some((now, stream_bytes.collect()));
            return;
        };
        let elapsed = now.saturating_duration_since(*then);
        if elapsed < SAMPLE_MIN {
            return;
        }
        let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        for ((fastest, before), bytes) in self.bytes_per_ms.iter_mut().zip(before).zip(stream_bytes)
        {
            *fastest = (*fastest).max(bytes.saturating_sub(*before) / elapsed_ms);
            *before = bytes;
        }
        *then = now;
    }

    /// How much a member may have left to send when its guest is stopped. `carried`: how fast its
    /// dirty pages were sent last, in bytes per second, which says more than its stream as a whole
    /// if that is slower: pages sent for the first time may cost less.
    pub(crate) fn unsent_bytes(&self, member: usize, carried: Option<f64>) -> u64 {
        let fastest = self.bytes_per_ms.get(member).copied().unwrap_or(0);
        let carried = carried.map_or(u64::MAX, |carried| (carried / 1000.0) as u64);
        let rate = fastest.min(carried);
        rate.saturating_mul(DOWNTIME_MS).max(UNSENT_BYTES_MIN)
    }
}

/// Keeps the longest downtime of each member's migration at what was asked for last.
pub(crate) struct Limits {
    /// In milliseconds; 0 until something is wanted.
    wanted: BTreeMap<usize, watch::Sender<u64>>,
    _tasks: JoinSet<()>,
}

impl Limits {
    /// The domains of all members, in their order.
    pub(crate) fn new(
        hypervisor: &Arc<dyn Hypervisor>,
        members: impl Iterator<Item = Uuid>,
    ) -> Limits {
        let mut tasks = JoinSet::new();
        let wanted = members
            .enumerate()
            .map(|(member, uuid)| {
                let (sender, wanted) = watch::channel(0);
                tasks.spawn(apply(hypervisor.clone(), uuid, wanted));
                (member, sender)
            })
            .collect();
        Limits {
            wanted,
            _tasks: tasks,
        }
    }

    /// Makes the member's QEMU finish each pass. Its migration must have begun, and its
    /// SWITCHOVER_ACK be withheld: without the one, the other would keep a busy guest copying
    /// for ever.
    pub(crate) fn hold(&self, member: usize) {
        self.want_first(member, HELD_MS);
    }

    /// A member that has sent every page and is not held cannot be: it is to switch over as
    /// soon as so few bytes are left.
    pub(crate) fn free_unless_held(&self, member: usize, unsent_bytes: u64) {
        self.want_first(member, limit_ms(unsent_bytes));
    }

    /// Takes effect only if nothing was wanted of this member before.
    fn want_first(&self, member: usize, limit_ms: u64) {
        if let Some(wanted) = self.wanted.get(&member) {
            wanted.send_if_modified(|wanted| {
                *wanted == 0 && std::mem::replace(wanted, limit_ms) == 0
            });
        }
    }

    /// Lets the member's QEMU stop its guest with so many bytes left to send.
    pub(crate) fn release(&self, member: usize, unsent_bytes: u64) {
        if let Some(wanted) = self.wanted.get(&member) {
            wanted.send_replace(limit_ms(unsent_bytes));
        }
    }

    /// The member's migration begins anew, and with QEMU's own limit.
    pub(crate) fn restart(&self, member: usize) {
        if let Some(wanted) = self.wanted.get(&member) {
            wanted.send_replace(0);
        }
    }

    /// Gives a released member more room once its stream has flowed faster than it had by its
    /// release: otherwise a guest that dirties more than that would never switch over.
    pub(crate) fn raise(&self, member: usize, unsent_bytes: u64) {
        if let Some(wanted) = self.wanted.get(&member) {
            let limit = limit_ms(unsent_bytes);
            wanted.send_if_modified(|wanted| {
                let higher = *wanted > HELD_MS && limit > *wanted;
                if higher {
                    *wanted = limit;
                }
                higher
            });
        }
    }
}

fn limit_ms(unsent_bytes: u64) -> u64 {
    (unsent_bytes / RATE_BYTES_PER_MS).clamp(HELD_MS, LIMIT_MS_MAX)
}

async fn apply(hypervisor: Arc<dyn Hypervisor>, uuid: Uuid, mut wanted: watch::Receiver<u64>) {
    while wanted.changed().await.is_ok() {
        for attempt in 1..=ATTEMPTS {
            let limit = *wanted.borrow_and_update();
            if limit == 0 {
                break;
            }
            let set = ask(&hypervisor, move |hypervisor| {
                hypervisor.set_max_downtime(uuid, limit)
            });
            match set.await {
                Ok(()) => break,
                Err(error) if attempt == ATTEMPTS => tracing::warn!(
                    domain = %uuid, limit_ms = limit, %error,
                    "cannot change the longest downtime; this member may switch over late"
                ),
                Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_member_finishes_its_passes() {
        // The smallest page a guest can have.
        const { assert!(RATE_BYTES_PER_MS * HELD_MS < 4096) };
    }

    #[test]
    fn only_a_released_member_gets_more_room() {
        let (sender, wanted) = watch::channel(0);
        let limits = Limits {
            wanted: BTreeMap::from([(0, sender)]),
            _tasks: JoinSet::new(),
        };
        let now = || *wanted.borrow();
        limits.raise(0, 9 << 20);
        assert_eq!(now(), 0, "nothing is wanted yet");
        limits.hold(0);
        limits.raise(0, 9 << 20);
        assert_eq!(now(), HELD_MS, "held");
        limits.release(0, 5 << 20);
        limits.raise(0, 2 << 20);
        assert_eq!(now(), limit_ms(5 << 20), "never less");
        limits.raise(0, 9 << 20);
        assert_eq!(now(), limit_ms(9 << 20));
    }

    #[test]
    fn the_fastest_stretch_counts() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut rates = StreamRates::new(2);
        rates.sample(at(0), [0, 0].into_iter());
        rates.sample(at(500), [50_000_000, 0].into_iter());
        // Too short to count, and not lost.
        rates.sample(at(510), [50_000_100, 9_000_000].into_iter());
        rates.sample(at(1500), [50_000_200, 10_000_000].into_iter());
        assert_eq!(rates.unsent_bytes(0, None), 30_000_000);
        assert_eq!(rates.unsent_bytes(1, None), 3_000_000);
        assert_eq!(rates.unsent_bytes(7, None), UNSENT_BYTES_MIN);
        assert_eq!(rates.unsent_bytes(0, Some(50e6)), 15_000_000);
        assert_eq!(rates.unsent_bytes(0, Some(500e6)), 30_000_000);
        assert_eq!(limit_ms(30_000_000), 28_625);
        assert_eq!(limit_ms(u64::MAX), LIMIT_MS_MAX);
        assert_eq!(limit_ms(0), HELD_MS);
    }
}
