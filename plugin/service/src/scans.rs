//! What is known of the memory of the guests on this host: scans, on request and from time to
//! time.
//!
//! Owns: the last snapshot of each guest, and the thread that keeps them fresh.
//! Must not: scan while a migration runs, unless that asks for it, or keep anything of a guest that
//! is gone.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use vmgang_dedup::Snapshot;
use vmgang_engine::PageKey;
use vmgang_libvirt::{DomainInfo, LibvirtError};
use vmgang_snapshot::{Budget, Pace, SnapshotError, Unpaced, idle_priority};

use crate::config::ScanConfig;
use crate::guests::{GuestRam, Guests, Opened};
use crate::hypervisor::Hypervisor;

/// How often guests are looked for.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// And how often libvirt is asked which of them are members, as long as no guest comes or goes: that
/// takes a few calls for each.
const ASK_INTERVAL: Duration = Duration::from_secs(60);
/// A guest that has just appeared still boots, or arrives.
const SETTLE_TIME: Duration = Duration::from_secs(10);

/// The last scan of one guest.
#[derive(Clone)]
pub struct Scan {
    pub memory: Arc<dyn GuestRam>,
    pub snapshot: Arc<Snapshot>,
    pub key_id: u64,
    at: Instant,
    pub unix_s: u64,
}

impl Scan {
    /// How long ago it ended.
    pub fn age(&self) -> Duration {
        self.at.elapsed()
    }
}

#[derive(Default)]
struct Guest {
    last: Option<Scan>,
    appeared: Option<Instant>,
    /// Held while it is scanned.
    scanning: Arc<Mutex<()>>,
}

/// All scans of this host.
pub struct Scans {
    guests: Arc<dyn Guests>,
    known: Mutex<HashMap<Uuid, Guest>>,
    /// Migrations under way: nothing is scanned unasked meanwhile.
    busy: Arc<AtomicUsize>,
    /// What a periodic scan looks at.
    stop: Arc<AtomicBool>,
    ended: (Mutex<bool>, Condvar),
}

/// Keeps periodic scans away until it is dropped.
pub struct Quiet(Arc<Scans>);

impl Drop for Quiet {
    fn drop(&mut self) {
        if self.0.busy.fetch_sub(1, Relaxed) == 1 {
            self.0.stop.store(false, Relaxed);
        }
    }
}

