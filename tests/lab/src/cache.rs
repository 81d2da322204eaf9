//! The cache directory: where Debian roots and the guest's initramfs are kept between runs.
//!
//! Owns the place and the lock that keeps two labs from building at once; what is built is the
//! business of `root` and `initramfs`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::error::{IoContext, Result};

const GUESTS: &str = "guests";

/// The cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// Held while something in the cache is built; released when dropped, also by a crash.
#[derive(Debug)]
pub(crate) struct BuildLock {
    _file: File,
}

impl Cache {
    /// `$VMGANG_LAB_CACHE`, or `target/lab` of the workspace.
    pub fn open() -> Result<Cache> {
        let dir = std::env::var_os("VMGANG_LAB_CACHE")
            .map_or_else(|| workspace_dir().join("target/lab"), PathBuf::from);
        // The mount point under which every host assembles its root, in a namespace of its own.
        let mount_point = dir.join("node");
        for needed in [&mount_point, &dir.join(GUESTS)] {
            fs::create_dir_all(needed)
                .doing(|| format!("create the lab's cache {}", dir.display()))?;
        }
        let dir = dir
            .canonicalize()
            .doing(|| format!("resolve {}", dir.display()))?;
        Ok(Cache { dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Archives that guests boot from; every host sees this directory.
    pub(crate) fn guests(&self) -> PathBuf {
        self.dir.join(GUESTS)
    }

    pub(crate) fn mount_point(&self) -> PathBuf {
        self.dir.join("node")
    }

    /// Waits until nobody else builds.
    pub(crate) fn lock(&self) -> Result<BuildLock> {
        let path = self.dir.join("lock");
        let file = File::create(&path).doing(|| format!("create {}", path.display()))?;
        flock(&file, FlockOperation::LockExclusive).doing(|| format!("lock {}", path.display()))?;
        Ok(BuildLock { _file: file })
    }
}

/// The workspace this lab was built from; the guest is built from it too.
pub(crate) fn workspace_dir() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors()
        .nth(2)
        .map_or_else(|| here.to_path_buf(), Path::to_path_buf)
}

/// Tells the person who waits what is going on.
pub(crate) fn progress(message: &str) {
    eprintln!("lab: {message}");
}
