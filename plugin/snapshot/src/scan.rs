//! One look at all pages of a guest.
//!
//! Owns: the copy that is fingerprinted and, where that is new, hashed: both of the same bytes.
//! Must not: take memory in proportion to the guest, or allocate for a page.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use vmgang_dedup::{
    BlockSnapshot, DigestKey, Fingerprinter, PAGE_BYTES, PageDigest, Snapshot, uniform_byte,
};

use crate::holes::{Entry, MergedFrames, PageMap, data_ranges};
use crate::memory::{Backing, GuestMemory, RamBlock, SnapshotError};
use crate::pace::{Pace, processor_time};

/// Pages that are copied at once: little enough to stay in the cache until they are hashed.
const COPIED_PAGES: usize = 64;
/// Pages that are hashed side by side.
const HASHED_PAGES: usize = 16;
/// Merged frames that are remembered.
const FRAMES_MAX: usize = 1 << 20;

/// What a scan has found, in pages unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScanReport {
    pub pages: u64,
    /// Without memory behind them.
    pub holes: u64,
    /// Swapped out, and left there: known by what they were.
    pub swapped: u64,
    /// Of one repeated byte, zero included.
    pub uniform: u64,
    /// The same as at the last scan, by their fingerprint.
    pub unchanged: u64,
    /// New, and hashed.
    pub hashed: u64,
    /// New, and known to the kernel to be the same as one that was hashed.
    pub same_frame: u64,
    /// Bytes that were copied.
    pub bytes_read: u64,
    /// Processor time.
    pub busy: Duration,
    pub elapsed: Duration,
}

/// Scans guests; one at a time, with buffers that are used again.
pub struct Scanner {
    key: DigestKey,
    fingerprinter: Fingerprinter,
    /// Begins with a page, as what is copied does: with a copy that lies a few bytes further into
    /// its page than the original, processors take each load for one of what was just stored, and
    /// copying takes four times as long.
    copy: Option<MmapMut>,
    digests: Vec<PageDigest>,
    frames: HashMap<u64, (u64, PageDigest)>,
}

/// One scan under way.
struct Scan<'a> {
    scanner: &'a mut Scanner,
    memory: &'a GuestMemory,
    pace: &'a mut dyn Pace,
    report: ScanReport,
    busy_before: Duration,
}

/// Pages of a copy that wait to be hashed.
#[derive(Default)]
struct Batch {
    /// Place in the copy, number of the page, its fingerprint, its frame if that is merged.
    pages: [(usize, usize, u64, u64); HASHED_PAGES],
    len: usize,
}

impl Scanner {
    /// Scans whose digests are made with this key.
    pub fn new(key: &DigestKey) -> Self {
        Self {
            key: key.clone(),
            fingerprinter: Fingerprinter::new(key),
            copy: None,
            digests: Vec::new(),
            frames: HashMap::new(),
        }
    }

    /// Looks at every page of the guest; `snapshot` has what the last scan found, and gets what
    /// this one finds. After an error it has some of both, which is as good a hint.
    pub fn scan(
        &mut self,
        memory: &GuestMemory,
        snapshot: &mut Snapshot,
        pace: &mut dyn Pace,
    ) -> Result<ScanReport, SnapshotError> {
        let began = Instant::now();
        let busy_at_start = processor_time();
        self.frames.clear();
        let mut scan = Scan {
            scanner: self,
            memory,
            pace,
            report: ScanReport::default(),
            busy_before: busy_at_start,
        };
        for (number, (block, pages)) in
            (memory.ram_blocks().iter().zip(snapshot.blocks_mut())).enumerate()
        {
            scan.block(number, block, pages)
                .map_err(|error| match error {
                    // Whatever was noticed first.
                    SnapshotError::Process { .. } if !memory.is_alive() => memory.gone(),
                    error => error,
                })?;
        }
        let mut report = scan.report;
        if !memory.is_alive() {
            return Err(memory.gone());
        }
        snapshot.scanned();
        report.busy = processor_time().saturating_sub(busy_at_start);
        report.elapsed = began.elapsed();
        Ok(report)
    }
}

