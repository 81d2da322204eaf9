//! How much memory a job's page window may take on each of its two hosts: the rules.
//! Must not: look anything up. What is free, and what was promised to others, is given.

use vmgang_engine::ZSTD_WINDOW_MAX_BYTES;

use crate::config::{WINDOW_BUDGET_MIN_BYTES, WindowBudget};

/// What a gang could use at most: room for every page of its guests at once, and beside it the
/// window of the session's zstd stream.
fn useful_bytes(guests_bytes: u64) -> u64 {
    // An eighth of the whole is a seventh of the rest.
    let stream = guests_bytes.div_ceil(7).min(ZSTD_WINDOW_MAX_BYTES);
    guests_bytes.saturating_add(stream)
}

/// What a job that leaves this host asks for. Its own guests still run here, and so may others,
/// so it takes at most a quarter of what is available.
pub fn to_offer(limit: WindowBudget, guests_bytes: u64, available_bytes: u64) -> u64 {
    limit
        .most_bytes()
        .min(useful_bytes(guests_bytes))
        .min(available_bytes / 4)
}

/// What a job that arrives here gets of what it was offered for: a quarter of what is left when
/// its guests have come. The window shrinks before a gang is refused; `None` when not even the
/// smallest one fits.
pub fn to_grant(
    limit: WindowBudget,
    offered_bytes: u64,
    guests_bytes: u64,
    available_bytes: u64,
) -> Option<u64> {
    let left = available_bytes.checked_sub(guests_bytes)?;
    let wanted = limit
        .most_bytes()
        .min(useful_bytes(guests_bytes))
        .min(offered_bytes);
    let least = WINDOW_BUDGET_MIN_BYTES.min(wanted);
    (left >= least).then(|| wanted.min((left / 4).max(least)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const AUTO: WindowBudget = WindowBudget::Auto;

    #[test]
    fn the_gangs_memory_is_the_most_it_can_use() {
        assert_eq!(to_offer(AUTO, 2 * GIB, 64 * GIB), 2 * GIB + 128 * MIB);
        assert_eq!(to_offer(AUTO, 70 * MIB, 64 * GIB), 80 * MIB);
        assert_eq!(
            to_grant(AUTO, u64::MAX, 2 * GIB, 64 * GIB),
            Some(2 * GIB + 128 * MIB)
        );
    }

    #[test]
    fn the_source_asks_for_a_quarter_of_what_it_has() {
        assert_eq!(to_offer(AUTO, 64 * GIB, 4 * GIB), GIB);
        assert_eq!(to_offer(AUTO, 64 * GIB, 0), 0);
    }

    #[test]
    fn the_destination_gives_a_quarter_of_what_is_left() {
        assert_eq!(to_grant(AUTO, 8 * GIB, 4 * GIB, 12 * GIB), Some(2 * GIB));
        assert_eq!(to_grant(AUTO, GIB, 4 * GIB, 12 * GIB), Some(GIB));
    }

    #[test]
    fn a_number_in_the_configuration_is_the_most() {
        let limit = WindowBudget::Bytes(256 * MIB);
        assert_eq!(to_offer(limit, 4 * GIB, 64 * GIB), 256 * MIB);
        assert_eq!(to_offer(limit, 4 * GIB, 512 * MIB), 128 * MIB);
        let grant = |available| to_grant(limit, 4 * GIB, 4 * GIB, available);
        assert_eq!(grant(64 * GIB), Some(256 * MIB));
        assert_eq!(grant(4 * GIB + 512 * MIB), Some(128 * MIB));
    }

    #[test]
    fn the_window_gives_way_before_the_gang() {
        let grant = |left| to_grant(AUTO, 4 * GIB, GIB, GIB + left);
        assert_eq!(grant(100 * MIB), Some(64 * MIB), "the smallest, not 25 MiB");
        assert_eq!(grant(64 * MIB), Some(64 * MIB));
        assert_eq!(grant(64 * MIB - 1), None);
        assert_eq!(to_grant(AUTO, 4 * GIB, GIB, GIB - 1), None);
        // Who asks for less needs less.
        assert_eq!(to_grant(AUTO, MIB, GIB, GIB + MIB), Some(MIB));
        assert_eq!(to_grant(AUTO, 0, GIB, GIB), Some(0));
    }

    proptest! {
        /// Rules that hold whatever the numbers are.
        #[test]
        fn never_more_than_any_rule_allows(
            limit in WINDOW_BUDGET_MIN_BYTES..u64::MAX,
            offered: u64, guests: u64, available: u64, fixed: bool,
        ) {
            let limit = if fixed { WindowBudget::Bytes(limit) } else { AUTO };
            let offer = to_offer(limit, guests, available);
            prop_assert!(offer <= available / 4 && offer <= limit.most_bytes());
            match to_grant(limit, offered, guests, available) {
                Some(grant) => {
                    prop_assert!(grant <= offered && grant <= limit.most_bytes());
                    // Guests and window together fit.
                    prop_assert!(u128::from(grant) + u128::from(guests) <= u128::from(available));
                }
                None => prop_assert!(available < guests.saturating_add(WINDOW_BUDGET_MIN_BYTES)),
            }
        }

        /// Of a useful budget the engine takes at most an eighth for zstd; every page fits in
        /// the rest.
        #[test]
        fn a_useful_budget_holds_every_page(guests in 0..1u64 << 50) {
            let budget = useful_bytes(guests);
            prop_assert!(budget - (budget / 8).min(ZSTD_WINDOW_MAX_BYTES) >= guests);
        }
    }
}
