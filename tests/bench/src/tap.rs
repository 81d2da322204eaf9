//! A relay between two unix sockets that keeps what goes one way: how `record` listens in.
//!
//! Owns: one connection, both directions, byte for byte. Must not: hold anything back; the return
//! path flows as in any migration.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const BUFFER_BYTES: usize = 256 * 1024;
/// How long the relay goes on waiting before it looks whether it still has to.
const LOOK_AGAIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// What went through.
#[derive(Debug, Clone, Copy)]
pub struct Tapped {
    pub stream_bytes: u64,
    pub return_bytes: u64,
    /// From the first to the last byte of the stream.
    pub duration: Duration,
}

/// A relay that listens already.
#[derive(Debug)]
pub struct Tap {
    listener: UnixListener,
    destination: PathBuf,
}

impl Tap {
    /// Listens at `source`; will connect to `destination` when someone has connected here.
    pub fn listen(source: &Path, destination: &Path) -> Result<Self> {
        let listener = UnixListener::bind(source)
            .with_context(|| format!("cannot listen at {}", source.display()))?;
        Ok(Self {
            listener,
            destination: destination.to_owned(),
        })
    }

    /// Relays one connection to its end, the stream also into `file`. `Ok(None)`: `called_off`
    /// was set before anyone connected.
    pub fn relay(self, file: &Path, called_off: &AtomicBool) -> Result<Option<Tapped>> {
        if !wait_for_connection(&self.listener, called_off)? {
            return Ok(None);
        }
        let (source, _) = self.listener.accept().context("cannot accept")?;
        let destination = UnixStream::connect(&self.destination)
            .with_context(|| format!("cannot connect to {}", self.destination.display()))?;
        let keep = File::create(file).with_context(|| format!("cannot make {}", file.display()))?;
        let (back_from, back_to) = (destination.try_clone()?, source.try_clone()?);
        let returning = std::thread::spawn(move || copy(back_from, back_to, &mut std::io::sink()));

        let mut keep = BufWriter::with_capacity(BUFFER_BYTES, keep);
        let copied = copy(source, destination, &mut keep)?;
        keep.flush()
            .with_context(|| format!("cannot write {}", file.display()))?;
        let Ok(returned) = returning.join() else {
            bail!("the relay of the return path panicked");
        };
        Ok(Some(Tapped {
            stream_bytes: copied.bytes,
            return_bytes: returned?.bytes,
            duration: copied.duration,
        }))
    }
}

/// Waits until a connection can be accepted; false: `called_off` was set first.
pub(crate) fn wait_for_connection(
    listener: &UnixListener,
    called_off: &AtomicBool,
) -> Result<bool> {
    while !called_off.load(Relaxed) {
        let mut waiting = [PollFd::new(listener, PollFlags::IN)];
        if poll(&mut waiting, Some(&LOOK_AGAIN))? > 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

struct Copied {
    bytes: u64,
    duration: Duration,
}

fn copy(mut from: UnixStream, mut to: UnixStream, keep: &mut dyn Write) -> Result<Copied> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut bytes = 0;
    let mut first = None;
    let mut last = Instant::now();
    loop {
        let len = from.read(&mut buffer).context("reading failed")?;
        if len == 0 {
            break;
        }
        last = Instant::now();
        first.get_or_insert(last);
        to.write_all(&buffer[..len]).context("writing failed")?;
        keep.write_all(&buffer[..len])
            .context("keeping the stream failed")?;
        bytes += len as u64;
    }
    // The other side may have hung up already, which is as good.
    let _ = to.shutdown(Shutdown::Write);
    Ok(Copied {
        bytes,
        duration: first.map_or(Duration::ZERO, |first| last - first),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_exactly_what_went_through() {
        let dir = tempfile::tempdir().expect("a directory");
        let (near, far) = (dir.path().join("near"), dir.path().join("far"));
        let file = dir.path().join("g.stream");
        let destination = UnixListener::bind(&far).expect("listens");
        let tap = Tap::listen(&near, &far).expect("listens");
        let kept = file.clone();
        let relay = std::thread::spawn(move || tap.relay(&kept, &AtomicBool::new(false)));
        let qemu = std::thread::spawn(move || {
            let (mut connection, _) = destination.accept().expect("the relay comes");
            connection.write_all(b"\0\x07\0\0").expect("answers");
            let mut bytes = Vec::new();
            connection.read_to_end(&mut bytes).expect("reads");
            bytes
        });
        let stream: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        let mut source = UnixStream::connect(&near).expect("connects");
        source.write_all(&stream).expect("writes");
        source.shutdown(Shutdown::Write).expect("shuts down");
        let mut returned = Vec::new();
        source.read_to_end(&mut returned).expect("reads");
        assert_eq!(returned, b"\0\x07\0\0");
        assert!(qemu.join().expect("no panic") == stream);
        let tapped = relay
            .join()
            .expect("no panic")
            .expect("relays")
            .expect("was not called off");
        assert_eq!(
            (tapped.stream_bytes, tapped.return_bytes),
            (stream.len() as u64, 4)
        );
        assert!(std::fs::read(&file).expect("a file") == stream);
    }

    #[test]
    fn can_be_called_off_before_anyone_connects() {
        let dir = tempfile::tempdir().expect("a directory");
        let tap = Tap::listen(&dir.path().join("near"), &dir.path().join("far")).expect("listens");
        let file = dir.path().join("g.stream");
        let tapped = tap
            .relay(&file, &AtomicBool::new(true))
            .expect("is no error");
        assert!(tapped.is_none() && !file.exists());
    }
}
