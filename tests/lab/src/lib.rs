//! Real libvirt hosts on one machine, for tests, the demo, the benchmark and people.
//!
//! A [`Lab`] has hosts with a Debian root, network, processes and daemons of their own, joined by
//! a switch. [`Host::boot`] starts a guest that checks its own memory for ever; [`Guest::verify`]
//! asks for its word. The machine itself is left as it was: no packages, no interfaces, no mounts,
//! and nothing that outlives the process that owns the lab.
//!
//! The crate must not know what vmgang does: it starts `vmgangd` like any other daemon.

mod archive;
mod cache;
mod cgroup;
mod daemon;
mod debian;
mod emulator;
mod error;
mod files;
mod guest;
mod host;
mod init;
mod initramfs;
mod kernel;
mod lab;
mod memory;
mod namespaces;
mod network;
pub mod node;
pub mod pki;
mod report;
mod role;
mod root;
mod spec;
mod stamps;
pub mod state;
mod userland;

pub use cache::Cache;
pub use cgroup::MemoryGroup;
pub use daemon::Daemon;
pub use error::{LabError, Result};
pub use guest::Guest;
pub use host::{Host, HostChild, HostCommand};
pub use lab::{Lab, LabOptions};
pub use network::{Counters, Loss, parse_rate};
pub use pki::{Authority, CertificateRequest, Credentials};
pub use report::Report;
pub use role::Role;
pub use root::{Root, RootRecipe};
/// Signals for [`HostChild::signal`].
pub use rustix::process::Signal;
pub use spec::GuestSpec;
pub use stamps::{Pause, Stamps};
