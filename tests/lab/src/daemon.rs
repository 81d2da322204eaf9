//! The daemons of a host: bus, polkit, libvirt and vmgangd, as a machine's boot would start them.
//!
//! Owns starting, finding and ending them. A daemon belongs to process 1 of its host, like one
//! started by an init; so nobody has to wait for it, and any handle can control it.

use std::time::{Duration, Instant};

use crate::error::{LabError, Result, tail};
use crate::host::{Host, POLL_INTERVAL};

const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

const VMGANGD_PATHS: [&str; 4] = [
    "/usr/sbin/vmgangd",
    "/usr/bin/vmgangd",
    "/usr/local/sbin/vmgangd",
    "/usr/local/bin/vmgangd",
];

const VMGANGD_UNIT: &str = "/usr/lib/systemd/system/vmgangd.service";

/// A daemon on a host, running or not.
#[derive(Clone, Debug)]
pub struct Daemon {
    host: Host,
    name: &'static str,
    /// What starts the command, with its arguments before it.
    wrapper: Vec<String>,
    command: Vec<String>,
    log: String,
    /// A command that succeeds once the daemon serves.
    probe: Vec<&'static str>,
    /// Kill it when it does not end so long after being asked; otherwise that is an error.
    kill_after: Option<Duration>,
}

