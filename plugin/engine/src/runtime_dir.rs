//! The directories where a member's migration sockets live, the same path on both hosts:
//! `<runtime_dir>/migrate/<job>/<member>/stream.sock`.
//!
//! Owns: making them for exactly one user, and leaving nothing behind.
//! Must not: follow names that came from elsewhere; job and member are rendered here.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::SocketOwner;

const MIGRATE: &str = "migrate";
const SOCKET: &str = "stream.sock";

/// A unix socket path is at most 107 bytes and its terminator.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Who makes the sockets in a job's directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// This daemon; QEMU's user may only pass through.
    Source,
    /// QEMU; the directory is its user's.
    Destination,
}

/// The directories of one job; removed on drop.
#[derive(Debug)]
pub(crate) struct JobDir {
    path: PathBuf,
}

impl JobDir {
    /// Makes the job's directory and one below it for each member, that member's QEMU user
    /// being the only one (besides root) that can enter it.
    pub(crate) fn create(
        runtime_dir: &Path,
        job: Uuid,
        owners: &[SocketOwner],
        side: Side,
    ) -> io::Result<Self> {
        let path = runtime_dir.join(MIGRATE).join(job.simple().to_string());
        let longest = path
            .join(owners.len().to_string())
            .join(SOCKET)
            .as_os_str()
            .len();
        if longest > SOCKET_PATH_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "socket paths below {} would be {longest} bytes long, {SOCKET_PATH_BYTES_MAX} \
                     are possible; set a shorter runtime_dir",
                    path.display()
                ),
            ));
        }
        // QEMU's user has to walk through; there is nothing to list for it.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(runtime_dir.join(MIGRATE))?;
        fs::set_permissions(runtime_dir.join(MIGRATE), fs::Permissions::from_mode(0o711))?;
        fs::DirBuilder::new().mode(0o711).create(&path)?;
        let dir = Self { path };
        for (member, owner) in owners.iter().enumerate() {
            let member_dir = dir.member(member);
            let (mode, uid) = match side {
                Side::Source => (0o710, None),
                Side::Destination => (0o700, Some(owner.uid)),
            };
            fs::DirBuilder::new().mode(mode).create(&member_dir)?;
            std::os::unix::fs::chown(&member_dir, uid, Some(owner.gid))?;
        }
        Ok(dir)
    }

    fn member(&self, member: usize) -> PathBuf {
        self.path.join(member.to_string())
    }

    /// Where a member's QEMU (or libvirtd for it) connects to or listens.
    pub(crate) fn socket(&self, member: usize) -> PathBuf {
        self.member(member).join(SOCKET)
    }
}

impl Drop for JobDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "could not remove job directory");
        }
    }
}

/// Where the members of a session have their sockets on this host.
#[derive(Debug)]
pub(crate) enum Sockets {
    /// Below a directory that is the session's.
    OfJob(JobDir),
    /// Where somebody else has made room for them.
    Elsewhere(Vec<PathBuf>),
}

impl Sockets {
    /// Where a member's QEMU (or libvirtd for it) connects to or listens.
    pub(crate) fn socket(&self, member: usize) -> PathBuf {
        match self {
            Sockets::OfJob(directory) => directory.socket(member),
            Sockets::Elsewhere(paths) => paths[member].clone(),
        }
    }
}

/// Removes what a killed daemon left; to be called before any session exists. Returns how
/// many jobs' directories there were.
pub fn sweep_runtime_dir(runtime_dir: &Path) -> io::Result<usize> {
    let entries = match fs::read_dir(runtime_dir.join(MIGRATE)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut swept = 0;
    for entry in entries {
        let entry = entry?;
        let is_job = entry
            .file_name()
            .to_str()
            .is_some_and(|name| Uuid::try_parse(name).is_ok());
        if is_job && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
            swept += 1;
        }
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_leaves_nothing_and_a_killed_one_is_swept() {
        let runtime = tempfile::tempdir().unwrap();
        let me = fs::metadata(runtime.path()).unwrap();
        use std::os::unix::fs::MetadataExt;
        let owner = SocketOwner {
            uid: me.uid(),
            gid: me.gid(),
        };
        let dir = JobDir::create(
            runtime.path(),
            Uuid::from_u128(1),
            &[owner, owner],
            Side::Destination,
        )
        .unwrap();
        let mode = fs::metadata(dir.member(1)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let path = dir.path.clone();
        drop(dir);
        assert!(!path.exists());

        let dir =
            JobDir::create(runtime.path(), Uuid::from_u128(2), &[owner], Side::Source).unwrap();
        let mode = fs::metadata(dir.member(0)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o710);
        let path = dir.path.clone();
        std::mem::forget(dir);
        fs::write(runtime.path().join(MIGRATE).join("not-ours"), b"").unwrap();
        assert_eq!(sweep_runtime_dir(runtime.path()).unwrap(), 1);
        assert!(!path.exists());
        assert!(runtime.path().join(MIGRATE).join("not-ours").exists());
    }

    #[test]
    fn a_runtime_dir_too_deep_for_sockets_is_refused_with_the_reason() {
        let runtime = tempfile::tempdir().unwrap();
        let deep = runtime.path().join("d".repeat(60));
        let error = JobDir::create(&deep, Uuid::from_u128(1), &[], Side::Source).unwrap_err();
        assert!(error.to_string().contains("runtime_dir"), "{error}");
        assert!(!deep.exists());
    }
}
