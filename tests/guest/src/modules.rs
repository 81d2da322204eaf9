//! Loads the kernel's modules that the initramfs holds, in the order of their names.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

const DIRECTORY: &str = "/modules";

/// Loads all of them, once.
pub fn load() -> io::Result<()> {
    let mut files: Vec<_> = fs::read_dir(DIRECTORY)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<io::Result<_>>()?;
    files.sort();
    for path in files {
        let file = File::open(path)?;
        // SAFETY: the descriptor is open for the whole call, and the text of no parameters is a
        // constant.
        let status =
            unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if status != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
