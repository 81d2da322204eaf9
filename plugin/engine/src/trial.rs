//! Whether a technique pays for one stream: it is switched off where it does not, and tried
//! again later.
//!
//! Must not: know what the technique is, or a clock; it counts pages.

/// A technique pays if it serves one page in so many.
const WORTH: u32 = 100;
/// Where the processor is scarce.
const WORTH_SCARCE: u32 = 3;

/// Pages that are tried before a verdict.
const TRIED: u32 = 1024;
/// Pages that are left out after the first bad verdict; twice as many after each next one.
const LEFT_OUT_MIN: u32 = 4096;
const LEFT_OUT_MAX: u32 = 1 << 17;

/// One technique that is of use for the very pages it is tried on.
#[derive(Debug, Default)]
pub(crate) struct Trial {
    tried: u32,
    served: u32,
    left_out: u32,
    pause: u32,
    /// The processor was scarce at the last verdict.
    scarce: bool,
}

impl Trial {
    /// Whether the technique is to be used for the next pages.
    pub(crate) fn on(&mut self, pages: u32, scarce: bool) -> bool {
        if self.scarce && !scarce {
            // What was too little then may be enough now.
            *self = Self::default();
        }
        let on = self.left_out == 0;
        self.left_out = self.left_out.saturating_sub(pages);
        on
    }

    /// What became of pages it was used for.
    pub(crate) fn count(&mut self, tried: u32, served: u32, scarce: bool) {
        self.tried += tried;
        self.served += served;
        if self.tried < TRIED {
            return;
        }
        let worth = if scarce { WORTH_SCARCE } else { WORTH };
        if self.served.saturating_mul(worth) >= self.tried {
            self.pause = 0;
        } else {
            self.pause = (self.pause * 2).clamp(LEFT_OUT_MIN, LEFT_OUT_MAX);
            self.left_out = self.pause;
        }
        self.scarce = scarce;
        (self.tried, self.served) = (0, 0);
    }
}

/// Looking for similar pages, which takes a copy of each page that others may be similar to. While
/// it does not pay, samples tell whether it would.
#[derive(Debug, Default)]
pub(crate) struct NearTrial {
    sampling: bool,
    tried: u32,
    served: u32,
    scarce: bool,
}

impl NearTrial {
    pub(crate) fn samples_only(&self) -> bool {
        self.sampling
    }

    /// What became of pages, or samples, that were looked for.
    pub(crate) fn count(&mut self, tried: u32, served: u32, scarce: bool) {
        if self.scarce && !scarce {
            // What was too little then may be enough now.
            *self = Self::default();
        }
        self.scarce = scarce;
        self.tried += tried;
        self.served += served;
        let enough = if self.sampling { SAMPLES } else { TRIED };
        if self.tried < enough {
            return;
        }
        let worth = if scarce { WORTH_SCARCE } else { WORTH };
        *self = Self {
            sampling: self.served.saturating_mul(worth) < self.tried,
            scarce,
            ..Self::default()
        };
    }
}

/// Pages that are hashed before a verdict on hashing: 8 MiB.
const HASHED: u32 = 2048;
/// While it is off: one content in so many is hashed all the same, the same ones in every
/// stream, so that what two streams share is noticed.
const SAMPLED: u64 = 16;
/// Sampled pages before they are forgotten again, and how many of them bring hashing back at
/// once.
const SAMPLES: u32 = 64;
const SAMPLES_FOUND: u32 = 4;

/// Hashing of pages. A hash pays when this page or any later one, of whichever stream, can
/// refer to it: what is left out now is missing later, so it is never given up altogether.
#[derive(Debug, Default)]
pub(crate) struct HashTrial {
    sampling: bool,
    hashed: u32,
    earned: u32,
}

impl HashTrial {
    pub(crate) fn samples_only(&self) -> bool {
        self.sampling
    }

    /// So many pages were found in another way, for which they have to be hashed as well.
    pub(crate) fn earn(&mut self, found: u32) {
        self.earned += found;
    }

