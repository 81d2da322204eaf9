//! The guests' kernel: fetched as a Debian package and unpacked to the plain ELF image, with the few
//! modules that guests load.
//!
//! QEMU starts an uncompressed kernel directly (PVH), which saves the firmware's and the
//! decompressor's work: the larger part of a boot under emulation.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;

use crate::debian::{chroot, first_with_extension};
use crate::error::{IoContext, LabError, Result, run};

/// What a memory balloon takes, in the order in which it is loaded.
pub(crate) const MODULES: [&str; 6] = [
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_balloon",
];

/// Downloads Debian's cloud kernel with the tree's own apt and writes its ELF image to `target`, and
/// [`MODULES`] to the directory `modules`.
pub(crate) fn fetch(tree: &Path, target: &Path, modules: &Path) -> Result<()> {
    let depends = run(chroot(tree).args(["apt-cache", "depends", "linux-image-cloud-amd64"]))?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .ok_or_else(|| broken("linux-image-cloud-amd64 depends on no kernel package"))?;
    let work = tree.join("kernel");
    fs::create_dir_all(&work).doing(|| format!("create {}", work.display()))?;
    run(chroot(tree)
        .args(["sh", "-c", "cd /kernel && exec apt-get -q download \"$0\""])
        .arg(package))?;
    let package = first_with_extension(&work, "deb")?;
    let package_name = package.file_name().unwrap_or_default();
    run(chroot(tree)
        .args(["dpkg", "-x"])
        .arg(Path::new("/kernel").join(package_name))
        .arg("/kernel"))?;
    let image = fs::read_dir(work.join("boot"))
        .doing(|| format!("read {}", work.display()))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
        })
        .ok_or_else(|| broken("the kernel package has no boot/vmlinuz"))?;
    let image = fs::read(&image).doing(|| format!("read {}", image.display()))?;
    unpack(tree, &work, &Payload::find(&image)?, target)?;
    copy_modules(&work, modules)?;
    fs::remove_dir_all(&work).doing(|| format!("remove {}", work.display()))
}

fn copy_modules(package: &Path, to: &Path) -> Result<()> {
    let versions = package.join("lib/modules");
    let version = fs::read_dir(&versions)
        .doing(|| format!("read {}", versions.display()))?
        .find_map(|entry| entry.ok().map(|entry| entry.path()))
        .ok_or_else(|| broken("the kernel package has no modules"))?;
    fs::create_dir_all(to).doing(|| format!("create {}", to.display()))?;
    for module in MODULES {
        let file = version.join(format!("kernel/drivers/virtio/{module}.ko"));
        fs::copy(&file, to.join(format!("{module}.ko")))
            .doing(|| format!("copy {}", file.display()))?;
    }
    Ok(())
}

/// The compressed ELF image inside a bzImage.
#[derive(Debug, PartialEq)]
struct Payload<'a> {
    compressed: &'a [u8],
    unpacked_bytes: u32,
    unpacker: &'static [&'static str],
}

impl<'a> Payload<'a> {
    /// Offsets as in the kernel's Documentation/arch/x86/boot.rst.
    fn find(image: &'a [u8]) -> Result<Payload<'a>> {
        if image.get(0x202..0x206) != Some(b"HdrS") {
            return Err(broken("vmlinuz is not a bzImage"));
        }
        let word = |at: usize| {
            image
                .get(at..at + 4)
                .and_then(|bytes| bytes.try_into().ok())
                .map(u32::from_le_bytes)
                .ok_or_else(|| broken("vmlinuz is too short"))
        };
        let setup_sectors = match image.get(0x1f1).copied().unwrap_or(0) {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let start = (setup_sectors + 1) * 512 + word(0x248)? as usize;
        let length = word(0x24c)? as usize;
        let payload = start
            .checked_add(length)
            .and_then(|end| image.get(start..end))
            .ok_or_else(|| broken("vmlinuz ends before its payload"))?;
        // The build appends the unpacked size to every format but gzip.
        let (compressed, size) = payload
            .split_last_chunk::<4>()
            .ok_or_else(|| broken("vmlinuz has an empty payload"))?;
        let unpacker: &[&str] = match compressed {
            [0x02, 0x21, 0x4c, 0x18, ..] => &["lz4", "-dc"],
            [0xfd, b'7', b'z', b'X', b'Z', ..] => &["xz", "--single-stream", "-dc"],
            [0x28, 0xb5, 0x2f, 0xfd, ..] => &["zstd", "-dc"],
            _ => return Err(broken("vmlinuz is packed in a way the lab does not know")),
        };
        Ok(Payload {
            compressed,
            unpacked_bytes: u32::from_le_bytes(*size),
            unpacker,
        })
    }
}

fn unpack(tree: &Path, work: &Path, payload: &Payload<'_>, target: &Path) -> Result<()> {
    let packed = work.join("payload");
    fs::write(&packed, payload.compressed).doing(|| format!("write {}", packed.display()))?;
    let input = File::open(&packed).doing(|| format!("open {}", packed.display()))?;
    let output = File::create(target).doing(|| format!("create {}", target.display()))?;
    let status = chroot(tree)
        .args(payload.unpacker)
        .stdin(input)
        .stdout(output)
        .stderr(Stdio::null())
        .status()
        .doing(|| format!("start {}", payload.unpacker.join(" ")))?;
    let written = fs::metadata(target)
        .doing(|| format!("read {}", target.display()))?
        .len();
    if !status.success() || written != u64::from(payload.unpacked_bytes) {
        return Err(broken(&format!(
            "{} ended with {status} after {written} of {} bytes",
            payload.unpacker.join(" "),
            payload.unpacked_bytes
        )));
    }
    Ok(())
}

fn broken(what: &str) -> LabError {
    LabError::Broken {
        who: "the guests' kernel".to_owned(),
        what: what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn finds_the_payload_and_its_size() {
        let image = image(b"\x02\x21\x4c\x18data\x00\x10\x00\x00");
        let payload = Payload::find(&image).expect("a small bzImage");
        assert_eq!(payload.compressed, b"\x02\x21\x4c\x18data");
        assert_eq!((payload.unpacked_bytes, payload.unpacker[0]), (4096, "lz4"));
    }

    #[test]
    fn refuses_what_is_cut_or_unknown() {
        let good = image(b"\x02\x21\x4c\x18data\x00\x10\x00\x00");
        for end in [0, 0x203, 0x24a, 1030, good.len() - 1] {
            assert!(Payload::find(&good[..end]).is_err(), "cut at {end}");
        }
        assert!(Payload::find(&image(b"gzip it is not")).is_err());
    }
}
