//! One host of a lab: running commands on it, its files, its libvirt.
//!
//! A `Host` is a handle: cloning it is cheap, and it does not keep the host alive.

use std::ffi::OsStr;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::cache::Cache;
use crate::daemon::Daemon;
use crate::error::{IoContext, LabError, Result, checked, shown};
use crate::files;
use crate::guest::Guest;
use crate::namespaces::{process_ids, spawn_in, udp_socket_in};
use crate::network::{self, Counters, Loss};
use crate::spec::GuestSpec;
use crate::userland;

/// How long a poll for something on a host sleeps.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A host of a running lab.
#[derive(Clone, Debug)]
pub struct Host {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    address: String,
    pid: u32,
    process: OwnedFd,
}

impl Host {
    /// A handle on the host whose process 1 is `pid`.
    pub(crate) fn open(name: &str, address: &str, pid: u32) -> Result<Host> {
        let process = Pid::from_raw(pid as i32)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .doing(|| format!("find process 1 of host {name} (pid {pid})"))?;
        Ok(Host {
            inner: Arc::new(Inner {
                name: name.to_owned(),
                address: address.to_owned(),
                pid,
                process,
            }),
        })
    }

    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The address on the lab's network.
    pub fn address(&self) -> &str {
        &self.inner.address
    }

    /// The machine's process id of the host's process 1.
    pub fn pid(&self) -> u32 {
        self.inner.pid
    }

    /// The libvirt URI under which other hosts reach this one.
    pub fn libvirt_uri(&self) -> String {
        format!("qemu+tls://{}/system", self.name())
    }

    /// Prepares a command on this host. Nothing runs before one of its finishing methods.
    pub fn command<S: AsRef<OsStr>>(&self, words: &[S]) -> HostCommand {
        HostCommand::new(self.clone(), words)
    }

    /// Runs a command to its end, whatever its exit status.
    pub fn exec<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Output> {
        self.command(words).output()
    }

    /// Runs a command that must succeed; gives its standard output.
    pub fn run<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<String> {
        self.command(words).run()
    }

