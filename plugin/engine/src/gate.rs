//! Who may read how much from its QEMU right now: the barrier, its back-pressure, and the
//! right of way of a guest that is stopped.
//!
//! Owns: the released state of each member, and how far each is in its first pass, so that
//! members come to its end together. Must not: decide when to release.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use vmgang_stream::Progress;

use crate::source_api::Hold;

/// An empty PART section of a member whose pages go over other connections has 26 bytes.
const EMPTY_FLUSHED_SECTIONS_BYTES: usize = 52;
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

/// In [`MemberGate::first_pass`]: it has not begun, or is over.
const NOT_IN_FIRST_PASS: u32 = u32::MAX;
/// A first pass in full.
const WHOLE: u32 = 1 << 16;
/// So much further than the last one, a member lets the others go first.
const AHEAD: u32 = WHOLE / 64;
/// For so long at most for each chunk, so that a stuck one stops nobody.
const PACE: Duration = Duration::from_millis(100);
const PACE_STEP: Duration = Duration::from_millis(2);

/// Whether a member whose first pass is done makes nothing but empty passes; `unread` bytes
/// of its stream wait in the buffer.
pub(crate) fn is_idle(progress: &Progress, unread: usize) -> bool {
    let empty = match progress.multifd() {
        true => EMPTY_FLUSHED_SECTIONS_BYTES,
        false => EMPTY_SECTIONS_BYTES,
    };
    progress.tail_is_empty_part() && unread <= empty
}

/// The gate of one session.
#[derive(Debug)]
pub(crate) struct Gate {
    hold: Hold,
    members: Vec<MemberGate>,
    /// How many of their guests are stopped.
    stopped: AtomicUsize,
    /// That has changed. Wakes who waits in the order in which they came, which a watch does not.
    changed: Notify,
}

#[derive(Debug)]
struct MemberGate {
    released: watch::Sender<bool>,
    ack_withheld: watch::Sender<bool>,
    /// Its guest is stopped.
    stopped: AtomicBool,
    /// How much of the first pass is done, of [`WHOLE`].
    first_pass: AtomicU32,
    /// Pages that went over connections other than the main one.
    pages_beside: AtomicU64,
}

impl Gate {
    pub(crate) fn new(members: usize, hold: Hold) -> Self {
        let member = |_| MemberGate {
            released: watch::Sender::new(hold == Hold::Nothing),
            ack_withheld: watch::Sender::new(false),
            stopped: AtomicBool::new(false),
            first_pass: AtomicU32::new(NOT_IN_FIRST_PASS),
            pages_beside: AtomicU64::new(0),
        };
        Self {
            hold,
            members: (0..members).map(member).collect(),
            stopped: AtomicUsize::new(0),
            changed: Notify::new(),
        }
    }

    pub(crate) fn release(&self, member: usize) {
        if let Some(member) = self.members.get(member) {
            member.released.send_replace(true);
        }
    }

    pub(crate) fn release_all(&self) {
        for member in &self.members {
            member.released.send_replace(true);
        }
    }

    /// The member's migration is to begin anew; it is held as if it had never been released.
    pub(crate) fn restart(&self, member: usize) {
        if let Some(known) = self.members.get(member) {
            known.released.send_replace(self.hold == Hold::Nothing);
            self.forget(member);
        }
    }

    /// What the member's last migration has shown says nothing about the next.
    fn forget(&self, member: usize) {
        let member = &self.members[member];
        member.ack_withheld.send_replace(false);
        member.first_pass.store(NOT_IN_FIRST_PASS, Relaxed);
        member.pages_beside.store(0, Relaxed);
    }

    /// The member's main connection, until the guard is dropped: its migration begins, perhaps anew.
    pub(crate) fn begin(self: &Arc<Self>, member: usize) -> UnderWay {
        self.forget(member);
        UnderWay {
            gate: self.clone(),
            member,
        }
    }

    /// The member's released state, to wait for.
    pub(crate) fn released(&self, member: usize) -> watch::Receiver<bool> {
        self.members[member].released.subscribe()
    }

    /// Notes that the member's SWITCHOVER_ACK waits here; true the first time.
    pub(crate) fn withhold_ack(&self, member: usize) -> bool {
        !self.members[member].ack_withheld.send_replace(true)
    }

    /// Whether the member cannot switch over because of us.
    pub(crate) fn holds(&self, member: usize) -> bool {
        let member = &self.members[member];
        *member.ack_withheld.borrow() && !*member.released.borrow()
    }

    /// Whether the member is to be held by anything, and there is nothing to hold it by.
    pub(crate) fn wants_hold(&self, member: usize) -> bool {
        let member = &self.members[member];
        self.hold == Hold::Anything && !*member.ack_withheld.borrow() && !*member.released.borrow()
    }

    /// Waits until the member is released, or can be held after all.
    pub(crate) async fn until_held_or_released(&self, member: usize) {
        let member = &self.members[member];
        let (mut ack, mut released) =
            (member.ack_withheld.subscribe(), member.released.subscribe());
        // Either outcome means go on: the senders live as long as `self`.
        tokio::select! {
            _ = ack.wait_for(|ack| *ack) => {}
            _ = released.wait_for(|released| *released) => {}
        }
    }

