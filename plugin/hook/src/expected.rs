//! What the daemon expects to arrive through vmgang, where the hook can see it: an empty file for each
//! domain in `<meeting place>/expected`.
//!
//! The files count only while the daemon lives, which its socket tells: see [`is_expected`]'s caller.
//! Must not: grow. A file goes with the last job that brings its domain, and what a killed daemon
//! left when the next one starts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

fn directory(meeting_place: &Path) -> PathBuf {
    meeting_place.join("expected")
}

/// Whether a file says that this domain is expected. Blocks for nothing.
pub fn is_expected(meeting_place: &Path, uuid: Uuid) -> bool {
    let file = directory(meeting_place).join(uuid.to_string());
    fs::symlink_metadata(file).is_ok_and(|file| file.is_file())
}

/// The daemon's side: who is expected, by which jobs.
#[derive(Debug)]
pub struct Expected {
    directory: PathBuf,
    domains: Mutex<BTreeMap<Uuid, BTreeSet<Uuid>>>,
}

impl Expected {
    /// Makes the directory, for root only, and removes what an earlier daemon left in it. To be called
    /// before the socket is there.
    pub fn open(meeting_place: &Path) -> io::Result<Expected> {
        let directory = directory(meeting_place);
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(meeting_place)?;
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if name
                .to_str()
                .is_some_and(|name| Uuid::try_parse(name).is_ok())
            {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Expected {
            directory,
            domains: Mutex::default(),
        })
    }

    /// A job will bring these domains. On an error none of them is expected that was not before.
    pub fn expect(&self, job: Uuid, domains: &[Uuid]) -> io::Result<()> {
        let mut expected = self.domains();
        for (index, uuid) in domains.iter().enumerate() {
            let jobs = expected.entry(*uuid).or_default();
            let made = match jobs.is_empty() {
                true => File::create(self.file(*uuid)).map(drop),
                false => Ok(()),
            };
            jobs.insert(job);
            if let Err(error) = made {
                for uuid in &domains[..=index] {
                    self.leave(&mut expected, job, *uuid);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// A job is over.
    pub fn forget(&self, job: Uuid) {
        let mut expected = self.domains();
        let brought: Vec<Uuid> = expected
            .iter()
            .filter(|(_, jobs)| jobs.contains(&job))
            .map(|(uuid, _)| *uuid)
            .collect();
        for uuid in brought {
            self.leave(&mut expected, job, uuid);
        }
    }

    fn leave(&self, expected: &mut BTreeMap<Uuid, BTreeSet<Uuid>>, job: Uuid, uuid: Uuid) {
        let Some(jobs) = expected.get_mut(&uuid) else {
            return;
        };
        jobs.remove(&job);
        if jobs.is_empty() {
            expected.remove(&uuid);
            // One that is left lets a domain in that comes by another way, until the next start.
            let _ = fs::remove_file(self.file(uuid));
        }
    }

    fn file(&self, uuid: Uuid) -> PathBuf {
        self.directory.join(uuid.to_string())
    }

    fn domains(&self) -> MutexGuard<'_, BTreeMap<Uuid, BTreeSet<Uuid>>> {
        // Each change is whole even if a thread died around it.
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    #[test]
    fn a_domain_is_expected_as_long_as_a_job_brings_it() {
        let place = tempfile::tempdir().expect("a directory");
        let expected = Expected::open(place.path()).expect("opens");
        let (first, second) = (Uuid::from_u128(11), Uuid::from_u128(12));
        expected.expect(first, &[A, B]).expect("writes");
        expected.expect(second, &[B]).expect("writes");
        let is = |uuid| is_expected(place.path(), uuid);
        assert!(is(A) && is(B) && !is(first));
        expected.forget(first);
        assert!(!is(A) && is(B));
        expected.forget(second);
        expected.forget(second);
        assert!(!is(B));
        assert_eq!(
            fs::read_dir(place.path().join("expected"))
                .expect("there")
                .count(),
            0
        );
    }

    #[test]
    fn what_a_killed_daemon_left_is_removed_and_nothing_else() {
        let place = tempfile::tempdir().expect("a directory");
        let left = Expected::open(place.path()).expect("opens");
        left.expect(Uuid::from_u128(11), &[A]).expect("writes");
        drop(left);
        assert!(is_expected(place.path(), A));
        fs::write(place.path().join("expected/not-ours"), "").expect("writes");
        Expected::open(place.path()).expect("opens");
        assert!(!is_expected(place.path(), A));
        assert!(place.path().join("expected/not-ours").exists());
    }

    #[test]
    fn an_error_leaves_nothing() {
        let place = tempfile::tempdir().expect("a directory");
        let expected = Expected::open(place.path()).expect("opens");
        // Something else is in the place of the second.
        fs::create_dir(place.path().join("expected").join(B.to_string())).expect("makes");
        expected
            .expect(Uuid::from_u128(11), &[A, B])
            .expect_err("cannot");
        assert!(!is_expected(place.path(), A) && !is_expected(place.path(), B));
    }
}
