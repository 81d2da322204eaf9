//! One connection to a libvirt daemon: domains, their gang membership, job control.
//! All calls block. Must not migrate: see `migration.rs`, which uses a connection a member.

use std::sync::{Arc, OnceLock};

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::{Domain, DomainState as VirtState};
use virt_sys as sys;

use crate::error::LibvirtError;
use crate::event_loop;
use crate::job_stats::JobStats;
use crate::metadata::{METADATA_NAMESPACE, METADATA_PREFIX, Membership, MetadataError};
use crate::qemu_user::{self, DomainQemuUser, QemuUser};
use crate::raw;

/// Seconds between keepalive messages, and how many may stay unanswered.
const KEEPALIVE_INTERVAL_S: i32 = 5;
const KEEPALIVE_COUNT: u32 = 5;

/// The first libvirt and QEMU that let the caller say how fast the link is at the switchover.
const SWITCHOVER_RATE_LIBVIRT: u32 = 11_001_000;
const SWITCHOVER_RATE_QEMU: u32 = 8_002_000;
/// The first QEMU whose multifd leaves out zero pages by itself, so that the destination need not touch
/// each of them.
const PARALLEL_QEMU: u32 = 9_000_000;
/// The first QEMU whose post-copy goes with multifd.
const POST_COPY_PARALLEL_QEMU: u32 = 10_001_000;

/// Whether a domain's guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    Running,
    Paused,
    ShuttingDown,
    ShutOff,
    Crashed,
    Unknown,
}

impl DomainState {
    /// virsh's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            DomainState::Running => "running",
            DomainState::Paused => "paused",
            DomainState::ShuttingDown => "in shutdown",
            DomainState::ShutOff => "shut off",
            DomainState::Crashed => "crashed",
            DomainState::Unknown => "unknown",
        }
    }
}

/// A domain as libvirt sees it at one moment.
#[derive(Debug, Clone)]
pub struct DomainInfo {
    pub name: String,
    pub uuid: Uuid,
    /// libvirt's id; only an active domain has one.
    pub id: Option<u32>,
    pub state: DomainState,
    pub persistent: bool,
    /// The most memory the guest can have.
    pub memory_bytes: u64,
    /// Its gang, or what is wrong with its metadata.
    pub membership: Result<Option<Membership>, MetadataError>,
}

impl DomainInfo {
    /// Has a QEMU process, and so can be migrated live.
    pub fn active(&self) -> bool {
        self.id.is_some()
    }
}

/// A domain as libvirt's list has it: without a question about each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedDomain {
    pub name: String,
    pub uuid: Uuid,
    /// Has a QEMU process.
    pub active: bool,
}

/// How the QEMU of a running domain runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DomainQemu {
    pub user: DomainQemuUser,
    /// It emulates the processor in software.
    pub emulated: bool,
}

/// A connection to one libvirt daemon.
#[derive(Clone)]
pub struct Host {
    uri: String,
    pub(crate) connect: Connect,
    /// Asked once a connection: to tell them libvirt looks at every QEMU there is, and starts
    /// each that it does not know yet, which takes a second or two. Only what libvirtd reads when
    /// it starts and never again may be taken from here.
    capabilities: Arc<OnceLock<String>>,
}

