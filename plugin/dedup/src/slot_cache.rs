//! A bounded cache from keys to window slots, the base of all side tables.
//!
//! Owns: memory in proportion to the entries it was made for, and what leaves when a place is
//! taken: the oldest of the few entries that share a set.
//! Must not: claim that an entry is current. It holds the tag of the content that was meant;
//! whoever looks up compares it with what the slot holds now.
//!
//! A set is 16 words of 32 bits, about a cache line: five entries of key, slot and tag. An
//! entry takes 16 bytes at the load the tables are made for.

use crate::Slot;

const WAYS: usize = 5;
const WORDS: usize = 16;
/// Entries a set is made for: with five, four stay nearly always.
const LOAD: u64 = 4;

/// One entry found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub slot: Slot,
    pub tag: u32,
}

/// Word 3i is the key of entry i, 3i + 1 its slot plus one (0: empty), 3i + 2 its tag. The
/// newest entry comes first.
#[derive(Debug)]
pub(crate) struct SlotCache {
    sets: Vec<[u32; WORDS]>,
}

impl SlotCache {
    /// A cache for about `entries` entries. Memory is taken from the system as it fills.
    pub(crate) fn new(entries: u64) -> Self {
        let sets = usize::try_from(entries.div_ceil(LOAD)).unwrap_or(usize::MAX);
        // Zeroed memory, not memory that is written to.
        Self {
            sets: vec![[0; WORDS]; sets],
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.sets.capacity() * WORDS * 4
    }

    /// The high half of the hash picks the set, the low half is the key within it.
    fn set(&self, hash: u64) -> Option<usize> {
        let set = (u128::from(hash) * self.sets.len() as u128) >> 64;
        (!self.sets.is_empty()).then_some(set as usize)
    }

    /// Puts an entry first. Of the others with its key the newest `keep` less one stay, so
    /// that a key never has more than `keep`.
    pub(crate) fn insert(&mut self, hash: u64, keep: usize, entry: Entry) {
        let Some(set) = self.set(hash) else { return };
        let words = &mut self.sets[set];
        let key = hash as u32;
        let mut same = 0;
        // The place that is overwritten: the first that may go, else the oldest.
        let mut victim = WAYS - 1;
        for way in 0..WAYS {
            let [old_key, old_slot, _] = entry_words(words, way);
            if old_slot == 0 {
                victim = way;
                break;
            }
            if old_key == key {
                same += 1;
                if same >= keep || old_slot == entry.slot.0 + 1 {
                    victim = way;
                    break;
                }
            }
        }
        words.copy_within(..3 * victim, 3);
        words[..3].copy_from_slice(&[key, entry.slot.0 + 1, entry.tag]);
    }

    /// Entries with this key, the newest first.
    pub(crate) fn find(&self, hash: u64) -> impl Iterator<Item = Entry> + '_ {
        let key = hash as u32;
        let words = self.set(hash).map(|set| &self.sets[set]);
        words.into_iter().flat_map(move |words| {
            (0..WAYS)
                .map(|way| entry_words(words, way))
                .take_while(|[_, slot, _]| *slot != 0)
                .filter(move |[old_key, ..]| *old_key == key)
                .map(|[_, slot, tag]| Entry {
                    slot: Slot(slot - 1),
                    tag,
                })
        })
    }
}

fn entry_words(words: &[u32; WORDS], way: usize) -> [u32; 3] {
    [words[3 * way], words[3 * way + 1], words[3 * way + 2]]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(slot: u32) -> Entry {
        Entry {
            slot: Slot(slot),
            tag: !slot,
        }
    }

    fn slots(cache: &SlotCache, hash: u64) -> Vec<u32> {
        cache.find(hash).map(|entry| entry.slot.0).collect()
    }

    #[test]
    fn a_key_keeps_its_newest_entries() {
        let mut cache = SlotCache::new(4);
        for slot in 0..4 {
            cache.insert(9, 2, entry(slot));
        }
        cache.insert(8, 1, entry(7));
        assert_eq!(slots(&cache, 9), [3, 2]);
        cache.insert(9, 2, entry(2));
        assert_eq!(slots(&cache, 9), [2, 3]);
        assert_eq!(slots(&cache, 8), [7]);
        assert_eq!(cache.find(9).next(), Some(entry(2)));
    }

    #[test]
    fn a_full_set_forgets_the_oldest() {
        let mut cache = SlotCache::new(4);
        for key in 0..6 {
            cache.insert(key, 1, entry(key as u32));
        }
        assert_eq!(slots(&cache, 0), []);
        for key in 1..6 {
            assert_eq!(slots(&cache, key), [key as u32]);
        }
    }

    #[test]
    fn no_entries_take_no_memory_and_find_nothing() {
        let mut cache = SlotCache::new(0);
        cache.insert(1, 1, entry(1));
        assert_eq!(slots(&cache, 1), []);
        assert_eq!(cache.memory_bytes(), 0);
    }
}
