//! vmgangd's D-Bus interfaces, for programs that migrate gangs of libvirt domains.
//!
//! The service is `org.vmgang.VMGang1` on the system bus. What methods and properties mean is in the
//! introspection XML that vmgang installs (`/usr/share/dbus-1/interfaces/org.vmgang.*.xml`) and, with options, errors
//! and examples, in its operations guide. Errors are named `org.vmgang.Error.*` and have a sentence for people.
//!
//! ```no_run
//! # async fn example() -> zbus::Result<()> {
//! let connection = zbus::Connection::system().await?;
//! let manager = vmgang_client::ManagerProxy::new(&connection).await?;
//! let job = manager.migrate("web", "qemu+tls://hostb/system", Default::default()).await?;
//! let job = vmgang_client::JobProxy::builder(&connection).path(job)?.build().await?;
//! println!("{}", job.state().await?);
//! # Ok(())
//! # }
//! ```
//!
//! Must not: do anything by itself.

use std::collections::HashMap;

use zbus::{OwnedObjectPath, OwnedVariant, Variant, proxy};

/// A gang: its name, how many of its members run, how many there are.
pub type GangLine = (String, u32, u32);
/// A member: name, UUID, state, order or -1, memory in bytes, persistent.
pub type MemberLine = (String, String, String, i64, u64, bool);
/// A job: path, id, gang, destination, state, start in seconds since 1970.
pub type JobLine = (OwnedObjectPath, String, String, String, String, u64);
/// What D-Bus calls `a{sv}`.
pub type Dictionary = HashMap<String, OwnedVariant>;
/// Options of a call: a name, and a flag (b), a number (t), a text (s) or texts (as).
pub type Options<'a> = HashMap<&'a str, Variant<'a>>;

/// Gangs, migrations, estimates and stages of this host.
#[proxy(
    interface = "org.vmgang.Manager1",
    default_service = "org.vmgang.VMGang1",
    default_path = "/org/vmgang/VMGang1"
)]
pub trait Manager {
    /// All gangs of this host, and domains whose vmgang metadata cannot be read: name, problem.
    fn list_gangs(&self) -> zbus::Result<(Vec<GangLine>, Vec<(String, String)>)>;
    /// The members of a gang, in switchover order.
    fn get_gang(&self, gang: &str) -> zbus::Result<Vec<MemberLine>>;
    /// Puts domains (names or UUIDs) into a gang; gives those that were not in it.
    #[zbus(allow_interactive_auth)]
    fn add_to_gang(&self, gang: &str, domains: &[String]) -> zbus::Result<Vec<String>>;
    /// Takes domains out of a gang; gives those that were in it.
    #[zbus(allow_interactive_auth)]
    fn remove_from_gang(&self, gang: &str, domains: &[String]) -> zbus::Result<Vec<String>>;
    /// Starts to migrate a gang; with an empty one the domains of the option `domains` or `all`. An error means that
    /// nothing has changed.
    #[zbus(allow_interactive_auth)]
    fn migrate(
        &self,
        gang: &str,
        destination: &str,
        options: Options<'_>,
    ) -> zbus::Result<OwnedObjectPath>;
    /// Brings the members of an ended job back to this host; gives the job that shows it, and what has changed.
    #[zbus(allow_interactive_auth, name = "Return")]
    fn return_(
        &self,
        job: &str,
        destination: &str,
        options: Options<'_>,
    ) -> zbus::Result<(OwnedObjectPath, Vec<String>)>;
    /// All jobs that are known, the newest first.
    fn list_jobs(&self) -> zbus::Result<Vec<JobLine>>;
    /// What a migration of the gang would send, as a JSON object.
    #[zbus(allow_interactive_auth)]
    fn estimate(&self, gang: &str, options: Options<'_>) -> zbus::Result<String>;
    /// Stages a gang's contents at its destination; gives the stage's id.
    #[zbus(allow_interactive_auth)]
    fn prepare(&self, gang: &str, destination: &str, options: Options<'_>) -> zbus::Result<String>;
    /// Whether migrations would be refused, and what could be better, as a JSON object.
    #[zbus(allow_interactive_auth)]
    fn diagnose(&self, destination: &str, options: Options<'_>) -> zbus::Result<String>;
    /// Stages that this host fills and holds.
    fn list_stages(&self) -> zbus::Result<Vec<Dictionary>>;
    /// Drops a stage that this host fills.
    #[zbus(allow_interactive_auth)]
    fn abort_stage(&self, id: &str) -> zbus::Result<()>;
    /// The daemon's version.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> zbus::Result<String>;
    /// Peers that the daemon has talked to.
    #[zbus(property(emits_changed_signal = "false"))]
    fn peers(&self) -> zbus::Result<Vec<String>>;
}

/// One job, at the path that its start has given. Not cached: each property is asked for.
#[proxy(interface = "org.vmgang.Job1", default_service = "org.vmgang.VMGang1")]
pub trait Job {
    /// Before the gang is released everything goes back as it was.
    #[zbus(allow_interactive_auth)]
    fn abort(&self) -> zbus::Result<()>;
    /// Caps the job's use of the network; 0 takes the cap off.
    #[zbus(allow_interactive_auth)]
    fn set_bandwidth(&self, mib_per_second: u64) -> zbus::Result<()>;
    /// Switches a job that may to post-copy now.
    #[zbus(allow_interactive_auth)]
    fn start_post_copy(&self) -> zbus::Result<()>;
    /// What happened when, a JSON object; empty if that was not noted.
    fn get_timeline(&self) -> zbus::Result<String>;
    /// `preparing`, `running`, `switching`; ended: `completed`, `failed`, `partial` or `aborted`.
    #[zbus(property(emits_changed_signal = "false"))]
    fn state(&self) -> zbus::Result<String>;
    /// How far each member is.
    #[zbus(property(emits_changed_signal = "false"))]
    fn progress(&self) -> zbus::Result<Dictionary>;
    /// Bytes, and what saved how many of them.
    #[zbus(property(emits_changed_signal = "false"))]
    fn statistics(&self) -> zbus::Result<Dictionary>;
    /// The report of an ended job, a JSON object; empty until then.
    #[zbus(property(emits_changed_signal = "false"))]
    fn result(&self) -> zbus::Result<String>;
}
