//! The processes behind a host: how the owner starts them, and what they do.
//!
//! A node is two processes of the `lab` helper. The outer one makes a process id namespace and
//! waits; the inner one is process 1 of it, makes the other namespaces, assembles the root and
//! then only reads its standard input. That pipe belongs to the owner of the lab: when the owner
//! ends, in whatever way, process 1 reads its end and exits, and the kernel ends everything that
//! ran on the host. Nothing needs to be cleaned up, because nothing was written outside.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
    mount_remount, unmount,
};
use serde::{Deserialize, Serialize};

use crate::error::{IoContext, LabError, Result};
use crate::namespaces;

/// The hidden subcommand that starts the outer process.
pub const NODE_COMMAND: &str = "__node";
/// The hidden subcommand that is process 1 of a node.
pub const NODE_INIT_COMMAND: &str = "__node-init";

const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// What a node is made of; read by process 1 from its first line of input.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeConfig {
    pub name: String,
    /// Read-only trees, the first one on top.
    pub lower: Vec<PathBuf>,
    /// Where to assemble the root; an empty directory.
    pub mount_point: PathBuf,
    /// Files and directories of the machine seen read-only on the host: source, path on the host.
    pub read_only: Vec<(PathBuf, PathBuf)>,
    /// The content of `/etc/hosts`.
    pub hosts_file: String,
    /// The content of `/etc/machine-id`.
    pub machine_id: String,
}

/// A started node as its owner holds it; dropping it ends the node.
#[derive(Debug)]
pub(crate) struct NodeProcess {
    name: String,
    outer: Child,
    /// Process 1 lives as long as this stays open.
    lifeline: Option<ChildStdin>,
}

impl NodeProcess {
    /// Starts a node and waits until its root is ready; gives the id of its process 1.
    pub fn start(helper: &Path, config: &NodeConfig) -> Result<(NodeProcess, u32)> {
        let mut outer = Command::new(helper)
            .args([NODE_COMMAND, &config.name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A ctrl-C is for the owner; the node follows through the pipe.
            .process_group(0)
            .spawn()
            .map_err(|source| LabError::Start {
                place: "this machine".to_owned(),
                command: helper.display().to_string(),
                source,
            })?;
        let lifeline = outer.stdin.take();
        let answers = outer.stdout.take();
        let mut node = NodeProcess {
            name: config.name.clone(),
            outer,
            lifeline,
        };
        let pid = node.introduce(config, answers)?;
        Ok((node, pid))
    }

    fn introduce(
        &mut self,
        config: &NodeConfig,
        answers: Option<std::process::ChildStdout>,
    ) -> Result<u32> {
        let (Some(lifeline), Some(answers)) = (self.lifeline.as_mut(), answers) else {
            return Err(broken(&self.name, "its pipes are missing"));
        };
        let mut line = serde_json::to_string(config)
            .map_err(|error| broken(&self.name, &format!("its configuration: {error}")))?;
        line.push('\n');
        lifeline
            .write_all(line.as_bytes())
            .doing(|| format!("configure host {}", config.name))?;

        let (mut pid, mut ready) = (None, false);
        for line in BufReader::new(answers).lines() {
            let line = line.doing(|| format!("read from host {}", config.name))?;
            match line.split_once(' ') {
                Some(("pid", number)) => pid = number.parse().ok(),
                Some(("error", text)) => return Err(broken(&self.name, text)),
                _ if line == "ready" => ready = true,
                _ => return Err(broken(&self.name, &format!("unexpected answer {line:?}"))),
            }
            if let (Some(pid), true) = (pid, ready) {
                return Ok(pid);
            }
        }
        Err(broken(
            &self.name,
            "it ended while it was being set up; its message, if any, is above",
        ))
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            match self.outer.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                _ => return,
            }
        }
        // Process 1 waits for processes started by this owner and never waited for; they are
        // dead, and go when the owner goes.
        crate::cache::progress(&format!(
            "host {} has not ended after {} s",
            self.name,
            STOP_TIMEOUT.as_secs()
        ));
    }
}

/// The outer process: makes the process id namespace, starts process 1 and waits for it.
pub fn run_outer(name: &str) -> io::Result<()> {
    namespaces::unshare_process_ids()?;
    let mut init = Command::new("/proc/self/exe")
        .arg0("lab")
        .args([NODE_INIT_COMMAND, name])
        .spawn()?;
    // One write each, because process 1 writes to the same pipe.
    io::stdout().write_all(format!("pid {}\n", init.id()).as_bytes())?;
    io::stdout().flush()?;
    init.wait()?;
    Ok(())
}

/// Process 1 of a node: sets up, says so, and lives until its input ends.
pub fn run_init() -> io::Result<()> {
    let mut input = BufReader::new(io::stdin());
    let mut line = String::new();
    input.read_line(&mut line)?;
    let answer = match serde_json::from_str::<NodeConfig>(&line) {
        Ok(config) => match set_up(&config) {
            Ok(()) => "ready\n".to_owned(),
            Err(error) => format!("error {}\n", one_line(&error)),
        },
        Err(error) => format!(
            "error its configuration cannot be read ({error}); build vmgang-lab again, the \
             helper is of another version\n"
        ),
    };
    io::stdout().write_all(answer.as_bytes())?;
    io::stdout().flush()?;
    io::copy(&mut input.by_ref(), &mut io::sink())?;
    Ok(())
}

fn one_line(error: &LabError) -> String {
    let mut text = error.to_string();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text.replace('\n', " ")
}