    /// `virsh` on this host, checked; gives its standard output.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let words: Vec<&str> = ["virsh", "-q"].iter().chain(arguments).copied().collect();
        self.run(&words)
    }

    /// The names of the running domains, sorted.
    pub fn domains(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = self
            .virsh(&["list", "--name"])?
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect();
        names.sort();
        Ok(names)
    }

    /// Defines a persistent domain from its XML.
    pub fn define_xml(&self, name: &str, xml: &str) -> Result<()> {
        self.with_xml(name, xml, |path| self.virsh(&["define", path]).map(drop))
    }

    /// Starts a transient domain from its XML.
    pub fn create_xml(&self, name: &str, xml: &str) -> Result<()> {
        self.with_xml(name, xml, |path| self.virsh(&["create", path]).map(drop))
    }

    fn with_xml(&self, name: &str, xml: &str, act: impl FnOnce(&str) -> Result<()>) -> Result<()> {
        let path = format!("/tmp/{name}.xml");
        self.write_file(&path, xml)?;
        act(&path)
    }

    /// Starts a guest; returns as soon as QEMU runs. See [`Guest::wait_for_report`].
    pub fn boot(&self, spec: &GuestSpec) -> Result<Guest> {
        let xml = spec.domain_xml()?;
        if spec.role().is_some() {
            userland::ensure(&Cache::open()?)?;
            let path = userland::path_on_host()?;
            if !self.file_exists(&path) {
                return Err(LabError::Request(format!(
                    "host {} has no {path}; the lab was started with another VMGANG_LAB_CACHE or \
                     another version, start it again",
                    self.name()
                )));
            }
        }
        if spec.is_persistent() {
            self.define_xml(spec.name(), &xml)?;
            self.virsh(&["start", spec.name()])?;
        } else {
            self.create_xml(spec.name(), &xml)?;
        }
        Ok(self.guest(spec.name()))
    }

    /// The guest of that name as seen on this host. Not checked: it may not be here yet.
    pub fn guest(&self, name: &str) -> Guest {
        Guest::new(self.clone(), name)
    }

    /// What a guest of the lab has written to its serial port since it started or arrived here.
    pub fn serial(&self, guest: &str) -> Result<String> {
        let path = crate::guest::serial_path(guest);
        Ok(String::from_utf8_lossy(&self.read_file(path)?).into_owned())
    }

    pub fn read_file(&self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        files::read(self.name(), self.pid(), path.as_ref())
    }

    pub fn read_text(&self, path: impl AsRef<Path>) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.read_file(path)?).into_owned())
    }

    /// Writes a file that everybody on the host may read, and the directories on the way to it.
    pub fn write_file(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> Result<()> {
        self.write_file_mode(path, content, 0o644)
    }

    pub fn write_file_mode(
        &self,
        path: impl AsRef<Path>,
        content: impl AsRef<[u8]>,
        mode: u32,
    ) -> Result<()> {
        let (path, content) = (path.as_ref(), content.as_ref());
        match files::write(self.name(), self.pid(), path, content, mode) {
            Err(LabError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            other => return other,
        }
        if let Some(parent) = path.parent() {
            self.run(&[OsStr::new("mkdir"), OsStr::new("-p"), parent.as_os_str()])?;
        }
        files::write(self.name(), self.pid(), path, content, mode)
    }

    pub fn file_exists(&self, path: impl AsRef<Path>) -> bool {
        files::open(
            self.name(),
            self.pid(),
            path.as_ref(),
            rustix::fs::OFlags::PATH,
            0,
        )
        .is_ok()
    }

    /// The names in a directory, sorted.
    pub fn list_dir(&self, path: impl AsRef<Path>) -> Result<Vec<String>> {
        files::list(self.name(), self.pid(), path.as_ref())
    }

    /// The vmgang daemon of this host.
    pub fn vmgangd(&self) -> Daemon {
        Daemon::vmgangd(self.clone())
    }

    /// The system bus of this host.
    pub fn bus(&self) -> Daemon {
        Daemon::bus(self.clone())
    }

    /// What the system bus asks who may do what.
    pub fn polkitd(&self) -> Daemon {
        Daemon::polkitd(self.clone())
    }

    /// The libvirt daemon of this host.
    pub fn libvirtd(&self) -> Daemon {
        Daemon::libvirtd(self.clone())
    }

    /// Bytes and packets through the host's network interface since the lab started.
    pub fn net_counters(&self) -> Result<Counters> {
        network::counters(self)
    }

    /// Limits what this host sends, in bits per second; `None` takes the limit away.
    pub fn shape(&self, bits_per_second: Option<u64>) -> Result<()> {
        network::shape(self, bits_per_second)
    }

    /// Has this host lose packets, sent or received, without a word; `None` takes that back.
    pub fn lose_packets(&self, loss: Option<Loss>) -> Result<()> {
        network::lose(self, loss)
    }

    /// Puts a file system of so many bytes over a directory, with what was in that.
    pub fn mount_small(&self, path: &str, bytes: u64) -> Result<()> {
        let script = "mkdir -p \"$0\" && old=$(mktemp -d) && cp -a \"$0/.\" \"$old\" && \
                      mount -t tmpfs -o \"size=$1,mode=0700\" tmpfs \"$0\" && \
                      cp -a \"$old/.\" \"$0\" && rm -r \"$old\"";
        self.run(&["sh", "-c", script, path, &bytes.to_string()])
            .map(drop)
    }

    /// Writes a file until its file system is full.
    pub fn fill_disk(&self, file: &str) -> Result<()> {
        // dd ends with an error when nothing more fits, which is what is wanted.
        let script = "dd if=/dev/zero of=\"$0\" bs=4k 2>/dev/null; ! echo > \"$0.more\"";
        self.run(&["bash", "-c", script, file]).map(drop)
    }

    /// The machine's process ids of everything that runs on this host.
    pub fn processes(&self) -> Result<Vec<u32>> {
        process_ids(self.pid()).doing(|| format!("list the processes of host {}", self.name()))
    }

    /// A UDP socket on this host's network, at any free port; for this process to use.
    pub fn udp_socket(&self) -> Result<UdpSocket> {
        udp_socket_in(&self.inner.process)
            .doing(|| format!("open a UDP socket on host {}", self.name()))
    }

    /// Sends a signal to a process by its process id on the host.
    pub fn kill(&self, pid_on_host: u32, signal: &str) -> Result<()> {
        let pid = pid_on_host.to_string();
        self.run(&["sh", "-c", "kill -s \"$0\" \"$1\"", signal, &pid])
            .map(drop)
    }

    /// Ends the whole host at once, as if its power were cut.
    pub fn power_off(&self) -> Result<()> {
        match pidfd_send_signal(&self.inner.process, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).doing(|| format!("end host {}", self.name())),
        }
    }
}

