//! Live migration of one domain: its own connection, its own operating system thread.
//!
//! A Perform call holds one of a connection's five request slots to its end, so members must
//! not share a connection, and abort and statistics must use yet another one.

use std::ffi::CStr;
use std::num::NonZeroU8;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tokio::sync::oneshot;
use uuid::Uuid;
use virt_sys as sys;

use crate::error::LibvirtError;
use crate::host::{Host, domain_error};
use crate::raw::{self, MigrateParam};

// Newer than the header this crate may be built with, or not bound as text.
const MIGRATE_URI: &CStr = c"migrate_uri";
const BANDWIDTH_AVAIL_SWITCHOVER: &CStr = c"bandwidth.avail.switchover";
const PARALLEL_CONNECTIONS: &CStr = c"parallel.connections";

/// How one domain is to be migrated, peer to peer and live.
#[derive(Debug, Clone, Default)]
pub struct MigrateOptions {
    /// The destination libvirt, as the *source's* libvirtd reaches it.
    pub destination_uri: String,
    /// `unix://PATH`, the same path on both hosts.
    pub migrate_uri: String,
    /// Make the domain persistent on the destination.
    pub persistent: bool,
    /// Remove a persistent domain's definition from the source.
    pub undefine_source: bool,
    /// Leave the guest paused on the destination.
    pub suspend: bool,
    /// QEMU may slow the guest down until it converges.
    pub auto_converge: bool,
    /// The migration can be switched to post-copy.
    pub post_copy: bool,
    /// It goes on where a broken post-copy has stopped.
    pub post_copy_resume: bool,
    /// So many connections of pages beside the main one.
    pub parallel: Option<NonZeroU8>,
    /// Also where libvirt cannot tell that disks are safe.
    pub unsafe_disks: bool,
    /// The rate QEMU is to reckon with at the switchover, in MiB/s, instead of its own estimate;
    /// see [`Host::takes_switchover_rate`].
    pub switchover_mib_s: Option<u64>,
}

impl MigrateOptions {
    fn flags(&self) -> u32 {
        let mut flags = sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_PEER2PEER;
        if self.persistent {
            flags |= sys::VIR_MIGRATE_PERSIST_DEST;
        }
        if self.undefine_source {
            flags |= sys::VIR_MIGRATE_UNDEFINE_SOURCE;
        }
        if self.suspend {
            flags |= sys::VIR_MIGRATE_PAUSED;
        }
        if self.auto_converge {
            flags |= sys::VIR_MIGRATE_AUTO_CONVERGE;
        }
        if self.post_copy || self.post_copy_resume {
            flags |= sys::VIR_MIGRATE_POSTCOPY;
        }
        if self.post_copy_resume {
            flags |= sys::VIR_MIGRATE_POSTCOPY_RESUME;
        }
        if self.parallel.is_some() {
            flags |= sys::VIR_MIGRATE_PARALLEL;
        }
        if self.unsafe_disks {
            flags |= sys::VIR_MIGRATE_UNSAFE;
        }
        flags
    }
}

/// A migration that runs in a thread of its own.
pub struct Migration {
    domain: String,
    result: oneshot::Receiver<Result<(), LibvirtError>>,
}

impl Migration {
    /// Starts migrating. The thread opens its own connection to the local libvirt at `uri`.
    pub fn start(
        uri: &str,
        domain: Uuid,
        name: &str,
        options: MigrateOptions,
    ) -> Result<Migration, LibvirtError> {
        let (sender, result) = oneshot::channel();
        let uri = uri.to_owned();
        thread::Builder::new()
            .name(thread_name("migrate-", name))
            .spawn(move || {
                // Nobody listening any more means the daemon is ending.
                let _ = sender.send(migrate(&uri, domain, &options));
            })
            .map_err(|error| LibvirtError::Thread {
                domain: name.to_owned(),
                error,
            })?;
        Ok(Migration {
            domain: name.to_owned(),
            result,
        })
    }

    /// Waits for libvirt's verdict. The one call of this crate that does not block.
    pub async fn wait(self) -> Result<(), LibvirtError> {
        match self.result.await {
            Ok(result) => result,
            Err(_) => Err(LibvirtError::ThreadLost {
                domain: self.domain,
            }),
        }
    }
}

/// Cancels the migration of one domain, over a connection of its own.
///
/// Fails while libvirt has not yet begun the job: ask again until the migration has returned.
/// Does nothing once `answered` is set: opening the connection takes a while, and the job that
/// runs on the domain after that answer is somebody else's.
pub fn abort_job(uri: &str, domain: Uuid, answered: &AtomicBool) -> Result<(), LibvirtError> {
    let host = Host::open(uri)?;
    let domain = host.lookup(domain)?;
    if answered.load(Ordering::SeqCst) {
        return Ok(());
    }
    raw::abort_job(&domain).map_err(domain_error(&domain, "abort the migration of"))
}

fn migrate(uri: &str, domain: Uuid, options: &MigrateOptions) -> Result<(), LibvirtError> {
    let destination = raw::c_string("the destination URI", &options.destination_uri)?;
    let migrate_uri = raw::c_string("the migration URI", &options.migrate_uri)?;
    let host = Host::open(uri)?;
    let domain = host.lookup(domain)?;
    let mut params = vec![MigrateParam::Text(MIGRATE_URI, &migrate_uri)];
    if let Some(rate) = options.switchover_mib_s {
        params.push(MigrateParam::Number(BANDWIDTH_AVAIL_SWITCHOVER, rate));
    }
    if let Some(connections) = options.parallel {
        let connections = connections.get().into();
        params.push(MigrateParam::Integer(PARALLEL_CONNECTIONS, connections));
    }
    raw::migrate_to_uri(&domain, &destination, &params, options.flags())
        .map_err(domain_error(&domain, "migrate"))
}

/// Linux keeps 15 bytes of a thread's name; a NUL would be refused.
fn thread_name(prefix: &str, name: &str) -> String {
    let mut text: String = prefix.chars().chain(name.chars()).collect();
    text.retain(|c| c.is_ascii_graphic());
    text.truncate(15);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_libvirt_flags() {
        let mut options = MigrateOptions::default();
        assert_eq!(options.flags(), 0b11);
        options.persistent = true;
        options.undefine_source = true;
        options.suspend = true;
        assert_eq!(options.flags(), 0b111011);
        let options = MigrateOptions {
            auto_converge: true,
            post_copy_resume: true,
            parallel: NonZeroU8::new(2),
            unsafe_disks: true,
            ..MigrateOptions::default()
        };
        let bits = [0, 1, 9, 13, 15, 17, 19];
        let expected = bits.into_iter().fold(0, |flags, bit| flags | 1 << bit);
        assert_eq!(options.flags(), expected);
    }

    #[test]
    fn thread_names_fit_linux() {
        assert_eq!(
            thread_name("migrate-", "a-very-long-name"),
            "migrate-a-very-"
        );
        assert_eq!(thread_name("migrate-", "\u{e9}\0 b"), "migrate-b");
    }
}
