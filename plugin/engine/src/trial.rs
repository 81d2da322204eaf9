//! Whether a technique pays for one stream: it is switched off where it does not, and tried
//! again later.
//!
//! Must not: know what the technique is, or a clock; it counts pages.

/// Pages that are tried before a verdict.
const TRIED: u32 = 1024;
/// A technique pays if it serves one page in so many.
const WORTH: u32 = 100;
/// Pages that are left out after the first bad verdict; twice as many after each next one.
const LEFT_OUT_MIN: u32 = 4096;
const LEFT_OUT_MAX: u32 = 1 << 17;

/// One technique on one stream.
#[derive(Debug, Default)]
pub(crate) struct Trial {
    tried: u32,
    served: u32,
    left_out: u32,
    pause: u32,
}

impl Trial {
    /// Whether the technique is to be used for the next page.
    pub(crate) fn on(&mut self) -> bool {
        if self.left_out > 0 {
            self.left_out -= 1;
            return false;
        }
        true
    }

    /// What became of a page it was used for.
    pub(crate) fn count(&mut self, served: bool) {
        self.tried += 1;
        self.served += u32::from(served);
        if self.tried < TRIED {
            return;
        }
        if self.served * WORTH >= self.tried {
            self.pause = 0;
        } else {
            self.pause = (self.pause * 2).clamp(LEFT_OUT_MIN, LEFT_OUT_MAX);
            self.left_out = self.pause;
        }
        (self.tried, self.served) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages it was used for, of so many.
    fn used(trial: &mut Trial, pages: u32, served: impl Fn(u32) -> bool) -> u32 {
        let mut used = 0;
        for page in 0..pages {
            if trial.on() {
                used += 1;
                trial.count(served(page));
            }
        }
        used
    }

    #[test]
    fn what_does_not_pay_is_left_out_and_tried_again() {
        let mut trial = Trial::default();
        let vain = used(&mut trial, 1_000_000, |_| false);
        assert!((8_000..20_000).contains(&vain), "{vain}");
        // Once it serves it is used for every page again.
        used(&mut trial, LEFT_OUT_MAX + TRIED, |_| true);
        assert_eq!(used(&mut trial, 10_000, |_| true), 10_000);
    }

    #[test]
    fn a_page_in_fifty_is_worth_it() {
        let mut trial = Trial::default();
        assert_eq!(used(&mut trial, 100_000, |page| page % 50 == 0), 100_000);
    }
}