/// A command that will run on a host, with a clean environment.
#[derive(Debug)]
pub struct HostCommand {
    host: Host,
    command: Command,
}

impl HostCommand {
    fn new<S: AsRef<OsStr>>(host: Host, words: &[S]) -> HostCommand {
        let mut words = words.iter();
        let program = words.next().map_or(OsStr::new(""), AsRef::as_ref);
        let mut command = Command::new(program);
        command
            .args(words)
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", "/root")
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null());
        HostCommand { host, command }
    }

    pub fn env(mut self, key: &str, value: &str) -> HostCommand {
        self.command.env(key, value);
        self
    }

    pub fn stdin(mut self, stdin: Stdio) -> HostCommand {
        self.command.stdin(stdin);
        self
    }

    pub fn stdout(mut self, stdout: Stdio) -> HostCommand {
        self.command.stdout(stdout);
        self
    }

    pub fn stderr(mut self, stderr: Stdio) -> HostCommand {
        self.command.stderr(stderr);
        self
    }

    /// Starts the command; standard output and error are this process's own unless set.
    pub fn spawn(self) -> Result<HostChild> {
        let text = shown(&self.command);
        let place = format!("host {}", self.host.name());
        spawn_in(&self.host.inner.process, self.command)
            .map(|child| HostChild {
                child,
                text: text.clone(),
            })
            .map_err(|source| LabError::Start {
                place,
                command: text,
                source,
            })
    }

    /// Runs the command to its end and collects what it says, whatever its exit status.
    pub fn output(self) -> Result<Output> {
        self.stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?
            .wait_with_output()
    }

    /// Runs the command, which must succeed; gives its standard output.
    pub fn run(self) -> Result<String> {
        let place = format!("host {}", self.host.name());
        let text = shown(&self.command);
        checked(&place, &text, self.output()?)
    }
}

/// A running command on a host. Dropping it kills the command.
#[derive(Debug)]
pub struct HostChild {
    child: Child,
    text: String,
}

impl HostChild {
    /// The machine's process id of the command.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The standard library's handle, for its pipes.
    pub fn child_mut(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Kills the command with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().doing(|| format!("kill `{}`", self.text))
    }

    /// Sends a signal to the command.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id() as i32).ok_or_else(|| LabError::Broken {
            who: self.text.clone(),
            what: "has no process id".to_owned(),
        })?;
        // Not waited for yet, so the id cannot belong to another process.
        if self.try_wait()?.is_none() {
            rustix::process::kill_process(pid, signal)
                .doing(|| format!("signal `{}`", self.text))?;
        }
        Ok(())
    }

    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.child
            .wait()
            .doing(|| format!("wait for `{}`", self.text))
    }

    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .doing(|| format!("wait for `{}`", self.text))
    }

    /// Waits no longer than `timeout`; the command goes on when it is not over by then.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                return Err(LabError::Timeout {
                    what: format!("the end of `{}`", self.text),
                    after: timeout,
                    last: "still running".to_owned(),
                });
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Collects everything the command says, and its end.
    pub fn wait_with_output(mut self) -> Result<Output> {
        // Both pipes are read at once, or a command that fills one of them would hang.
        let stdout = self.child.stdout.take();
        let stderr = self.child.stderr.take();
        let reader = std::thread::spawn(move || read_all(stderr));
        let stdout = read_all(stdout);
        let stderr = reader
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the reading thread panicked")));
        let status = self.wait()?;
        Ok(Output {
            status,
            stdout: stdout.doing(|| format!("read from `{}`", self.text))?,
            stderr: stderr.doing(|| format!("read from `{}`", self.text))?,
        })
    }
}

impl Drop for HostChild {
    fn drop(&mut self) {
        // Both fail only when it is over already. It must be waited for, because process 1 of the
        // host cannot end while a dead process of its namespace has not been.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_all(pipe: Option<impl std::io::Read>) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    if let Some(mut pipe) = pipe {
        pipe.read_to_end(&mut content)?;
    }
    Ok(content)
}
