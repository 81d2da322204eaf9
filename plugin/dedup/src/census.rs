//! The joint dedup map before a move: how often each content exists in a gang, in whom, and for
//! how long it has stayed.
//!
//! Owns: counting over the members' snapshots. Must not: know where a page of a content lies
//! beyond one place for each member, or what a peer has.
//!
//! Memory: 64 B a distinct content, while it is there.

use hashbrown::HashTable;

use crate::{Member, PageDigest, PageState, Snapshot};

/// One content of a gang.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    pub digest: PageDigest,
    /// Pages that have it, over all members.
    pub pages: u32,
    /// Who has it, if only one does.
    pub only: Option<Member>,
    /// Scans that its most stable page has stayed through.
    pub stable: u8,
    /// A page that has it: the most stable one.
    pub place: PlaceOf,
    /// Members that have it, the 64th and later ones together.
    pub members: u64,
}

/// Where a page lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaceOf {
    pub member: Member,
    pub block: u16,
    pub page: u32,
}

/// What a gang's pages are, by the thousand of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shares {
    pub pages: u64,
    /// No memory behind them, or zeros.
    pub zero: u64,
    /// One repeated byte, but not zero.
    pub uniform: u64,
    /// Everything else.
    pub content: u64,
    /// Contents, each counted once.
    pub distinct: u64,
    /// Pages that only repeat what the same member has.
    pub intra_vm: u64,
    /// Pages that only repeat what another member has.
    pub cross_vm: u64,
    /// Pages with a content that have not changed since the scan before.
    pub stable: u64,
}

/// Counted contents.
#[derive(Debug, Default)]
pub struct Census {
    table: HashTable<u32>,
    contents: Vec<Content>,
    shares: Vec<Shares>,
    /// Pages of one member whose content the other has, too, by member and other.
    shared: Vec<u64>,
}

impl Census {
    /// Counts the members' pages, in the order that numbers them.
    pub fn of(snapshots: &[&Snapshot]) -> Self {
        let members = snapshots.len();
        let mut census = Census {
            shares: vec![Shares::default(); members],
            shared: vec![0; members * members],
            ..Census::default()
        };
        for (member, snapshot) in snapshots.iter().enumerate() {
            census.count(Member(member as u16), snapshot);
        }
        for (member, snapshot) in snapshots.iter().enumerate() {
            census.compare(member, members, snapshot);
        }
        census
    }

    fn count(&mut self, member: Member, snapshot: &Snapshot) {
        let shares = &mut self.shares[usize::from(member.0)];
        let bit = 1 << member.0.min(63);
        for (block, pages) in snapshot.blocks().iter().enumerate() {
            for page in 0..pages.pages() {
                shares.pages += 1;
                let digest = match pages.state(page) {
                    PageState::Hole | PageState::Uniform(0) => {
                        shares.zero += 1;
                        continue;
                    }
                    PageState::Uniform(_) => {
                        shares.uniform += 1;
                        continue;
                    }
                    PageState::Content(digest) => digest,
                };
                shares.content += 1;
                let stable = pages.stable_scans(page);
                shares.stable += u64::from(stable > 0);
                let place = PlaceOf {
                    member,
                    block: block as u16,
                    page: page as u32,
                };
                let hash = digest.table_hash();
                let contents = &mut self.contents;
                let known = self
                    .table
                    .find(hash, |index| contents[*index as usize].digest == digest);
                let Some(&index) = known else {
                    shares.distinct += 1;
                    self.table
                        .insert_unique(hash, contents.len() as u32, |index| {
                            contents[*index as usize].digest.table_hash()
                        });
                    contents.push(Content {
                        digest,
                        pages: 1,
                        only: Some(member),
                        stable,
                        place,
                        members: bit,
                    });
                    continue;
                };
                let content = &mut contents[index as usize];
                if content.only == Some(member) || (member.0 < 63 && content.members & bit != 0) {
                    shares.intra_vm += 1;
                } else {
                    shares.cross_vm += 1;
                }
                content.only = content.only.filter(|only| *only == member);
                content.members |= bit;
                content.pages = content.pages.saturating_add(1);
                if stable > content.stable {
                    content.stable = stable;
                    content.place = place;
                }
            }
        }
    }

    fn compare(&mut self, member: usize, members: usize, snapshot: &Snapshot) {
        let shared = &mut self.shared[member * members..][..members];
        for pages in snapshot.blocks() {
            for page in 0..pages.pages() {
                let PageState::Content(digest) = pages.state(page) else {
                    continue;
                };
                let Some(index) = self.table.find(digest.table_hash(), |index| {
                    self.contents[*index as usize].digest == digest
                }) else {
                    continue;
                };
                let who = self.contents[*index as usize].members;
                for (other, shared) in shared.iter_mut().enumerate().take(63) {
                    *shared += u64::from(who & (1 << other) != 0);
                }
            }
        }
    }

