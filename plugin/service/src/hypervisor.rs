//! The libvirt side of this host, as the service needs it: a trait, so that everything above it
//! is tested without libvirt, and the real thing.
//!
//! All calls but `migrate`'s future block: use [`ask`], which begins at once, so that several
//! questions can be under way together.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinHandle;
use uuid::Uuid;
use vmgang_libvirt::{
    Balloon, DomainInfo, DomainQemu, Fit, Hardware, Host, JobStats, LibvirtError, ListedDomain,
    Membership, MigrateOptions, Migration, QemuUser, Versions,
};

use crate::error::ServiceError;

/// libvirt's verdict about one migration, when it comes.
pub type Verdict = Pin<Box<dyn Future<Output = Result<(), LibvirtError>> + Send>>;

/// What preflight wants to know of the destination's libvirt.
#[derive(Debug, Clone)]
pub struct DestinationInfo {
    pub host_uuid: Option<Uuid>,
    /// Of libvirt, as it numbers itself: a million for each major, a thousand for each minor version.
    pub libvirt_version: Option<u32>,
    pub domains: Vec<ListedDomain>,
}

/// What the doctor wants to know of the destination's libvirt.
#[derive(Debug, Clone)]
pub struct DestinationFit {
    pub versions: Versions,
    /// Whether it can run each hardware it was asked about.
    pub fits: Vec<Fit>,
}

/// One host's libvirt.
pub trait Hypervisor: Send + Sync + 'static {
    /// No call blocks: questions need no thread to be put. Not of a real libvirt.
    fn answers_at_once(&self) -> bool {
        false
    }
    fn hostname(&self) -> Result<String, LibvirtError>;
    fn host_uuid(&self) -> Result<Uuid, LibvirtError>;
    fn domains(&self) -> Result<Vec<DomainInfo>, LibvirtError>;
    /// The domains whose guests run now.
    fn running(&self) -> Result<Vec<Uuid>, LibvirtError>;
    fn domain(&self, uuid: Uuid) -> Result<DomainInfo, LibvirtError>;
    fn set_membership(
        &self,
        uuid: Uuid,
        membership: Option<&Membership>,
    ) -> Result<(), LibvirtError>;
    /// The user QEMU runs as unless a domain says otherwise.
    fn qemu_user(&self) -> Result<QemuUser, LibvirtError>;
    fn domain_qemu(&self, uuid: Uuid) -> Result<DomainQemu, LibvirtError>;
    /// Whether a migration can be told the rate to reckon with at its switchover.
    fn takes_switchover_rate(&self) -> Result<bool, LibvirtError>;
    /// Whether QEMU here does better with pages on several connections than on its main one.
    fn pages_go_parallel(&self) -> Result<bool, LibvirtError>;
    /// Whether QEMU here can go to post-copy with pages on several connections.
    fn post_copy_goes_parallel(&self) -> Result<bool, LibvirtError>;
    /// Changes the longest downtime of the migration that runs on the domain.
    fn set_max_downtime(&self, uuid: Uuid, milliseconds: u64) -> Result<(), LibvirtError>;
    /// Switches the migration that runs on the domain to post-copy.
    fn start_post_copy(&self, uuid: Uuid) -> Result<(), LibvirtError>;
    /// Suspends a guest that is being migrated; it runs again at the destination.
    fn suspend(&self, uuid: Uuid) -> Result<(), LibvirtError>;
    /// Lets a suspended guest go on.
    fn resume(&self, uuid: Uuid) -> Result<(), LibvirtError>;
    /// The domain's memory balloon; `None` if it has none.
    fn balloon(&self, uuid: Uuid) -> Result<Option<Balloon>, LibvirtError>;
    /// How often its guest is asked what it could do without.
    fn set_balloon_period(&self, uuid: Uuid, seconds: u32) -> Result<(), LibvirtError>;
    /// Asks its guest to make do with so much memory.
    fn set_memory(&self, uuid: Uuid, bytes: u64) -> Result<(), LibvirtError>;
    /// Both of a domain at the destination.
    fn restore_memory(
        &self,
        uri: &str,
        uuid: Uuid,
        bytes: u64,
        period_s: u32,
    ) -> Result<(), LibvirtError>;
    fn running_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError>;
    fn completed_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError>;
    /// Opens the destination's libvirt and looks around.
    fn inspect_destination(&self, uri: &str) -> Result<DestinationInfo, LibvirtError>;
    fn versions(&self) -> Result<Versions, LibvirtError>;
    fn hardware(&self, uuid: Uuid) -> Result<Hardware, LibvirtError>;
    /// Opens the destination's libvirt and asks whether its QEMU can run these.
    fn fit_destination(
        &self,
        uri: &str,
        hardware: &[Hardware],
    ) -> Result<DestinationFit, LibvirtError>;
    /// Starts migrating one domain in a thread of its own.
    fn migrate(
        &self,
        uuid: Uuid,
        name: &str,
        options: MigrateOptions,
    ) -> Result<Verdict, LibvirtError>;
    /// Cancels the migration of one domain, unless libvirt has `answered` for it by then.
    fn abort_job(&self, uuid: Uuid, answered: &AtomicBool) -> Result<(), LibvirtError>;
}

