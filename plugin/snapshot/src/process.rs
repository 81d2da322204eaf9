//! Which process is a guest's QEMU.
//!
//! Must not: take a later process with the same number for it: numbers are used again.

use std::collections::HashMap;
use std::io;

use uuid::Uuid;

/// A process, told from a later one of the same number by when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QemuProcess {
    pid: u32,
    start_time: u64,
}

/// No command line of QEMU is longer; what is, is cut.
const COMMAND_LINE_BYTES_MAX: u64 = 4 << 20;

impl QemuProcess {
    /// The QEMUs of these guests that run now, by one look through `/proc`.
    pub fn find(uuids: &[Uuid]) -> io::Result<HashMap<Uuid, Self>> {
        let mut found = HashMap::new();
        for entry in std::fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A process may be gone by now.
            let Ok(process) = Self::of_pid(pid) else {
                continue;
            };
            let Ok(arguments) = process.arguments() else {
                continue;
            };
            let value = arguments.windows(2).find(|pair| pair[0] == "-uuid");
            let uuid = value.and_then(|pair| pair[1].parse().ok());
            if let Some(uuid) = uuid.filter(|uuid| uuids.contains(uuid))
                && process.is_alive()
            {
                found.insert(uuid, process);
            }
        }
        Ok(found)
    }

    /// The process with this number.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        let (_, start_time) = stat(pid)?;
        Ok(Self { pid, start_time })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        let dead = |state| matches!(state, b'Z' | b'X' | b'x');
        stat(self.pid).is_ok_and(|(state, start)| start == self.start_time && !dead(state))
    }

    /// What it was started with.
    pub(crate) fn arguments(&self) -> io::Result<Vec<String>> {
        use std::io::Read;
        let file = std::fs::File::open(self.file("cmdline"))?;
        let mut bytes = Vec::new();
        file.take(COMMAND_LINE_BYTES_MAX).read_to_end(&mut bytes)?;
        let arguments = bytes.split(|byte| *byte == 0);
        Ok(arguments
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect())
    }

    /// A file of it in `/proc`.
    pub(crate) fn file(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.pid)
    }
}

/// State and start time of a process.
fn stat(pid: u32) -> io::Result<(u8, u64)> {
    let text = std::fs::read(format!("/proc/{pid}/stat"))?;
    parse_stat(&text)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a stat that is none"))
}

/// The name comes second, in parentheses, and may hold anything.
fn parse_stat(text: &[u8]) -> Option<(u8, u64)> {
    let after_name = text.iter().rposition(|byte| *byte == b')')? + 1;
    let fields = std::str::from_utf8(text.get(after_name..)?).ok()?;
    let mut fields = fields.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    // The 22nd field of all.
    let start_time = fields.nth(18)?.parse().ok()?;
    Some((state, start_time))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_anything() {
        let stat = b"7 (a) b (R 1) ) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1";
        assert_eq!(parse_stat(stat), Some((b'S', 4711)));
        assert_eq!(parse_stat(b"7 (a"), None);
        assert_eq!(parse_stat(b"7 (a) S 1"), None);
    }

    #[test]
    fn this_process_is_alive_and_no_other_with_its_number() {
        let mut me = QemuProcess::of_pid(std::process::id()).expect("it runs");
        assert!(me.is_alive());
        me.start_time += 1;
        assert!(!me.is_alive());
    }
}