impl Host {
    /// Opens a connection with keepalive set.
    pub fn open(uri: &str) -> Result<Host, LibvirtError> {
        event_loop::ensure_running();
        raw::c_string("a libvirt URI", uri)?;
        let connect = Connect::open(Some(uri)).map_err(|error| LibvirtError::Connect {
            uri: uri.to_owned(),
            failure: error.into(),
        })?;
        // Local test drivers have none; a daemon that cannot is not worth failing for.
        if let Err(error) = connect.set_keep_alive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT) {
            tracing::debug!(uri, %error, "no keepalive on this connection");
        }
        Ok(Host {
            uri: uri.to_owned(),
            connect,
            capabilities: Arc::default(),
        })
    }

    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// False once libvirtd has gone: open a new connection then.
    pub fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    pub fn hostname(&self) -> Result<String, LibvirtError> {
        self.connect
            .hostname()
            .map_err(host_error("read the host name"))
    }

    /// The user QEMU runs as when a domain has no label of its own.
    pub fn qemu_user(&self) -> Result<QemuUser, LibvirtError> {
        Ok(qemu_user::host_qemu_user(self.capabilities()?)?)
    }

    /// The UUID by which libvirt refuses to migrate a domain to its own host.
    pub fn uuid(&self) -> Result<Uuid, LibvirtError> {
        Ok(qemu_user::host_uuid(self.capabilities()?)?)
    }

    fn capabilities(&self) -> Result<&str, LibvirtError> {
        if let Some(known) = self.capabilities.get() {
            return Ok(known);
        }
        let told = self
            .connect
            .capabilities()
            .map_err(host_error("read libvirt's capabilities"))?;
        Ok(self.capabilities.get_or_init(|| told))
    }

    /// All domains, running or not, in one question.
    pub fn list(&self) -> Result<Vec<ListedDomain>, LibvirtError> {
        let listed = self.listed(0)?;
        listed
            .iter()
            .map(|domain| {
                Ok(ListedDomain {
                    name: domain.name().map_err(domain_error(domain, "name"))?,
                    uuid: uuid_of(domain)?,
                    active: domain.id().is_some(),
                })
            })
            .collect()
    }

    /// The domains whose guests run now: not those that are still arriving.
    pub fn running(&self) -> Result<Vec<Uuid>, LibvirtError> {
        let running = self.listed(sys::VIR_CONNECT_LIST_DOMAINS_RUNNING)?;
        running.iter().map(uuid_of).collect()
    }

    fn listed(&self, flags: u32) -> Result<Vec<Domain>, LibvirtError> {
        self.connect
            .list_all_domains(flags)
            .map_err(host_error("list the domains"))
    }

    /// All domains, running or not, in the order of their names.
    pub fn domains(&self) -> Result<Vec<DomainInfo>, LibvirtError> {
        let domains = self.listed(0)?;
        let mut infos = Vec::with_capacity(domains.len());
        for domain in domains {
            match info(&domain) {
                Ok(found) => infos.push(found),
                // It may have ended between the list and the question.
                Err(error) if error.code() == Some(sys::VIR_ERR_NO_DOMAIN) => {}
                Err(error) => return Err(error),
            }
        }
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(infos)
    }

    pub fn domain_by_name(&self, name: &str) -> Result<DomainInfo, LibvirtError> {
        raw::c_string("a domain name", name)?;
        let domain = self
            .connect
            .lookup_domain_by_name(name)
            .map_err(lookup_error(name))?;
        info(&domain)
    }

    pub fn domain_by_uuid(&self, uuid: Uuid) -> Result<DomainInfo, LibvirtError> {
        info(&self.lookup(uuid)?)
    }

    /// How this domain's QEMU runs, and as which user: its own label's, else the host's.
    pub fn domain_qemu(&self, uuid: Uuid) -> Result<DomainQemu, LibvirtError> {
        let domain = self.lookup(uuid)?;
        let xml = domain
            .xml_desc(0)
            .map_err(domain_error(&domain, "read the XML of"))?;
        let user = match qemu_user::domain_qemu_user(&xml)? {
            Some(user) => user,
            None => DomainQemuUser {
                user: self.qemu_user()?,
                fixed: false,
            },
        };
        Ok(DomainQemu {
            user,
            emulated: qemu_user::is_emulated(&xml)?,
        })
    }

    /// Writes the membership, live and for the next start; `None` removes it.
    ///
    /// Blocks while the domain migrates: libvirt lets nobody modify it then.
    pub fn set_membership(
        &self,
        uuid: Uuid,
        membership: Option<&Membership>,
    ) -> Result<(), LibvirtError> {
        let domain = self.lookup(uuid)?;
        let xml = match membership {
            Some(membership) => {
                Membership::check_gang_name(&membership.gang).map_err(|reason| MetadataError {
                    domain: name_of(&domain),
                    reason,
                    gang: None,
                })?;
                Some(membership.to_xml())
            }
            None => None,
        };
        let mut impact = 0;
        if domain.is_active().unwrap_or(false) {
            impact |= sys::VIR_DOMAIN_AFFECT_LIVE;
        }
        if domain.is_persistent().unwrap_or(false) {
            impact |= sys::VIR_DOMAIN_AFFECT_CONFIG;
        }
        domain
            .set_metadata(
                sys::VIR_DOMAIN_METADATA_ELEMENT as i32,
                xml.as_deref(),
                Some(METADATA_PREFIX),
                Some(METADATA_NAMESPACE),
                impact,
            )
            .map_err(domain_error(&domain, "write the metadata of"))
    }

    /// Statistics of the job that runs on the domain now (source host only).
    pub fn running_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError> {
        self.job_stats(uuid, 0)
    }

    /// Statistics of the domain's last completed job; reading does not use them up.
    pub fn completed_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError> {
        self.job_stats(
            uuid,
            sys::VIR_DOMAIN_JOB_STATS_COMPLETED | sys::VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED,
        )
    }

    fn job_stats(&self, uuid: Uuid, flags: u32) -> Result<JobStats, LibvirtError> {
        let domain = self.lookup(uuid)?;
        let (kind, params) = raw::job_stats(&domain, flags)
            .map_err(domain_error(&domain, "read the job statistics of"))?;
        Ok(JobStats::from_params(kind, &params))
    }

    /// The daemon's version: a million for each major, a thousand for each minor one.
    pub fn libvirt_version(&self) -> Result<u32, LibvirtError> {
        self.connect
            .lib_version()
            .map_err(host_error("read the version of libvirt"))
    }

    /// The version of this host's QEMU, in the same way.
    pub fn qemu_version(&self) -> Result<u32, LibvirtError> {
        self.connect
            .hyp_version()
            .map_err(host_error("read the version of QEMU"))
    }

    /// Whether migrations from here can be told the rate QEMU is to reckon with at the
    /// switchover ([`crate::MigrateOptions::switchover_mib_s`]).
    pub fn takes_switchover_rate(&self) -> Result<bool, LibvirtError> {
        let libvirt = self.libvirt_version()?;
        let qemu = self.qemu_version()?;
        Ok(libvirt >= SWITCHOVER_RATE_LIBVIRT && qemu >= SWITCHOVER_RATE_QEMU)
    }

    /// Whether QEMU here does better with pages on several connections than on its main one.
    pub fn pages_go_parallel(&self) -> Result<bool, LibvirtError> {
        Ok(self.qemu_version()? >= PARALLEL_QEMU)
    }

    /// Whether QEMU here can go to post-copy with pages on several connections.
    pub fn post_copy_goes_parallel(&self) -> Result<bool, LibvirtError> {
        Ok(self.qemu_version()? >= POST_COPY_PARALLEL_QEMU)
    }

    /// Lets the migration that runs on the domain stop the guest for so long, in milliseconds.
    pub fn set_max_downtime(&self, uuid: Uuid, milliseconds: u64) -> Result<(), LibvirtError> {
        let domain = self.lookup(uuid)?;
        domain
            .migrate_set_max_downtime(milliseconds, 0)
            .map_err(domain_error(&domain, "set the longest downtime of"))?;
        Ok(())
    }

    /// Switches the migration that runs on the domain to post-copy.
    pub fn start_post_copy(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let domain = self.lookup(uuid)?;
        raw::start_post_copy(&domain).map_err(domain_error(&domain, "switch to post-copy"))
    }

    /// Lets a suspended guest go on.
    pub fn resume(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let domain = self.lookup(uuid)?;
        domain.resume().map_err(domain_error(&domain, "resume"))?;
        Ok(())
    }

    /// Suspends the guest; during its migration this makes it converge, and it runs again at the
    /// destination.
    pub fn suspend(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let domain = self.lookup(uuid)?;
        domain.suspend().map_err(domain_error(&domain, "suspend"))?;
        Ok(())
    }

    pub(crate) fn lookup(&self, uuid: Uuid) -> Result<Domain, LibvirtError> {
        self.connect
            .lookup_domain_by_uuid_string(&uuid.to_string())
            .map_err(lookup_error(&uuid.to_string()))
    }
}

