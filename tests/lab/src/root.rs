//! The Debian root that hosts run from: built once with debootstrap, cached, never changed after.
//!
//! Owns which packages are in it. A different package list is a different root with a name of its
//! own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::cache::{Cache, progress};
use crate::debian;
use crate::error::{IoContext, Result};
use crate::kernel;

/// Raise when the steps below change what a root contains.
const RECIPE_VERSION: u32 = 2;

const MODULES: &str = "modules";

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

impl RootRecipe {
    /// Debian 12 with its own libvirt and QEMU.
    pub fn without_backports() -> RootRecipe {
        RootRecipe {
            backports: false,
            ..RootRecipe::default()
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

    /// The directory of the modules that go with it.
    pub(crate) fn modules(&self) -> PathBuf {
        self.dir.join(MODULES)
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
        debian::in_private_mounts(|| self.build(cache, &partial))?;
        fs::rename(&partial, &dir).doing(|| format!("rename {}", partial.display()))?;
        progress(&format!("built in {} s", started.elapsed().as_secs()));
        Ok(Root { dir })
    }

    fn build(&self, cache: &Cache, dir: &Path) -> Result<()> {
        let tree = debian::bootstrap(cache, dir, &self.suite)?;
        let backports = self.backports.then(|| format!("{}-backports", self.suite));
        if let Some(backports) = &backports {
            debian::write(
                &tree.join("etc/apt/sources.list.d/backports.list"),
                &format!("deb {} {backports} main\n", debian::mirror()),
            )?;
        }
        progress("installing libvirt and QEMU");
        debian::install(&tree, backports.as_deref(), &self.packages())?;
        progress("unpacking the guests' kernel");
        kernel::fetch(&tree, &dir.join("vmlinux"), &dir.join(MODULES))?;
        debian::clean(&tree)
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
