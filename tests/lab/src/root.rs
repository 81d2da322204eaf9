//! The Debian root that hosts run from: built once with debootstrap, cached, never changed after.
//!
//! Owns which packages are in it. A different package list is a different root with a name of its
//! own. Nothing is installed on the machine itself: debootstrap is unpacked into the cache, and
//! every mount is made in a namespace that ends with the build.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use crate::cache::{Cache, progress};
use crate::error::{IoContext, LabError, Result, run};
use crate::kernel;
use crate::namespaces;

/// Raise when the steps below change what a root contains.
const RECIPE_VERSION: u32 = 1;

const HOST_PACKAGES: &[&str] = &[
    "libvirt-daemon-system",
    "libvirt-clients",
    "libvirt-daemon-driver-qemu",
    "qemu-system-x86",
    "qemu-utils",
    "seabios",
    "dbus",
    "polkitd",
    "iproute2",
    "nftables",
    // What a distribution's kernel may be packed with.
    "lz4",
    "xz-utils",
    "zstd",
];

/// Which Debian a host runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootRecipe {
    /// The suite, such as `bookworm`.
    pub suite: String,
    /// Take packages from `<suite>-backports` where it has them.
    pub backports: bool,
    /// Packages beside the lab's own.
    pub extra_packages: Vec<String>,
}

impl Default for RootRecipe {
    /// Debian 12 with libvirt and QEMU from its backports.
    fn default() -> RootRecipe {
        RootRecipe {
            suite: "bookworm".to_owned(),
            backports: true,
            extra_packages: Vec::new(),
        }
    }
}

/// A root that exists.
#[derive(Clone, Debug)]
pub struct Root {
    dir: PathBuf,
}

impl Root {
    /// The directory tree of the Debian system.
    pub fn tree(&self) -> PathBuf {
        self.dir.join("tree")
    }

    /// The uncompressed kernel that guests boot.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }
}

impl RootRecipe {
    fn packages(&self) -> Vec<&str> {
        HOST_PACKAGES
            .iter()
            .copied()
            .chain(self.extra_packages.iter().map(String::as_str))
            .collect()
    }

    /// A name that changes with everything that changes the content.
    fn name(&self) -> String {
        let key = format!("{RECIPE_VERSION}\n{self:?}\n{:?}", self.packages());
        let digest = blake3::hash(key.as_bytes()).to_hex();
        let backports = if self.backports { "-backports" } else { "" };
        format!("root-{}{backports}-{}", self.suite, &digest[..12])
    }

    /// Finds the root in the cache, or builds it there.
    pub fn ensure(&self, cache: &Cache) -> Result<Root> {
        let dir = cache.dir().join(self.name());
        if dir.is_dir() {
            return Ok(Root { dir });
        }
        let _lock = cache.lock()?;
        if dir.is_dir() {
            return Ok(Root { dir });
        }
        let started = Instant::now();
        progress(&format!("building {} (once)", dir.display()));
        let partial = cache.dir().join(format!("{}.partial", self.name()));
        if partial.exists() {
            fs::remove_dir_all(&partial).doing(|| format!("remove {}", partial.display()))?;
        }
        fs::create_dir_all(&partial).doing(|| format!("create {}", partial.display()))?;
        in_private_mounts(|| self.build(&partial))?;
        fs::rename(&partial, &dir).doing(|| format!("rename {}", partial.display()))?;
        progress(&format!("built in {} s", started.elapsed().as_secs()));
        Ok(Root { dir })
    }

    fn build(&self, dir: &Path) -> Result<()> {
        let tree = dir.join("tree");
        let mirror = std::env::var("VMGANG_LAB_MIRROR")
            .unwrap_or_else(|_| "http://deb.debian.org/debian".to_owned());

        progress("fetching debootstrap");
        let debootstrap = fetch_debootstrap(dir)?;
        progress(&format!("installing Debian {}", self.suite));
        run(Command::new(debootstrap.join("usr/sbin/debootstrap"))
            .env("DEBOOTSTRAP_DIR", debootstrap.join("usr/share/debootstrap"))
            .arg("--variant=minbase")
            .arg(&self.suite)
            .arg(&tree)
            .arg(&mirror))?;

        self.configure(&tree, &mirror)?;
        mount("proc", tree.join("proc"), "proc", MountFlags::empty(), None)
            .doing(|| "mount proc in the new root".to_owned())?;
        progress("installing libvirt and QEMU");
        run(chroot(&tree).args(["apt-get", "-q", "update"]))?;
        let mut install = chroot(&tree);
        install.args(["apt-get", "-q", "-y", "install", "--no-install-recommends"]);
        if self.backports {
            install.args(["-t", &format!("{}-backports", self.suite)]);
        }
        run(install.args(self.packages()))?;

        progress("unpacking the guests' kernel");
        kernel::fetch(&tree, &dir.join("vmlinux"))?;
        run(chroot(&tree).args(["apt-get", "clean"]))?;
        clean(&tree)?;
        remove_dir(&debootstrap)
    }