fn info(domain: &Domain) -> Result<DomainInfo, LibvirtError> {
    let name = domain.name().map_err(domain_error(domain, "name"))?;
    let uuid = uuid_of(domain)?;
    let described = domain
        .info()
        .map_err(domain_error(domain, "read the state of"))?;
    let state = match described.state {
        virt::enumutil::Enum::Known(state) => match state {
            VirtState::Running | VirtState::Blocked => DomainState::Running,
            VirtState::Paused | VirtState::PMSuspended => DomainState::Paused,
            VirtState::Shutdown => DomainState::ShuttingDown,
            VirtState::Shutoff => DomainState::ShutOff,
            VirtState::Crashed => DomainState::Crashed,
            VirtState::NoState => DomainState::Unknown,
        },
        virt::enumutil::Enum::Unknown(_) => DomainState::Unknown,
    };
    let membership = membership(domain, &name)?;
    Ok(DomainInfo {
        uuid,
        id: domain.id(),
        state,
        persistent: domain
            .is_persistent()
            .map_err(domain_error(domain, "read the state of"))?,
        memory_bytes: described.max_mem.saturating_mul(1024),
        membership,
        name,
    })
}

fn membership(
    domain: &Domain,
    name: &str,
) -> Result<Result<Option<Membership>, MetadataError>, LibvirtError> {
    match domain.metadata(
        sys::VIR_DOMAIN_METADATA_ELEMENT as i32,
        Some(METADATA_NAMESPACE),
        0,
    ) {
        Ok(xml) => Ok(Membership::parse(name, &xml).map(Some)),
        Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN_METADATA => Ok(Ok(None)),
        Err(error) => Err(domain_error(domain, "read the metadata of")(error)),
    }
}

fn uuid_of(domain: &Domain) -> Result<Uuid, LibvirtError> {
    domain
        .uuid()
        .map_err(domain_error(domain, "read the UUID of"))
}

fn name_of(domain: &Domain) -> String {
    domain.name().unwrap_or_else(|_| "(unnamed)".into())
}

pub(crate) fn host_error(action: &'static str) -> impl Fn(virt::error::Error) -> LibvirtError {
    move |error| LibvirtError::Host {
        action,
        failure: error.into(),
    }
}

pub(crate) fn domain_error<'a>(
    domain: &'a Domain,
    action: &'static str,
) -> impl Fn(virt::error::Error) -> LibvirtError + 'a {
    move |error| LibvirtError::Domain {
        action,
        domain: name_of(domain),
        failure: error.into(),
    }
}

fn lookup_error(domain: &str) -> impl Fn(virt::error::Error) -> LibvirtError + '_ {
    move |error| {
        if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN {
            LibvirtError::NoSuchDomain {
                domain: domain.to_owned(),
            }
        } else {
            LibvirtError::Domain {
                action: "find",
                domain: domain.to_owned(),
                failure: error.into(),
            }
        }
    }
}
