//! Where a guest's RAM has memory behind it.
//!
//! Must not: touch what has not: reading a hole may make it memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};

use crate::process::QemuProcess;

/// Bytes of a page, and of its entry in `pagemap`.
const PAGE_BYTES: u64 = 4096;
const ENTRY_BYTES: usize = 8;

/// Ranges of bytes of a file with data in them, at most up to `len`.
pub(crate) fn data_ranges(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(len);
        if start >= end {
            break;
        }
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

/// What the page tables of a process say of its pages.
pub(crate) struct PageMap {
    file: File,
    entries: Vec<u8>,
}

/// One page by its page table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Never touched.
    Hole,
    /// Reading it would bring it back from where it was swapped to.
    Swapped,
    /// In this frame; 0 if that may not be known.
    Present(u64),
}

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FRAME: u64 = (1 << 55) - 1;

impl PageMap {
    pub(crate) fn open(process: &QemuProcess) -> io::Result<Self> {
        Ok(Self {
            file: File::open(process.file("pagemap"))?,
            entries: Vec::new(),
        })
    }

    /// The entries of `count` pages from an address on.
    pub(crate) fn read(
        &mut self,
        address: u64,
        count: usize,
    ) -> io::Result<impl Iterator<Item = Entry> + use<'_>> {
        self.entries.resize(count * ENTRY_BYTES, 0);
        let at = address / PAGE_BYTES * ENTRY_BYTES as u64;
        self.file.read_exact_at(&mut self.entries, at)?;
        let (entries, _) = self.entries.as_chunks::<ENTRY_BYTES>();
        Ok(entries
            .iter()
            .map(|entry| parse(u64::from_ne_bytes(*entry))))
    }
}

fn parse(entry: u64) -> Entry {
    if entry & PRESENT != 0 {
        Entry::Present(entry & FRAME)
    } else if entry & SWAPPED != 0 {
        Entry::Swapped
    } else {
        Entry::Hole
    }
}

/// Which frames the kernel has merged, if it merges any and tells.
pub(crate) struct MergedFrames(File);

const KSM_FLAG: u64 = 1 << 21;

impl MergedFrames {
    pub(crate) fn open() -> Option<Self> {
        let sharing = std::fs::read_to_string("/sys/kernel/mm/ksm/pages_sharing").ok()?;
        if sharing.trim() == "0" {
            return None;
        }
        File::open("/proc/kpageflags").ok().map(Self)
    }

    /// Whether pages in this frame are the same because the kernel says so.
    pub(crate) fn has(&self, frame: u64) -> bool {
        let mut flags = [0; ENTRY_BYTES];
        let at = frame.saturating_mul(ENTRY_BYTES as u64);
        frame != 0
            && self.0.read_exact_at(&mut flags, at).is_ok()
            && u64::from_ne_bytes(flags) & KSM_FLAG != 0
    }
}
