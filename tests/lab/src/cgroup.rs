//! A limit on the memory of a whole host, and memory that is taken until the limit hurts.
//!
//! Owns a control group below this process's own, of the first or the second version, whichever
//! the machine has for memory. Nothing else of the lab knows control groups; the hosts see none.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, LabError, Result};
use crate::host::{Host, HostChild};

/// What is taken when memory is to run out.
const TAKEN_MIB: u64 = 48;
/// What is left beside that at least: with less, nobody's end would be enough.
const LEFT_MIB: u64 = 16;

/// Every process of a host but its first in one group. Dropping it lifts the limit and removes the group.
#[derive(Debug)]
pub struct MemoryGroup {
    host: Host,
    parent: PathBuf,
    group: PathBuf,
    limit: &'static str,
    usage: &'static str,
    unlimited: &'static str,
    hog: Option<HostChild>,
}

impl MemoryGroup {
    /// Puts all that runs on the host into a group without a limit; what those processes start
    /// is in it as well. What they had before may count elsewhere.
    pub fn of(host: &Host) -> Result<MemoryGroup> {
        let own = fs::read_to_string("/proc/self/cgroup")
            .doing(|| "read this process's control groups".to_owned())?;
        let (parent, first) = memory_group(&own).ok_or_else(|| {
            LabError::Request("this machine has no control groups for memory".to_owned())
        })?;
        let group = parent.join(format!("vmgang-lab-{}-{}", std::process::id(), host.name()));
        fs::create_dir(&group).doing(|| format!("create {}", group.display()))?;
        let (limit, usage, unlimited) = match first {
            true => ("memory.limit_in_bytes", "memory.usage_in_bytes", "-1"),
            false => ("memory.max", "memory.current", "max"),
        };
        let group = MemoryGroup {
            host: host.clone(),
            parent,
            group,
            limit,
            usage,
            unlimited,
            hog: None,
        };
        // Without its first process there would be no host.
        for process in host.processes()? {
            if process == host.pid() {
                continue;
            }
            join(&group.group, process)?;
        }
        Ok(group)
    }

    /// Allows no more than what is used now, or little, and takes some of that: the kernel kills the
    /// largest process, at once or when more is asked for. What takes is spared.
    pub fn exhaust(&mut self) -> Result<()> {
        let used = self.read(self.usage)?;
        let used = used.trim().parse().map_err(|_| LabError::Broken {
            who: self.group.display().to_string(),
            what: format!("{} says {used:?}", self.usage),
        })?;
        let allowed: u64 = std::cmp::max(used, (TAKEN_MIB + LEFT_MIB) << 20);
        self.write(self.limit, &allowed.to_string())?;
        // dd fills its one buffer again and again until it is killed.
        let script = "echo -1000 > /proc/self/oom_score_adj; read go; \
                      exec dd if=/dev/zero of=/dev/null bs=${0}M";
        let mut hog = self
            .host
            .command(&["sh", "-c", script, &TAKEN_MIB.to_string()])
            .stdin(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        join(&self.group, hog.id())?;
        // Only once it is in the group may it begin.
        let go = hog.child_mut().stdin.take();
        if let Some(mut go) = go {
            std::io::Write::write_all(&mut go, b"\n")
                .doing(|| "start to take memory".to_owned())?;
        }
        self.hog = Some(hog);
        Ok(())
    }

    /// Gives back what was taken and lifts the limit.
    pub fn relieve(&mut self) -> Result<()> {
        // Whoever waits for memory of the group can end only when there is some.
        self.write(self.limit, self.unlimited)?;
        self.hog = None;
        Ok(())
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.group.join(name);
        fs::read_to_string(&path).doing(|| format!("read {}", path.display()))
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        let path = self.group.join(name);
        fs::write(&path, value).doing(|| format!("write {value} to {}", path.display()))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Each of these fails only when it is done already or the host is gone.
        let _ = self.relieve();
        if let Ok(processes) = self.read("cgroup.procs") {
            for process in processes.lines().filter_map(|line| line.parse().ok()) {
                let _ = join(&self.parent, process);
            }
        }
        if let Err(error) = fs::remove_dir(&self.group) {
            crate::cache::progress(&format!("{} stays: {error}", self.group.display()));
        }
    }
}

/// Where this process's group for memory is, and whether it is one of the first version.
fn memory_group(own: &str) -> Option<(PathBuf, bool)> {
    let path = |line: &str, names: &str| -> Option<String> {
        let mut fields = line.splitn(3, ':').skip(1);
        let found = fields.next()?.split(',').any(|name| name == names);
        found.then(|| fields.next()).flatten().map(str::to_owned)
    };
    let below = |root: &str, group: String| Path::new(root).join(group.trim_start_matches('/'));
    let first = own.lines().find_map(|line| path(line, "memory"));
    match first {
        Some(group) => Some((below("/sys/fs/cgroup/memory", group), true)),
        None => own
            .lines()
            .find_map(|line| path(line, ""))
            .map(|group| (below("/sys/fs/cgroup", group), false)),
    }
}

/// A process that has ended meanwhile needs no group.
fn join(group: &Path, process: u32) -> Result<()> {
    let path = group.join("cgroup.procs");
    match fs::write(&path, process.to_string()) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other.doing(|| format!("put process {process} into {}", group.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_group_for_memory_of_either_version() {
        let first = "5:devices:/\n4:cpu,memory:/some/where\n0::/\n";
        let (path, version) = memory_group(first).expect("it is there");
        assert_eq!(path, Path::new("/sys/fs/cgroup/memory/some/where"));
        assert!(version);
        let (path, version) = memory_group("0::/user.slice\n").expect("it is there");
        assert_eq!(path, Path::new("/sys/fs/cgroup/user.slice"));
        assert!(!version);
        assert!(memory_group("5:devices:/\n").is_none());
    }
}
