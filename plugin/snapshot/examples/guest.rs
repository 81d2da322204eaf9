//! Plays a QEMU for the tests of this crate: it is started with `-uuid` and `-object` as libvirt
//! would, has that RAM, and does to it what its standard input says.
//!
//! A line is a command, answered with `ok`: `fill FROM COUNT` (a content of its own for each page),
//! `write PAGE VERSION`, `uniform PAGE BYTE`, `drop PAGE` (a hole), `churn FROM COUNT` (goes on
//! writing versions there), `shrink BYTES`. It ends with its input.

use std::io::{BufRead, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

const PAGE_BYTES: usize = 4096;

/// Eight bytes of page and version, all over the page: whoever reads it can tell both, and
/// whether it was torn.
fn content(page: u64, version: u64) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    for (word, chunk) in (0u64..).zip(bytes.chunks_exact_mut(16)) {
        chunk[..8].copy_from_slice(&(page << 20 | version).to_le_bytes());
        chunk[8..].copy_from_slice(&word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    bytes
}

struct Ram {
    map: MmapRaw,
    file: Option<OwnedFd>,
}

impl Ram {
    fn put(&self, page: usize, bytes: &[u8; PAGE_BYTES]) {
        assert!((page + 1) * PAGE_BYTES <= self.map.len());
        // SAFETY: inside the mapping; others only read it, from another process.
        unsafe {
            let to = self.map.as_mut_ptr().add(page * PAGE_BYTES);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, PAGE_BYTES);
        }
    }

    fn drop_page(&self, page: usize) {
        let at = page * PAGE_BYTES;
        match &self.file {
            Some(file) => rustix::fs::fallocate(
                file,
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                at as u64,
                PAGE_BYTES as u64,
            )
            .expect("punched"),
            None => {
                let advice = UncheckedAdvice::DontNeed;
                // SAFETY: nothing refers into the mapping.
                unsafe { self.map.unchecked_advise_range(advice, at, PAGE_BYTES) }
                    .expect("dropped");
            }
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let object = arguments.iter().find(|argument| argument.starts_with('{'));
    let object: serde_json::Value =
        serde_json::from_str(object.expect("an object")).expect("it is JSON");
    let bytes = object["size"].as_u64().expect("a size") as usize;
    let ram = match object["qom-type"].as_str() {
        Some("memory-backend-memfd") => {
            let name = "memory-backend-memfd";
            let mut flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
            if object["hugetlb"] == true {
                flags |= rustix::fs::MemfdFlags::HUGETLB;
            }
            let file = rustix::fs::memfd_create(name, flags).expect("a memfd");
            rustix::fs::ftruncate(&file, bytes as u64).expect("its size");
            // As QEMU does, unless told not to.
            if object["seal"] != false {
                let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW;
                rustix::fs::fcntl_add_seals(&file, seals).expect("sealed");
            }
            let map = MmapOptions::new()
                .len(bytes)
                .map_raw(&file)
                .expect("mapped");
            Ram {
                map,
                file: Some(file.as_fd().try_clone_to_owned().expect("one more")),
            }
        }
        _ => {
            let map = MmapOptions::new().len(bytes).map_anon().expect("memory");
            // Its own pages are to be small ones, and such that the kernel may merge.
            let _ = map.advise(Advice::NoHugePage);
            let _ = map.advise(Advice::Mergeable);
            Ram {
                map: MmapRaw::from(map),
                file: None,
            }
        }
    };
    let ram = Arc::new(ram);
    println!("ok");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line");
        let mut words = line.split(' ');
        let command = words.next().unwrap_or_default();
        let numbers: Vec<u64> = words.map(|word| word.parse().expect("a number")).collect();
        match (command, numbers.as_slice()) {
            ("fill", [from, count]) => {
                for page in *from..from + count {
                    ram.put(page as usize, &content(page, 0));
                }
            }
            ("write", [page, version]) => ram.put(*page as usize, &content(*page, *version)),
            ("same", [page, as_page]) => ram.put(*page as usize, &content(*as_page, 0)),
            ("uniform", [page, byte]) => ram.put(*page as usize, &[*byte as u8; PAGE_BYTES]),
            ("drop", [page]) => ram.drop_page(*page as usize),
            ("shrink", [bytes]) => {
                let file = ram.file.as_ref().expect("a file");
                rustix::fs::ftruncate(file, *bytes).expect("shorter");
            }
            ("churn", [from, count]) => {
                let (ram, from, count) = (ram.clone(), *from, *count);
                std::thread::spawn(move || {
                    for version in 1.. {
                        for page in from..from + count {
                            ram.put(page as usize, &content(page, version & 0xf_ffff));
                        }
                    }
                });
            }
            _ => panic!("what is `{line}`?"),
        }
        println!("ok");
        std::io::stdout().flush().expect("told");
    }
}
