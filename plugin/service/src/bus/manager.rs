//! `org.vmgang.Manager1`: gangs, and the jobs that migrate them.

use std::collections::HashMap;
use std::sync::Arc;

use vmgang_libvirt::DomainInfo;
use zbus::message::Header;
use zbus::{Connection, OwnedObjectPath, OwnedVariant, interface};

use super::authorize::{Permission, check};
use super::{job_path, publish};
use crate::coordinator::Coordinator;
use crate::error::ServiceError;
use crate::gangs;
use crate::request::MigrateRequest;

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
    /// is ready to switch over by then; each wave of a large gang has this time); peer (s, HOST:PORT of the other vmgangd); persistent,
    /// undefinesource, suspend (b, as in virsh); on-failure (s, abort or continue); technique
    /// (s, comma list, all or none). Anything else is refused.
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
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    /// Peers this daemon has talked to since it started.
    #[zbus(property(emits_changed_signal = "false"))]
    fn peers(&self) -> Vec<String> {
        self.coordinator.peers()
    }
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
