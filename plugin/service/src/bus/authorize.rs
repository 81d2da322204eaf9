//! May this caller do that? Root may; anybody else is a question for polkit.

use std::collections::HashMap;

use zbus::Connection;
use zbus::message::{Flags, Header};
use zbus_polkit::policykit1::{AuthorityProxy, CheckAuthorizationFlags, Subject};

use crate::error::ServiceError;

/// The polkit actions of `org.vmgang.policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permission {
    Read,
    Manage,
    Migrate,
}

impl Permission {
    fn action(self) -> &'static str {
        match self {
            Permission::Read => "org.vmgang.read",
            Permission::Manage => "org.vmgang.manage",
            Permission::Migrate => "org.vmgang.migrate",
        }
    }
}

pub(crate) async fn check(
    connection: &Connection,
    header: &Header<'_>,
    permission: Permission,
) -> Result<(), ServiceError> {
    let action = permission.action();
    let refused = |reason: &str| {
        ServiceError::NotAuthorized(format!(
            "{reason}; become root, or have the administrator allow the polkit action {action}"
        ))
    };
    let Some(sender) = header.sender() else {
        return check_peer_to_peer(connection)
            .await
            .map_err(|reason| refused(&reason));
    };
    let bus = zbus::fdo::DBusProxy::new(connection)
        .await
        .map_err(|error| refused(&format!("the bus cannot be asked who is calling ({error})")))?;
    let uid = bus
        .get_connection_unix_user(sender.clone().into())
        .await
        .map_err(|error| refused(&format!("the bus does not know the caller ({error})")))?;
    if uid == 0 {
        return Ok(());
    }
    let interactive = header
        .primary()
        .flags()
        .contains(Flags::ALLOW_INTERACTIVE_AUTH);
    let flags = if interactive {
        CheckAuthorizationFlags::ALLOW_USER_INTERACTION
    } else {
        CheckAuthorizationFlags::empty()
    };
    let asked = async {
        let subject = Subject::new_for_message_header(header).map_err(|error| error.to_string())?;
        let authority = AuthorityProxy::new(connection)
            .await
            .map_err(|error| error.to_string())?;
        authority
            .check_authorization(&subject, action, &HashMap::new(), flags, "")
            .await
            .map_err(|error| error.to_string())
    };
    match asked.await {
        Ok(result) if result.is_authorized => Ok(()),
        Ok(_) => Err(refused("this user may not do that")),
        Err(error) => Err(refused(&format!("polkit cannot be asked ({error})"))),
    }
}

/// The same for a property. Nobody calls where zbus reads it for a signal: signals go to all who may
/// receive them, which is for the bus's own policy to say.
pub(crate) async fn check_reader(
    connection: &Connection,
    header: Option<Header<'_>>,
) -> Result<(), ServiceError> {
    match header {
        Some(header) => check(connection, &header, Permission::Read).await,
        None => Ok(()),
    }
}

/// Without a bus in between only root and the daemon's own user are let in.
async fn check_peer_to_peer(connection: &Connection) -> Result<(), String> {
    let credentials = connection
        .peer_creds()
        .await
        .map_err(|error| format!("the caller is not known ({error})"))?;
    let own = rustix::process::geteuid().as_raw();
    match credentials.unix_user_id() {
        Some(uid) if uid == 0 || uid == own => Ok(()),
        _ => Err("this user may not do that".into()),
    }
}