impl Scan<'_> {
    fn failed(&self, what: &'static str) -> impl Fn(std::io::Error) -> SnapshotError + use<> {
        let pid = self.memory.process().pid();
        move |error| SnapshotError::Process { pid, what, error }
    }

    fn block(
        &mut self,
        number: usize,
        block: &RamBlock,
        pages: &mut BlockSnapshot,
    ) -> Result<(), SnapshotError> {
        self.report.pages += pages.pages() as u64;
        match &block.backing {
            Backing::File {
                file,
                seekable: true,
                ..
            } => {
                let ranges = data_ranges(file, block.bytes).map_err(self.failed("the memory"))?;
                let mut next = 0;
                for range in ranges {
                    let data = page_range(&range, pages.pages());
                    self.hole(pages, next..data.start);
                    next = data.end;
                    self.data(number, pages, data)?;
                }
                self.hole(pages, next..pages.pages());
                Ok(())
            }
            _ => self.mapped(number, block, pages),
        }
    }

    /// A block whose holes only QEMU's page tables tell.
    fn mapped(
        &mut self,
        number: usize,
        block: &RamBlock,
        pages: &mut BlockSnapshot,
    ) -> Result<(), SnapshotError> {
        let failed = self.failed("the page map");
        let mut map = PageMap::open(self.memory.process()).map_err(&failed)?;
        let merged = match block.backing {
            Backing::Private => MergedFrames::open(),
            Backing::File { .. } => None,
        };
        let mut entries = [Entry::Hole; COPIED_PAGES];
        for first in (0..pages.pages()).step_by(COPIED_PAGES) {
            let count = COPIED_PAGES.min(pages.pages() - first);
            let address = block.address + (first * PAGE_BYTES) as u64;
            let read = map.read(address, count).map_err(&failed)?;
            for (entry, read) in entries.iter_mut().zip(read) {
                *entry = read;
            }
            let entries = &entries[..count];
            // A merged page's frame is told from others by its number, 0 stands for none.
            let frame = |entry: &Entry| match (entry, &merged) {
                (Entry::Present(frame), Some(merged)) if merged.has(*frame) => *frame,
                _ => 0,
            };
            let present = |entry: &Entry| matches!(entry, Entry::Present(_));
            let mut at = 0;
            while at < count {
                let run = entries[at..]
                    .iter()
                    .position(|entry| present(entry) != present(&entries[at]))
                    .unwrap_or(count - at);
                let run = at..at + run;
                at = run.end;
                if present(&entries[run.start]) {
                    let frames: Vec<u64> = match merged {
                        Some(_) => entries[run.clone()].iter().map(frame).collect(),
                        None => Vec::new(),
                    };
                    self.copy(number, pages, first + run.start, run.len(), &frames)?;
                    continue;
                }
                for place in run {
                    match entries[place] {
                        Entry::Swapped => self.report.swapped += 1,
                        _ => self.hole(pages, first + place..first + place + 1),
                    }
                }
            }
            self.breathe()?;
        }
        Ok(())
    }

    fn hole(&mut self, pages: &mut BlockSnapshot, range: Range<usize>) {
        self.report.holes += range.len() as u64;
        for page in range {
            pages.set_hole(page);
        }
    }

    fn data(
        &mut self,
        number: usize,
        pages: &mut BlockSnapshot,
        range: Range<usize>,
    ) -> Result<(), SnapshotError> {
        for first in range.clone().step_by(COPIED_PAGES) {
            let count = COPIED_PAGES.min(range.end - first);
            self.copy(number, pages, first, count, &[])?;
            self.breathe()?;
        }
        Ok(())
    }

    /// Copies pages and finds out what each is. `frames`, if any, has the merged frame of each.
    fn copy(
        &mut self,
        number: usize,
        pages: &mut BlockSnapshot,
        first: usize,
        count: usize,
        frames: &[u64],
    ) -> Result<(), SnapshotError> {
        let mut copy = match self.scanner.copy.take() {
            Some(copy) => copy,
            None => MmapMut::map_anon(COPIED_PAGES * PAGE_BYTES)
                .map_err(self.failed("anything for want of memory"))?,
        };
        let read = self
            .memory
            .read(number, first, &mut copy[..count * PAGE_BYTES]);
        if read.is_ok() {
            self.report.bytes_read += (count * PAGE_BYTES) as u64;
            self.look(pages, first, &copy[..count * PAGE_BYTES], frames);
        }
        self.scanner.copy = Some(copy);
        read
    }

    fn look(&mut self, pages: &mut BlockSnapshot, first: usize, copy: &[u8], frames: &[u64]) {
        let mut batch = Batch::default();
        let copies = copy.chunks_exact(PAGE_BYTES);
        for (place, page) in copies.filter_map(<[u8]>::first_chunk).enumerate() {
            let number = first + place;
            if let Some(fill) = uniform_byte(page) {
                self.report.uniform += 1;
                pages.set_uniform(number, fill);
                continue;
            }
            let fingerprint = self.scanner.fingerprinter.of(page);
            if pages.known(number, fingerprint).is_some() {
                self.report.unchanged += 1;
                pages.set_unchanged(number);
                continue;
            }
            let frame = frames.get(place).copied().unwrap_or(0);
            let waiting = &batch.pages[..batch.len];
            if frame != 0 && waiting.iter().any(|page| page.3 == frame) {
                self.hash(pages, copy, &mut batch);
            }
            if let Some((print, digest)) = self.scanner.frames.get(&frame)
                && *print == fingerprint
            {
                self.report.same_frame += 1;
                pages.set_content(number, fingerprint, *digest);
                continue;
            }
            batch.pages[batch.len] = (place, number, fingerprint, frame);
            batch.len += 1;
            if batch.len == HASHED_PAGES {
                self.hash(pages, copy, &mut batch);
            }
        }
        self.hash(pages, copy, &mut batch);
    }

    fn hash(&mut self, pages: &mut BlockSnapshot, copy: &[u8], batch: &mut Batch) {
        let Scanner {
            key,
            digests,
            frames,
            ..
        } = &mut *self.scanner;
        let mut copies = [&[0; PAGE_BYTES]; HASHED_PAGES];
        for (page, (place, ..)) in copies.iter_mut().zip(&batch.pages[..batch.len]) {
            if let Some(found) = copy.get(place * PAGE_BYTES..).and_then(<[u8]>::first_chunk) {
                *page = found;
            }
        }
        digests.clear();
        PageDigest::of_many(key, &copies[..batch.len], digests);
        for ((_, number, fingerprint, frame), digest) in batch.pages.iter().zip(&*digests) {
            pages.set_content(*number, *fingerprint, *digest);
            if *frame != 0 && frames.len() < FRAMES_MAX {
                frames.insert(*frame, (*fingerprint, *digest));
            }
        }
        self.report.hashed += batch.len as u64;
        batch.len = 0;
    }

    fn breathe(&mut self) -> Result<(), SnapshotError> {
        let now = processor_time();
        let busy = now.saturating_sub(self.busy_before);
        let goes_on = self.pace.pause(busy);
        self.busy_before = processor_time();
        match goes_on.is_continue() {
            true => Ok(()),
            false => Err(SnapshotError::Stopped),
        }
    }
}

/// Whole pages of a range of bytes.
fn page_range(bytes: &Range<u64>, pages: usize) -> Range<usize> {
    let page = PAGE_BYTES as u64;
    let start = (bytes.start / page) as usize;
    let end = (bytes.end.div_ceil(page) as usize).min(pages);
    start.min(end)..end
}
