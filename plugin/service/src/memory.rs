//! This host's memory, from `/proc/meminfo`.

use std::io;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    pub total_bytes: u64,
    /// What can be used without swapping, as the kernel estimates it.
    pub available_bytes: u64,
}

impl Memory {
    pub fn read() -> io::Result<Memory> {
        let text = std::fs::read_to_string("/proc/meminfo")?;
        Memory::parse(&text).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "no MemTotal or MemAvailable")
        })
    }

    /// What a job that leaves this host may take of it for its copy of the page window: guests
    /// still run here.
    pub fn window_to_offer(&self, configured_bytes: u64) -> u64 {
        configured_bytes.min(self.available_bytes / 4)
    }

    fn parse(text: &str) -> Option<Memory> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line
                .strip_prefix(':')?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse()
                .ok()?;
            kib.checked_mul(1024)
        };
        Some(Memory {
            total_bytes: field("MemTotal")?,
            available_bytes: field("MemAvailable")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_host_offers_little() {
        let memory = |available_bytes| Memory {
            total_bytes: 64 << 30,
            available_bytes,
        };
        assert_eq!(memory(60 << 30).window_to_offer(2 << 30), 2 << 30);
        assert_eq!(memory(4 << 30).window_to_offer(16 << 30), 1 << 30);
        assert_eq!(memory(0).window_to_offer(16 << 30), 0);
    }

    #[test]
    fn reads_the_kernels_format() {
        let text = "MemTotal:       24689564 kB\nMemFree:         1 kB\nMemAvailable:    2048 kB\n";
        let memory = Memory::parse(text).expect("complete");
        assert_eq!(memory.total_bytes, 24_689_564 * 1024);
        assert_eq!(memory.available_bytes, 2 << 20);
        assert_eq!(Memory::parse("MemTotal: x"), None);
        assert!(Memory::read().expect("on Linux").total_bytes > 0);
    }
}
