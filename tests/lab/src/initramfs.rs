//! The guests' initramfs: the init of `tests/guest`, alone in an archive.
//!
//! Left uncompressed, because unpacking is what is slow under emulation.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use crate::cache::{Cache, progress};
use crate::error::{IoContext, Result};
use crate::init;

/// Finds the archive made from the present sources of the init, or builds it.
pub(crate) fn ensure(cache: &Cache) -> Result<PathBuf> {
    let path = cache
        .dir()
        .join(format!("initramfs-{}.cpio", init::key("guest")?));
    if path.is_file() {
        return Ok(path);
    }
    let _lock = cache.lock()?;
    if !path.is_file() {
        progress("building the guests' init");
        let init = init::build(cache, "vmgang-guest")?;
        let archive = archive(&init).doing(|| "make the guests' initramfs".to_owned())?;
        let partial = path.with_extension("partial");
        fs::write(&partial, &archive).doing(|| format!("write {}", partial.display()))?;
        fs::rename(&partial, &path).doing(|| format!("rename {}", partial.display()))?;
    }
    Ok(path)
}

fn archive(init: &[u8]) -> io::Result<Vec<u8>> {
    const DIRECTORY: u32 = 0o040_755;
    const CHARACTER_DEVICE: u32 = 0o020_600;
    const PROGRAM: u32 = 0o100_755;
    let entry = |name: &str, mode: u32| cpio::newc::Builder::new(name).mode(mode).nlink(1);
    let mut out = Vec::with_capacity(init.len() + 4096);
    for name in ["dev", "proc"] {
        out = entry(name, DIRECTORY).write(out, 0).finish()?;
    }
    out = entry("dev/console", CHARACTER_DEVICE)
        .rdev_major(5)
        .rdev_minor(1)
        .write(out, 0)
        .finish()?;
    let size = u32::try_from(init.len()).map_err(io::Error::other)?;
    let mut writer = entry("init", PROGRAM).write(out, size);
    writer.write_all(init)?;
    cpio::newc::trailer(writer.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_holds_an_executable_init_and_a_console() {
        let archive = archive(b"the init").expect("an archive");
        let mut names = Vec::new();
        let mut reader = archive.as_slice();
        loop {
            let file = cpio::newc::Reader::new(reader).expect("a readable archive");
            if file.entry().is_trailer() {
                break;
            }
            names.push((file.entry().name().to_owned(), file.entry().mode()));
            reader = file.finish().expect("the next entry");
        }
        assert!(names.contains(&("init".to_owned(), 0o100_755)), "{names:?}");
        assert!(names.contains(&("dev/console".to_owned(), 0o020_600)));
    }
}
