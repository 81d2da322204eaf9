//! The Debian guests' initramfs: a small Debian with the servers of every role, and the init of
//! `tests/workload`, in one archive for all roles.
//!
//! Owns which packages are in it. Built when the first Debian guest is booted; the packages and
//! the init are kept apart, so that a change of the init takes seconds.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::archive::Archive;
use crate::cache::{Cache, progress};
use crate::debian;
use crate::error::{IoContext, Result};
use crate::init;

/// Where every host sees the archives in [`Cache::guests`].
pub(crate) const GUESTS_PATH: &str = "/usr/lib/vmgang-lab/guests";

/// Raise when the steps below change what is in the archive.
const RECIPE_VERSION: u32 = 1;
const SUITE: &str = "bookworm";
const PACKAGES: &[&str] = &["redis-server", "nginx-light", "sqlite3"];
/// What is there for people, or to install more.
const LEFT_OUT: &[&str] = &[
    "debootstrap",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/log/apt",
];

/// The path on every host of the archive made from the present sources of the init.
pub(crate) fn path_on_host() -> Result<String> {
    Ok(format!("{GUESTS_PATH}/{}", file_name()?))
}

fn file_name() -> Result<String> {
    Ok(format!(
        "debian-{}-{}.cpio",
        packages_key(),
        init::key("workload")?
    ))
}

fn packages_key() -> String {
    let key = format!("{RECIPE_VERSION}\n{SUITE}\n{PACKAGES:?}\n{LEFT_OUT:?}");
    blake3::hash(key.as_bytes()).to_hex()[..12].to_owned()
}

/// Finds the archive in the cache, or builds it there.
pub(crate) fn ensure(cache: &Cache) -> Result<()> {
    let path = cache.guests().join(file_name()?);
    if path.is_file() {
        return Ok(());
    }
    let _lock = cache.lock()?;
    if path.is_file() {
        return Ok(());
    }
    let packages = ensure_packages(cache)?;
    progress("building the Debian guests' init");
    let init = init::build(cache, "vmgang-workload")?;
    whole_file(&path, |file| {
        // The kernel unpacks one archive after the other.
        io::copy(&mut File::open(&packages)?, file)?;
        Archive::new(file)
            .add_console()?
            .add_program("init", &init)?
            .finish()
            .map(drop)
    })
}

/// The archive of everything but the init.
fn ensure_packages(cache: &Cache) -> Result<PathBuf> {
    let path = cache.dir().join(format!("debian-{}.cpio", packages_key()));
    if path.is_file() {
        return Ok(path);
    }
    let started = Instant::now();
    progress(&format!("building {} (once)", path.display()));
    let work = path.with_extension("work");
    debian::remove_dir(&work)?;
    fs::create_dir_all(&work).doing(|| format!("create {}", work.display()))?;
    debian::in_private_mounts(|| {
        let tree = debian::bootstrap(cache, &work, SUITE)?;
        progress(&format!("installing {}", PACKAGES.join(", ")));
        debian::install(&tree, None, PACKAGES)?;
        debian::clean(&tree)?;
        for name in LEFT_OUT {
            debian::remove_dir(&tree.join(name))?;
        }
        whole_file(&path, |file| {
            Archive::new(file).add_tree(&tree)?.finish().map(drop)
        })
    })?;
    debian::remove_dir(&work)?;
    progress(&format!("built in {} s", started.elapsed().as_secs()));
    Ok(path)
}

/// Writes a file that appears under its name when it is complete.
fn whole_file(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<()> {
    let partial = path.with_extension("partial");
    let action = || format!("write {}", partial.display());
    let mut file = BufWriter::new(File::create(&partial).doing(action)?);
    write(&mut file).and_then(|()| file.flush()).doing(action)?;
    fs::rename(&partial, path).doing(|| format!("rename {}", partial.display()))
}
