//! `org.vmgang.Manager1`: gangs, and the jobs that migrate them.

use std::collections::HashMap;
use std::sync::Arc;

use vmgang_libvirt::DomainInfo;
use zbus::message::Header;
use zbus::{Connection, OwnedObjectPath, OwnedVariant, Variant, interface};

use super::authorize::{Permission, check, check_reader};
use super::job::{Dictionary, dictionary};
use super::{job_path, publish};
use crate::bring_back::ReturnRequest;
use crate::coordinator::Coordinator;
use crate::error::ServiceError;
use crate::gangs;
use crate::request::{DiagnoseRequest, MigrateRequest, PrepareRequest};
use crate::stages::StageView;

/// name, running members, all members
type GangLine = (String, u32, u32);
/// name, uuid, state, order or -1, memory in bytes, persistent
type MemberLine = (String, String, String, i64, u64, bool);
/// path, id, gang, destination, state, start in seconds since 1970
type JobLine = (OwnedObjectPath, String, String, String, String, u64);

pub struct Manager {
    coordinator: Arc<Coordinator>,
}

impl Manager {
    pub(crate) fn new(coordinator: Arc<Coordinator>) -> Manager {
        Manager { coordinator }
    }
}

#[interface(name = "org.vmgang.Manager1")]
impl Manager {
    /// All gangs on this host: name, running members, all members. Then the domains whose
    /// vmgang metadata cannot be read: name, problem.
    #[zbus(out_args("gangs", "problems"))]
    async fn list_gangs(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(Vec<GangLine>, Vec<(String, String)>), ServiceError> {
        check(connection, &header, Permission::Read).await?;
        let (gangs, problems) = gangs::summarise(&self.coordinator.domains().await?);
        let gangs = gangs
            .into_iter()
            .map(|gang| (gang.name, gang.active, gang.total))
            .collect();
        Ok((gangs, problems))
    }

    /// The members of a gang in switchover order: name, uuid, state (virsh's word), order (-1
    /// if none), memory in bytes, persistent.
    #[zbus(out_args("members"))]
    async fn get_gang(
        &self,
        gang: String,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<MemberLine>, ServiceError> {
        check(connection, &header, Permission::Read).await?;
        let members = gangs::members(&gang, &self.coordinator.domains().await?)?;
        Ok(members.into_iter().map(member_line).collect())
    }

    /// Puts domains (names or UUIDs) into a gang. Returns those that were not in it before.
    #[zbus(out_args("changed"))]
    async fn add_to_gang(
        &self,
        gang: String,
        domains: Vec<String>,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<String>, ServiceError> {
        check(connection, &header, Permission::Manage).await?;
        self.coordinator.add_to_gang(&gang, &domains).await
    }

    /// Takes domains (names or UUIDs) out of a gang; unreadable metadata is removed as well.
    #[zbus(out_args("changed"))]
    async fn remove_from_gang(
        &self,
        gang: String,
        domains: Vec<String>,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<String>, ServiceError> {
        check(connection, &header, Permission::Manage).await?;
        self.coordinator.remove_from_gang(&gang, &domains).await
    }

    /// Migrates a gang. Returns once everything that can be checked beforehand was found good
    /// and the job has started; an error means that nothing has changed.
    ///
    /// The destination is a libvirt URI with a host, or a host name. Options: domains (as) or
    /// all (b), with an empty gang; bandwidth (t, MiB/s); timeout (t, s: abort unless the gang
    /// is ready to switch over by then), or instead of the abort timeout-suspend or
    /// timeout-postcopy (b); peer (s, HOST:PORT of the other vmgangd); persistent, undefinesource,
    /// suspend, auto-converge, unsafe, postcopy, postcopy-resume (b, as in virsh); parallel (t,
    /// connections); concurrency (t, members under way at once); switchover (s, together, staggered
    /// or free); on-failure (s, abort or continue); on-stall (s, throttle, postcopy, leave or
    /// abort); technique (s, comma list, all or none). Anything else is refused.
    #[zbus(out_args("job"))]
    async fn migrate(
        &self,
        gang: String,
        destination: String,
        options: HashMap<String, OwnedVariant>,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<OwnedObjectPath, ServiceError> {
        check(connection, &header, Permission::Migrate).await?;
        let request = MigrateRequest::parse(&gang, &destination, options)?;
        let job = self.coordinator.migrate(request).await?;
        publish(connection, self.coordinator.clone(), job).await
    }

    /// Brings the members of an ended job back to this host: those that it has moved and that do not run
    /// here. The host on which they are migrates them, as `Migrate` there would, and must let this one use
    /// its libvirt. Returns once that has started, with a job of this host that shows it, and with a
    /// sentence for each thing that is not as it was when they left. The destination is this host as the
    /// other one reaches it; empty: as that one was named. Options as for `Migrate`, but for domains and all.
    #[zbus(name = "Return", out_args("back", "changes"))]
    async fn return_(
        &self,
        job: String,
        destination: String,
        options: HashMap<String, OwnedVariant>,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, Vec<String>), ServiceError> {
        check(connection, &header, Permission::Migrate).await?;
        let request = ReturnRequest {
            job,
            destination: (!destination.is_empty()).then_some(destination),
            options,
        };
        let (back, changes) = self.coordinator.bring_back(request).await?;
        let path = publish(connection, self.coordinator.clone(), back).await?;
        Ok((path, changes))
    }

    /// What a migration of the gang's running members would send, as one JSON object: counts of each
    /// member's pages, which pages of one the other has as well, and bytes by technique of one pass
    /// over the memory as it is. Reads that memory, which takes a second for each two gigabytes.
    #[zbus(out_args("result"))]
    async fn estimate(
        &self,
        gang: String,
        options: HashMap<String, OwnedVariant>,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<String, ServiceError> {
        check(connection, &header, Permission::Manage).await?;
        no_options(options)?;
        self.coordinator.estimate(&gang).await
    }

    /// Stages a gang's contents at its destination: a migration to there that begins within the time
    /// finds them. Returns once the destination has accepted it. Options: bandwidth (t, MiB/s); for
    /// (t, s: how long it is kept, 3600 unless said); peer (s, HOST:PORT of the other vmgangd).
    #[zbus(out_args("stage"))]
    async fn prepare(
        &self,
        gang: String,
        destination: String,
        options: HashMap<String, OwnedVariant>,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<String, ServiceError> {
        check(connection, &header, Permission::Migrate).await?;
        let request = PrepareRequest::parse(&gang, &destination, options)?;
        self.coordinator.prepare(request).await
    }

    /// Looks at this host and, if a destination is named, at the pair: whether a migration would be
    /// refused, and what could be better, as one JSON object. Tries what a migration tries before it
    /// begins, and changes nothing. Options: gang (s; all gangs unless said); peer (s, HOST:PORT of
    /// the other vmgangd).
    ///
    /// With a destination it needs leave to migrate, because it opens that URI as root does.
    #[zbus(out_args("diagnosis"))]
    async fn diagnose(
        &self,
        destination: String,
        options: HashMap<String, OwnedVariant>,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<String, ServiceError> {
        // A libvirt URI can name a program to be run.
        let permission = match destination.is_empty() {
            true => Permission::Read,
            false => Permission::Migrate,
        };
        check(connection, &header, permission).await?;
        let request = DiagnoseRequest::parse(&destination, options)?;
        Ok(self.coordinator.diagnose(request).await)
    }

    /// The stages that this host fills, and then those that it holds for others: id (s), direction
    /// (s, outgoing or incoming), gang (s), peer (s, the destination or the source's name), state (s:
    /// scanning, staging, fresh, taken or ended), error (s), contents (t, pages), bytes (t, of these),
    /// wire_bytes (t), found (t, of the pages, those that the destination had), remaining_bytes (t),
    /// refreshed and expires (t, seconds since 1970).
    #[zbus(out_args("stages"))]
    async fn list_stages(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<Dictionary>, ServiceError> {
        check(connection, &header, Permission::Read).await?;
        Ok(self.coordinator.stages().iter().map(stage).collect())
    }

    /// Drops a stage that this host fills.
    async fn abort_stage(
        &self,
        id: String,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(), ServiceError> {
        check(connection, &header, Permission::Migrate).await?;
        self.coordinator.abort_stage(&id)
    }

    /// All jobs this daemon knows, ended ones too, the newest first: path, id, gang (empty if
    /// single domains were migrated), destination, state, start in seconds since 1970.
    #[zbus(out_args("jobs"))]
    async fn list_jobs(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<Vec<JobLine>, ServiceError> {
        check(connection, &header, Permission::Read).await?;
        self.coordinator
            .jobs()
            .iter()
            .map(|job| {
                let path = job_path(&job.id).map_err(|error| {
                    ServiceError::Internal(format!("the job {} has no valid path: {error}", job.id))
                })?;
                Ok((
                    path,
                    job.id.clone(),
                    job.gang.clone().unwrap_or_default(),
                    job.destination.clone(),
                    job.state().as_str().to_owned(),
                    job.started_unix_s,
                ))
            })
            .collect()
    }

    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    async fn version(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Option<Header<'_>>,
    ) -> Result<String, ServiceError> {
        check_reader(connection, header).await?;
        Ok(VERSION.to_owned())
    }

    /// Peers this daemon has talked to since it started.
    #[zbus(property(emits_changed_signal = "false"))]
    async fn peers(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Option<Header<'_>>,
    ) -> Result<Vec<String>, ServiceError> {
        check_reader(connection, header).await?;
        Ok(self.coordinator.peers())
    }
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// All properties.
pub(super) fn properties(coordinator: &Coordinator) -> Dictionary {
    dictionary([
        ("Version", Variant::from(VERSION)),
        ("Peers", Variant::from(coordinator.peers())),
    ])
}

fn no_options(options: HashMap<String, OwnedVariant>) -> Result<(), ServiceError> {
    match options.keys().next() {
        None => Ok(()),
        Some(name) => Err(ServiceError::InvalidOption(format!(
            "there is no option {name}"
        ))),
    }
}

fn stage(stage: &StageView) -> Dictionary {
    let direction = match stage.outgoing {
        true => "outgoing",
        false => "incoming",
    };
    let bytes = stage
        .contents
        .saturating_mul(vmgang_dedup::PAGE_BYTES as u64);
    dictionary([
        ("id", Variant::from(stage.id.clone())),
        ("direction", Variant::from(direction)),
        ("gang", Variant::from(stage.gang.clone())),
        ("peer", Variant::from(stage.peer.clone())),
        ("state", Variant::from(stage.state.as_str())),
        (
            "error",
            Variant::from(stage.error.clone().unwrap_or_default()),
        ),
        ("contents", Variant::from(stage.contents)),
        ("bytes", Variant::from(bytes)),
        ("wire_bytes", Variant::from(stage.wire_bytes)),
        ("found", Variant::from(stage.found)),
        ("remaining_bytes", Variant::from(stage.remaining_bytes)),
        ("refreshed", Variant::from(stage.refreshed_unix_s)),
        ("expires", Variant::from(stage.expires_unix_s)),
    ])
}

fn member_line(domain: DomainInfo) -> MemberLine {
    let order = match &domain.membership {
        Ok(Some(member)) => member.order.map_or(-1, i64::from),
        _ => -1,
    };
    (
        domain.name,
        domain.uuid.to_string(),
        domain.state.as_str().to_owned(),
        order,
        domain.memory_bytes,
        domain.persistent,
    )
}
