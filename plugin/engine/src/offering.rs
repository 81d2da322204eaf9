//! Asking the destination for contents that it may have already.
//!
//! Owns: the session's order, because slots on offer are nobody's until the answer, and the OFFERs
//! that have none yet.
//! Must not: know why a content is wanted.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, oneshot};
use vmgang_dedup::{PageDigest, Slot};
use vmgang_wire::{Frame, Have, OFFER_CONTENTS_MAX, OFFERS_MAX, Offer, Offered};

use crate::connection::FrameQueue;
use crate::order::SessionOrder;

/// Before all of many contents are offered, so many are: spread over them.
const PROBE_CONTENTS: usize = 512;
/// One in so many of the probe must be there, or no more are offered: an offer takes 20 bytes, a
/// page a hundred times that.
const WORTH_ONE_IN: usize = 64;

/// An OFFER that has no answer yet.
struct Unanswered {
    slots: Vec<Slot>,
    answered: oneshot::Sender<usize>,
}

/// See above.
pub(crate) struct Offering {
    order: Mutex<SessionOrder>,
    unanswered: Mutex<VecDeque<Unanswered>>,
    /// For OFFERs under way.
    room: Semaphore,
    queue: FrameQueue,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Offering {
    pub(crate) fn new(order: SessionOrder, queue: FrameQueue) -> Self {
        Self {
            order: Mutex::new(order),
            unanswered: Mutex::default(),
            room: Semaphore::new(OFFERS_MAX),
            queue,
        }
    }

    pub(crate) fn order(&self) -> MutexGuard<'_, SessionOrder> {
        lock(&self.order)
    }

    /// Offers contents in their order, as many as find a slot. Returns how many of them the
    /// destination has put into its window.
    ///
    /// A few are offered first. If hardly any of those is there, that is it.
    pub(crate) async fn offer_all(&self, digests: &[PageDigest]) -> usize {
        let mut found = 0;
        let step = digests.len() / PROBE_CONTENTS;
        if step > 1 {
            let probe: Vec<_> = digests.iter().step_by(step).copied().collect();
            found = self.offer(&probe).await;
            if found * WORTH_ONE_IN < probe.len() {
                return found;
            }
        }
        let offers = digests.chunks(OFFER_CONTENTS_MAX);
        let answers = futures_util::future::join_all(offers.map(|offer| self.offer(offer)));
        found + answers.await.into_iter().sum::<usize>()
    }

    /// Makes one OFFER of at most [`OFFER_CONTENTS_MAX`]; without any that the destination might
    /// have and that finds a slot, it makes none.
    pub(crate) async fn offer(&self, digests: &[PageDigest]) -> usize {
        let Ok(place) = self.room.acquire().await else {
            return 0;
        };
        let mut contents = Vec::with_capacity(digests.len());
        let mut slots = Vec::with_capacity(digests.len());
        {
            let mut order = self.order();
            for digest in digests.iter().take(OFFER_CONTENTS_MAX) {
                if let Some(slot) = order.offer(*digest) {
                    slots.push(slot);
                    contents.push(Offered {
                        slot: slot.0,
                        digest: digest.0,
                    });
                }
            }
        }
        if contents.is_empty() {
            return 0;
        }
        let (answered, answer) = oneshot::channel();
        {
            // Answers come in the order of the offers.
            let mut unanswered = lock(&self.unanswered);
            unanswered.push_back(Unanswered { slots, answered });
            self.queue.send(&Frame::Offer(Offer { contents }));
        }
        // Without an answer the session has ended.
        let found = answer.await.unwrap_or(0);
        drop(place);
        found
    }

    /// Takes an answer.
    pub(crate) fn answered(&self, have: &Have) -> Result<(), String> {
        let Some(offer) = lock(&self.unanswered).pop_front() else {
            return Err("the peer answers an offer that was not made".to_owned());
        };
        if offer.slots.len() != have.contents.len() {
            return Err("the peer's answer does not fit the offer".to_owned());
        }
        let mut order = self.order();
        let mut found = 0;
        for (slot, has) in offer.slots.iter().zip(&have.contents) {
            found += usize::from(order.answered(*slot, *has));
        }
        drop(order);
        let _ = offer.answered.send(found);
        Ok(())
    }

    /// The session has ended: nobody waits for answers any more.
    pub(crate) fn close(&self) {
        self.room.close();
        lock(&self.unanswered).clear();
    }
}
