//! What vmgang needs of libvirt, and nothing more: the only crate that names `virt`.
//!
//! Owns the connection, domain listing, gang membership metadata, the QEMU user of a
//! domain or host, their hardware, memory balloons, peer-to-peer migration over a unix socket, abort and job statistics.
//! Must not know gangs as a job, peers, sockets or D-Bus.
//!
//! **Every call here blocks** until libvirtd answers, a migration for as long as it runs.
//! Call from a thread that may wait (tokio: `spawn_blocking`); [`Migration::start`] makes a
//! thread of its own, since a connection serves only five calls at a time.

mod balloon;
mod error;
mod event_loop;
mod hardware;
mod host;
mod job_stats;
mod metadata;
mod migration;
mod qemu_user;
mod raw;

pub use balloon::Balloon;
pub use error::{Failure, LibvirtError};
pub use hardware::{Fit, Hardware, Processor, Versions};
pub use host::{DomainInfo, DomainQemu, DomainState, Host, ListedDomain};
pub use job_stats::JobStats;
pub use metadata::{METADATA_NAMESPACE, Membership, MetadataError};
pub use migration::{MigrateOptions, Migration, abort_job};
pub use qemu_user::{
    DomainQemuUser, QemuUser, QemuUserError, domain_qemu_user, host_qemu_user, host_uuid,
    is_emulated,
};