impl Daemon {
    fn new(host: Host, name: &'static str, command: &[&str], probe: &[&'static str]) -> Daemon {
        Daemon {
            host,
            name,
            wrapper: Vec::new(),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log: format!("/var/log/{name}.log"),
            probe: probe.to_vec(),
            kill_after: None,
        }
    }

    pub(crate) fn bus(host: Host) -> Daemon {
        Daemon::new(
            host,
            "dbus-daemon",
            // One that was killed leaves the file with its process id.
            &["dbus-daemon", "--system", "--nofork", "--nopidfile"],
            &[
                "dbus-send",
                "--system",
                "--print-reply",
                "--dest=org.freedesktop.DBus",
                "/",
                "org.freedesktop.DBus.GetId",
            ],
        )
    }

    pub(crate) fn polkitd(host: Host) -> Daemon {
        Daemon::new(
            host,
            "polkitd",
            &["/usr/lib/polkit-1/polkitd", "--no-debug"],
            &[
                "sh",
                "-c",
                "dbus-send --system --print-reply --dest=org.freedesktop.DBus / \
                 org.freedesktop.DBus.NameHasOwner string:org.freedesktop.PolicyKit1 | grep -q true",
            ],
        )
    }

    pub(crate) fn libvirtd(host: Host) -> Daemon {
        let mut daemon = Daemon::new(
            host,
            "libvirtd",
            &["/usr/sbin/libvirtd", "--listen"],
            &["virsh", "-q", "-c", "qemu:///system", "list"],
        );
        // libvirtd 11.3 asked to end soon after its start sometimes loses a wake-up of its udev
        // thread and lingers for 30 s. Killing it is harmless: guests are not its children.
        daemon.kill_after = Some(Duration::from_secs(2));
        daemon
    }

    pub(crate) fn vmgangd(host: Host) -> Daemon {
        let path = VMGANGD_PATHS
            .iter()
            .find(|path| host.file_exists(path))
            .unwrap_or(&VMGANGD_PATHS[0]);
        let wrapper = confinement(&host.read_text(VMGANGD_UNIT).unwrap_or_default());
        let mut daemon = Daemon::new(
            host,
            "vmgangd",
            &[path],
            &[
                "sh",
                "-c",
                "dbus-send --system --print-reply --dest=org.freedesktop.DBus / \
                 org.freedesktop.DBus.NameHasOwner string:org.vmgang.VMGang1 | grep -q true",
            ],
        );
        daemon.wrapper = wrapper;
        daemon
    }

    /// The same without one of its arguments.
    pub fn without(mut self, argument: &str) -> Daemon {
        self.command.retain(|word| word != argument);
        self
    }

    /// Whether the host's root has this daemon at all.
    pub fn is_installed(&self) -> bool {
        self.command
            .first()
            .is_some_and(|path| self.host.file_exists(path))
    }

    /// Where its standard output and error go, on the host.
    pub fn log_path(&self) -> &str {
        &self.log
    }

    /// Everything it has logged since the host started; empty when it has never run.
    pub fn log(&self) -> String {
        self.host.read_text(&self.log).unwrap_or_default()
    }

    /// Its process id on the host, when it runs.
    pub fn pid(&self) -> Result<Option<u32>> {
        // The lowest one: a daemon's own children have its name until they execute something.
        let mut found = None;
        for entry in self.host.list_dir("/proc")? {
            let Ok(pid) = entry.parse::<u32>() else {
                continue;
            };
            // A process may end at any moment, so what cannot be read is not there.
            let Ok(stat) = self.host.read_text(format!("/proc/{pid}/stat")) else {
                continue;
            };
            if is_live_process(&stat, self.name) && found.is_none_or(|lowest| pid < lowest) {
                found = Some(pid);
            }
        }
        Ok(found)
    }

    pub fn is_running(&self) -> Result<bool> {
        Ok(self.pid()?.is_some())
    }

    /// Starts it and waits until it serves.
    pub fn start(&self) -> Result<()> {
        self.start_with(&[], &[])
    }

    /// Starts it with more arguments and environment, and waits until it serves.
    pub fn start_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
        self.launch(arguments, environment)?;
        self.wait_ready()
    }

    /// Starts it without waiting: for a daemon that is expected to refuse its configuration.
    pub fn launch(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
        if let Some(pid) = self.pid()? {
            return Err(LabError::Request(format!(
                "{} runs already on host {} as process {pid}",
                self.name,
                self.host.name()
            )));
        }
        // The shell ends at once, so that process 1 adopts the daemon.
        let script = "log=$1; shift; setsid \"$@\" </dev/null >>\"$log\" 2>&1 &";
        let mut words = vec!["sh", "-c", script, "sh", self.log.as_str()];
        words.extend(self.wrapper.iter().map(String::as_str));
        words.extend(self.command.iter().map(String::as_str));
        words.extend(arguments);
        let mut command = self.host.command(&words);
        for (key, value) in environment {
            command = command.env(key, value);
        }
        command.run().map(drop)
    }

    /// Waits until it serves; fails as soon as it has ended.
    pub fn wait_ready(&self) -> Result<()> {
        let started = Instant::now();
        loop {
            let probe = self.host.exec(&self.probe)?;
            if probe.status.success() {
                return Ok(());
            }
            // It needs a moment between its start and its name in the process table.
            if started.elapsed() > Duration::from_secs(1) && !self.is_running()? {
                return Err(self.broken("ended while starting"));
            }
            if started.elapsed() > START_TIMEOUT {
                return Err(self.broken("runs, but does not answer"));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Asks it to end and waits for that. Nothing happens when it does not run.
    pub fn stop(&self) -> Result<()> {
        match self.kill_after {
            None => self.end("TERM", STOP_TIMEOUT),
            Some(grace) => self.end("TERM", grace).or_else(|_| self.kill()),
        }
    }

    /// Kills it with SIGKILL and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        self.end("KILL", STOP_TIMEOUT)
    }

    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start()
    }

    fn end(&self, signal: &str, timeout: Duration) -> Result<()> {
        let Some(pid) = self.pid()? else {
            return Ok(());
        };
        self.host.kill(pid, signal)?;
        let started = Instant::now();
        while self.pid()? == Some(pid) {
            if started.elapsed() > timeout {
                return Err(self.broken(&format!("does not end on SIG{signal}")));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn broken(&self, what: &str) -> LabError {
        LabError::Broken {
            who: format!("{} on host {}", self.name, self.host.name()),
            what: format!(
                "{what}; the end of {}:\n{}",
                self.log,
                tail(&self.log(), 2000)
            ),
        }
    }
}

/// Brings up what a host needs before vmgangd: the system bus, polkit, virtlogd and libvirtd.
pub(crate) fn start_host(host: &Host) -> Result<()> {
    host.run(&["mkdir", "-p", "/run/dbus", "/run/lock"])?;
    // What an installed package asks of the boot.
    if host.file_exists("/usr/lib/sysusers.d/vmgang.conf") {
        host.run(&["systemd-sysusers", "vmgang.conf"])?;
    }
    if host.file_exists("/usr/lib/tmpfiles.d/vmgang.conf") {
        host.run(&["systemd-tmpfiles", "--create", "vmgang.conf"])?;
    }
    host.bus().start()?;
    host.polkitd().launch(&[], &[])?;
    host.run(&["/usr/sbin/virtlogd", "-d"])?;
    host.libvirtd().start()
}

/// Starts a command with no more capabilities than its unit gives it: what it lacks is found by the
/// tests. Empty where there is no unit, or one that takes none away.
fn confinement(unit: &str) -> Vec<String> {
    let Some(set) = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
    else {
        return Vec::new();
    };
    let kept: String = set
        .split_whitespace()
        .map(|name| name.trim_start_matches("CAP_").to_ascii_lowercase())
        .map(|name| format!(",+{name}"))
        .collect();
    [
        "setpriv".to_owned(),
        format!("--bounding-set=-all{kept}"),
        "--inh-caps=-all".to_owned(),
        "--no-new-privs".to_owned(),
    ]
    .into()
}

/// Reads one line of `/proc/PID/stat`: the name is in parentheses, the state follows.
fn is_live_process(stat: &str, name: &str) -> bool {
    let Some((start, rest)) = stat.rsplit_once(')') else {
        return false;
    };
    let found = start.split_once('(').map(|(_, found)| found);
    let state = rest.trim_start().chars().next();
    found == Some(name) && !matches!(state, None | Some('Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_says_what_its_daemon_may() {
        let unit = "[Service]\nExecStart=/x\nCapabilityBoundingSet=CAP_CHOWN CAP_SYS_PTRACE\n";
        assert_eq!(
            confinement(unit)[..2],
            ["setpriv", "--bounding-set=-all,+chown,+sys_ptrace"]
        );
        assert!(confinement("[Service]\nExecStart=/x\n").is_empty());
    }

    #[test]
    fn a_process_is_known_by_its_name_and_a_zombie_is_none() {
        assert!(is_live_process("12 (vmgangd) S 1 12 12", "vmgangd"));
        assert!(!is_live_process("12 (vmgangd) Z 1 12 12", "vmgangd"));
        assert!(!is_live_process("12 (vmgangd-x) S 1", "vmgangd"));
        assert!(is_live_process("12 (odd) name) R 1", "odd) name"));
        assert!(!is_live_process("", "vmgangd"));
    }
}
