//! Contents that this host has although nobody has sent them for the job at hand: of members of
//! the gang that run here, and of those that left not long ago.
//!
//! Owns: the checkpoints, within their budget and time.
//! Must not: give one gang's contents to another one: that a content is here may be seen from how
//! long a migration takes.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use uuid::Uuid;
use vmgang_dedup::{Page, PageDigest, PageState};
use vmgang_engine::{Offer, PageKey, Recall, Remains};

use crate::config::RecallConfig;
use crate::gangs;
use crate::guests::GuestRam;
use crate::hypervisor::Hypervisor;
use crate::memory::AvailableMemory;
use crate::scans::Scans;

/// Contents of guests that run here are looked up by an index; it has no more than this, which
/// is 4 GiB of them and takes 56 MiB.
const INDEXED_MAX: usize = 1 << 20;

/// What a job has left behind.
struct Checkpoint {
    gang: String,
    members: HashSet<Uuid>,
    key_id: u64,
    remains: Arc<Remains>,
    kept: Instant,
}

/// Of residents' contents, so many are told unasked: one for each eight pages that come. Telling takes
/// 16 bytes, and a copy.
const TOLD_ONE_IN_BYTES: u64 = 8 * vmgang_dedup::PAGE_BYTES as u64;

/// All contents that offers are compared with.
pub struct Contents {
    config: RecallConfig,
    scans: Arc<Scans>,
    hypervisor: Arc<dyn Hypervisor>,
    available: Box<AvailableMemory>,
    checkpoints: Mutex<Vec<Checkpoint>>,
}

impl Contents {
    pub fn new(
        config: RecallConfig,
        scans: Arc<Scans>,
        hypervisor: Arc<dyn Hypervisor>,
        available: Box<AvailableMemory>,
    ) -> Self {
        Self {
            config,
            scans,
            hypervisor,
            available,
            checkpoints: Mutex::default(),
        }
    }

    fn checkpoints(&self) -> MutexGuard<'_, Vec<Checkpoint>> {
        self.checkpoints
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what a job leaves is kept at all.
    pub fn keeps(&self) -> bool {
        self.config.checkpoints
    }

    /// Keeps what a job has left, for its members' way back. The oldest make room.
    pub fn keep(&self, gang: &str, members: HashSet<Uuid>, key: &PageKey, remains: Remains) {
        if !self.config.checkpoints || remains.is_empty() {
            return;
        }
        let mut checkpoints = self.checkpoints();
        // What they had before is not what they have now.
        checkpoints.retain(|old| old.members.is_disjoint(&members));
        checkpoints.push(Checkpoint {
            gang: gang.to_owned(),
            members,
            key_id: key.id(),
            remains: Arc::new(remains),
            kept: Instant::now(),
        });
        drop(checkpoints);
        self.tidy();
        let bytes = self.checkpoint_bytes();
        tracing::info!(
            gang,
            bytes,
            "contents of the gang are kept for its way back"
        );
    }

    /// Bytes that checkpoints take.
    pub fn checkpoint_bytes(&self) -> u64 {
        let checkpoints = self.checkpoints();
        checkpoints
            .iter()
            .map(|one| one.remains.memory_bytes())
            .sum()
    }

    /// Drops what has had its time, and what is more than this host can spare now.
    pub fn tidy(&self) {
        let held = self.checkpoint_bytes();
        if held == 0 {
            return;
        }
        // What they take themselves is available but for them.
        let spare = (self.available)().map_or(0, |available| (available + held) / 4);
        let most = self.config.checkpoint_budget.most_bytes().min(spare);
        let dropped: Vec<Checkpoint> = {
            let mut checkpoints = self.checkpoints();
            let mut left = most;
            let mut keeps = |one: &Checkpoint| {
                let bytes = one.remains.memory_bytes();
                let stays = one.kept.elapsed() < self.config.checkpoint_time() && bytes <= left;
                left -= if stays { bytes } else { 0 };
                stays
            };
            // The newest first.
            let stays: Vec<bool> = checkpoints.iter().rev().map(&mut keeps).collect();
            let mut stays = stays.into_iter().rev();
            let (kept, dropped) = std::mem::take(&mut *checkpoints)
                .into_iter()
                .partition(|_| stays.next().unwrap_or(false));
            *checkpoints = kept;
            dropped
        };
        for one in dropped {
            tracing::info!(
                gang = one.gang,
                "contents of the gang are not kept any longer"
            );
        }
    }

