//! vmgangd on the bus as this program finds it, and its errors as sentences.

use anyhow::Context;
pub use vmgang_client::{Dictionary, JobLine, JobProxy, ManagerProxy};
use zbus::fdo::{PropertiesChangedStream, PropertiesProxy};
use zbus::{Connection, OwnedObjectPath};

/// The system bus, where vmgangd is.
pub async fn connect() -> anyhow::Result<Connection> {
    Connection::system()
        .await
        .context("the system bus cannot be reached; is dbus running on this host?")
}

pub async fn manager(connection: &Connection) -> anyhow::Result<ManagerProxy<'_>> {
    Ok(ManagerProxy::new(connection).await?)
}

pub async fn job<'a>(
    connection: &'a Connection,
    path: &OwnedObjectPath,
) -> anyhow::Result<JobProxy<'a>> {
    Ok(JobProxy::builder(connection)
        .path(path.clone())
        .build()
        .await?)
}

/// What a job tells of its changes, from now on.
pub async fn changes(job: &JobProxy<'_>) -> anyhow::Result<PropertiesChangedStream> {
    let job = job.inner();
    let properties = PropertiesProxy::builder(job.connection())
        .destination(job.destination().to_owned())
        .path(job.path().to_owned())
        .build()
        .await?;
    Ok(properties.receive_properties_changed().await?)
}

/// The job with this id, or with the only id that begins like this.
pub async fn find_job(connection: &Connection, id: &str) -> anyhow::Result<JobLine> {
    let jobs = manager(connection).await?.list_jobs().await?;
    pick(jobs, id)
}

fn pick(jobs: Vec<JobLine>, id: &str) -> anyhow::Result<JobLine> {
    // UUIDs are also written with dashes and capitals.
    let wanted = id.replace('-', "").to_ascii_lowercase();
    let mut found = jobs
        .into_iter()
        .filter(|job| !wanted.is_empty() && job.1.starts_with(&wanted));
    match (found.next(), found.next()) {
        (Some(job), None) => Ok(job),
        (None, _) => anyhow::bail!("there is no job {id}; `vmgang history` lists those there are"),
        (Some(_), Some(_)) => {
            anyhow::bail!("more than one job begins with {id}; give more of its id")
        }
    }
}

/// An error as one sentence: what vmgangd said, without D-Bus in it.
pub fn sentence(error: &anyhow::Error) -> String {
    let Some(error) = error.downcast_ref::<zbus::Error>() else {
        return format!("{error:#}");
    };
    match error {
        zbus::Error::MethodError(name, text, _) => describe(name.as_str(), text.as_deref()),
        zbus::Error::FDO(error) => {
            let error = error.as_ref();
            let name = zbus::DBusError::name(error).to_string();
            describe(&name, zbus::DBusError::description(error))
        }
        other => other.to_string(),
    }
}

fn describe(name: &str, text: Option<&str>) -> String {
    let text = text.unwrap_or_default();
    match name.strip_prefix("org.freedesktop.DBus.Error.") {
        Some(
            "ServiceUnknown"
            | "NameHasNoOwner"
            | "Spawn.ExecFailed"
            | "Spawn.ChildExited"
            | "Spawn.ServiceNotFound",
        ) => "vmgangd does not run on this host; start it with `systemctl start vmgangd`".into(),
        Some("NoReply" | "Disconnected") => {
            "vmgangd ended while it was asked; see `journalctl -u vmgangd`, then `vmgang history`"
                .into()
        }
        _ if text.is_empty() => name.to_owned(),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: &str) -> JobLine {
        let path = OwnedObjectPath::try_from("/a").expect("a path");
        (
            path,
            id.into(),
            "web".into(),
            "b".into(),
            "completed".into(),
            0,
        )
    }

    #[test]
    fn jobs_by_unique_prefix() {
        let jobs = || vec![line("abc1"), line("abd2")];
        assert_eq!(pick(jobs(), "abc").expect("one").1, "abc1");
        assert_eq!(pick(jobs(), "AB-D").expect("one").1, "abd2");
        assert!(pick(jobs(), "ab").is_err());
        assert!(pick(jobs(), "x").is_err());
        assert!(pick(jobs(), "").is_err());
    }

    #[test]
    fn errors_read_as_sentences() {
        let text = describe(
            "org.freedesktop.DBus.Error.ServiceUnknown",
            Some("The name..."),
        );
        assert!(text.contains("systemctl start vmgangd"));
        assert_eq!(describe("org.vmgang.Error.Busy", Some("wait")), "wait");
        assert_eq!(
            describe("org.vmgang.Error.Busy", None),
            "org.vmgang.Error.Busy"
        );
    }
}
