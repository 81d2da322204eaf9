//! Who had what first: how many pages of each member went as a reference to what another had sent.
//!
//! Owns: the counts, one number for each pair. Must not: lock or allocate while pages are counted.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vmgang_dedup::Member;

/// For more members it is not counted: pairs are many then.
const MEMBERS_MAX: usize = 64;

/// Pages by member and, in each row, by who had sent them first: the members in their order, then what was
/// staged, then what the destination had.
#[derive(Debug, Default)]
pub(crate) struct Sharing {
    members: usize,
    pages: Vec<AtomicU64>,
}

impl Sharing {
    pub(crate) fn new(members: usize) -> Sharing {
        let members = if members > MEMBERS_MAX { 0 } else { members };
        Sharing {
            members,
            pages: (0..members * (members + 2))
                .map(|_| AtomicU64::new(0))
                .collect(),
        }
    }

    pub(crate) fn count(&self, member: Member, first_sender: Member) {
        let column = match first_sender {
            Member::STAGED => self.members,
            Member::DESTINATION => self.members + 1,
            Member(sender) => usize::from(sender).min(self.members),
        };
        let at = usize::from(member.0) * (self.members + 2) + column;
        if let Some(pages) = self.pages.get(at) {
            pages.fetch_add(1, Relaxed);
        }
    }

    /// All of it; empty if it is not counted.
    pub(crate) fn rows(&self) -> Vec<Vec<u64>> {
        let row = |row: &[AtomicU64]| row.iter().map(|pages| pages.load(Relaxed)).collect();
        self.pages.chunks(self.members + 2).map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pair_is_counted_apart() {
        let sharing = Sharing::new(2);
        sharing.count(Member(0), Member(1));
        sharing.count(Member(0), Member(1));
        sharing.count(Member(1), Member(1));
        sharing.count(Member(1), Member::STAGED);
        sharing.count(Member(1), Member::DESTINATION);
        // Nobody.
        sharing.count(Member(2), Member(0));
        assert_eq!(sharing.rows(), [[0, 2, 0, 0], [0, 1, 1, 1]]);
    }

    #[test]
    fn too_many_are_not_counted() {
        let sharing = Sharing::new(MEMBERS_MAX + 1);
        sharing.count(Member(0), Member(1));
        assert!(sharing.rows().is_empty());
    }
}
