//! A whole lab: hosts, the switch between them, and their common certificate authority.
//!
//! Owns the order in which a lab comes up. Dropping a lab ends everything in it; so does the end
//! of the process that started it, however it ends.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::cache::{Cache, progress};
use crate::daemon;
use crate::emulator;
use crate::error::{IoContext, LabError, Result};
use crate::guest::Guest;
use crate::host::Host;
use crate::initramfs;
use crate::network::{self, Counters};
use crate::node::{NodeConfig, NodeProcess};
use crate::pki::{self, Authority, CertificateRequest};
use crate::root::RootRecipe;
use crate::spec::{INITRAMFS_PATH, KERNEL_PATH};
use crate::userland::{self, GUESTS_PATH};

/// The switch is a node like a host, without daemons.
const SWITCH_NAME: &str = "switch";

/// What a lab is made of.
#[derive(Clone, Debug)]
pub struct LabOptions {
    /// The hosts' names; they resolve each other by them.
    pub hosts: Vec<String>,
    /// What each host may send, in bits per second; `None` for no limit.
    pub link_bits_per_second: Option<u64>,
    /// A tree as `make install DESTDIR=` leaves it, laid over each host's root. When it holds
    /// `vmgangd`, that is started.
    pub install_tree: Option<PathBuf>,
    /// Which Debian the hosts run.
    pub root: RootRecipe,
    /// Hosts that run another one. Guests boot the same kernel on all.
    pub other_roots: BTreeMap<String, RootRecipe>,
    /// Start vmgangd when it is installed.
    pub start_vmgangd: bool,
}

impl Default for LabOptions {
    /// Two hosts, `a` and `b`, on an unlimited link, without vmgang.
    fn default() -> LabOptions {
        LabOptions {
            hosts: vec!["a".to_owned(), "b".to_owned()],
            link_bits_per_second: None,
            install_tree: None,
            root: RootRecipe::default(),
            other_roots: BTreeMap::new(),
            start_vmgangd: true,
        }
    }
}

impl LabOptions {
    /// Whether guests need [memory of an odd size](emulator): one of the hosts has Debian 12's QEMU.
    fn odd_memory(&self) -> bool {
        std::iter::once(&self.root)
            .chain(self.other_roots.values())
            .any(|recipe| !recipe.backports)
    }
}

/// What hosts and guests are made from; built once and then only read.
#[derive(Clone, Debug)]
struct Material {
    tree: PathBuf,
    other_trees: BTreeMap<String, PathBuf>,
    kernel: PathBuf,
    initramfs: PathBuf,
    guests: PathBuf,
    mount_point: PathBuf,
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    hosts: Vec<Host>,
    switch: Host,
    authority: Option<Authority>,
    /// Empty for a lab that another process owns.
    nodes: Vec<NodeProcess>,
}

impl Lab {
    /// Builds what is not in the cache, then starts every host and waits until it serves.
    pub fn start(options: &LabOptions) -> Result<Lab> {
        check(options)?;
        let material = prepare(options)?;
        let helper = helper()?;
        let names = hosts_file(&options.hosts);

        let (node, pid) = start_node(&helper, SWITCH_NAME, &material, options, &names)?;
        let mut lab = Lab {
            hosts: Vec::new(),
            switch: Host::open(SWITCH_NAME, "", pid)?,
            authority: Some(Authority::new("vmgang lab")?),
            nodes: vec![node],
        };
        network::start_switch(&lab.switch)?;
        for (index, name) in options.hosts.iter().enumerate() {
            let (node, pid) = start_node(&helper, name, &material, options, &names)?;
            lab.nodes.push(node);
            let host = Host::open(name, &network::address(index), pid)?;
            network::connect(&lab.switch, &host)?;
            if options.link_bits_per_second.is_some() {
                host.shape(options.link_bits_per_second)?;
            }
            lab.hosts.push(host);
        }
        let odd_memory = options.odd_memory();
        lab.each_host(|host| lab.start_daemons(host, options.start_vmgangd, odd_memory))?;
        Ok(lab)
    }

