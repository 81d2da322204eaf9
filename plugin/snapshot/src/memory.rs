//! The RAM of one guest, open for reading.
//!
//! Owns: where each block's memory is, and copying pages out of it.
//! Must not: map a file that can be shortened: touching what is not there any more is a signal that
//! would end the daemon. QEMU seals its memfds against that; other files are read by calls, at half
//! the speed (`docs/decisions/0012`).

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use memmap2::{MmapOptions, MmapRaw};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use vmgang_dedup::{BlockSnapshot, PAGE_BYTES, Page, Snapshot};

use crate::layout::{self, Kind};
use crate::process::QemuProcess;

/// Why a guest's memory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("the guest's QEMU (process {pid}) is gone; it has ended, or was started anew")]
    Gone { pid: u32 },
    #[error("cannot read {what} of the guest's QEMU (process {pid}): {error}")]
    Process {
        pid: u32,
        what: &'static str,
        error: io::Error,
    },
    #[error("the guest's QEMU (process {pid}) has no RAM that can be told from its command line")]
    NoBlocks { pid: u32 },
    #[error(
        "the memory of RAM block {block} cannot be told from other memory of the guest's QEMU (process {pid})"
    )]
    NotFound { pid: u32, block: String },
    #[error("the scan was stopped")]
    Stopped,
}

/// Where a block's memory is read from.
#[derive(Debug)]
pub(crate) enum Backing {
    File {
        file: File,
        /// If it cannot become shorter.
        map: Option<MmapRaw>,
        /// Its holes can be asked for; else only the page tables tell.
        seekable: bool,
    },
    Private,
}

#[derive(Debug)]
pub(crate) struct RamBlock {
    pub name: String,
    pub bytes: u64,
    pub backing: Backing,
    /// In the address space of QEMU.
    pub address: u64,
}

/// See above.
#[derive(Debug)]
pub struct GuestMemory {
    process: QemuProcess,
    blocks: Vec<RamBlock>,
}

/// A piece of QEMU's address space.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Area {
    start: u64,
    end: u64,
    /// Device and inode of a file.
    file: Option<(u64, u64)>,
}

impl GuestMemory {
    /// Finds the RAM of a guest's QEMU.
    pub fn open(process: &QemuProcess) -> Result<Self, SnapshotError> {
        let pid = process.pid();
        let failed = |what| move |error| SnapshotError::Process { pid, what, error };
        let arguments = process.arguments().map_err(failed("the command line"))?;
        let wanted = layout::blocks(&arguments);
        if wanted.is_empty() {
            return Err(SnapshotError::NoBlocks { pid });
        }
        let maps = std::fs::read_to_string(process.file("maps")).map_err(failed("the maps"))?;
        let mut areas = areas(&maps);
        let mut blocks = Vec::new();
        for block in wanted {
            let Some(area) = take(&mut areas, &block) else {
                return Err(SnapshotError::NotFound {
                    pid,
                    block: block.name,
                });
            };
            let backing = match area.file {
                None => Backing::Private,
                Some(file) => open_file(process, file, block.bytes)
                    .map_err(failed("the memory file"))?
                    .ok_or(SnapshotError::NotFound {
                        pid,
                        block: block.name.clone(),
                    })?,
            };
            blocks.push(RamBlock {
                name: block.name,
                bytes: block.bytes,
                backing,
                address: area.start,
            });
        }
        // The largest is what matters most.
        blocks.sort_by_key(|block| std::cmp::Reverse(block.bytes));
        let memory = Self {
            process: *process,
            blocks,
        };
        match memory.is_alive() {
            true => Ok(memory),
            false => Err(SnapshotError::Gone { pid }),
        }
    }

    /// Name and size of each block, the largest first.
    pub fn blocks(&self) -> impl Iterator<Item = (&str, u64)> {
        self.blocks
            .iter()
            .map(|block| (block.name.as_str(), block.bytes))
    }

