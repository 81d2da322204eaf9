//! A directory tree as an initramfs: what the kernel unpacks (cpio, "newc"), written as a stream.
//!
//! Left uncompressed, because unpacking is what is slow under emulation.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cpio::newc::Builder;

/// Writes trees and single files into one archive.
pub(crate) struct Archive<W: Write> {
    out: W,
    /// Numbers by which the kernel recognises two names of one file.
    numbers: HashMap<u64, u32>,
    last_number: u32,
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Archive<W> {
        Archive {
            out,
            numbers: HashMap::new(),
            last_number: 0,
        }
    }

    /// Adds all that is below `tree`, without what is mounted there.
    pub fn add_tree(mut self, tree: &Path) -> io::Result<Archive<W>> {
        let device = fs::metadata(tree)?.dev();
        let mut waiting = vec![tree.to_path_buf()];
        while let Some(directory) = waiting.pop() {
            let mut names = fs::read_dir(&directory)?
                .map(|entry| entry.map(|entry| entry.file_name()))
                .collect::<io::Result<Vec<_>>>()?;
            names.sort();
            for name in names {
                let path = directory.join(name);
                let metadata = fs::symlink_metadata(&path)?;
                let inside = path.strip_prefix(tree).map_err(io::Error::other)?;
                self = self.add_entry(inside.as_os_str(), &path, &metadata)?;
                if metadata.is_dir() && metadata.dev() == device {
                    waiting.push(path);
                }
            }
        }
        Ok(self)
    }

    fn add_entry(mut self, name: &OsStr, path: &Path, found: &Metadata) -> io::Result<Archive<W>> {
        let name = name
            .to_str()
            .ok_or_else(|| io::Error::other(format!("{} is not UTF-8", path.display())))?;
        let known = found.is_file() && self.numbers.contains_key(&found.ino());
        let number = self.number(found);
        let entry = Builder::new(name)
            .ino(number)
            .mode(found.mode())
            .uid(found.uid())
            .gid(found.gid())
            .nlink(if found.is_file() {
                u32::try_from(found.nlink()).map_err(io::Error::other)?
            } else {
                1
            })
            .rdev_major(rustix::fs::major(found.rdev()))
            .rdev_minor(rustix::fs::minor(found.rdev()));
        if found.is_symlink() {
            let target = fs::read_link(path)?;
            return self.add(entry, target.as_os_str().as_bytes());
        }
        if !found.is_file() || known {
            return self.add(entry, &[]);
        }
        let size = u32::try_from(found.len()).map_err(io::Error::other)?;
        let mut writer = entry.write(self.out, size);
        io::copy(&mut File::open(path)?, &mut writer)?;
        self.out = writer.finish()?;
        Ok(self)
    }

    fn number(&mut self, found: &Metadata) -> u32 {
        if let Some(number) = self.numbers.get(&found.ino()) {
            return *number;
        }
        self.last_number += 1;
        if found.is_file() && found.nlink() > 1 {
            self.numbers.insert(found.ino(), self.last_number);
        }
        self.last_number
    }

    fn add(mut self, entry: Builder, content: &[u8]) -> io::Result<Archive<W>> {
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let mut writer = entry.write(self.out, size);
        writer.write_all(content)?;
        self.out = writer.finish()?;
        Ok(self)
    }

    /// Adds a program.
    pub fn add_program(mut self, name: &str, content: &[u8]) -> io::Result<Archive<W>> {
        self.last_number += 1;
        let entry = Builder::new(name)
            .ino(self.last_number)
            .mode(0o100_755)
            .nlink(1);
        self.add(entry, content)
    }

    /// Adds the device that the first process speaks to; it exists before anything is mounted.
    pub fn add_console(mut self) -> io::Result<Archive<W>> {
        self.last_number += 1;
        let entry = Builder::new("dev/console")
            .ino(self.last_number)
            .mode(0o020_600)
            .nlink(1)
            .rdev_major(5)
            .rdev_minor(1);
        self.add(entry, &[])
    }

    /// Ends the archive.
    pub fn finish(self) -> io::Result<W> {
        cpio::newc::trailer(self.out)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_tree_is_written_with_links_and_modes() -> io::Result<()> {
        let tree = tempfile::tempdir()?;
        let at = |name: &str| tree.path().join(name);
        fs::create_dir(at("usr"))?;
        fs::write(at("usr/program"), b"content")?;
        fs::hard_link(at("usr/program"), at("usr/same"))?;
        symlink("usr/program", at("link"))?;
        let archive = Archive::new(Vec::new())
            .add_tree(tree.path())?
            .add_program("init", b"first")?
            .finish()?;

        let mut entries = Vec::new();
        let mut reader = archive.as_slice();
        loop {
            let mut file = cpio::newc::Reader::new(reader)?;
            if file.entry().is_trailer() {
                break;
            }
            let mut content = Vec::new();
            io::copy(&mut file, &mut content)?;
            let entry = file.entry();
            entries.push((
                entry.name().to_owned(),
                entry.mode(),
                (entry.ino(), entry.nlink()),
                content,
            ));
            reader = file.finish()?;
        }
        let entry = |name: &str| {
            entries
                .iter()
                .find(|entry| entry.0 == name)
                .unwrap_or_else(|| panic!("{name} is missing in {entries:?}"))
        };
        assert_eq!(entry("usr").1 & 0o170_000, 0o040_000);
        assert_eq!(entry("link").1 & 0o170_000, 0o120_000);
        assert_eq!(entry("link").3, b"usr/program");
        assert_eq!(
            (entry("init").1, entry("init").3.as_slice()),
            (0o100_755, &b"first"[..])
        );
        // One file with two names: the same number, its content once.
        assert_eq!(entry("usr/program").2, entry("usr/same").2);
        assert_eq!(entry("usr/program").2.1, 2);
        let both = [&entry("usr/program").3[..], &entry("usr/same").3[..]].concat();
        assert_eq!(both, b"content");
        let position = |name: &str| entries.iter().position(|entry| entry.0 == name);
        assert!(position("usr") < position("usr/program"), "{entries:?}");
        Ok(())
    }
}
