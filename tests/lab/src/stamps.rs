//! When a guest was seen to run, on whatever host: the times at which the stamps it writes to its
//! serial port arrive. Longer gaps than between two stamps are pauses, the guest's own word for how
//! long it stood still.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
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
    watching: Option<JoinHandle<Vec<Instant>>>,
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
            while !stopped.load(Relaxed) {
                text.clear();
                for (host, port) in &mut ports {
                    if port.is_none() {
                        *port = open(host, &path);
                    }
                    if let Some(port) = port {
                        let _ = port.read_to_end(&mut text);
                    }
                }
                if !text.is_empty() {
                    seen.push(Instant::now());
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

    /// Ends watching; gives the longest time without a stamp.
    pub fn longest_pause(mut self) -> Result<Pause> {
        self.stop.store(true, Relaxed);
        let nothing = || LabError::Request("the guest wrote no stamps; use with_stamps".into());
        let seen = self.watching.take().ok_or_else(nothing)?;
        let seen = seen.join().map_err(|_| nothing())?;
        let gaps = seen.windows(2).map(|pair| Pause {
            began: pair[0],
            length: pair[1] - pair[0],
        });
        gaps.max_by_key(|pause| pause.length).ok_or_else(nothing)
    }
}

impl Drop for Stamps {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

fn open(host: &Host, path: &str) -> Option<File> {
    files::open(host.name(), host.pid(), Path::new(path), OFlags::RDONLY, 0).ok()
}