    pub(crate) fn ram_blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    pub(crate) fn process(&self) -> &QemuProcess {
        &self.process
    }

    /// What is known of the guest before its first scan.
    pub fn empty_snapshot(&self) -> Snapshot {
        let blocks = self.blocks.iter().map(|block| {
            BlockSnapshot::new(&block.name, (block.bytes / PAGE_BYTES as u64) as usize)
        });
        Snapshot::new(blocks.collect())
    }

    /// Whether the guest's QEMU is still the same process.
    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    pub(crate) fn gone(&self) -> SnapshotError {
        SnapshotError::Gone {
            pid: self.process.pid(),
        }
    }

    /// Copies one page.
    pub fn read_page(
        &self,
        block: usize,
        page: usize,
        out: &mut Page,
    ) -> Result<(), SnapshotError> {
        self.read(block, page, &mut out[..])
    }

    /// Copies whole pages from that one on. What is in the copy was there at some moment of the
    /// call, word by word.
    pub(crate) fn read(
        &self,
        block: usize,
        page: usize,
        out: &mut [u8],
    ) -> Result<(), SnapshotError> {
        let Some(block) = self.blocks.get(block) else {
            return Err(self.gone());
        };
        let at = page as u64 * PAGE_BYTES as u64;
        if at + out.len() as u64 > block.bytes {
            return Err(self.gone());
        }
        let pid = self.process.pid();
        let what = "the memory";
        match &block.backing {
            Backing::File { map: Some(map), .. } => {
                copy(map, at, out);
                Ok(())
            }
            Backing::File { file, .. } => file
                .read_exact_at(out, at)
                .map_err(|error| SnapshotError::Process { pid, what, error }),
            Backing::Private => {
                let len = out.len();
                let remote = RemoteIoVec {
                    base: (block.address + at) as usize,
                    len,
                };
                let read = process_vm_readv(
                    Pid::from_raw(pid as i32),
                    &mut [IoSliceMut::new(out)],
                    &[remote],
                );
                // Not before it is known whose memory it was.
                if !self.is_alive() {
                    return Err(self.gone());
                }
                match read {
                    Ok(read) if read == len => Ok(()),
                    Ok(_) => Err(self.gone()),
                    Err(error) => Err(SnapshotError::Process {
                        pid,
                        what,
                        error: error.into(),
                    }),
                }
            }
        }
    }
}

/// Memory that can be read and written, as the kernel lists it.
fn areas(maps: &str) -> Vec<Area> {
    maps.lines().filter_map(area).collect()
}

/// Takes the area of a block out of the list: the first one of its size, or several in a row: the
/// kernel cuts where advice differs.
fn take(areas: &mut Vec<Area>, block: &layout::Block) -> Option<Area> {
    let fits = |area: &Area| area.file.is_some() == (block.kind == Kind::File);
    for first in 0..areas.len() {
        if !fits(&areas[first]) {
            continue;
        }
        let mut end = first;
        while end + 1 < areas.len()
            && areas[end].end - areas[first].start < block.bytes
            && areas[end + 1].start == areas[end].end
            && areas[end + 1].file == areas[first].file
        {
            end += 1;
        }
        if areas[end].end - areas[first].start == block.bytes {
            let whole = Area {
                end: areas[end].end,
                ..areas[first].clone()
            };
            areas.drain(first..=end);
            return Some(whole);
        }
    }
    None
}

/// `7f00-7f10 rw-s 00000000 00:01 1027 /memfd:memory-backend-memfd (deleted)`
fn area(line: &str) -> Option<Area> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let rights = fields.next()?;
    let _offset = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode: u64 = fields.next()?.parse().ok()?;
    if !rights.starts_with("rw") {
        return None;
    }
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let device = rustix::fs::makedev(hex(major)? as u32, hex(minor)? as u32);
    let shared = rights.ends_with('s');
    // A private mapping of a file is neither of the two.
    if (inode != 0) != shared {
        return None;
    }
    Some(Area {
        start: hex(start)?,
        end: hex(end)?,
        file: shared.then_some((device, inode)),
    })
}

