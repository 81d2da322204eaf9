//! Who has been let go and waits for its turn to leave: members that were released together leave
//! one after another, each as soon as the one before has arrived or has had its time; so do those who
//! are let go by themselves, if at the same time. All at once they would wait for each other's
//! processors and for the link, each with its guest stopped.
//!
//! Pure: it is told the time. Must not decide who is let go: `barrier.rs` does.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// What a member may take to switch over before the next one leaves all the same.
const APART: Duration = Duration::from_millis(100);
/// The last one of a gang leaves at most so long after the first.
const SPREAD: Duration = Duration::from_millis(350);

#[derive(Debug, Default)]
pub(crate) struct Departures {
    /// They are no gang that is to leave within [`SPREAD`].
    each_by_itself: bool,
    waiting: VecDeque<usize>,
    apart: Duration,
    next: Option<Instant>,
    /// Who left last, if it may still be on its way.
    leaving: Option<usize>,
}

impl Departures {
    /// Of members that have nothing to do with each other but the host.
    pub(crate) fn each_by_itself() -> Departures {
        Departures {
            each_by_itself: true,
            ..Departures::default()
        }
    }

    /// These leave from now on, in this order.
    pub(crate) fn add(&mut self, members: &[usize], now: Instant) {
        self.waiting.extend(members);
        let gaps = u32::try_from(self.waiting.len().saturating_sub(1)).unwrap_or(u32::MAX);
        self.apart = match self.each_by_itself {
            true => APART,
            false => APART.min(SPREAD / gaps.max(1)),
        };
        self.next.get_or_insert(now);
    }

    /// It does not leave any more, or has left.
    pub(crate) fn remove(&mut self, member: usize, now: Instant) {
        self.waiting.retain(|&one| one != member);
        self.arrived(member, now);
    }

    /// It runs at the destination. The next one need not wait for it any more.
    pub(crate) fn arrived(&mut self, member: usize, now: Instant) {
        if self.leaving == Some(member) {
            self.leaving = None;
            self.next = self.next.map(|next| next.min(now));
        }
    }

    /// When the next one leaves; `None` if nobody waits.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.next.filter(|_| !self.waiting.is_empty())
    }

    /// Whose turn it is now; to be asked until it is nobody's.
    pub(crate) fn leaves(&mut self, now: Instant) -> Option<usize> {
        if self.due()? > now {
            return None;
        }
        let member = self.waiting.pop_front();
        // Also for who is let go later, while this one is on its way.
        self.next = Some(now + self.apart);
        self.leaving = member;
        member
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_leave_one_after_another() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut departures = Departures::default();
        assert_eq!((departures.due(), departures.leaves(start)), (None, None));
        departures.add(&[2, 0, 1], start);
        assert_eq!(departures.leaves(start), Some(2));
        assert_eq!(
            (departures.leaves(start), departures.leaves(at(99))),
            (None, None)
        );
        assert_eq!(departures.due(), Some(at(100)));
        assert_eq!(departures.leaves(at(130)), Some(0));
        departures.remove(1, at(140));
        assert_eq!((departures.due(), departures.leaves(at(900))), (None, None));
        // Nobody waits for those who are gone.
        departures.add(&[3], at(1000));
        assert_eq!(departures.leaves(at(1000)), Some(3));
    }

    #[test]
    fn who_is_let_go_later_waits_for_who_is_on_its_way() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut departures = Departures::each_by_itself();
        departures.add(&[0], start);
        assert_eq!(departures.leaves(start), Some(0));
        departures.add(&[1], at(10));
        assert_eq!(
            (departures.leaves(at(10)), departures.due()),
            (None, Some(at(100)))
        );
        departures.arrived(0, at(30));
        assert_eq!(departures.leaves(at(30)), Some(1));
        // However many, each has its time; nobody waits for one that has failed.
        departures.remove(1, at(40));
        departures.add(&(2..16).collect::<Vec<_>>(), at(40));
        for place in 0..14 {
            let due = at(40 + 100 * place);
            assert_eq!(departures.due(), Some(due));
            assert!(departures.leaves(due).is_some());
        }
    }

    #[test]
    fn nobody_waits_for_one_that_has_arrived() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut departures = Departures::default();
        departures.add(&[2, 0, 1], start);
        assert_eq!(departures.leaves(start), Some(2));
        // Whoever did not leave last is not waited for.
        departures.arrived(1, at(5));
        assert_eq!(departures.leaves(at(10)), None);
        departures.arrived(2, at(20));
        assert_eq!(departures.due(), Some(at(20)));
        assert_eq!(departures.leaves(at(20)), Some(0));
        // Told twice, it counts once.
        departures.arrived(2, at(25));
        assert_eq!(departures.due(), Some(at(120)));
        // Late news does not put it off.
        departures.arrived(0, at(125));
        assert_eq!(departures.due(), Some(at(120)));
        assert_eq!(departures.leaves(at(125)), Some(1));
        departures.arrived(1, at(130));
        assert_eq!(departures.due(), None);
    }

    #[test]
    fn many_leave_within_the_same_time() {
        let start = Instant::now();
        let mut departures = Departures::default();
        departures.add(&(0..36).collect::<Vec<_>>(), start);
        let mut last = start;
        while let Some(due) = departures.due() {
            last = due;
            assert!(departures.leaves(due).is_some());
        }
        assert_eq!(last - start, SPREAD);
    }
}