    /// Starts a lab, does the work in it and ends it; keeps the hosts' logs when the work fails.
    pub fn scope<T, E: From<LabError>>(
        options: &LabOptions,
        work: impl FnOnce(&Lab) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let lab = Lab::start(options)?;
        let result = work(&lab);
        if result.is_err() {
            lab.keep_logs();
        }
        result
    }

    /// Builds what is not in the cache and starts nothing.
    pub fn prepare(options: &LabOptions) -> Result<()> {
        check(options)?;
        prepare(options).map(drop)
    }

    /// Builds what Debian guests boot from, if it is not in the cache; the first one to be booted
    /// does so too.
    pub fn prepare_debian() -> Result<()> {
        userland::ensure(&Cache::open()?)
    }

    /// A lab that another process owns. Dropping this handle ends nothing.
    pub(crate) fn attach(hosts: Vec<Host>, switch: Host) -> Lab {
        Lab {
            hosts,
            switch,
            authority: None,
            nodes: Vec::new(),
        }
    }

    fn start_daemons(&self, host: &Host, vmgangd: bool, odd_memory: bool) -> Result<()> {
        let uuid = uuid::Uuid::new_v4();
        let configuration = host.read_text("/etc/libvirt/libvirtd.conf")?;
        host.write_file(
            "/etc/libvirt/libvirtd.conf",
            format!("{configuration}\nhost_uuid = \"{uuid}\"\n"),
        )?;
        self.install_certificates(host)?;
        if odd_memory {
            emulator::replace(host)?;
        }
        daemon::start_host(host)?;
        let daemon = host.vmgangd();
        if vmgangd && daemon.is_installed() {
            daemon.start()?;
        }
        Ok(())
    }

    /// Does something on all hosts at once; the first error in the hosts' order.
    pub fn each_host(&self, act: impl Fn(&Host) -> Result<()> + Sync) -> Result<()> {
        std::thread::scope(|scope| {
            let act = &act;
            let running: Vec<_> = self
                .hosts
                .iter()
                .map(|host| scope.spawn(move || act(host)))
                .collect();
            running
                .into_iter()
                .map(|thread| {
                    thread.join().unwrap_or_else(|_| {
                        Err(LabError::Broken {
                            who: "the lab".to_owned(),
                            what: "a thread panicked; its message is above".to_owned(),
                        })
                    })
                })
                .fold(Ok(()), Result::and)
        })
    }

    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    pub(crate) fn switch(&self) -> &Host {
        &self.switch
    }

    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts
            .iter()
            .find(|host| host.name() == name)
            .ok_or_else(|| {
                let known: Vec<&str> = self.hosts.iter().map(Host::name).collect();
                LabError::Request(format!(
                    "the lab has no host {name:?}; it has {}",
                    known.join(", ")
                ))
            })
    }

    /// The guest of that name on the one host where it runs.
    pub fn find_guest(&self, name: &str) -> Result<Guest> {
        let mut found = Vec::new();
        for host in &self.hosts {
            let guest = host.guest(name);
            if guest.is_running()? {
                found.push(guest);
            }
        }
        match (found.pop(), found.is_empty()) {
            (Some(guest), true) => Ok(guest),
            (Some(_), false) => Err(LabError::Request(format!("{name} runs on several hosts"))),
            (None, _) => Err(LabError::Request(format!("{name} runs on no host"))),
        }
    }

    /// Limits what every host sends; `None` takes the limit away.
    pub fn shape(&self, bits_per_second: Option<u64>) -> Result<()> {
        self.each_host(|host| host.shape(bits_per_second))
    }

    /// Pulls the cable of a host out. Connections hang, as they do with a real cable.
    pub fn partition(&self, host: &str) -> Result<()> {
        network::set_cable(&self.switch, self.host(host)?, false)
    }

    /// Puts the cable back.
    pub fn heal(&self, host: &str) -> Result<()> {
        network::set_cable(&self.switch, self.host(host)?, true)
    }

    /// The counters of every host's link, in the hosts' order.
    pub fn link_counters(&self) -> Result<Vec<(String, Counters)>> {
        self.hosts
            .iter()
            .map(|host| Ok((host.name().to_owned(), host.net_counters()?)))
            .collect()
    }

    /// The certificate authority that all hosts trust.
    pub fn authority(&self) -> Result<&Authority> {
        self.authority.as_ref().ok_or_else(|| {
            LabError::Request("only the process that started a lab can issue certificates".into())
        })
    }

    /// Gives a host the right certificates (again).
    pub fn install_certificates(&self, host: &Host) -> Result<()> {
        let authority = self.authority()?;
        let credentials = authority.issue(&CertificateRequest::for_host(host))?;
        pki::install(host, &authority.certificate(), &credentials)
    }

    /// Copies the logs of every host to `dir/HOST/`.
    pub fn dump_logs(&self, dir: &Path) -> Result<()> {
        for host in &self.hosts {
            for (source, below) in [("/var/log", ""), ("/var/log/libvirt/qemu", "qemu")] {
                copy_files(host, source, &dir.join(host.name()).join(below))?;
            }
        }
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.nodes.is_empty() && std::thread::panicking() {
            self.keep_logs();
        }
        // All lifelines are cut before any of the hosts is waited for.
        let ends: Vec<_> = self
            .nodes
            .drain(..)
            .map(|node| std::thread::spawn(move || drop(node)))
            .collect();
        for end in ends {
            // A failed end has said so itself.
            let _ = end.join();
        }
    }
}

