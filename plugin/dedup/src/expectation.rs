//! How often contents are still to be sent, for those that do not sit in a slot.
//!
//! Owns: counts by content, never more than the window has slots.
//! Must not: know slots; the map takes the count of a content that gets one.
//!
//! Contents are told apart by 64 bits of their digest: a mix-up keeps a page longer or
//! shorter than it should be, which costs bytes only. Memory: 12 B an entry and 1 B of hash
//! table at 44 to 88 % load: at most 30 B a content, none without expectations.

use hashbrown::HashTable;

use crate::PageDigest;

/// Below this a table is not worth shrinking.
const ENTRIES_KEPT: usize = 1024;

/// The low and the high half of the digest's hash, and the count.
type Entry = [u32; 3];

#[derive(Debug)]
pub(crate) struct Expectations {
    table: HashTable<Entry>,
    entries_max: usize,
}

impl Expectations {
    pub(crate) fn new(entries_max: u32) -> Self {
        Self {
            table: HashTable::new(),
            entries_max: entries_max as usize,
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        self.table.allocation_size()
    }

    /// Sets the count; 0 forgets it. What finds no room is not remembered.
    pub(crate) fn set(&mut self, digest: &PageDigest, count: u32) {
        if count == 0 {
            self.take(digest, u32::MAX);
            return;
        }
        let hash = digest.table_hash();
        if let Some(entry) = self.table.find_mut(hash, |entry| hash_of(entry) == hash) {
            entry[2] = count;
        } else if self.table.len() < self.entries_max {
            let entry = [hash as u32, (hash >> 32) as u32, count];
            self.table.insert_unique(hash, entry, hash_of);
        }
    }

    /// Takes up to `most` of a content's count; `None` if nothing is known of it.
    pub(crate) fn take(&mut self, digest: &PageDigest, most: u32) -> Option<u32> {
        if self.table.is_empty() {
            return None;
        }
        let hash = digest.table_hash();
        let mut entry = self
            .table
            .find_entry(hash, |entry| hash_of(entry) == hash)
            .ok()?;
        let count = entry.get()[2];
        if count > most {
            entry.get_mut()[2] = count - most;
            return Some(most);
        }
        entry.remove();
        let len = self.table.len();
        if len > ENTRIES_KEPT && len * 4 < self.table.capacity() {
            self.table.shrink_to(len * 2, hash_of);
        }
        Some(count)
    }

    pub(crate) fn clear(&mut self) {
        self.table = HashTable::new();
    }
}

fn hash_of(entry: &Entry) -> u64 {
    u64::from(entry[0]) | (u64::from(entry[1]) << 32)
}
