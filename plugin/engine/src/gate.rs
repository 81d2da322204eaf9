//! Who may read how much from its QEMU right now: the barrier, its back-pressure, and the
//! right of way of a guest that is stopped.
//!
//! Owns: the released state of each member. Must not: decide when to release.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use vmgang_stream::Progress;

/// Most bytes read from QEMU before they are encoded.
pub(crate) const CHUNK_BYTES: usize = 256 * 1024;
/// How often a held member is read from.
pub(crate) const HELD_PAUSE: Duration = Duration::from_millis(50);
/// What an idle held member is read at a time: one empty pass. QEMU, blocked in its socket,
/// then makes no more, instead of tens of thousands a second that would each send libvirtd an
/// event (`docs/decisions/0007`).
pub(crate) const HELD_IDLE_BYTES: usize = 18;
/// How long a released member's QEMU has to read its SWITCHOVER_ACK before it is read from at
/// full speed again: it then switches over at the end of the pass at hand.
pub(crate) const ACK_HEAD_START: Duration = Duration::from_millis(5);
/// An empty RAM section is 18 bytes; more than this unread is the start of a page.
const EMPTY_SECTIONS_BYTES: usize = 36;
/// Longest wait for members whose guests are stopped, so that a stuck one stops nobody.
const RIGHT_OF_WAY: Duration = Duration::from_millis(250);

/// Whether a member whose first pass is done makes nothing but empty passes; `unread` bytes
/// of its stream wait in the buffer.
pub(crate) fn is_idle(progress: &Progress, unread: usize) -> bool {
    progress.tail_is_empty_part() && unread <= EMPTY_SECTIONS_BYTES
}

/// The gate of one session.
#[derive(Debug)]
pub(crate) struct Gate {
    released: Vec<watch::Sender<bool>>,
    ack_withheld: Vec<AtomicBool>,
    /// Members whose guests are stopped.
    stopped: AtomicUsize,
    /// There are none any more. Wakes who waits in the order in which they came, which a watch
    /// does not.
    free: Notify,
}

impl Gate {
    /// `hold`: nobody is released yet.
    pub(crate) fn new(members: usize, hold: bool) -> Self {
        Self {
            released: (0..members).map(|_| watch::Sender::new(!hold)).collect(),
            ack_withheld: (0..members).map(|_| AtomicBool::new(false)).collect(),
            stopped: AtomicUsize::new(0),
            free: Notify::new(),
        }
    }

    pub(crate) fn release(&self, member: usize) {
        if let Some(released) = self.released.get(member) {
            released.send_replace(true);
        }
    }

    pub(crate) fn release_all(&self) {
        for released in &self.released {
            released.send_replace(true);
        }
    }

    /// The member's released state, to wait for.
    pub(crate) fn released(&self, member: usize) -> watch::Receiver<bool> {
        self.released[member].subscribe()
    }

    /// Notes that the member's SWITCHOVER_ACK waits here; true the first time.
    pub(crate) fn withhold_ack(&self, member: usize) -> bool {
        !self.ack_withheld[member].swap(true, Relaxed)
    }

    /// Whether the member cannot switch over because of us.
    pub(crate) fn holds(&self, member: usize) -> bool {
        self.ack_withheld[member].load(Relaxed) && !*self.released[member].borrow()
    }

    /// Gives this member's bytes right of way until the guard is dropped.
    pub(crate) fn guest_stopped(self: &Arc<Self>) -> StoppedGuest {
        self.stopped.fetch_add(1, Relaxed);
        StoppedGuest(self.clone())
    }

    /// Lets members whose guests are stopped go first.
    pub(crate) async fn give_way(&self) {
        let free = async {
            loop {
                // Before the look: what comes free in between is not missed.
                let free = self.free.notified();
                if self.stopped.load(Relaxed) == 0 {
                    return;
                }
                free.await;
            }
        };
        // Either outcome means go on.
        let _ = tokio::time::timeout(RIGHT_OF_WAY, free).await;
    }
}

/// While it lives, a guest of the session is stopped and waiting for its last bytes.
#[derive(Debug)]
pub(crate) struct StoppedGuest(Arc<Gate>);

impl Drop for StoppedGuest {
    fn drop(&mut self) {
        if self.0.stopped.fetch_sub(1, Relaxed) == 1 {
            self.0.free.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmgang_stream::Tokenizer;
    use vmgang_stream::synthetic::StreamBuilder;

    #[test]
    fn an_idle_held_member_trickles_and_a_dirty_one_flows() {
        let mut builder = StreamBuilder::new(4096);
        builder.begin_part().page(0, &[1; 4096]).end_ram_section();
        let busy = builder.bytes().len();
        for _ in 0..3 {
            builder.begin_part().end_ram_section();
        }
        let mut tokenizer = Tokenizer::new();
        tokenizer.push(&builder.bytes()[..busy], false, |_| {});
        assert!(!is_idle(tokenizer.progress(), 0));
        tokenizer.push(&builder.bytes()[busy..], false, |_| {});
        assert!(is_idle(tokenizer.progress(), 0));
        // A torn empty section does not open the tap; the start of a page does.
        assert!(is_idle(tokenizer.progress(), 17));
        assert!(!is_idle(tokenizer.progress(), 100));
    }
}
