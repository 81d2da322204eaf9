//! How much memory this host has available, from `/proc/meminfo`; and memory of this process that
//! nothing uses any longer, given back to the host.

use std::io;

/// How the service asks; tests have hosts of their own.
pub type AvailableMemory = dyn Fn() -> io::Result<u64> + Send + Sync;

/// Bytes that can be used without swapping, as the kernel estimates it.
pub fn available_bytes() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    parse(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no MemAvailable in kB"))
}

/// Bytes of this process that are in memory.
pub fn resident_bytes() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    let page_bytes = rustix::param::page_size() as u64;
    pages
        .and_then(|pages: u64| pages.checked_mul(page_bytes))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no resident pages"))
}

/// Blocks from here on have memory of their own, which is given back when they are freed.
const OWN_MEMORY_BYTES: i32 = 1 << 20;
/// Free memory at the end of a heap stays up to this; there is a heap for every other thread.
const HEAP_REST_BYTES: i32 = 2 << 20;

/// Keeps the allocator from keeping: by itself it would learn from the first large block that is freed
/// to keep tens of MiB in each of its heaps, which [`trim`] cannot reach. Once, before there are threads.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets numbers of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MEMORY_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, HEAP_REST_BYTES);
    }
}

/// Gives back what was freed: a job frees hundreds of MiB, which the allocator keeps in pieces. Takes
/// some milliseconds, during which others wait for the allocator.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches nothing but free memory of the allocator, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn parse(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_format() {
        let text = "MemTotal:       24689564 kB\nMemFree:         1 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(parse(text), Some(2 << 20));
        assert_eq!(parse("MemAvailable: x"), None);
        assert_eq!(parse("MemTotal: 1 kB"), None);
        assert!(available_bytes().expect("on Linux") > 0);
    }
}