/// Asks the hypervisor without blocking the caller's task. The question is put at once; only its
/// answer waits to be awaited.
pub fn ask<T, Q>(
    hypervisor: &Arc<dyn Hypervisor>,
    question: Q,
) -> impl Future<Output = Result<T, ServiceError>> + Send + use<T, Q>
where
    T: Send + 'static,
    Q: FnOnce(&dyn Hypervisor) -> Result<T, LibvirtError> + Send + 'static,
{
    let hypervisor = hypervisor.clone();
    let asked = match hypervisor.answers_at_once() {
        true => Asked::Answered(question(&*hypervisor)),
        false => Asked::Waiting(tokio::task::spawn_blocking(move || question(&*hypervisor))),
    };
    async move {
        let asked = match asked {
            Asked::Answered(answer) => return Ok(answer?),
            Asked::Waiting(asked) => asked,
        };
        match asked.await {
            Ok(answer) => Ok(answer?),
            Err(error) => Err(ServiceError::Internal(format!(
                "a call to libvirt ended without an answer ({error}); see the log of vmgangd"
            ))),
        }
    }
}

enum Asked<T> {
    Answered(Result<T, LibvirtError>),
    Waiting(JoinHandle<Result<T, LibvirtError>>),
}

/// The libvirt daemon at one URI, connected anew when the connection is lost.
pub struct Libvirt {
    uri: String,
    host: Mutex<Option<Host>>,
}

impl Libvirt {
    pub fn new(uri: &str) -> Libvirt {
        Libvirt {
            uri: uri.to_owned(),
            host: Mutex::new(None),
        }
    }

    fn host(&self) -> Result<Host, LibvirtError> {
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = host.as_ref()
            && open.is_alive()
        {
            return Ok(open.clone());
        }
        let opened = Host::open(&self.uri)?;
        *host = Some(opened.clone());
        Ok(opened)
    }
}

impl Hypervisor for Libvirt {
    fn hostname(&self) -> Result<String, LibvirtError> {
        self.host()?.hostname()
    }

    fn host_uuid(&self) -> Result<Uuid, LibvirtError> {
        self.host()?.uuid()
    }

    fn domains(&self) -> Result<Vec<DomainInfo>, LibvirtError> {
        self.host()?.domains()
    }

    fn running(&self) -> Result<Vec<Uuid>, LibvirtError> {
        self.host()?.running()
    }

    fn domain(&self, uuid: Uuid) -> Result<DomainInfo, LibvirtError> {
        self.host()?.domain_by_uuid(uuid)
    }

    fn set_membership(
        &self,
        uuid: Uuid,
        membership: Option<&Membership>,
    ) -> Result<(), LibvirtError> {
        self.host()?.set_membership(uuid, membership)
    }

    fn qemu_user(&self) -> Result<QemuUser, LibvirtError> {
        self.host()?.qemu_user()
    }

    fn domain_qemu(&self, uuid: Uuid) -> Result<DomainQemu, LibvirtError> {
        self.host()?.domain_qemu(uuid)
    }

    fn takes_switchover_rate(&self) -> Result<bool, LibvirtError> {
        self.host()?.takes_switchover_rate()
    }

    fn pages_go_parallel(&self) -> Result<bool, LibvirtError> {
        self.host()?.pages_go_parallel()
    }

    fn post_copy_goes_parallel(&self) -> Result<bool, LibvirtError> {
        self.host()?.post_copy_goes_parallel()
    }

    fn set_max_downtime(&self, uuid: Uuid, milliseconds: u64) -> Result<(), LibvirtError> {
        self.host()?.set_max_downtime(uuid, milliseconds)
    }

    fn start_post_copy(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.host()?.start_post_copy(uuid)
    }

    fn suspend(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.host()?.suspend(uuid)
    }

    fn resume(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.host()?.resume(uuid)
    }

    fn balloon(&self, uuid: Uuid) -> Result<Option<Balloon>, LibvirtError> {
        self.host()?.balloon(uuid)
    }

    fn set_balloon_period(&self, uuid: Uuid, seconds: u32) -> Result<(), LibvirtError> {
        self.host()?.set_balloon_period(uuid, seconds)
    }

    fn set_memory(&self, uuid: Uuid, bytes: u64) -> Result<(), LibvirtError> {
        self.host()?.set_memory(uuid, bytes)
    }

    fn restore_memory(
        &self,
        uri: &str,
        uuid: Uuid,
        bytes: u64,
        period_s: u32,
    ) -> Result<(), LibvirtError> {
        let host = Host::open(uri)?;
        host.set_memory(uuid, bytes)?;
        host.set_balloon_period(uuid, period_s)
    }

    fn running_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError> {
        self.host()?.running_job(uuid)
    }

    fn completed_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError> {
        self.host()?.completed_job(uuid)
    }

    fn inspect_destination(&self, uri: &str) -> Result<DestinationInfo, LibvirtError> {
        let destination = Host::open(uri)?;
        Ok(DestinationInfo {
            host_uuid: destination.uuid().ok(),
            libvirt_version: destination.libvirt_version().ok(),
            domains: destination.list()?,
        })
    }

    fn versions(&self) -> Result<Versions, LibvirtError> {
        self.host()?.versions()
    }

    fn hardware(&self, uuid: Uuid) -> Result<Hardware, LibvirtError> {
        self.host()?.hardware(uuid)
    }

    fn fit_destination(
        &self,
        uri: &str,
        hardware: &[Hardware],
    ) -> Result<DestinationFit, LibvirtError> {
        let destination = Host::open(uri)?;
        let fits = hardware.iter().map(|hardware| destination.fits(hardware));
        Ok(DestinationFit {
            versions: destination.versions()?,
            fits: fits.collect::<Result<_, _>>()?,
        })
    }

    fn migrate(
        &self,
        uuid: Uuid,
        name: &str,
        options: MigrateOptions,
    ) -> Result<Verdict, LibvirtError> {
        let migration = Migration::start(&self.uri, uuid, name, options)?;
        Ok(Box::pin(migration.wait()))
    }

    fn abort_job(&self, uuid: Uuid, answered: &AtomicBool) -> Result<(), LibvirtError> {
        vmgang_libvirt::abort_job(&self.uri, uuid, answered)
    }
}
