//! The errors users see: D-Bus names under `org.vmgang.Error`, each with a sentence that says
//! what happened, to which domain or peer, and what to do next.

use vmgang_engine::SourceError;
use vmgang_libvirt::LibvirtError;
use zbus::DBusError;

/// A refused request. The text is the whole message; the name is for programs.
#[derive(Debug, Clone, PartialEq, Eq, DBusError)]
#[zbus(prefix = "org.vmgang.Error")]
pub enum ServiceError {
    UnknownGang(String),
    UnknownDomain(String),
    /// The domain is in another gang already.
    AlreadyInGang(String),
    NoRunningMember(String),
    InvalidMetadata(String),
    InvalidDestination(String),
    InvalidOption(String),
    DestinationUnreachable(String),
    PeerUnreachable(String),
    PeerRefused(String),
    TlsFailed(String),
    VersionMismatch(String),
    /// The gang, or one of the domains, is in a job already.
    Busy(String),
    /// The job has ended, so there is nothing to control.
    JobEnded(String),
    NotAuthorized(String),
    MemberNotMigratable(String),
    LibvirtFailed(String),
    Internal(String),
}

impl ServiceError {
    /// The sentence without the D-Bus name.
    pub fn sentence(&self) -> &str {
        zbus::DBusError::description(self).unwrap_or_default()
    }
}

impl From<LibvirtError> for ServiceError {
    fn from(error: LibvirtError) -> Self {
        let text = error.to_string();
        match error {
            LibvirtError::NoSuchDomain { .. } => ServiceError::UnknownDomain(text),
            LibvirtError::Metadata(_) => ServiceError::InvalidMetadata(text),
            LibvirtError::Nul { .. } => ServiceError::InvalidOption(text),
            _ => ServiceError::LibvirtFailed(text),
        }
    }
}

impl From<SourceError> for ServiceError {
    fn from(error: SourceError) -> Self {
        let text = error.to_string();
        match error {
            SourceError::Unreachable { .. } => ServiceError::PeerUnreachable(text),
            SourceError::Tls { .. } => ServiceError::TlsFailed(text),
            SourceError::VersionMismatch { .. } => ServiceError::VersionMismatch(text),
            SourceError::Refused { .. } => ServiceError::PeerRefused(text),
            _ => ServiceError::Internal(text),
        }
    }
}
