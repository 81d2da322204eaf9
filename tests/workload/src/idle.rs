//! The role idle: no server and no load, only a tree of files that is hashed now and then.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::workload::{Damage, Done, Result, Workload};

/// Files are hashed in pieces of this size.
const PIECE_BYTES: u64 = 64 << 10;

pub struct Idle {
    files: Vec<PathBuf>,
    pieces: Vec<Piece>,
    buffer: Vec<u8>,
}

struct Piece {
    file: usize,
    offset: u64,
    hash: blake3::Hash,
}

impl Idle {
    /// Hashes every file below a directory.
    pub fn start(root: impl AsRef<Path>) -> Result<Idle> {
        let root = root.as_ref();
        let mut idle = Idle {
            files: Vec::new(),
            pieces: Vec::new(),
            buffer: vec![0; PIECE_BYTES as usize],
        };
        idle.collect(root)
            .map_err(|error| format!("cannot read {}: {error}", root.display()))?;
        if idle.pieces.is_empty() {
            return Err(format!("{} holds no files", root.display()));
        }
        Ok(idle)
    }

    fn collect(&mut self, directory: &Path) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.collect(&entry.path())?;
            } else if kind.is_file() {
                let size = entry.metadata()?.len();
                let file = self.files.len();
                self.files.push(entry.path());
                for offset in (0..size).step_by(PIECE_BYTES as usize) {
                    let hash = self.hash(file, offset)?;
                    self.pieces.push(Piece { file, offset, hash });
                }
            }
        }
        Ok(())
    }

    fn hash(&mut self, file: usize, offset: u64) -> io::Result<blake3::Hash> {
        let file = File::open(&self.files[file])?;
        let mut filled = 0;
        while filled < self.buffer.len() {
            match file.read_at(&mut self.buffer[filled..], offset + filled as u64)? {
                0 => break,
                more => filled += more,
            }
        }
        Ok(blake3::hash(&self.buffer[..filled]))
    }
}

impl Workload for Idle {
    fn items(&self) -> usize {
        self.pieces.len()
    }

    fn request(&mut self, random: u64) -> Result<Done> {
        let item = random as usize % self.items();
        // Only a reason to read something; the check is what compares.
        let Piece { file, offset, .. } = self.pieces[item];
        self.hash(file, offset)
            .map_err(|error| format!("cannot read {}: {error}", self.files[file].display()))?;
        Ok(Done::Read)
    }

    fn check(&mut self, first: usize, count: usize) -> Result<Vec<Damage>> {
        let mut damage = Vec::new();
        for item in first..first + count {
            let Piece { file, offset, hash } = self.pieces[item];
            let path = |idle: &Idle| idle.files[file].display().to_string();
            let what = match self.hash(file, offset) {
                Ok(found) if found == hash => continue,
                Ok(_) => format!("file={} piece={offset}", path(self)),
                Err(error) => format!("file={} error={error}", path(self)),
            };
            damage.push(Damage { item, what });
        }
        Ok(damage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_and_a_lost_file_are_found() {
        let root = tempfile::tempdir().expect("a directory");
        let path = |name: &str| root.path().join(name);
        fs::create_dir(path("below")).expect("a directory");
        fs::write(path("below/large"), vec![7; 100_000]).expect("a file");
        fs::write(path("small"), b"hello").expect("a file");
        fs::write(path("empty"), b"").expect("a file");
        let mut idle = Idle::start(root.path()).expect("a tree");
        assert_eq!(idle.items(), 3);
        assert_eq!(idle.check(0, 3), Ok(Vec::new()));

        let mut large = vec![7; 100_000];
        large[70_000] = 8;
        fs::write(path("below/large"), large).expect("a file");
        let damage = idle.check(0, 3).expect("a check");
        assert_eq!(damage.len(), 1);
        assert!(damage[0].what.ends_with("large piece=65536"), "{damage:?}");
        fs::remove_file(path("small")).expect("a file");
        assert_eq!(idle.check(0, 3).expect("a check").len(), 2);
    }
}
