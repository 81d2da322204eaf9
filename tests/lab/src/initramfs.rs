//! The guests' initramfs: the init of `tests/guest`, and the kernel's modules it may load.
//!
//! Left uncompressed, because unpacking is what is slow under emulation.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use crate::cache::{Cache, progress};
use crate::error::{IoContext, Result};
use crate::init;
use crate::kernel::MODULES;
use crate::root::Root;

/// Finds the archive made from the present sources of the init, and the root's modules, or builds it.
pub(crate) fn ensure(cache: &Cache, root: &Root) -> Result<PathBuf> {
    let modules = modules(root)?;
    let path = cache.dir().join(format!(
        "initramfs-{}-{}.cpio",
        init::key("guest")?,
        key(&modules)
    ));
    if path.is_file() {
        return Ok(path);
    }
    let _lock = cache.lock()?;
    if !path.is_file() {
        progress("building the guests' init");
        let init = init::build(cache, "vmgang-guest")?;
        let archive = archive(&init, &modules).doing(|| "make the guests' initramfs".to_owned())?;
        let partial = path.with_extension("partial");
        fs::write(&partial, &archive).doing(|| format!("write {}", partial.display()))?;
        fs::rename(&partial, &path).doing(|| format!("rename {}", partial.display()))?;
    }
    Ok(path)
}

/// A module's name and content.
type Module = (&'static str, Vec<u8>);

fn modules(root: &Root) -> Result<Vec<Module>> {
    MODULES
        .iter()
        .map(|name| {
            let file = root.modules().join(format!("{name}.ko"));
            let content = fs::read(&file).doing(|| format!("read {}", file.display()))?;
            Ok((*name, content))
        })
        .collect()
}

/// A module goes with one build of the kernel only.
fn key(modules: &[Module]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (_, content) in modules {
        hasher.update(content);
    }
    hasher.finalize().to_hex()[..12].to_owned()
}

fn archive(init: &[u8], modules: &[Module]) -> io::Result<Vec<u8>> {
    const DIRECTORY: u32 = 0o040_755;
    const CHARACTER_DEVICE: u32 = 0o020_600;
    const PROGRAM: u32 = 0o100_755;
    const FILE: u32 = 0o100_644;
    let entry = |name: &str, mode: u32| cpio::newc::Builder::new(name).mode(mode).nlink(1);
    let mut out = Vec::with_capacity(init.len() + 4096);
    for name in ["dev", "proc", "modules"] {
        out = entry(name, DIRECTORY).write(out, 0).finish()?;
    }
    out = entry("dev/console", CHARACTER_DEVICE)
        .rdev_major(5)
        .rdev_minor(1)
        .write(out, 0)
        .finish()?;
    // Their names are their order.
    for (number, (name, content)) in modules.iter().enumerate() {
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let mut writer = entry(&format!("modules/{number}-{name}.ko"), FILE).write(out, size);
        writer.write_all(content)?;
        out = writer.finish()?;
    }
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
        let module = ("virtio", b"a module".to_vec());
        let archive = archive(b"the init", &[module]).expect("an archive");
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
        assert!(names.contains(&("modules/0-virtio.ko".to_owned(), 0o100_644)));
    }
}
