//! The memory of the guests on this host as a trait, so that scans and stages are tested without
//! QEMU. Nothing is decided here: every method is one call of the snapshot crate.

use std::sync::Arc;

use uuid::Uuid;
use vmgang_dedup::{DigestKey, Page, Snapshot};
use vmgang_snapshot::{GuestMemory, Pace, QemuProcess, ScanReport, Scanner, SnapshotError};

/// A guest's memory, or why it cannot be read.
pub type Opened = Result<Arc<dyn GuestRam>, String>;

/// Finds guests' memory.
pub trait Guests: Send + Sync + 'static {
    /// The memory of each of these that runs here, or why it cannot be read. Blocks.
    fn open(&self, uuids: &[Uuid]) -> Vec<(Uuid, Opened)>;
}

/// One guest's memory; see [`GuestMemory`].
pub trait GuestRam: Send + Sync + 'static {
    /// Its QEMU is still the same process.
    fn is_alive(&self) -> bool;
    fn empty_snapshot(&self) -> Snapshot;
    fn scan(
        &self,
        key: &DigestKey,
        snapshot: &mut Snapshot,
        pace: &mut dyn Pace,
    ) -> Result<ScanReport, SnapshotError>;
    fn read_page(&self, block: usize, page: usize, out: &mut Page) -> Result<(), SnapshotError>;
}

/// The QEMUs of this host.
pub struct Qemus;

impl Guests for Qemus {
    fn open(&self, uuids: &[Uuid]) -> Vec<(Uuid, Opened)> {
        let found = match QemuProcess::find(uuids) {
            Ok(found) => found,
            Err(error) => {
                let problem = format!("this host's processes cannot be listed: {error}");
                let failed = |uuid: &Uuid| (*uuid, Err(problem.clone()));
                return uuids.iter().map(failed).collect();
            }
        };
        let open = |(uuid, process): (Uuid, QemuProcess)| {
            let memory = GuestMemory::open(&process);
            let memory = memory.map(|memory| Arc::new(memory) as Arc<dyn GuestRam>);
            (uuid, memory.map_err(|error| error.to_string()))
        };
        found.into_iter().map(open).collect()
    }
}

impl GuestRam for GuestMemory {
    fn is_alive(&self) -> bool {
        GuestMemory::is_alive(self)
    }

    fn empty_snapshot(&self) -> Snapshot {
        GuestMemory::empty_snapshot(self)
    }

    fn scan(
        &self,
        key: &DigestKey,
        snapshot: &mut Snapshot,
        pace: &mut dyn Pace,
    ) -> Result<ScanReport, SnapshotError> {
        Scanner::new(key).scan(self, snapshot, pace)
    }

    fn read_page(&self, block: usize, page: usize, out: &mut Page) -> Result<(), SnapshotError> {
        GuestMemory::read_page(self, block, page, out)
    }
}
