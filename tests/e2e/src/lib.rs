//! What the end-to-end tests and the benchmark share: a lab with vmgang installed, gangs of
//! guests on it, and the command line as users call it.
//!
//! Must not: reach into vmgang's crates. These tests know what users know: commands, JSON,
//! exit codes, and the guests' own word about their memory.

pub mod browser;
pub mod documents;
mod result;
pub mod schema;
mod versions;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmgang_lab::{Guest, GuestSpec, Host, HostChild, Lab, LabOptions};

pub use result::{DomainResult, JobResult, Saved};
pub use versions::Versions;

/// Long enough for an emulated guest on a busy machine to do anything.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// The tree that `make install` left for the lab.
pub fn install_tree() -> Result<PathBuf> {
    let tree = std::env::var_os("VMGANG_INSTALL_TREE").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/install")),
        PathBuf::from,
    );
    ensure!(
        tree.join("usr/sbin/vmgangd").exists(),
        "{} holds no vmgang; run `make stage` first",
        tree.display()
    );
    Ok(tree)
}

/// Runs a test on hosts a and b with vmgang installed and running; keeps the hosts' logs if
/// it fails.
pub fn with_lab(
    link_bits_per_second: Option<u64>,
    test: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    with_lab_of(Versions::asked_for()?, link_bits_per_second, test)
}

/// The same on hosts with these versions.
pub fn with_lab_of(
    versions: Versions,
    link_bits_per_second: Option<u64>,
    test: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    let options = LabOptions {
        link_bits_per_second,
        install_tree: Some(install_tree()?),
        ..versions.options()
    };
    Lab::scope(&options, test)
}

/// A guest whose memory is mostly what its whole gang has.
pub fn clone_guest(name: &str) -> GuestSpec {
    GuestSpec::new(name)
        .with_memory_mib(160)
        .with_fill("zero:20,uniform:5,same:50,similar:5,unique:10,compressible:10")
}

/// Boots guests at the same time, and waits until each has filled its memory.
pub fn boot_all(host: &Host, specs: &[GuestSpec]) -> Result<Vec<Guest>> {
    let guests = specs
        .iter()
        .map(|spec| Ok(host.boot(spec)?))
        .collect::<Result<Vec<_>>>()?;
    for guest in &guests {
        guest.wait_for_report(PATIENCE)?;
    }
    Ok(guests)
}

/// How a command ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// The result that `migrate --json` prints.
    pub fn job(&self) -> Result<JobResult> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not a job result: {self:?}"))
    }

    /// Fails unless the exit code is this.
    pub fn expect(self, code: i32) -> Result<Self> {
        ensure!(self.code == code, "exit code {code} was due: {self:?}");
        Ok(self)
    }
}

impl From<std::process::Output> for Ended {
    fn from(output: std::process::Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Runs `vmgang` on a host. JSON that it prints has to be what the documents say.
pub fn vmgang(host: &Host, arguments: &[&str]) -> Result<Ended> {
    let words: Vec<&str> = [&["vmgang"], arguments].concat();
    let ended: Ended = host.exec(&words)?.into();
    if arguments.contains(&"--json") && !ended.stdout.is_empty() {
        schema::check(arguments, &ended.stdout)?;
    }
    Ok(ended)
}

/// Starts `vmgang` on a host and lets it run.
pub fn start_vmgang(host: &Host, arguments: &[&str]) -> Result<HostChild> {
    let words: Vec<&str> = [&["vmgang"], arguments].concat();
    let piped = std::process::Stdio::piped;
    Ok(host
        .command(&words)
        .stdout(piped())
        .stderr(piped())
        .spawn()?)
}

/// The libvirt URI by which one host of the lab knows another.
pub fn uri(host: &Host) -> String {
    format!("qemu+tls://{}/system", host.name())
}

/// Lets the hosts use each other's libvirt over vmgang's port, as a bare host name as destination takes.
pub fn allow_libvirt(lab: &Lab) -> Result<()> {
    for host in lab.hosts() {
        host.write_file("/etc/vmgang/vmgang.toml", "allow_libvirt = ['a', 'b']\n")?;
        host.vmgangd().restart()?;
    }
    Ok(())
}

/// Fails unless exactly these guests run on the host.
pub fn expect_running(host: &Host, guests: &[&str]) -> Result<()> {
    let mut running = host.domains()?;
    running.sort();
    let mut wanted: Vec<_> = guests.iter().map(|name| (*name).to_owned()).collect();
    wanted.sort();
    ensure!(
        running == wanted,
        "host {} runs {running:?}, not {wanted:?}",
        host.name()
    );
    Ok(())
}

/// Fails unless each of these guests runs, as opposed to being paused.
pub fn expect_not_paused(host: &Host, guests: &[&str]) -> Result<()> {
    for guest in guests {
        let state = host.virsh(&["domstate", guest])?;
        let state = state.trim();
        ensure!(state == "running", "guest {guest} is {state}");
    }
    Ok(())
}

/// Has every guest check all its memory once more, where it runs now.
pub fn verify_all(host: &Host, guests: &[&str]) -> Result<()> {
    let verify = |name: &str| -> Result<()> {
        expect_not_paused(host, &[name])?;
        let report = host.guest(name).verify(PATIENCE)?;
        ensure!(report.bad == 0, "guest {name} found bad memory: {report:?}");
        Ok(())
    };
    std::thread::scope(|scope| {
        let checks: Vec<_> = guests
            .iter()
            .map(|name| scope.spawn(move || verify(name)))
            .collect();
        for check in checks {
            check
                .join()
                .map_err(|_| anyhow::anyhow!("a check panicked"))??;
        }
        Ok(())
    })
}

/// Fails if a job has left sockets or directories on the host.
pub fn expect_clean(host: &Host) -> Result<()> {
    let left = host.list_dir("/run/vmgang/migrate").unwrap_or_default();
    ensure!(left.is_empty(), "host {} still has {left:?}", host.name());
    Ok(())
}

/// Waits until `done`, or fails naming `what`.
pub fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !done()? {
        ensure!(
            std::time::Instant::now() < deadline,
            "waited in vain until {what}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