    /// Where to look for what a job offers; nothing if there is nothing to be found. Blocks.
    pub fn for_job(&self, offer: &Offer, key: &PageKey) -> Option<Arc<dyn Recall>> {
        self.tidy();
        let coming: HashSet<Uuid> = offer.members.iter().map(|member| member.uuid).collect();
        let mut found = Found::default();
        for one in self
            .checkpoints()
            .iter()
            .filter(|one| one.key_id == key.id())
        {
            let same_gang = !offer.gang.is_empty() && one.gang == offer.gang;
            if !one.members.is_disjoint(&coming) {
                found.checkpoints.insert(0, one.remains.clone());
                found.returning += 1;
            } else if same_gang {
                found.checkpoints.push(one.remains.clone());
            }
        }
        let guests = offer
            .members
            .iter()
            .fold(0u64, |sum, member| sum.saturating_add(member.memory_bytes));
        found.told = usize::try_from(guests / TOLD_ONE_IN_BYTES).unwrap_or(usize::MAX);
        if self.config.residents && !offer.gang.is_empty() {
            self.index_residents(&offer.gang, &coming, key, &mut found);
        }
        (found.contents() > 0).then(|| Arc::new(found) as Arc<dyn Recall>)
    }

    fn index_residents(
        &self,
        gang: &str,
        coming: &HashSet<Uuid>,
        key: &PageKey,
        found: &mut Found,
    ) {
        let Ok(domains) = self.hypervisor.domains() else {
            return;
        };
        let Ok(members) = gangs::members(gang, &domains) else {
            return;
        };
        let here = members
            .iter()
            .filter(|member| member.active() && !coming.contains(&member.uuid));
        for scan in here.filter_map(|member| self.scans.last(member.uuid, key)) {
            let resident = found.residents.len() as u32;
            found.residents.push(scan.memory.clone());
            for (number, block) in scan.snapshot.blocks().iter().enumerate() {
                for page in 0..block.pages() {
                    let PageState::Content(digest) = block.state(page) else {
                        continue;
                    };
                    if let Some(known) = found.index.get_mut(&digest) {
                        known.pages += 1;
                    } else if found.index.len() < INDEXED_MAX {
                        let place = Place {
                            guest: resident,
                            block: number as u32,
                            page: page as u32,
                            pages: 1,
                        };
                        found.index.insert(digest, place);
                    }
                }
            }
        }
    }
}

/// What one job's offers are compared with.
#[derive(Default)]
struct Found {
    checkpoints: Vec<Arc<Remains>>,
    /// The first of these are of members that come back.
    returning: usize,
    residents: Vec<Arc<dyn GuestRam>>,
    /// Contents of residents.
    index: HashMap<PageDigest, Place>,
    /// Contents of residents to be told before anybody asks: those that most pages have.
    told: usize,
}

/// Where a content is, and how many pages have it.
struct Place {
    guest: u32,
    block: u32,
    page: u32,
    pages: u32,
}

impl Recall for Found {
    fn contents(&self) -> u64 {
        let kept: usize = self.checkpoints.iter().map(|remains| remains.len()).sum();
        (kept + self.index.len()) as u64
    }

    fn find(&self, digests: &[PageDigest], found: &mut dyn FnMut(usize, &Page)) {
        let mut copy = [0; vmgang_dedup::PAGE_BYTES];
        for (place, digest) in digests.iter().enumerate() {
            let kept = self.checkpoints.iter().find_map(|one| one.get(digest));
            if let Some(page) = kept {
                found(place, page);
                continue;
            }
            let Some(known) = self.index.get(digest) else {
                continue;
            };
            // The engine looks whether it is still that content.
            if self.copy(known, &mut copy) {
                found(place, &copy);
            }
        }
    }

    fn likely(&self, most: usize, found: &mut dyn FnMut(&PageDigest, &Page)) {
        let mut left = most;
        let mut told = HashSet::new();
        for remains in self.checkpoints.iter().take(self.returning) {
            for (digest, page) in remains.iter().take(left) {
                if told.insert(*digest) {
                    found(digest, page);
                }
            }
            left = most.saturating_sub(told.len());
        }
        let mut residents: Vec<(&PageDigest, &Place)> = self.index.iter().collect();
        // Of two that are as frequent, neighbours stay neighbours.
        residents.sort_unstable_by_key(|(_, place)| {
            let reverse = std::cmp::Reverse(place.pages);
            (reverse, place.guest, place.block, place.page)
        });
        let mut copy = [0; vmgang_dedup::PAGE_BYTES];
        for (digest, place) in residents.into_iter().take(left.min(self.told)) {
            if !told.contains(digest) && self.copy(place, &mut copy) {
                found(digest, &copy);
            }
        }
    }
}

impl Found {
    /// Copies what is in a resident's page now.
    fn copy(&self, place: &Place, out: &mut Page) -> bool {
        let Some(guest) = self.residents.get(place.guest as usize) else {
            return false;
        };
        let (block, page) = (place.block as usize, place.page as usize);
        guest.read_page(block, page, out).is_ok()
    }
}
