//! The guests' inits: crates of this workspace, built as static binaries.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{Cache, workspace_dir};
use crate::error::{IoContext, LabError, Result, run};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Raise when the build's options or what is made of the program change.
const BUILD_VERSION: u32 = 1;

/// A name for the present sources of a crate in `tests`. Running labs keep the program they
/// started with.
pub(crate) fn key(directory: &str) -> Result<String> {
    sources_key(&workspace_dir().join("tests").join(directory))
}

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
    hasher.update(&BUILD_VERSION.to_le_bytes());
    for file in files {
        let content = fs::read(&file).doing(|| format!("read {}", file.display()))?;
        hasher.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        hasher.update(&(content.len() as u64).to_le_bytes());
        hasher.update(&content);
    }
    Ok(hasher.finalize().to_hex()[..12].to_owned())
}

/// Builds the init and gives its content.
pub(crate) fn build(cache: &Cache, package: &str) -> Result<Vec<u8>> {
    let target_dir = cache.dir().join("guest");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace_dir())
        .args(["rustc", "--quiet", "--release", "--package", package])
        .args(["--bin", package, "--target", TARGET])
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
        .join("release")
        .join(package);
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
}
