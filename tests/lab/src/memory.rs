//! A guest's memory as the QEMU that runs it holds it, for those who look at it from outside.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{IoContext, LabError, Result};
use crate::host::Host;

/// Opens the shared memory of a guest, to read or to damage it.
pub(crate) fn open(host: &Host, guest: &str) -> Result<File> {
    let process = find_qemu(host, guest)?;
    let descriptors = process.join("fd");
    for entry in fs::read_dir(&descriptors).doing(|| format!("read {}", descriptors.display()))? {
        let path = entry
            .doing(|| format!("read {}", descriptors.display()))?
            .path();
        let target = fs::read_link(&path).unwrap_or_default();
        if target
            .to_string_lossy()
            .starts_with("/memfd:memory-backend")
        {
            return File::options()
                .read(true)
                .write(true)
                .open(&path)
                .doing(|| format!("open the memory of guest {guest}"));
        }
    }
    Err(broken(host, guest, "its memory is not shared"))
}

/// The QEMU that runs a guest on this host; another host may run one of the same name.
fn find_qemu(host: &Host, guest: &str) -> Result<PathBuf> {
    let network = |process: &Path| fs::read_link(process.join("ns/net")).ok();
    let wanted = network(&PathBuf::from(format!("/proc/{}", host.pid())));
    let named = format!("guest={guest},");
    let processes = fs::read_dir("/proc").doing(|| "list the processes".to_owned())?;
    for entry in processes {
        let path = entry.doing(|| "list the processes".to_owned())?.path();
        // A process may end between being listed and being read.
        let Ok(arguments) = fs::read(path.join("cmdline")) else {
            continue;
        };
        let is_named = arguments
            .split(|byte| *byte == 0)
            .any(|argument| argument.starts_with(named.as_bytes()));
        if is_named && network(&path) == wanted {
            return Ok(path);
        }
    }
    Err(broken(host, guest, "does not run"))
}

fn broken(host: &Host, guest: &str, what: &str) -> LabError {
    LabError::Broken {
        who: format!("guest {guest} on host {}", host.name()),
        what: what.to_owned(),
    }
}
