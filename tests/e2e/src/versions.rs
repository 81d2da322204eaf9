//! Which versions of libvirt and QEMU the hosts of a test run, chosen by the environment variable
//! `VMGANG_LAB_DEBIAN`, and what tests may expect of them.

use anyhow::{Result, bail};
use vmgang_lab::{LabOptions, RootRecipe};

/// The versions of a lab's hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Versions {
    /// QEMU 10.0 and libvirt 11.3, of Debian 12's backports.
    Backports,
    /// Debian 12's own: QEMU 7.2 and libvirt 9.0.
    Own,
    /// Host a has Debian 12's own, the others have the backports: the way QEMU supports.
    Upgrade,
}

impl Versions {
    /// The backports unless the environment asks for others.
    pub fn asked_for() -> Result<Versions> {
        Ok(match std::env::var("VMGANG_LAB_DEBIAN").as_deref() {
            Err(_) | Ok("" | "backports") => Versions::Backports,
            Ok("own") => Versions::Own,
            Ok("upgrade") => Versions::Upgrade,
            Ok(other) => bail!("VMGANG_LAB_DEBIAN is {other:?}, not backports, own or upgrade"),
        })
    }

    /// A lab of two hosts with them.
    pub fn options(self) -> LabOptions {
        let mut options = LabOptions::default();
        match self {
            Versions::Backports => {}
            Versions::Own => options.root = RootRecipe::without_backports(),
            Versions::Upgrade => {
                let host = options.hosts[0].clone();
                let recipe = RootRecipe::without_backports();
                options.other_roots.insert(host, recipe);
            }
        }
        options
    }

    /// Whether emulated guests on the source are held until all have converged: that takes
    /// libvirt 11.1 and QEMU 8.2.
    pub fn holds_emulated(self) -> bool {
        self == Versions::Backports
    }

    /// Whether what has migrated can go back: QEMU supports only the way to a newer one.
    pub fn goes_back(self) -> bool {
        self != Versions::Upgrade
    }
}
