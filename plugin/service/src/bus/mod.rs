//! The D-Bus surface: names, objects, and who publishes changes. Each interface is described in
//! `xml-schemas/`; a test compares that with what is served. Decides nothing about jobs.

mod authorize;
mod job;
mod manager;
mod objects;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use zbus::connection::Builder;
use zbus::fdo::Properties;
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedObjectPath, Variant};

pub use job::JobObject;
pub use manager::Manager;
pub use objects::ObjectList;

use crate::coordinator::Coordinator;
use crate::error::ServiceError;
use crate::job::Job;

pub const BUS_NAME: &str = "org.vmgang.VMGang1";
pub const MANAGER_PATH: &str = "/org/vmgang/VMGang1";
/// Here ObjectManager lives: jobs are below it.
pub const ROOT_PATH: &str = "/org/vmgang";
const MANAGER_INTERFACE: &str = "org.vmgang.Manager1";
const JOB_INTERFACE: &str = "org.vmgang.Job1";

/// PropertiesChanged is sent at most this often for one job while it runs. Its end is told at
/// once.
const CHANGES_INTERVAL: Duration = Duration::from_millis(500);

/// Puts the objects on a connection that is being built, and the known jobs once it is there.
pub async fn serve(
    builder: Builder<'_>,
    coordinator: Arc<Coordinator>,
) -> zbus::Result<Connection> {
    let connection = builder
        .serve_at(ROOT_PATH, ObjectList::new(coordinator.clone()))
        .serve_at(MANAGER_PATH, Manager::new(coordinator.clone()))
        .build()
        .await?;
    for job in coordinator.jobs() {
        let path = job_path(&job.id)?;
        connection
            .object_server()
            .at(path, JobObject::new(job))
            .await?;
    }
    tokio::spawn(publish_unasked(connection.clone(), coordinator));
    Ok(connection)
}

/// Shows jobs that no call has started, as long as there is a bus.
async fn publish_unasked(connection: Connection, coordinator: Arc<Coordinator>) {
    loop {
        let job = coordinator.next_unasked().await;
        if let Err(error) = publish(&connection, coordinator.clone(), job).await {
            tracing::warn!(error = error.sentence(), "a job is not shown");
        }
    }
}

/// The object path of a job.
pub fn job_path(id: &str) -> zbus::Result<OwnedObjectPath> {
    OwnedObjectPath::try_from(format!("{ROOT_PATH}/jobs/{id}"))
}

/// Publishes a new job and follows its changes to the end.
pub(crate) async fn publish(
    connection: &Connection,
    coordinator: Arc<Coordinator>,
    job: Arc<Job>,
) -> Result<OwnedObjectPath, ServiceError> {
    let failed = |error: zbus::Error| {
        ServiceError::Internal(format!(
            "the job {} runs, but cannot be shown on the bus: {error}",
            job.id
        ))
    };
    let path = job_path(&job.id).map_err(failed)?;
    connection
        .object_server()
        .at(path.clone(), JobObject::new(job.clone()))
        .await
        .map_err(failed)?;
    let connection = connection.clone();
    let published = path.clone();
    tokio::spawn(async move {
        if let Err(error) = follow(&connection, &published, &job).await {
            tracing::warn!(job = job.id, %error, "changes of the job cannot be sent");
        }
        for removed in coordinator.prune() {
            if let Ok(path) = job_path(&removed) {
                let _ = connection
                    .object_server()
                    .remove::<JobObject, _>(path)
                    .await;
            }
        }
    });
    Ok(path)
}

async fn follow(connection: &Connection, path: &OwnedObjectPath, job: &Job) -> zbus::Result<()> {
    let emitter = SignalEmitter::new(connection, path.clone())?;
    let mut changes = job.watch();
    loop {
        changes.mark_unchanged();
        let ended = job.state().ended();
        let object = job::Properties::of(job);
        let changed: HashMap<&str, Variant<'_>> = object.into_variants();
        Properties::properties_changed(
            &emitter,
            InterfaceName::from_static_str(JOB_INTERFACE)?,
            changed,
            Cow::Borrowed(&[]),
        )
        .await?;
        if ended {
            return Ok(());
        }
        // A watcher of its own: waiting takes note of changes that are still to be sent.
        let mut end = job.watch();
        tokio::select! {
            () = tokio::time::sleep(CHANGES_INTERVAL) => {}
            _ = end.wait_for(|_| job.state().ended()) => continue,
        }
        if changes.changed().await.is_err() {
            return Ok(());
        }
    }
}
