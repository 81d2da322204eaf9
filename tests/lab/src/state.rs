//! What `lab up` leaves for later commands: which processes a lab in the background consists of.
//!
//! Owns the files in /run/vmgang-lab. A lab is only believed to run when the process that owns it
//! still is the very process that wrote the file.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::error::{IoContext, LabError, Result};
use crate::host::Host;
use crate::lab::Lab;

const STATE_DIR: &str = "/run/vmgang-lab";
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// A lab in the background.
#[derive(Debug, Serialize, Deserialize)]
pub struct LabState {
    pub name: String,
    owner: Process,
    switch: Node,
    hosts: Vec<Node>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Node {
    name: String,
    address: String,
    process: Process,
}

/// A process that cannot be mistaken for a later one with the same id.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Process {
    pid: u32,
    /// In clock ticks since the machine started.
    start_time: u64,
}

impl LabState {
    /// Describes a lab that this process owns.
    pub fn of(name: &str, lab: &Lab) -> Result<LabState> {
        let node = |host: &Host| {
            Ok(Node {
                name: host.name().to_owned(),
                address: host.address().to_owned(),
                process: Process::with_pid(host.pid())?,
            })
        };
        Ok(LabState {
            name: name.to_owned(),
            owner: Process::with_pid(std::process::id())?,
            switch: node(lab.switch())?,
            hosts: lab.hosts().iter().map(node).collect::<Result<_>>()?,
        })
    }

    pub fn save(&self) -> Result<()> {
        fs::create_dir_all(STATE_DIR).doing(|| format!("create {STATE_DIR}"))?;
        let path = state_path(&self.name)?;
        let text = serde_json::to_string_pretty(self)
            .map_err(std::io::Error::from)
            .doing(|| "write the lab's state".to_owned())?;
        let partial = path.with_extension("partial");
        fs::write(&partial, text).doing(|| format!("write {}", partial.display()))?;
        fs::rename(&partial, &path).doing(|| format!("write {}", path.display()))
    }

    /// The running lab of that name, if there is one.
    pub fn load(name: &str) -> Result<Option<LabState>> {
        let path = state_path(name)?;
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).doing(|| format!("read {}", path.display())),
        };
        let state: LabState = serde_json::from_str(&text)
            .map_err(std::io::Error::from)
            .doing(|| format!("read {}; remove it if no lab runs", path.display()))?;
        if state.owner.is_alive() {
            return Ok(Some(state));
        }
        remove(name)?;
        Ok(None)
    }

    /// The names of all running labs.
    pub fn list() -> Result<Vec<LabState>> {
        let mut labs = Vec::new();
        let entries = match fs::read_dir(STATE_DIR) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(labs),
            Err(error) => return Err(error).doing(|| format!("read {STATE_DIR}")),
        };
        for entry in entries {
            let path = entry.doing(|| format!("read {STATE_DIR}"))?.path();
            if path.extension().is_none_or(|found| found != "json") {
                continue;
            }
            if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
                labs.extend(LabState::load(name)?);
            }
        }
        labs.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(labs)
    }

    /// A handle on the lab; dropping it ends nothing.
    pub fn attach(&self) -> Result<Lab> {
        let open = |node: &Node| {
            if node.process.is_alive() {
                Host::open(&node.name, &node.address, node.process.pid)
            } else {
                Err(LabError::Broken {
                    who: format!("host {} of lab {}", node.name, self.name),
                    what: "has ended; use `lab down` and `lab up`".to_owned(),
                })
            }
        };
        let hosts = self.hosts.iter().map(open).collect::<Result<_>>()?;
        Ok(Lab::attach(hosts, open(&self.switch)?))
    }

    pub fn host_names(&self) -> Vec<&str> {
        self.hosts.iter().map(|host| host.name.as_str()).collect()
    }

    pub fn owner_pid(&self) -> u32 {
        self.owner.pid
    }

    /// Ends the lab's owner and waits until nothing of the lab is left.
    pub fn stop(&self) -> Result<()> {
        self.owner.signal(Signal::TERM)?;
        let started = Instant::now();
        let mut nodes: Vec<&Process> = vec![&self.owner, &self.switch.process];
        nodes.extend(self.hosts.iter().map(|host| &host.process));
        while nodes.iter().any(|process| process.is_alive()) {
            if started.elapsed() > STOP_TIMEOUT {
                // Process 1 of every host ends with its owner, so this cannot fail to work.
                self.owner.signal(Signal::KILL)?;
                return Err(LabError::Timeout {
                    what: format!("the end of lab {}", self.name),
                    after: STOP_TIMEOUT,
                    last: format!("process {} was killed", self.owner.pid),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        remove(&self.name)
    }
}

/// Forgets a lab that has ended.
pub fn remove(name: &str) -> Result<()> {
    let path = state_path(name)?;
    for path in [path.with_extension("log"), path] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).doing(|| format!("remove {}", path.display()));
            }
            _ => {}
        }
    }
    // Goes with the last lab; while there are others it is not empty, and stays.
    let _ = fs::remove_dir(STATE_DIR);
    Ok(())
}

/// Where a lab in the background writes what it has to say.
pub fn log_path(name: &str) -> Result<PathBuf> {
    fs::create_dir_all(STATE_DIR).doing(|| format!("create {STATE_DIR}"))?;
    Ok(state_path(name)?.with_extension("log"))
}

fn state_path(name: &str) -> Result<PathBuf> {
    let good = !name.is_empty()
        && name
            .bytes()
            .all(|letter| letter.is_ascii_alphanumeric() || letter == b'-' || letter == b'_');
    if !good {
        return Err(LabError::Request(format!(
            "{name:?} cannot name a lab; use letters, digits, - and _"
        )));
    }
    Ok(PathBuf::from(STATE_DIR).join(format!("{name}.json")))
}

impl Process {
    fn with_pid(pid: u32) -> Result<Process> {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
        let start_time = start_time(&stat).ok_or_else(|| LabError::Broken {
            who: path,
            what: "has no start time".to_owned(),
        })?;
        Ok(Process { pid, start_time })
    }

    fn is_alive(&self) -> bool {
        Process::with_pid(self.pid).is_ok_and(|found| found == *self)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let action = || format!("signal process {}", self.pid);
        let Some(pid) = Pid::from_raw(self.pid as i32) else {
            return Ok(());
        };
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
            return Ok(());
        };
        // Only after the id is pinned down is it known whose it is.
        if !self.is_alive() {
            return Ok(());
        }
        match pidfd_send_signal(&process, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).doing(action),
        }
    }
}

/// Field 22 of `/proc/PID/stat`; a zombie has none, because it is over.
fn start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = Process::with_pid(std::process::id()).expect("this process");
        assert!(me.is_alive());
        let other = Process {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(!other.is_alive());
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let live = "7 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_time(live), Some(4242));
        assert_eq!(start_time(&live.replace(" S ", " Z ")), None);
        assert_eq!(start_time("7 (x"), None);
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        for name in ["", "../x", "a/b", "a b", "."] {
            assert!(state_path(name).is_err(), "{name}");
        }
    }
}