impl Lab {
    /// Keeps the logs of a lab whose test failed, in `$VMGANG_LAB_LOGS` or the cache's `logs`.
    fn keep_logs(&self) {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = match std::env::var_os("VMGANG_LAB_LOGS") {
            Some(dir) => PathBuf::from(dir),
            None => match Cache::open() {
                Ok(cache) => cache.dir().join("logs"),
                Err(_) => return,
            },
        };
        let dir = dir.join(format!("{}-{number}", std::process::id()));
        match self.dump_logs(&dir) {
            Ok(()) => progress(&format!("the hosts' logs are in {}", dir.display())),
            Err(error) => progress(&format!("the hosts' logs are lost: {error}")),
        }
    }
}

fn copy_files(host: &Host, source: &str, target: &Path) -> Result<()> {
    fs::create_dir_all(target).doing(|| format!("create {}", target.display()))?;
    // A log that is not there, or not a file, is nothing to copy.
    for name in host.list_dir(source).unwrap_or_default() {
        if let Ok(content) = host.read_file(format!("{source}/{name}")) {
            let target = target.join(&name);
            fs::write(&target, content).doing(|| format!("write {}", target.display()))?;
        }
    }
    Ok(())
}

fn check(options: &LabOptions) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(LabError::Request("the lab needs root".to_owned()));
    }
    if options.hosts.is_empty() || options.hosts.len() > network::HOSTS_MAX {
        return Err(LabError::Request(format!(
            "a lab has 1 to {} hosts",
            network::HOSTS_MAX
        )));
    }
    for (index, name) in options.hosts.iter().enumerate() {
        // An interface is named after the host, which leaves twelve letters.
        let good = (1..=12).contains(&name.len())
            && name
                .bytes()
                .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit());
        if !good || name == SWITCH_NAME || name == "localhost" {
            return Err(LabError::Request(format!(
                "{name:?} cannot name a host; use up to 12 small letters and digits"
            )));
        }
        if options.hosts[..index].contains(name) {
            return Err(LabError::Request(format!("two hosts are named {name}")));
        }
    }
    if let Some(tree) = &options.install_tree {
        check_install_tree(tree)?;
    }
    Ok(())
}