    /// Gives this member's bytes right of way until the guard is dropped.
    pub(crate) fn guest_stopped(self: &Arc<Self>, member: usize) -> StoppedGuest {
        self.members[member].stopped.store(true, Relaxed);
        self.stopped.fetch_add(1, Relaxed);
        self.changed.notify_waiters();
        StoppedGuest {
            gate: self.clone(),
            member,
        }
    }

    /// Whether the member's guest is stopped, which any of its connections may have told.
    pub(crate) fn is_stopped(&self, member: usize) -> bool {
        self.members[member].stopped.load(Relaxed)
    }

    /// Lets members whose guests are stopped go first, unless this is one of them.
    pub(crate) async fn give_way(&self, member: usize) {
        let free = async {
            loop {
                // Before the look: a change in between is not missed.
                let changed = self.changed.notified();
                if self.stopped.load(Relaxed) == 0 || self.is_stopped(member) {
                    return;
                }
                changed.await;
            }
        };
        // Either outcome means go on.
        let _ = tokio::time::timeout(RIGHT_OF_WAY, free).await;
    }

    /// Takes note of how far the member is in its first pass.
    pub(crate) fn first_pass(&self, member: usize, done: u64, whole: u64) {
        let share = u128::from(done.min(whole)) * u128::from(WHOLE) / u128::from(whole.max(1));
        let share = u32::try_from(share).unwrap_or(WHOLE);
        self.members[member].first_pass.store(share, Relaxed);
    }

    /// A connection other than the main one has had so many pages more.
    pub(crate) fn add_pages_beside(&self, member: usize, pages: u64) {
        let member = &self.members[member];
        member.pages_beside.fetch_add(pages, Relaxed);
    }

    /// Pages that went over such connections.
    pub(crate) fn pages_beside(&self, member: usize) -> u64 {
        self.members[member].pages_beside.load(Relaxed)
    }

    pub(crate) fn first_pass_done(&self, member: usize) {
        let member = &self.members[member];
        member.first_pass.store(NOT_IN_FIRST_PASS, Relaxed);
    }

    /// Whether the member is further in its first pass than another that has begun its own.
    fn is_ahead(&self, member: usize) -> bool {
        let mine = self.members[member].first_pass.load(Relaxed);
        let shares = self.members.iter();
        let last = shares.map(|member| member.first_pass.load(Relaxed)).min();
        mine != NOT_IN_FIRST_PASS && last.is_some_and(|last| mine > last.saturating_add(AHEAD))
    }

    /// Lets members that are behind go first for as long as `contended`, so that all come to the
    /// end of their first passes together: who is there early dirties pages anew meanwhile.
    pub(crate) async fn pace(&self, member: usize, contended: impl Fn() -> bool) {
        let mut waited = Duration::ZERO;
        while waited < PACE && contended() && self.is_ahead(member) {
            tokio::time::sleep(PACE_STEP).await;
            waited += PACE_STEP;
        }
    }
}

/// While it lives, a member's main connection is open. Whoever failed in the first pass is in none any more, and
/// nobody lets it go first.
#[derive(Debug)]
pub(crate) struct UnderWay {
    gate: Arc<Gate>,
    member: usize,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.gate.first_pass_done(self.member);
    }
}

/// While it lives, a guest of the session is stopped and waiting for its last bytes.
#[derive(Debug)]
pub(crate) struct StoppedGuest {
    gate: Arc<Gate>,
    member: usize,
}

impl Drop for StoppedGuest {
    fn drop(&mut self) {
        let member = &self.gate.members[self.member];
        member.stopped.store(false, Relaxed);
        self.gate.stopped.fetch_sub(1, Relaxed);
        self.gate.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmgang_stream::Tokenizer;
    use vmgang_stream::synthetic::StreamBuilder;

    #[test]
    fn who_is_ahead_waits_for_who_is_behind() {
        let gate = Gate::new(3, Hold::Anything);
        assert!(!gate.is_ahead(0), "not begun");
        gate.first_pass(0, 50, 100);
        assert!(!gate.is_ahead(0), "the others have not begun");
        gate.first_pass(1, 10, 100);
        assert!(gate.is_ahead(0) && !gate.is_ahead(1));
        gate.first_pass_done(1);
        assert!(!gate.is_ahead(0));
        gate.first_pass(1, u64::MAX, u64::MAX);
        assert!(gate.is_ahead(1));
    }

    #[test]
    fn who_has_failed_in_its_first_pass_is_not_waited_for() {
        let gate = Arc::new(Gate::new(2, Hold::Nothing));
        let failing = gate.begin(0);
        gate.first_pass(0, 10, 100);
        gate.add_pages_beside(0, 7);
        gate.first_pass(1, 90, 100);
        assert!(gate.is_ahead(1));
        drop(failing);
        assert!(!gate.is_ahead(1));
        let _anew = gate.begin(0);
        assert_eq!(gate.pages_beside(0), 0);
        assert!(!gate.is_ahead(1), "it has not begun its pass");
    }

    #[test]
    fn a_restarted_member_is_held_anew() {
        let gate = Gate::new(1, Hold::Anything);
        assert!(gate.wants_hold(0) && gate.withhold_ack(0));
        assert!(gate.holds(0) && !gate.withhold_ack(0));
        gate.release(0);
        assert!(!gate.holds(0));
        gate.restart(0);
        assert!(!gate.holds(0) && gate.wants_hold(0) && gate.withhold_ack(0));
        assert!(gate.holds(0));
        gate.release(0);
        assert!(!gate.holds(0) && !gate.wants_hold(0));
    }

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
