//! Live migration of one domain: its own connection, its own operating system thread.
//!
//! A Perform call holds one of a connection's five request slots to its end, so members must
//! not share a connection, and abort and statistics must use yet another one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use tokio::sync::oneshot;
use uuid::Uuid;
use virt_sys as sys;

use crate::error::LibvirtError;
use crate::host::{Host, domain_error};
use crate::raw;

/// How one domain is to be migrated, peer to peer and live.
#[derive(Debug, Clone)]
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
    raw::migrate_to_uri(
        &domain,
        &destination,
        &migrate_uri,
        options.switchover_mib_s,
        options.flags(),
    )
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
        let mut options = MigrateOptions {
            destination_uri: "qemu+tls://b/system".into(),
            migrate_uri: "unix:///run/vmgang/x/0.sock".into(),
            persistent: false,
            undefine_source: false,
            suspend: false,
            switchover_mib_s: None,
        };
        assert_eq!(options.flags(), 0b11);
        options.persistent = true;
        options.undefine_source = true;
        options.suspend = true;
        assert_eq!(options.flags(), 0b111011);
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
