//! The guests' initramfs: the init of `tests/guest`, built as a static binary, in an archive.
//!
//! Left uncompressed, because unpacking is what is slow under emulation.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{Cache, progress, workspace_dir};
use crate::error::{IoContext, LabError, Result, run};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Raise when the archive's layout or the build's options change.
const ARCHIVE_VERSION: u32 = 1;

/// Finds the archive made from the present sources of the init, or builds it.
pub(crate) fn ensure(cache: &Cache) -> Result<PathBuf> {
    let key = sources_key(&workspace_dir().join("tests/guest"))?;
    let path = cache.dir().join(format!("initramfs-{key}.cpio"));
    if path.is_file() {
        return Ok(path);
    }
    let _lock = cache.lock()?;
    if !path.is_file() {
        progress("building the guests' init");
        let init = build_init(cache)?;
        let archive = archive(&init).doing(|| "make the guests' initramfs".to_owned())?;
        let partial = path.with_extension("partial");
        fs::write(&partial, &archive).doing(|| format!("write {}", partial.display()))?;
        fs::rename(&partial, &path).doing(|| format!("rename {}", partial.display()))?;
    }
    Ok(path)
}

/// A name for the content of the guest's crate. Running labs keep the archive they started with.
fn sources_key(package: &Path) -> Result<String> {
    let mut files = vec![package.join("Cargo.toml")];
    let sources = package.join("src");
    for entry in fs::read_dir(&sources).doing(|| format!("read {}", sources.display()))? {
        files.push(
            entry
                .doing(|| format!("read {}", sources.display()))?
                .path(),
        );
    }
    files.sort();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&ARCHIVE_VERSION.to_le_bytes());
    for file in files {
        let content = fs::read(&file).doing(|| format!("read {}", file.display()))?;
        hasher.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        hasher.update(&(content.len() as u64).to_le_bytes());
        hasher.update(&content);
    }
    Ok(hasher.finalize().to_hex()[..12].to_owned())
}

fn build_init(cache: &Cache) -> Result<Vec<u8>> {
    let target_dir = cache.dir().join("guest");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace_dir())
        .args(["rustc", "--quiet", "--release", "--package", "vmgang-guest"])
        .args(["--bin", "vmgang-guest", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .args(["--", "-C", "target-feature=+crt-static"])
        .args(["-C", "strip=symbols"]);
    // Settings meant for the caller's own build would make this one differ.
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET",
        "LLVM_PROFILE_FILE",
    ] {
        command.env_remove(name);
    }
    run(&mut command)?;
    let path: PathBuf = [target_dir.as_path(), Path::new(TARGET)]
        .iter()
        .collect::<PathBuf>()
        .join("release/vmgang-guest");
    let init = fs::read(&path).doing(|| format!("read {}", path.display()))?;
    if has_interpreter(&init) {
        return Err(LabError::Broken {
            who: path.display().to_string(),
            what: "is not static; is the static C library (libc6-dev) installed?".to_owned(),
        });
    }
    Ok(init)
}

/// Whether an ELF file asks for a dynamic loader, by the loader's path in it.
fn has_interpreter(elf: &[u8]) -> bool {
    let needle = b"/lib64/ld-linux-x86-64.so";
    elf.get(..4096)
        .unwrap_or(elf)
        .windows(needle.len())
        .any(|window| window == needle)
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
    fn changed_sources_are_another_archive() {
        let package = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| {
            fs::write(package.path().join(name), text).expect("a file");
        };
        fs::create_dir(package.path().join("src")).expect("a directory");
        write("Cargo.toml", "[package]");
        write("src/main.rs", "fn main() {}");
        let before = sources_key(package.path()).expect("a key");
        assert_eq!(before, sources_key(package.path()).expect("a key"));
        write("src/main.rs", "fn main() { }");
        assert_ne!(before, sources_key(package.path()).expect("a key"));
    }

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
