//! When a guest was seen to run, on whatever host: the times at which the stamps it writes to its
//! serial port arrive. Longer gaps than between two stamps are pauses, the guest's own word for how
//! long it stood still.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::error::{LabError, Result};
use crate::files;
use crate::guest::serial_path;
use crate::host::Host;

const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// Once in so many looks also for a new file; what is in that before is not lost, but comes later.
const NEW_FILE_LOOKS: u32 = 10;

/// A time in which a guest stood still.
#[derive(Debug, Clone, Copy)]
pub struct Pause {
    pub began: Instant,
    pub length: Duration,
}

/// Watches one guest's serial ports.
#[derive(Debug)]
pub struct Stamps {
    stop: Arc<AtomicBool>,
    watching: Option<JoinHandle<Vec<(Instant, usize)>>>,
}

impl Stamps {
    /// Begins to watch a guest that was started with `GuestSpec::with_stamps`, on these hosts.
    pub fn watch(hosts: &[Host], guest: &str) -> Stamps {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, hosts, path) = (stop.clone(), hosts.to_vec(), serial_path(guest));
        let watching = std::thread::spawn(move || {
            let mut ports: Vec<(Host, Option<File>)> =
                hosts.into_iter().map(|host| (host, None)).collect();
            for (host, port) in &mut ports {
                *port = open(host, &path);
                if let Some(port) = port {
                    // What it wrote before is of no interest.
                    let _ = port.seek(SeekFrom::End(0));
                }
            }
            let mut seen = Vec::new();
            let mut text = Vec::new();
            for look in 0u32.. {
                if stopped.load(Relaxed) {
                    break;
                }
                for (number, (host, port)) in ports.iter_mut().enumerate() {
                    if port.is_none() {
                        *port = open(host, &path);
                    }
                    text.clear();
                    if let Some(port) = port {
                        let _ = port.read_to_end(&mut text);
                        // A guest that comes begins a new file.
                        if text.is_empty()
                            && look % NEW_FILE_LOOKS == 0
                            && let Some(new) = open(host, &path)
                            && identity(&new) != identity(port)
                        {
                            *port = new;
                        }
                    }
                    if !text.is_empty() {
                        seen.push((Instant::now(), number));
                    }
                }
                std::thread::sleep(LOOK_INTERVAL);
            }
            seen
        });
        Stamps {
            stop,
            watching: Some(watching),
        }
    }

    /// Ends watching; gives the time from the last stamp on one host to the first on another.
    pub fn move_pause(mut self) -> Result<Pause> {
        self.stop.store(true, Relaxed);
        let nothing = || LabError::Request("the guest wrote no stamps; use with_stamps".into());
        let seen = self.watching.take().ok_or_else(nothing)?;
        let seen = seen.join().map_err(|_| nothing())?;
        pause_between_hosts(&seen)
            .ok_or_else(|| LabError::Request("the guest has not moved while it was watched".into()))
    }
}

/// Of stamps with the host that each was seen on, in their order.
fn pause_between_hosts(seen: &[(Instant, usize)]) -> Option<Pause> {
    let moved = seen.windows(2).find(|pair| pair[0].1 != pair[1].1)?;
    Some(Pause {
        began: moved[0].0,
        length: moved[1].0 - moved[0].0,
    })
}

impl Drop for Stamps {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// Tells files apart.
fn identity(port: &File) -> Option<(u64, u64)> {
    let meta = port.metadata().ok()?;
    Some((meta.dev(), meta.ino()))
}

fn open(host: &Host, path: &str) -> Option<File> {
    files::open(host.name(), host.pid(), Path::new(path), OFlags::RDONLY, 0).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_that_of_the_move_and_not_the_longest() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let seen = [
            (at(0), 0),
            (at(500), 0),
            (at(510), 0),
            (at(560), 1),
            (at(900), 1),
        ];
        let pause = pause_between_hosts(&seen).expect("it moved");
        assert_eq!(
            (pause.began, pause.length),
            (at(510), Duration::from_millis(50))
        );
        assert!(pause_between_hosts(&seen[..3]).is_none());
    }
}