    /// So many pages were hashed since, and so many references made from or to this stream's.
    pub(crate) fn count(&mut self, hashed: u32, earned: u32) {
        self.hashed += hashed;
        self.earned += earned;
        let pays = self.earned.saturating_mul(WORTH) >= self.hashed;
        if self.sampling {
            if self.earned >= SAMPLES_FOUND && pays {
                *self = Self::default();
            } else if self.hashed >= SAMPLES {
                (self.hashed, self.earned) = (0, 0);
            }
        } else if self.hashed >= HASHED {
            *self = Self {
                sampling: !pays,
                ..Self::default()
            };
        }
    }

    /// Whether a page is among the samples; it depends on its content only.
    pub(crate) fn samples(page: &[u8; 4096]) -> bool {
        // Counters and pointers in the middle of pages differ more than their beginnings.
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&page[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let mixed = (word(1000) ^ word(2040).rotate_left(21) ^ word(3080).rotate_left(42))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32).is_multiple_of(SAMPLED)
    }
}

/// Whether a stream's pages are what the last scan found: asking costs a tenth of hashing, and
/// pays if one in eight is.
#[derive(Debug, Default)]
pub(crate) struct ScanTrial {
    asked: u32,
    told: u32,
}

/// Pages that are asked about at least.
const ASKED_MIN: u32 = 2048;

impl ScanTrial {
    pub(crate) fn on(&self) -> bool {
        self.asked < ASKED_MIN || self.told >= self.asked / 8
    }

    /// So many pages were asked about, so many of these were what they had been.
    pub(crate) fn count(&mut self, asked: u32, told: u32) {
        self.asked = self.asked.saturating_add(asked);
        self.told = self.told.saturating_add(told);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages it was used for, of so many.
    fn used(trial: &mut Trial, pages: u32, served: impl Fn(u32) -> bool) -> u32 {
        let mut used = 0;
        for page in 0..pages {
            if trial.on(1, false) {
                used += 1;
                trial.count(1, u32::from(served(page)), false);
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

    #[test]
    fn a_scarce_processor_asks_for_more() {
        let mut trial = Trial::default();
        trial.count(TRIED, TRIED / 10, false);
        assert!(trial.on(1, false));
        trial.count(TRIED, TRIED / 10, true);
        assert!(!trial.on(1, true));
        // No more than that the link is the bottleneck again.
        assert!(trial.on(1, false));
        trial.count(TRIED, TRIED / 2, true);
        assert!(trial.on(1, true));
    }

    #[test]
    fn similar_pages_are_sought_among_samples_until_that_pays() {
        let mut trial = NearTrial::default();
        trial.count(TRIED, TRIED / 10, true);
        assert!(trial.samples_only());
        trial.count(SAMPLES, SAMPLES / 10, true);
        assert!(trial.samples_only());
        trial.count(SAMPLES, SAMPLES / 2, true);
        assert!(!trial.samples_only());
        // Where the processor has time, one in a hundred is enough.
        trial.count(TRIED, TRIED / 10, false);
        assert!(!trial.samples_only());
    }

    #[test]
    fn hashing_goes_on_by_samples_and_comes_back_when_they_are_found() {
        let mut trial = HashTrial::default();
        trial.count(HASHED - 1, 0);
        assert!(!trial.samples_only());
        trial.count(1, 0);
        assert!(trial.samples_only());
        trial.count(SAMPLES * 10, 3);
        assert!(trial.samples_only());
        trial.count(10, SAMPLES_FOUND);
        assert!(!trial.samples_only());
        // One in a hundred is enough.
        trial.count(HASHED, HASHED / WORTH + 1);
        assert!(!trial.samples_only());
    }

    #[test]
    fn about_one_content_in_sixteen_is_a_sample() {
        let mut state = 1u64;
        let mut page = [0; 4096];
        let samples = (0..10_000)
            .filter(|_| {
                for at in [1000, 2040, 3080] {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    page[at..at + 8].copy_from_slice(&state.to_le_bytes());
                }
                HashTrial::samples(&page)
            })
            .count();
        assert!((500..750).contains(&samples), "{samples}");
    }
}
