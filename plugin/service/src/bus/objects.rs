//! `org.freedesktop.DBus.ObjectManager`, for those who may read: zbus's own tells everybody what
//! all properties are. The signals are still sent by zbus, which knows an ObjectManager by its name.
//! Must not: keep objects of its own.

use std::collections::HashMap;
use std::sync::Arc;

use zbus::fdo::ManagedObjects;
use zbus::message::Header;
use zbus::names::{InterfaceName, OwnedInterfaceName};
use zbus::object_server::SignalEmitter;
use zbus::{Connection, ObjectPath, OwnedObjectPath, Variant, interface};

use super::authorize::{Permission, check};
use super::job::{self, Dictionary};
use super::{JOB_INTERFACE, MANAGER_INTERFACE, MANAGER_PATH, job_path, manager};
use crate::coordinator::Coordinator;
use crate::error::ServiceError;

/// Lists the manager and the jobs.
pub struct ObjectList {
    coordinator: Arc<Coordinator>,
}

impl ObjectList {
    pub(crate) fn new(coordinator: Arc<Coordinator>) -> ObjectList {
        ObjectList { coordinator }
    }
}

#[interface(
    name = "org.freedesktop.DBus.ObjectManager",
    introspection_docs = false
)]
impl ObjectList {
    /// Each object's interfaces and their properties.
    async fn get_managed_objects(
        &self,
        #[zbus(connection)] connection: &Connection,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<ManagedObjects, ServiceError> {
        check(connection, &header, Permission::Read).await?;
        let mut objects = ManagedObjects::new();
        let mut add = |path: zbus::Result<OwnedObjectPath>, interface, properties| {
            // Names that are written here, and ids that have been paths before.
            if let (Ok(path), Ok(interface)) = (path, InterfaceName::from_static_str(interface)) {
                let interface = OwnedInterfaceName::from(interface);
                objects.insert(path, HashMap::from([(interface, properties)]));
            }
        };
        add(
            OwnedObjectPath::try_from(MANAGER_PATH),
            MANAGER_INTERFACE,
            manager::properties(&self.coordinator),
        );
        for job in self.coordinator.jobs() {
            let properties: Dictionary = job::Properties::of(&job).into_dictionary();
            add(job_path(&job.id), JOB_INTERFACE, properties);
        }
        Ok(objects)
    }

    #[zbus(signal)]
    async fn interfaces_added(
        emitter: &SignalEmitter<'_>,
        object_path: ObjectPath<'_>,
        interfaces_and_properties: HashMap<InterfaceName<'_>, HashMap<&str, Variant<'_>>>,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn interfaces_removed(
        emitter: &SignalEmitter<'_>,
        object_path: ObjectPath<'_>,
        interfaces: Vec<InterfaceName<'_>>,
    ) -> zbus::Result<()>;
}
