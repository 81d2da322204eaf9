//! The domain's UUID, from the XML that libvirt gives a hook on its standard input.
//!
//! Must not: wait longer than it is allowed to, or read more than it needs: libvirt does not mind a
//! hook that leaves its input unread.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use uuid::Uuid;

/// The UUID is in the first few hundred bytes: only the name comes before it.
const LOOKED_AT_BYTES_MAX: usize = 64 * 1024;
const OPENING: &[u8] = b"<uuid>";

/// Reads until the UUID is there. `None` if it has not come within `patience`, or there is none.
pub fn read_uuid(input: BorrowedFd<'_>, patience: Duration) -> Option<Uuid> {
    let deadline = Instant::now() + patience;
    let mut xml = Vec::new();
    let mut piece = [0; 4096];
    while xml.len() < LOOKED_AT_BYTES_MAX {
        if !readable(input, deadline).unwrap_or(false) {
            return None;
        }
        match rustix::io::read(input, &mut piece) {
            Ok(0) => return find_uuid(&xml),
            Ok(len) => xml.extend_from_slice(&piece[..len]),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(_) => return None,
        }
        if let Some(uuid) = find_uuid(&xml) {
            return Some(uuid);
        }
    }
    None
}

/// Waits until there is something to read, which the end is as well; false after the deadline.
fn readable(input: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(io::Error::other)?;
    let mut polled = [PollFd::new(&input, PollFlags::IN)];
    match poll(&mut polled, Some(&left)) {
        Ok(ready) => Ok(ready > 0),
        // Nothing here handles signals; one more round will tell.
        Err(rustix::io::Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// The first one: in what libvirt writes, the only element before the domain's UUID is its name, and
/// text has no angle brackets.
fn find_uuid(xml: &[u8]) -> Option<Uuid> {
    let at = xml.windows(OPENING.len()).position(|w| w == OPENING)?;
    let text = &xml[at + OPENING.len()..];
    let end = text.iter().position(|byte| *byte == b'<')?;
    Uuid::try_parse_ascii(text[..end].trim_ascii()).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    const UUID: &str = "6c2e1c9e-5f0b-4f3a-9d0c-7b4a1f2e3d4c";

    fn read(xml: &[u8]) -> Option<Uuid> {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let xml = xml.to_owned();
        // More than a pipe holds; the reader may leave before the end.
        let writing = std::thread::spawn(move || {
            let _ = writer.write_all(&xml);
        });
        let uuid = read_uuid(reader.as_fd(), Duration::from_secs(20));
        drop(reader);
        writing.join().expect("wrote");
        uuid
    }

    fn domain(more: &str) -> String {
        format!(
            "<domain type='kvm' id='3'>\n  <name>&lt;uuid&gt;x</name>\n  <uuid>{UUID}</uuid>\n{more}</domain>"
        )
    }

    #[test]
    fn the_uuid_is_the_domains_own() {
        let uuid: Uuid = UUID.parse().expect("a UUID");
        assert_eq!(read(domain("").as_bytes()), Some(uuid));
        let other = "<metadata><uuid>00000000-0000-0000-0000-000000000000</uuid></metadata>";
        assert_eq!(read(domain(other).as_bytes()), Some(uuid));
        assert_eq!(read(domain(&" ".repeat(1 << 20)).as_bytes()), Some(uuid));
    }

    #[test]
    fn without_one_there_is_none() {
        for xml in [
            "",
            "<domain/>",
            "<uuid>",
            "<uuid></uuid>",
            "<uuid>12</uuid>",
        ] {
            assert_eq!(read(xml.as_bytes()), None, "{xml}");
        }
        let late = format!("{}{}", " ".repeat(LOOKED_AT_BYTES_MAX), domain(""));
        assert_eq!(read(late.as_bytes()), None);
    }

    #[test]
    fn an_input_that_says_nothing_is_not_waited_for() {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        writer.write_all(b"<domain><name>").expect("writes");
        assert_eq!(read_uuid(reader.as_fd(), Duration::from_millis(50)), None);
        assert_eq!(read_uuid(reader.as_fd(), Duration::ZERO), None);
    }
}
