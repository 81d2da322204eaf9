//! What libvirt's hook and vmgangd tell each other, and what may migrate into this host.
//!
//! Owns: the message the hook sends ([`Announcement`]), the files by which the daemon says what it
//! expects ([`Expected`]), the administrator's [`Policy`], and reading the domain's UUID from what
//! libvirt gives a hook.
//! Must not: call libvirt (it waits for the hook, so that would be a deadlock), wait for the
//! daemon, or fail what would have worked without vmgang.

mod announcement;
mod domain_xml;
mod expected;
mod policy;

use std::path::{Path, PathBuf};

pub use announcement::{Announcement, Event, MESSAGE_BYTES_MAX};
pub use domain_xml::read_uuid;
pub use expected::{Expected, is_expected};
pub use policy::{Policy, PolicyError};

/// Where the hook and the daemon meet. libvirt tells its hooks of no configuration, so this does
/// not move with `runtime_dir`.
pub const MEETING_PLACE: &str = "/run/vmgang";
/// What may migrate into this host.
pub const POLICY_PATH: &str = "/etc/vmgang/incoming.toml";

/// The socket that vmgangd reads announcements from: datagrams, for root only.
pub fn socket_path(meeting_place: &Path) -> PathBuf {
    meeting_place.join("hook.sock")
}
