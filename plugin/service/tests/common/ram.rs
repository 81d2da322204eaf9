//! The memory of scripted guests.

use super::*;

/// The memory of scripted guests, which tests write to.
#[derive(Clone, Default)]
pub struct FakeRam(pub(super) Arc<Mutex<HashMap<Uuid, Ram>>>);

#[derive(Clone)]
pub struct Ram {
    pub pages: Arc<Mutex<Vec<Option<Page>>>>,
    pub alive: Arc<AtomicBool>,
    /// Scans there were.
    pub scans: Arc<AtomicUsize>,
}

impl FakeRam {
    pub fn add(&self, uuid: Uuid, pages: Vec<Option<Page>>) -> Ram {
        let ram = Ram {
            pages: Arc::new(Mutex::new(pages)),
            alive: Arc::new(AtomicBool::new(true)),
            scans: Arc::default(),
        };
        self.0.lock().expect("lock").insert(uuid, ram.clone());
        ram
    }
}

impl Guests for FakeRam {
    fn open(&self, uuids: &[Uuid]) -> Vec<(Uuid, guests::Opened)> {
        let known = self.0.lock().expect("lock");
        let open = |uuid: &Uuid| {
            let ram = known.get(uuid)?.clone();
            let alive = ram.alive.load(Ordering::SeqCst);
            alive.then(|| (*uuid, Ok(Arc::new(ram) as Arc<dyn GuestRam>)))
        };
        uuids.iter().filter_map(open).collect()
    }
}

impl GuestRam for Ram {
    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    fn empty_snapshot(&self) -> Snapshot {
        let pages = self.pages.lock().expect("lock").len();
        Snapshot::new(vec![BlockSnapshot::new("pc.ram", pages)])
    }

    fn scan(
        &self,
        key: &DigestKey,
        snapshot: &mut Snapshot,
        pace: &mut dyn Pace,
    ) -> Result<ScanReport, SnapshotError> {
        let prints = Fingerprinter::new(key);
        for (number, page) in self.pages.lock().expect("lock").iter().enumerate() {
            if pace.pause(Duration::ZERO).is_break() {
                return Err(SnapshotError::Stopped);
            }
            let block = &mut snapshot.blocks_mut()[0];
            match page {
                None => block.set_hole(number),
                Some(page) => {
                    let digest = PageDigest::of(key, page);
                    block.set_content(number, prints.of(page), digest)
                }
            };
        }
        snapshot.scanned();
        self.scans.fetch_add(1, Ordering::SeqCst);
        Ok(ScanReport::default())
    }

    fn read_page(&self, _: usize, page: usize, out: &mut Page) -> Result<(), SnapshotError> {
        let pages = self.pages.lock().expect("lock");
        match pages.get(page) {
            Some(page) => {
                *out = page.unwrap_or([0; PAGE_BYTES]);
                Ok(())
            }
            None => Err(SnapshotError::Gone { pid: 1 }),
        }
    }
}

/// A page of its own for each number.
pub fn page(content: u64) -> Page {
    let mut page = [9; PAGE_BYTES];
    page[..8].copy_from_slice(&content.to_le_bytes());
    page
}
