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
/// is 16 GiB of them.
const INDEXED_MAX: usize = 4 << 20;

/// What a job has left behind.
struct Checkpoint {
    gang: String,
    members: HashSet<Uuid>,
    key_id: u64,
    remains: Arc<Remains>,
    kept: Instant,
}

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
            if same_gang || !one.members.is_disjoint(&coming) {
                found.checkpoints.push(one.remains.clone());
            }
        }
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
                    if let PageState::Content(digest) = block.state(page)
                        && found.index.len() < INDEXED_MAX
                    {
                        let place = (resident, number as u32, page as u32);
                        found.index.entry(digest).or_insert(place);
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
    residents: Vec<Arc<dyn GuestRam>>,
    /// Guest, block and page by content.
    index: HashMap<PageDigest, (u32, u32, u32)>,
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
            let Some((resident, block, page)) = self.index.get(digest) else {
                continue;
            };
            let Some(guest) = self.residents.get(*resident as usize) else {
                continue;
            };
            // The engine looks whether it is still that content.
            if guest
                .read_page(*block as usize, *page as usize, &mut copy)
                .is_ok()
            {
                found(place, &copy);
            }
        }
    }
}