/// Copies out of memory that the guest writes to meanwhile.
fn copy(map: &MmapRaw, at: u64, out: &mut [u8]) {
    let at = at as usize;
    assert!(at + out.len() <= map.len());
    // SAFETY: the source lies inside the mapping, which lives as long as the call and cannot lose
    // its pages: the file is sealed. Bytes that change during the copy come out old or new, and
    // nothing here relies on either.
    unsafe {
        std::ptr::copy_nonoverlapping(map.as_ptr().add(at), out.as_mut_ptr(), out.len());
    }
}

/// Maps a file that is sealed against becoming shorter and is long enough.
fn map(file: &File, bytes: u64) -> Option<MmapRaw> {
    let seals = rustix::fs::fcntl_get_seals(file).ok()?;
    let long_enough = file.metadata().ok()?.len() >= bytes;
    if !seals.contains(rustix::fs::SealFlags::SHRINK) || !long_enough {
        return None;
    }
    let len = usize::try_from(bytes).ok()?;
    MmapOptions::new().len(len).map_raw_read_only(file).ok()
}

const HUGETLBFS: i64 = 0x9584_58f6;

/// Opens the file behind an area through QEMU's own descriptors: it may have no name.
fn open_file(process: &QemuProcess, file: (u64, u64), bytes: u64) -> io::Result<Option<Backing>> {
    for entry in std::fs::read_dir(process.file("fd"))? {
        let path = entry?.path();
        // It may be closed by now.
        let Ok(found) = std::fs::metadata(&path) else {
            continue;
        };
        if !found.is_file() || (found.dev(), found.ino()) != file {
            continue;
        }
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(&path)?;
        let kind = rustix::fs::fstatfs(&file)?.f_type;
        return Ok(Some(Backing::File {
            map: map(&file, bytes),
            file,
            seekable: kind as i64 != HUGETLBFS,
        }));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_one_area_of_its_size_or_several_in_a_row() {
        let maps = "\
1000-3000 rw-p 00000000 00:00 0
3000-5000 rw-p 00000000 00:00 0 [anon:ram]
5000-6000 ---p 00000000 00:00 0
6000-8000 rw-s 00000000 00:01 77 /memfd:memory-backend-memfd (deleted)
8000-9000 rw-s 00000000 00:01 78 /memfd:memory-backend-memfd (deleted)
9000-a000 rw-p 00000000 08:01 79 /usr/lib/x.so
b000-c000 r-xp 00000000 08:01 79 /usr/lib/x.so
nonsense
";
        let take = |bytes, kind| {
            let name = String::new();
            let block = layout::Block { name, bytes, kind };
            super::take(&mut areas(maps), &block).map(|area| (area.start, area.end))
        };
        assert_eq!(take(0x2000, Kind::Private), Some((0x1000, 0x3000)));
        assert_eq!(take(0x4000, Kind::Private), Some((0x1000, 0x5000)));
        assert_eq!(
            take(0x5000, Kind::Private),
            None,
            "not beyond what may not be read"
        );
        assert_eq!(take(0x2000, Kind::File), Some((0x6000, 0x8000)));
        assert_eq!(take(0x1000, Kind::File), Some((0x8000, 0x9000)));
        assert_eq!(take(0x3000, Kind::File), None, "two files");
        assert_eq!(
            take(0x1000, Kind::Private),
            None,
            "a private view of a file"
        );
        let mut both = areas(maps);
        let name = String::new;
        let block = || layout::Block {
            name: name(),
            bytes: 0x2000,
            kind: Kind::Private,
        };
        assert_eq!(
            super::take(&mut both, &block()).map(|area| area.start),
            Some(0x1000)
        );
        assert_eq!(
            super::take(&mut both, &block()).map(|area| area.start),
            Some(0x3000)
        );
    }
}