fn set_up(config: &NodeConfig) -> Result<()> {
    namespaces::reap_children_automatically();
    namespaces::unshare_host().doing(|| "make namespaces (the lab needs root)".to_owned())?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .doing(|| "make mounts private".to_owned())?;
    let root = assemble_root(config)?;
    fill_root(config, &root)?;
    std::env::set_current_dir(&root).doing(|| "enter the root".to_owned())?;
    // The old root ends up on top of the new one and is taken off again.
    rustix::process::pivot_root(".", ".").doing(|| "change to the new root".to_owned())?;
    unmount(".", UnmountFlags::DETACH).doing(|| "leave the old root".to_owned())?;
    std::env::set_current_dir("/").doing(|| "enter the new root".to_owned())?;
    rustix::system::sethostname(config.name.as_bytes()).doing(|| "set the host name".to_owned())
}

/// The overlay; what a host writes goes to a tmpfs that ends with its namespace.
fn assemble_root(config: &NodeConfig) -> Result<PathBuf> {
    tmpfs(&config.mount_point, c"mode=0755")?;
    let part = |name: &str| config.mount_point.join(name);
    for name in ["upper", "work", "root"] {
        make_dir(&part(name), 0o755)?;
    }
    let mut lower = Vec::new();
    for path in &config.lower {
        let text = path
            .to_str()
            .filter(|text| !text.contains(['\\', ':', ',']));
        lower.push(text.ok_or_else(|| {
            LabError::Request(format!(
                "{}: a path with a colon, comma or backslash cannot be part of a root",
                path.display()
            ))
        })?);
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.join(":"),
        part("upper").display(),
        part("work").display()
    );
    let options = std::ffi::CString::new(options)
        .map_err(io::Error::from)
        .doing(|| "name the overlay's directories".to_owned())?;
    mount(
        "overlay",
        part("root"),
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .doing(|| format!("mount an overlay of {}", lower.join(" on ")))?;
    Ok(part("root"))
}

fn fill_root(config: &NodeConfig, root: &Path) -> Result<()> {
    let at = |path: &str| root.join(path);
    mount("proc", at("proc"), "proc", MountFlags::empty(), None)
        .doing(|| "mount /proc".to_owned())?;
    mount("sysfs", at("sys"), "sysfs", MountFlags::empty(), None)
        .doing(|| "mount /sys".to_owned())?;
    tmpfs(&at("run"), c"mode=0755")?;
    tmpfs(&at("tmp"), c"mode=1777")?;
    make_devices(&at("dev"))?;
    for (path, text) in [
        ("etc/hosts", config.hosts_file.as_str()),
        ("etc/hostname", &format!("{}\n", config.name)),
        ("etc/machine-id", &format!("{}\n", config.machine_id)),
        ("etc/resolv.conf", ""),
    ] {
        fs::write(at(path), text).doing(|| format!("write /{path}"))?;
    }
    for (source, target) in &config.read_only {
        let target = root.join(target.strip_prefix("/").unwrap_or(target));
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).doing(|| format!("create {}", parent.display()))?;
        }
        if source.is_dir() {
            make_dir(&target, 0o755)?;
        } else {
            File::create(&target).doing(|| format!("create {}", target.display()))?;
        }
        mount_bind(source, &target).doing(|| format!("bind {}", source.display()))?;
        mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY, c"")
            .doing(|| format!("make {} read-only", target.display()))?;
    }
    Ok(())
}

/// A small `/dev`. `/dev/kvm` is left out on purpose: where it exists and QEMU's user may not
/// open it, libvirt throws its probe of QEMU away at every start and every migration.
fn make_devices(dev: &Path) -> Result<()> {
    tmpfs(dev, c"mode=0755")?;
    for (name, major, minor, mode) in [
        ("null", 1, 3, 0o666),
        ("zero", 1, 5, 0o666),
        ("full", 1, 7, 0o666),
        ("random", 1, 8, 0o666),
        ("urandom", 1, 9, 0o666),
        ("tty", 5, 0, 0o666),
    ] {
        make_device(&dev.join(name), makedev(major, minor), mode)?;
    }
    // Its number is given out by the running kernel; post-copy migration needs it.
    if let Ok(status) = rustix::fs::stat("/dev/userfaultfd") {
        make_device(&dev.join("userfaultfd"), status.st_rdev, 0o666)?;
    }
    for name in ["pts", "shm", "net"] {
        make_dir(&dev.join(name), 0o755)?;
    }
    tmpfs(&dev.join("shm"), c"mode=1777")?;
    mount(
        "devpts",
        dev.join("pts"),
        "devpts",
        MountFlags::empty(),
        c"newinstance,ptmxmode=0666,mode=0620,gid=5",
    )
    .doing(|| "mount /dev/pts".to_owned())?;
    for (target, name) in [
        ("pts/ptmx", "ptmx"),
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ] {
        symlink(target, dev.join(name)).doing(|| format!("link /dev/{name}"))?;
    }
    Ok(())
}

fn make_device(path: &Path, device: u64, mode: u32) -> Result<()> {
    mknodat(
        CWD,
        path,
        FileType::CharacterDevice,
        Mode::from_raw_mode(mode),
        device,
    )
    .doing(|| format!("make the device {}", path.display()))?;
    set_mode(path, mode)
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(path).doing(|| format!("create {}", path.display()))?;
    set_mode(path, mode)
}

/// Sets a mode whatever the umask is.
fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .doing(|| format!("set the mode of {}", path.display()))
}

fn tmpfs(path: &Path, options: &std::ffi::CStr) -> Result<()> {
    mount("tmpfs", path, "tmpfs", MountFlags::empty(), options)
        .doing(|| format!("mount a tmpfs on {}", path.display()))
}

fn broken(name: &str, what: &str) -> LabError {
    LabError::Broken {
        who: format!("host {name}"),
        what: what.to_owned(),
    }
}
