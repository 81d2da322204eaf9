//! The file systems a Debian userland expects to find mounted.

use std::fs;

use rustix::mount::{MountFlags, mount};

use crate::workload::Result;

pub fn mount_all() -> Result<()> {
    for (kind, target, options) in [
        ("proc", "/proc", c""),
        ("sysfs", "/sys", c""),
        ("devtmpfs", "/dev", c"mode=0755"),
        ("tmpfs", "/run", c"mode=0755,size=90%"),
        ("tmpfs", "/tmp", c"mode=1777,size=90%"),
        ("tmpfs", "/srv", c"mode=0755,size=90%"),
    ] {
        fs::create_dir_all(target).map_err(|error| format!("cannot create {target}: {error}"))?;
        mount(kind, target, kind, MountFlags::empty(), options)
            .map_err(|error| format!("cannot mount {kind} on {target}: {error}"))?;
    }
    Ok(())
}
