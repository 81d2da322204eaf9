//! Building a Debian tree below a directory: debootstrap, packages, what is left out.
//!
//! Owns how a tree comes to be; what is in it is the business of `root` and `userland`. Nothing
//! is installed on the machine itself: debootstrap is unpacked where the tree is built, and every
//! mount is made in a namespace that ends with the build.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use crate::cache::{Cache, progress};
use crate::error::{IoContext, LabError, Result, run};
use crate::namespaces;

/// The mirror that packages come from.
pub(crate) fn mirror() -> String {
    std::env::var("VMGANG_LAB_MIRROR").unwrap_or_else(|_| "http://deb.debian.org/debian".to_owned())
}

/// Makes `work/tree` a minimal Debian in which packages can be installed; `work` is a directory
/// of the cache, whose lock the caller holds.
pub(crate) fn bootstrap(cache: &Cache, work: &Path, suite: &str) -> Result<PathBuf> {
    let tree = work.join("tree");
    // Every tree begins with the same packages; installing them takes longest.
    let packed = cache.dir().join(format!("minbase-{suite}.tar"));
    if packed.is_file() {
        progress(&format!("unpacking Debian {suite}"));
        fs::create_dir_all(&tree).doing(|| format!("create {}", tree.display()))?;
        run(&mut tar("--extract", &packed, &tree))?;
    } else {
        debootstrap(work, suite, &tree)?;
        let partial = packed.with_extension("partial");
        run(tar("--create", &partial, &tree).arg("."))?;
        fs::rename(&partial, &packed).doing(|| format!("rename {}", partial.display()))?;
    }
    configure(&tree)?;
    mount("proc", tree.join("proc"), "proc", MountFlags::empty(), None)
        .doing(|| "mount proc in the new tree".to_owned())?;
    Ok(tree)
}

fn debootstrap(work: &Path, suite: &str, tree: &Path) -> Result<()> {
    progress("fetching debootstrap");
    let debootstrap = fetch_debootstrap(work)?;
    progress(&format!("installing Debian {suite}"));
    run(Command::new(debootstrap.join("usr/sbin/debootstrap"))
        .env("DEBOOTSTRAP_DIR", debootstrap.join("usr/share/debootstrap"))
        .arg("--variant=minbase")
        .arg(suite)
        .arg(tree)
        .arg(mirror()))?;
    run(chroot(tree).args(["apt-get", "clean"]))?;
    remove_dir(&debootstrap)
}

/// Owners are kept by number: those of the tree are not those of the machine.
fn tar(action: &str, archive: &Path, tree: &Path) -> Command {
    let mut command = Command::new("tar");
    command
        .args([
            action,
            "--numeric-owner",
            "--preserve-permissions",
            "--file",
        ])
        .arg(archive)
        .arg("--directory")
        .arg(tree);
    command
}

fn configure(tree: &Path) -> Result<()> {
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
    let names = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    write(&tree.join("etc/resolv.conf"), &names)
}

/// Installs packages in a tree, from the release of that name if one is given.
pub(crate) fn install(tree: &Path, release: Option<&str>, packages: &[&str]) -> Result<()> {
    run(chroot(tree).args(["apt-get", "-q", "update"]))?;
    let mut install = chroot(tree);
    install.args(["apt-get", "-q", "-y", "install", "--no-install-recommends"]);
    if let Some(release) = release {
        install.args(["-t", release]);
    }
    run(install.args(packages))?;
    Ok(())
}

/// Removes what only the build needed.
pub(crate) fn clean(tree: &Path) -> Result<()> {
    run(chroot(tree).args(["apt-get", "clean"]))?;
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
pub(crate) fn in_private_mounts<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
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
                    who: "the builder of a Debian tree".to_owned(),
                    what: "panicked".to_owned(),
                })
            })
    })
}

pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).doing(|| format!("write {}", path.display()))
}

pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).doing(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
