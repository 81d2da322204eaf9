//! Whether a member converges: whether what is left to send becomes little enough for a switchover,
//! judged from what each pass sent and how long it took.
//!
//! A pass sends what was dirtied in the pass before. So its bytes over the earlier pass's time are
//! the rate at which the guest dirties memory, and over its own time the rate at which the link
//! carries it, after all saving.
//!
//! Pure. Must not: decide what is done about a member that does not converge.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A pass that sends this share of the smallest one so far, or more, is no progress.
const NO_PROGRESS: f64 = 0.9;
/// So many passes without progress, one after the other, are a stall.
const STALLED_PASSES: u32 = 2;
/// And they take so long together: a quick guest has ups and downs.
const STALLED_TIME: Duration = Duration::from_secs(2);
/// QEMU throttles a guest more with every few passes, up to 99 %; so many without progress are
/// more than that takes. As many for one that has converged before: it will again.
const PATIENT_PASSES: u32 = 25;
/// Shorter passes say little about a rate.
const RATE_BYTES_MIN: u64 = 256 * 1024;

/// How fast a guest dirties memory, and how fast it could be sent, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    pub dirtied: f64,
    pub carried: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Judgement {
    /// Each pass is smaller than the one before, but not small enough yet.
    Converging,
    /// It could switch over with a short pause.
    Converged,
    /// It dirties memory as fast as it can be sent.
    Stalled(Rates),
}

/// What is known of one member's passes after the first.
#[derive(Debug, Clone, Default)]
pub struct Convergence {
    last: Option<Duration>,
    smallest: Option<u64>,
    without_progress: u32,
    /// How long those took.
    time: Duration,
    /// The guest is being slowed down, which needs its time, or has converged before.
    patient: bool,
    carried: Option<f64>,
}

impl Convergence {
    /// Of a member whose guest QEMU slows down.
    pub fn throttled() -> Convergence {
        Convergence {
            patient: true,
            ..Convergence::default()
        }
    }

    /// A pass has ended. `may_be_left`: so many bytes are sent in a pause that is short enough.
    pub fn pass(&mut self, sent_bytes: u64, took: Duration, may_be_left: u64) -> Judgement {
        let took_before = self.last.replace(took);
        if sent_bytes >= RATE_BYTES_MIN && !took.is_zero() {
            self.carried = Some(sent_bytes as f64 / took.as_secs_f64());
        }
        // Passes go up and down: only one smaller than all before is progress.
        let progress = self
            .smallest
            .is_none_or(|smallest| (sent_bytes as f64) < smallest as f64 * NO_PROGRESS);
        let converged = sent_bytes <= may_be_left;
        if progress || converged {
            self.smallest = Some(sent_bytes.max(may_be_left));
            self.without_progress = 0;
            self.time = Duration::ZERO;
            self.patient |= converged;
            return match converged {
                true => Judgement::Converged,
                false => Judgement::Converging,
            };
        }
        self.without_progress += 1;
        self.time += took;
        let passes = if self.patient {
            PATIENT_PASSES
        } else {
            STALLED_PASSES
        };
        if self.without_progress < passes || self.time < STALLED_TIME {
            return Judgement::Converging;
        }
        let per_second = |took: Duration| sent_bytes as f64 / took.as_secs_f64().max(1e-3);
        Judgement::Stalled(Rates {
            dirtied: per_second(took_before.unwrap_or(took)),
            carried: per_second(took),
        })
    }

    /// How fast dirty pages were sent last, in bytes per second, if that is known.
    pub fn carried(&self) -> Option<f64> {
        self.carried
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEFT: u64 = 10_000_000;

    fn judge(convergence: &mut Convergence, sent: u64, ms: u64) -> Judgement {
        convergence.pass(sent, Duration::from_millis(ms), LEFT)
    }

    #[test]
    fn passes_that_shrink_converge() {
        let mut member = Convergence::default();
        for sent in [800_000_000, 400_000_000, 200_000_000, 50_000_000] {
            assert_eq!(judge(&mut member, sent, 4000), Judgement::Converging);
        }
        assert_eq!(member.carried(), Some(12_500_000.0));
        assert_eq!(judge(&mut member, LEFT, 100), Judgement::Converged);
        assert_eq!(judge(&mut member, 0, 1), Judgement::Converged);
        // And may stop being small.
        assert_eq!(judge(&mut member, LEFT + 1, 100), Judgement::Converging);
    }

    #[test]
    fn passes_that_do_not_are_a_stall_with_its_figures() {
        let mut member = Convergence::default();
        assert_eq!(judge(&mut member, 100_000_000, 1000), Judgement::Converging);
        assert_eq!(judge(&mut member, 95_000_000, 2000), Judgement::Converging);
        let stalled = Judgement::Stalled(Rates {
            dirtied: 60_000_000.0,
            carried: 120_000_000.0,
        });
        assert_eq!(judge(&mut member, 120_000_000, 1000), stalled);
        assert_eq!(judge(&mut member, 60_000_000, 1000), Judgement::Converging);
    }

    #[test]
    fn passes_that_go_up_and_down_are_a_stall() {
        let mut member = Convergence::default();
        assert_eq!(judge(&mut member, 100_000_000, 1000), Judgement::Converging);
        assert_eq!(judge(&mut member, 80_000_000, 1000), Judgement::Converging);
        assert_eq!(judge(&mut member, 100_000_000, 1000), Judgement::Converging);
        let up_again = judge(&mut member, 80_000_000, 1000);
        assert!(matches!(up_again, Judgement::Stalled(_)), "{up_again:?}");
    }

    #[test]
    fn one_that_has_converged_before_is_given_time() {
        let mut member = Convergence::default();
        assert_eq!(judge(&mut member, LEFT, 1000), Judgement::Converged);
        for _ in 1..PATIENT_PASSES {
            assert_eq!(judge(&mut member, LEFT + 1, 1000), Judgement::Converging);
        }
        assert!(matches!(
            judge(&mut member, LEFT + 1, 1000),
            Judgement::Stalled(_)
        ));
    }

    #[test]
    fn short_passes_must_stall_for_a_while() {
        let mut member = Convergence::default();
        for _ in 0..40 {
            assert_eq!(judge(&mut member, LEFT + 1, 50), Judgement::Converging);
        }
        assert!(matches!(
            judge(&mut member, LEFT + 1, 100),
            Judgement::Stalled(_)
        ));
    }

    #[test]
    fn a_throttled_guest_gets_the_time_that_takes() {
        let mut member = Convergence::throttled();
        for _ in 0..PATIENT_PASSES {
            assert_eq!(judge(&mut member, 90_000_000, 1000), Judgement::Converging);
        }
        assert!(matches!(
            judge(&mut member, 90_000_000, 1000),
            Judgement::Stalled(_)
        ));
    }
}
