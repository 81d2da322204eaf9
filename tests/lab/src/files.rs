//! Reading and writing files of a host from outside, without starting a process there.
//!
//! Paths are resolved inside the host's root, symbolic links included: a link on a host can never
//! lead to a file of the machine.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use crate::error::{IoContext, Result};

/// Opens a file of the host whose process 1 is `pid`.
pub(crate) fn open(host: &str, pid: u32, path: &Path, flags: OFlags, mode: u32) -> Result<File> {
    let show = || format!("open {} on host {host}", path.display());
    let root = rustix::fs::openat(
        CWD,
        format!("/proc/{pid}/root"),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .doing(|| format!("reach the root of host {host}; is it still running?"))?;
    let inside = path.strip_prefix("/").unwrap_or(path);
    let inside = if inside.as_os_str().is_empty() {
        Path::new(".")
    } else {
        inside
    };
    openat2(
        root,
        inside,
        flags | OFlags::CLOEXEC,
        Mode::from_raw_mode(mode),
        ResolveFlags::IN_ROOT,
    )
    .map(File::from)
    .doing(show)
}

pub(crate) fn read(host: &str, pid: u32, path: &Path) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    open(host, pid, path, OFlags::RDONLY, 0)?
        .read_to_end(&mut content)
        .doing(|| format!("read {} on host {host}", path.display()))?;
    Ok(content)
}

pub(crate) fn write(host: &str, pid: u32, path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let mut file = open(
        host,
        pid,
        path,
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC,
        mode,
    )?;
    file.write_all(content)
        .and_then(|()| rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).map_err(Into::into))
        .doing(|| format!("write {} on host {host}", path.display()))
}

/// The names in a directory.
pub(crate) fn list(host: &str, pid: u32, path: &Path) -> Result<Vec<String>> {
    let directory = open(host, pid, path, OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
    let show = || format!("list {} on host {host}", path.display());
    let entries = rustix::fs::Dir::read_from(&directory).doing(show)?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.doing(show)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