    /// All contents, in no order.
    pub fn contents(&self) -> &[Content] {
        &self.contents
    }

    /// A content, if any member has it.
    pub fn get(&self, digest: &PageDigest) -> Option<&Content> {
        self.table
            .find(digest.table_hash(), |index| {
                self.contents[*index as usize].digest == *digest
            })
            .map(|index| &self.contents[*index as usize])
    }

    /// Each member's pages. A content counts as repeated in the members after the first that has
    /// it, so these add up.
    pub fn shares(&self) -> &[Shares] {
        &self.shares
    }

    /// Pages of `member` whose content `other` has as well; with itself, all it has with a
    /// content. Known among the first 63 members.
    pub fn shared_with(&self, member: usize, other: usize) -> u64 {
        let members = self.shares.len();
        match member < members && other < members {
            true => self.shared[member * members + other],
            false => 0,
        }
    }

    /// Contents in the order in which it pays to have them at the other side: those of most pages
    /// first, of these the most stable, of these as they lie in memory.
    pub fn by_worth(&self) -> Vec<Content> {
        let mut contents = self.contents.clone();
        contents.sort_unstable_by_key(|content| {
            let place = content.place;
            (
                std::cmp::Reverse((content.pages, content.stable)),
                (place.member, place.block, place.page),
            )
        });
        contents
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockSnapshot;

    fn digest(content: u8) -> PageDigest {
        PageDigest([content; 16])
    }

    /// A guest of one block; 0 is a hole, 100 and more are uniform.
    fn guest(pages: &[u8], scans: u32) -> Snapshot {
        let mut block = BlockSnapshot::new("pc.ram", pages.len());
        for _ in 0..scans {
            for (page, content) in pages.iter().enumerate() {
                match content {
                    0 => block.set_hole(page),
                    100.. => block.set_uniform(page, *content),
                    content => block.set_content(page, u64::from(*content), digest(*content)),
                };
            }
        }
        Snapshot::new(vec![block])
    }

    #[test]
    fn shares_add_up() {
        let a = guest(&[0, 100, 1, 1, 2, 3], 2);
        let b = guest(&[2, 2, 2, 4, 0, 0], 1);
        let census = Census::of(&[&a, &b]);
        let [first, second] = census.shares() else {
            panic!("two members");
        };
        assert_eq!(
            *first,
            Shares {
                pages: 6,
                zero: 1,
                uniform: 1,
                content: 4,
                distinct: 3,
                intra_vm: 1,
                cross_vm: 0,
                stable: 4
            }
        );
        // The first of three repeats the other member, the two others this one.
        assert_eq!(
            (second.distinct, second.cross_vm, second.intra_vm),
            (1, 1, 2)
        );
        for shares in census.shares() {
            assert_eq!(
                shares.content,
                shares.distinct + shares.intra_vm + shares.cross_vm
            );
            assert_eq!(shares.pages, shares.zero + shares.uniform + shares.content);
        }
        assert_eq!(census.shared_with(0, 1), 1);
        assert_eq!(census.shared_with(1, 0), 3);
        assert_eq!(census.shared_with(0, 0), 4);
        assert_eq!(census.shared_with(0, 9), 0);
        let two = census.get(&digest(2)).expect("counted");
        assert_eq!((two.pages, two.only, two.stable), (4, None, 1));
        assert_eq!(
            census.get(&digest(1)).expect("counted").only,
            Some(Member(0))
        );
        assert!(census.get(&digest(9)).is_none());
    }

    #[test]
    fn what_most_pages_have_comes_first() {
        let a = guest(&[1, 2, 2, 3], 1);
        let b = guest(&[2, 4, 3, 5], 3);
        let census = Census::of(&[&a, &b]);
        let order: Vec<u8> = census.by_worth().iter().map(|c| c.digest.0[0]).collect();
        assert_eq!(order, [2, 3, 4, 5, 1]);
    }

    #[test]
    fn more_members_than_bits() {
        let guests: Vec<_> = (0..70).map(|n| guest(&[1, 2 + n], 1)).collect();
        let guests: Vec<_> = guests.iter().collect();
        let census = Census::of(&guests);
        let shares = census.shares();
        assert_eq!((shares[0].distinct, shares[0].cross_vm), (2, 0));
        assert_eq!((shares[69].distinct, shares[69].cross_vm), (1, 1));
        assert_eq!(census.get(&digest(1)).expect("counted").pages, 70);
    }
}