impl Scans {
    pub fn new(guests: Arc<dyn Guests>) -> Arc<Self> {
        Arc::new(Self {
            guests,
            known: Mutex::default(),
            busy: Arc::default(),
            stop: Arc::default(),
            ended: (Mutex::new(false), Condvar::new()),
        })
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Uuid, Guest>> {
        // Each change is one insert or remove, whole even if a thread died around it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A migration begins.
    pub fn quiet(self: &Arc<Self>) -> Quiet {
        self.busy.fetch_add(1, Relaxed);
        self.stop.store(true, Relaxed);
        Quiet(self.clone())
    }

    /// Whether a migration runs.
    pub fn is_quiet(&self) -> bool {
        self.busy.load(Relaxed) > 0
    }

    /// The last scan of a guest that still runs, made with that key.
    pub fn last(&self, uuid: Uuid, key: &PageKey) -> Option<Scan> {
        let last = self.known().get(&uuid)?.last.clone()?;
        (last.key_id == key.id() && last.memory.is_alive()).then_some(last)
    }

    /// These guests have left. Who closes the last that is open of a guest's memory waits until the kernel
    /// has freed all of it, so a thread of its own does.
    pub fn forget(&self, uuids: &HashSet<Uuid>) {
        let left: Vec<Guest> = {
            let mut known = self.known();
            uuids.iter().filter_map(|uuid| known.remove(uuid)).collect()
        };
        if !left.is_empty() {
            let closing = thread::Builder::new().name("forget".to_owned());
            // If no thread can be had it has been closed here.
            drop(closing.spawn(move || drop(left)));
        }
    }

    /// Scans these guests, each in its place, but for those that were scanned less than `age` ago.
    /// What cannot be scanned comes with the reason. Blocks, for a second or so for each two
    /// gigabytes.
    pub fn scan_now(
        &self,
        uuids: &[Uuid],
        key: &PageKey,
        age: Duration,
    ) -> Vec<Result<Scan, String>> {
        self.scan(uuids, key, age, &mut || Box::new(Unpaced))
    }

    fn scan(
        &self,
        uuids: &[Uuid],
        key: &PageKey,
        age: Duration,
        pace: &mut dyn FnMut() -> Box<dyn Pace>,
    ) -> Vec<Result<Scan, String>> {
        let fresh = |uuid: &Uuid| self.last(*uuid, key).filter(|scan| scan.age() < age);
        let stale: Vec<Uuid> = uuids
            .iter()
            .copied()
            .filter(|uuid| fresh(uuid).is_none())
            .collect();
        let mut opened: HashMap<Uuid, Opened> = HashMap::new();
        if !stale.is_empty() {
            opened = self.guests.open(&stale).into_iter().collect();
        }
        let mut scans = Vec::with_capacity(uuids.len());
        for uuid in uuids {
            scans.push(match (fresh(uuid), opened.remove(uuid)) {
                (Some(scan), _) => Ok(scan),
                (None, None) => Err("its QEMU is not found among this host's processes".to_owned()),
                (None, Some(Err(problem))) => Err(problem),
                (None, Some(Ok(memory))) => self
                    .scan_one(*uuid, memory, key, age, &mut *pace())
                    .map_err(|error| error.to_string()),
            });
        }
        scans
    }

    fn scan_one(
        &self,
        uuid: Uuid,
        memory: Arc<dyn GuestRam>,
        key: &PageKey,
        age: Duration,
        pace: &mut dyn Pace,
    ) -> Result<Scan, SnapshotError> {
        let scanning = self.known().entry(uuid).or_default().scanning.clone();
        let _scanning = scanning.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have done it meanwhile.
        let last = self.last(uuid, key);
        if let Some(scan) = last.as_ref().filter(|scan| scan.age() < age) {
            return Ok(scan.clone());
        }
        // A guest of another shape is another guest: it was rebooted, or has got memory.
        let empty = memory.empty_snapshot();
        let same_shape = |scan: &&Scan| {
            let blocks = scan.snapshot.blocks().iter().zip(empty.blocks());
            scan.snapshot.blocks().len() == empty.blocks().len()
                && blocks
                    .into_iter()
                    .all(|(old, new)| (old.name(), old.pages()) == (new.name(), new.pages()))
        };
        let mut snapshot = match last.as_ref().filter(same_shape) {
            Some(last) => Snapshot::clone(&last.snapshot),
            None => empty,
        };
        let report = memory.scan(key.digest_key(), &mut snapshot, pace)?;
        tracing::debug!(
            domain = %uuid, pages = report.pages, holes = report.holes, hashed = report.hashed,
            unchanged = report.unchanged, busy_ms = report.busy.as_millis() as u64,
            elapsed_ms = report.elapsed.as_millis() as u64, "guest scanned"
        );
        let scan = Scan {
            memory,
            snapshot: Arc::new(snapshot),
            key_id: key.id(),
            at: Instant::now(),
            unix_s: unix_seconds(),
        };
        self.known().entry(uuid).or_default().last = Some(scan.clone());
        Ok(scan)
    }

    /// Scans the members of this host's gangs from time to time, until [`end`](Self::end), on a
    /// thread of its own at idle priority.
    pub fn run(
        self: &Arc<Self>,
        config: ScanConfig,
        hypervisor: Arc<dyn Hypervisor>,
        key: impl Fn() -> Option<PageKey> + Send + 'static,
    ) -> std::io::Result<()> {
        let scans = self.clone();
        let run = move || {
            if let Err(error) = idle_priority() {
                tracing::warn!(%error, "scans run at normal priority");
            }
            let mut seen = Seen::default();
            while !scans.wait(LOOK_INTERVAL) {
                if let Some(key) = key() {
                    scans.round(&config, &*hypervisor, &key, &mut seen);
                }
            }
        };
        std::thread::Builder::new()
            .name("scans".to_owned())
            .spawn(run)?;
        Ok(())
    }

    /// Ends the thread, without waiting for it.
    pub fn end(&self) {
        self.stop.store(true, Relaxed);
        *self.ended.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.ended.1.notify_all();
    }

    /// Whether it is to end.
    fn wait(&self, time: Duration) -> bool {
        let ended = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .ended
            .1
            .wait_timeout_while(ended, time, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Forgets who is gone, and scans who is due.
    fn round(
        &self,
        config: &ScanConfig,
        hypervisor: &dyn Hypervisor,
        key: &PageKey,
        seen: &mut Seen,
    ) {
        if let Err(error) = seen.look(hypervisor) {
            tracing::debug!(%error, "cannot tell which guests to scan");
            return;
        }
        {
            let mut known = self.known();
            known.retain(|uuid, guest| {
                seen.running.contains(uuid)
                    && guest
                        .last
                        .as_ref()
                        .is_none_or(|scan| scan.memory.is_alive())
            });
            for uuid in &seen.members {
                let guest = known.entry(*uuid).or_default();
                guest.appeared.get_or_insert_with(Instant::now);
            }
        }
        let Some(interval) = config.interval() else {
            return;
        };
        for uuid in seen.members.iter().copied() {
            if self.is_quiet() {
                return;
            }
            let settled = self
                .known()
                .get(&uuid)
                .and_then(|guest| guest.appeared)
                .is_some_and(|appeared| appeared.elapsed() >= SETTLE_TIME);
            if !settled {
                continue;
            }
            let share = f64::from(config.processor_percent) / 100.0;
            let mut pace = || Box::new(Budget::new(share, self.stop.clone())) as Box<dyn Pace>;
            for result in self.scan(&[uuid], key, interval, &mut pace) {
                if let Err(problem) = result {
                    tracing::debug!(domain = %uuid, problem, "guest not scanned");
                }
            }
        }
    }
}

/// The guests of this host, as libvirt has told.
#[derive(Default)]
struct Seen {
    running: HashSet<Uuid>,
    /// Those that are members of a gang.
    members: Vec<Uuid>,
    asked: Option<Instant>,
}

impl Seen {
    fn look(&mut self, hypervisor: &dyn Hypervisor) -> Result<(), LibvirtError> {
        let running: HashSet<Uuid> = hypervisor.running()?.into_iter().collect();
        let asked = self.asked.is_some_and(|at| at.elapsed() < ASK_INTERVAL);
        if asked && running == self.running {
            return Ok(());
        }
        let domains = hypervisor.domains()?;
        let member = |domain: &&DomainInfo| {
            running.contains(&domain.uuid) && matches!(domain.membership, Ok(Some(_)))
        };
        let members = domains.iter().filter(member);
        self.members = members.map(|domain| domain.uuid).collect();
        self.running = running;
        self.asked = Some(Instant::now());
        Ok(())
    }
}

pub fn unix_seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