    fn configure(&self, tree: &Path, mirror: &str) -> Result<()> {
        let policy = tree.join("usr/sbin/policy-rc.d");
        write(&policy, "#!/bin/sh\nexit 101\n")?;
        fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))
            .doing(|| format!("make {} executable", policy.display()))?;
        write(
            &tree.join("etc/dpkg/dpkg.cfg.d/lab"),
            "force-unsafe-io\n\
             path-exclude=/usr/share/doc/*\n\
             path-exclude=/usr/share/man/*\n\
             path-exclude=/usr/share/locale/*\n",
        )?;
        if self.backports {
            write(
                &tree.join("etc/apt/sources.list.d/backports.list"),
                &format!("deb {mirror} {}-backports main\n", self.suite),
            )?;
        }
        let names = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        write(&tree.join("etc/resolv.conf"), &names)
    }
}

/// Removes what only the build needed.
fn clean(tree: &Path) -> Result<()> {
    remove_dir(&tree.join("var/lib/apt/lists"))?;
    for log in ["var/log/apt", "var/cache/debconf"] {
        remove_dir(&tree.join(log))?;
    }
    // Look-ups must fail at once instead of waiting for a name server that no host can reach.
    write(&tree.join("etc/resolv.conf"), "")
}

/// Unpacks debootstrap from its package, without installing it.
fn fetch_debootstrap(dir: &Path) -> Result<PathBuf> {
    let unpacked = dir.join("debootstrap");
    let packages = dir.join("packages");
    fs::create_dir_all(&packages).doing(|| format!("create {}", packages.display()))?;
    let download = |options: &[String]| {
        run(Command::new("apt-get")
            .current_dir(&packages)
            .args(options)
            .args(["-q", "download", "debootstrap"]))
    };
    if download(&[]).is_err() {
        // A fresh machine has no package lists; these are read into the cache, not into /var.
        let lists = dir.join("lists");
        fs::create_dir_all(lists.join("partial"))
            .doing(|| format!("create {}", lists.display()))?;
        let options = [
            "-o".to_owned(),
            format!("Dir::State::lists={}", lists.display()),
            "-o".to_owned(),
            format!("Dir::Cache={}", packages.display()),
        ];
        run(Command::new("apt-get")
            .args(&options)
            .args(["-q", "update"]))?;
        download(&options)?;
        remove_dir(&lists)?;
    }
    let package = first_with_extension(&packages, "deb")?;
    run(Command::new("dpkg").arg("-x").arg(&package).arg(&unpacked))?;
    remove_dir(&packages)?;
    Ok(unpacked)
}

pub(crate) fn first_with_extension(dir: &Path, extension: &str) -> Result<PathBuf> {
    fs::read_dir(dir)
        .doing(|| format!("read {}", dir.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|found| found == extension))
        .ok_or_else(|| LabError::Broken {
            who: dir.display().to_string(),
            what: format!("no .{extension} file was downloaded"),
        })
}

/// A command inside a tree that is being built.
pub(crate) fn chroot(tree: &Path) -> Command {
    let mut command = Command::new("chroot");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .arg(tree);
    command
}

/// Runs `work` on a thread whose mounts nobody else sees; they end with the thread and with the
/// commands it started, whatever happens.
fn in_private_mounts<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                namespaces::unshare_mounts()
                    .doing(|| "make a mount namespace (the lab needs root)".to_owned())?;
                mount_change(
                    "/",
                    MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
                )
                .doing(|| "make mounts private".to_owned())?;
                work()
            })
            .join()
            .unwrap_or_else(|_| {
                Err(LabError::Broken {
                    who: "the root's builder".to_owned(),
                    what: "panicked".to_owned(),
                })
            })
    })
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).doing(|| format!("write {}", path.display()))
}

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).doing(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_package_list_is_another_root() {
        let default = RootRecipe::default();
        let more = RootRecipe {
            extra_packages: vec!["ovmf".to_owned()],
            ..RootRecipe::default()
        };
        let older = RootRecipe {
            backports: false,
            ..RootRecipe::default()
        };
        assert_eq!(default.name(), RootRecipe::default().name());
        assert_ne!(default.name(), more.name());
        assert_ne!(default.name(), older.name());
        assert!(default.name().starts_with("root-bookworm-backports-"));
    }
}
