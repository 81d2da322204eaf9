//! Errors of this crate: libvirt's own code and message, with the domain they concern.
//! Must not leak types of the `virt` crate.

use std::fmt;

use crate::metadata::MetadataError;
use crate::qemu_user::QemuUserError;

/// What libvirt itself said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// `virErrorNumber`, as in libvirt/virterror.h.
    pub code: u32,
    /// libvirt's own sentence.
    pub message: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (libvirt error {})", self.message, self.code)
    }
}

impl std::error::Error for Failure {}

impl From<virt::error::Error> for Failure {
    fn from(error: virt::error::Error) -> Self {
        Failure {
            code: error.code().to_raw(),
            message: error.message().to_owned(),
        }
    }
}

/// Why a call to libvirt did not do what was asked.
///
/// Texts hold the whole story, so that they can be shown as they are.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    #[error(
        "cannot connect to libvirt at {uri}: {failure}; check that libvirtd runs there and that this user may use it"
    )]
    Connect { uri: String, failure: Failure },
    #[error("cannot {action} on this host: {failure}")]
    Host {
        action: &'static str,
        failure: Failure,
    },
    #[error("cannot {action} domain {domain}: {failure}")]
    Domain {
        action: &'static str,
        domain: String,
        failure: Failure,
    },
    #[error("there is no domain {domain} on this host; `virsh list --all` shows those there are")]
    NoSuchDomain { domain: String },
    #[error("{0}")]
    Metadata(#[from] MetadataError),
    #[error("{0}")]
    QemuUser(#[from] QemuUserError),
    #[error("{what} must not contain a NUL character")]
    Nul { what: &'static str },
    #[error(
        "cannot start a thread to migrate domain {domain}: {error}; free memory or raise the limit on threads"
    )]
    Thread {
        domain: String,
        error: std::io::Error,
    },
    #[error(
        "the thread that migrated domain {domain} ended without a result; see `virsh domstate {domain}` on both hosts"
    )]
    ThreadLost { domain: String },
}

impl LibvirtError {
    /// libvirt's error number, where libvirt was the one that refused.
    pub fn code(&self) -> Option<u32> {
        match self {
            LibvirtError::Connect { failure, .. }
            | LibvirtError::Host { failure, .. }
            | LibvirtError::Domain { failure, .. } => Some(failure.code),
            _ => None,
        }
    }
}