/// On Debian `/bin`, `/lib` and the like are links; a directory of that name would hide one.
fn check_install_tree(tree: &Path) -> Result<()> {
    if !tree.is_dir() {
        return Err(LabError::Request(format!(
            "{} is not a directory; run `make install DESTDIR=` first",
            tree.display()
        )));
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        if tree.join(name).is_dir() {
            return Err(LabError::Request(format!(
                "{} has a directory {name}, which would hide the system's own; install below usr",
                tree.display()
            )));
        }
    }
    Ok(())
}

fn prepare(options: &LabOptions) -> Result<Material> {
    let cache = Cache::open()?;
    let root = options.root.ensure(&cache)?;
    let other_trees = options.other_roots.iter().map(|(host, recipe)| {
        let root = recipe.ensure(&cache)?;
        Ok((host.clone(), root.tree()))
    });
    Ok(Material {
        tree: root.tree(),
        other_trees: other_trees.collect::<Result<_>>()?,
        kernel: root.kernel(),
        initramfs: initramfs::ensure(&cache, &root)?,
        guests: cache.guests(),
        mount_point: cache.mount_point(),
    })
}

fn start_node(
    helper: &Path,
    name: &str,
    material: &Material,
    options: &LabOptions,
    hosts_file: &str,
) -> Result<(NodeProcess, u32)> {
    let mut lower = Vec::new();
    if let Some(tree) = options
        .install_tree
        .as_ref()
        .filter(|_| name != SWITCH_NAME)
    {
        lower.push(
            tree.canonicalize()
                .doing(|| format!("resolve {}", tree.display()))?,
        );
    }
    let tree = material.other_trees.get(name).unwrap_or(&material.tree);
    lower.push(tree.clone());
    NodeProcess::start(
        helper,
        &NodeConfig {
            name: name.to_owned(),
            lower,
            mount_point: material.mount_point.clone(),
            read_only: vec![
                (material.kernel.clone(), KERNEL_PATH.into()),
                (material.initramfs.clone(), INITRAMFS_PATH.into()),
                (material.guests.clone(), GUESTS_PATH.into()),
            ],
            hosts_file: hosts_file.to_owned(),
            machine_id: uuid::Uuid::new_v4().simple().to_string(),
        },
    )
}

fn hosts_file(names: &[String]) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    for (index, name) in names.iter().enumerate() {
        text.push_str(&format!("{} {name}\n", network::address(index)));
    }
    text
}

/// The `lab` program: beside this one, or one directory up when this is a test.
pub(crate) fn helper() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("VMGANG_LAB_BIN") {
        return Ok(PathBuf::from(path));
    }
    let here = std::env::current_exe().doing(|| "find this program".to_owned())?;
    here.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("lab"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            LabError::Request(format!(
                "there is no `lab` program near {}; build it with `cargo build -p vmgang-lab`, \
                 or name it in VMGANG_LAB_BIN",
                here.display()
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(hosts: &[&str]) -> LabOptions {
        LabOptions {
            hosts: hosts.iter().map(|name| (*name).to_owned()).collect(),
            ..LabOptions::default()
        }
    }

    #[test]
    fn refuses_hosts_that_cannot_be() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        for wrong in [
            &[][..],
            &["a", "a"],
            &["A"],
            &["switch"],
            &["a-much-too-long-name"],
            &["a b"],
        ] {
            assert!(check(&options(wrong)).is_err(), "{wrong:?}");
        }
        assert!(check(&options(&["a", "b", "c"])).is_ok());
    }

    #[test]
    fn refuses_an_install_tree_that_hides_system_directories() {
        let tree = tempfile::tempdir().expect("a directory");
        assert!(check_install_tree(tree.path()).is_ok());
        fs::create_dir(tree.path().join("sbin")).expect("a directory");
        assert!(check_install_tree(tree.path()).is_err());
        assert!(check_install_tree(&tree.path().join("missing")).is_err());
    }

    #[test]
    fn hosts_know_each_other_by_name() {
        let text = hosts_file(&["a".to_owned(), "b".to_owned()]);
        assert!(text.contains("10.77.0.1 a\n10.77.0.2 b\n"), "{text}");
    }
}
