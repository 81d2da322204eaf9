//! The host on which the members are: does for a peer that may ask what a call on its own bus would, and tells it how
//! that goes.
//! Must not: decide who may ask; `access.rs` does.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufRead, AsyncWrite, BufReader};
use uuid::Uuid;
use vmgang_engine::{Connection, PeerName};
use vmgang_libvirt::DomainInfo;
use zbus::{OwnedVariant, Variant};

use super::words::{Answer, Order, REQUEST_BYTES_MAX, Wanted, hear, say};
use crate::coordinator::Coordinator;
use crate::error::ServiceError;
use crate::job::{Control, Job};
use crate::peers::describe;
use crate::request::MigrateRequest;

/// A peer that has been let in says what it wants at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// And at least so often, that the other host sees that this one lives.
const ALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// At most so often the state of the job is told.
const CHANGES_INTERVAL: Duration = Duration::from_millis(500);

impl Coordinator {
    /// The other end: does what a peer asks for that may, and tells it how that goes.
    pub async fn obey(
        self: Arc<Self>,
        peer: PeerName,
        connection: Box<dyn Connection>,
    ) -> io::Result<()> {
        let (reader, mut writer) = tokio::io::split(connection);
        let mut reader = BufReader::new(reader);
        let order = tokio::time::timeout(REQUEST_TIMEOUT, hear(&mut reader, REQUEST_BYTES_MAX));
        let order = order.await.map_err(|_| io::ErrorKind::TimedOut)??;
        let Some(order @ Order::Return { .. }) = order else {
            let text =
                "it was not told what to bring back; install the same vmgang version on both hosts";
            return say(&mut writer, &Answer::Refused(text.to_owned())).await;
        };
        let (job, changes) = match self.give_back(order, &peer).await {
            Ok(started) => started,
            Err(error) => {
                let text = error.sentence().to_owned();
                return say(&mut writer, &Answer::Refused(text)).await;
            }
        };
        let id = Uuid::try_parse(&job.id).map_err(io::Error::other)?;
        say(&mut writer, &Answer::Started { job: id, changes }).await?;
        // The job goes on if nobody listens any more.
        tokio::select! {
            told = tell(&mut writer, &job) => told,
            heard = listen(&mut reader, &job) => heard,
        }
    }

    /// Starts the job that brings a peer its guests.
    async fn give_back(
        self: &Arc<Self>,
        order: Order,
        peer: &PeerName,
    ) -> Result<(Arc<Job>, Vec<String>), ServiceError> {
        let Order::Return {
            job: of,
            gang,
            members,
            destination,
            options,
        } = order
        else {
            return Err(ServiceError::Internal("nothing to bring back".to_owned()));
        };
        let domains = self.domains().await?;
        let (coming, changes) = compare(gang.as_deref(), &members, &domains);
        if coming.is_empty() {
            return Err(ServiceError::NoRunningMember(changes.join("; ")));
        }
        let mut choices = HashMap::new();
        for (name, choice) in options {
            choices.insert(name, choice.into_variant()?);
        }
        let uuids: Vec<String> = coming
            .iter()
            .map(|domain| domain.uuid.to_string())
            .collect();
        let selection = OwnedVariant::try_from(Variant::from(uuids))
            .map_err(|error| ServiceError::Internal(error.to_string()))?;
        choices.insert("domains".to_owned(), selection);
        let request = MigrateRequest {
            as_they_are: true,
            ..MigrateRequest::parse("", &destination, choices)?
        };
        tracing::info!(
            peer = describe(peer),
            of,
            destination,
            "a peer wants its guests back"
        );
        let job = self.migrate(request).await?;
        self.show_started(&job);
        Ok((job, changes))
    }
}

/// Who can come back, and in what respects things are not as they were.
fn compare<'a>(
    gang: Option<&str>,
    members: &[Wanted],
    domains: &'a [DomainInfo],
) -> (Vec<&'a DomainInfo>, Vec<String>) {
    let mut coming = Vec::new();
    let mut changes = Vec::new();
    for member in members {
        let name = &member.name;
        match domains.iter().find(|domain| domain.uuid == member.uuid) {
            None => changes.push(format!("domain {name} is not there any more")),
            Some(domain) if !domain.active() => changes.push(format!(
                "domain {name} is {} and stays there",
                domain.state.as_str()
            )),
            Some(domain) => {
                if domain.name != *name {
                    changes.push(format!("domain {name} is called {} now", domain.name));
                }
                coming.push(domain);
            }
        }
    }
    let in_gang = |domain: &&DomainInfo| match (&domain.membership, gang) {
        (Ok(Some(member)), Some(gang)) => member.gang == gang,
        _ => false,
    };
    for domain in domains.iter().filter(in_gang) {
        if !members.iter().any(|member| member.uuid == domain.uuid) {
            changes.push(format!(
                "domain {} has joined the gang there and stays",
                domain.name
            ));
        }
    }
    (coming, changes)
}

/// Tells how a job goes, to its end.
async fn tell(writer: &mut (impl AsyncWrite + Unpin), job: &Job) -> io::Result<()> {
    let mut changes = job.watch();
    loop {
        changes.mark_unchanged();
        let mut view = job.view();
        if let Some(report) = view.report.take() {
            return say(writer, &Answer::Ended(Box::new(report))).await;
        }
        say(writer, &Answer::View(Box::new(view))).await?;
        let told = Instant::now();
        let mut end = job.watch();
        tokio::select! {
            changed = async {
                let changed = changes.changed().await;
                tokio::time::sleep(CHANGES_INTERVAL.saturating_sub(told.elapsed())).await;
                changed
            } => if changed.is_err() { return Ok(()); },
            _ = end.wait_for(|_| job.state().ended()) => {}
            () = tokio::time::sleep(ALIVE_INTERVAL) => {}
        }
    }
}

/// Does to the job what the peer says meanwhile.
async fn listen(reader: &mut (impl AsyncBufRead + Unpin), job: &Job) -> io::Result<()> {
    while let Some(order) = hear(reader, REQUEST_BYTES_MAX).await? {
        let control = match order {
            Order::Abort => Control::Abort,
            Order::SetBandwidth(bytes_per_s) => Control::SetBandwidth(bytes_per_s),
            Order::Return { .. } => return Err(io::Error::other("a second request")),
        };
        // It may have ended just now.
        let _ = job.control(control);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vmgang_libvirt::{DomainState, Membership};

    use super::*;

    fn domain(n: u128, name: &str, active: bool, gang: Option<&str>) -> DomainInfo {
        DomainInfo {
            name: name.into(),
            uuid: Uuid::from_u128(n),
            id: active.then_some(1),
            state: match active {
                true => DomainState::Running,
                false => DomainState::ShutOff,
            },
            persistent: true,
            memory_bytes: 1,
            membership: Ok(gang.map(|gang| Membership {
                gang: gang.into(),
                order: None,
            })),
        }
    }

    #[test]
    fn what_has_changed_is_named_and_who_can_comes() {
        let wanted = |n, name: &str| Wanted {
            uuid: Uuid::from_u128(n),
            name: name.into(),
        };
        let domains = [
            domain(1, "web1", true, Some("web")),
            domain(2, "renamed", true, Some("web")),
            domain(3, "web3", false, Some("web")),
            domain(5, "new", true, Some("web")),
            domain(6, "other", true, None),
        ];
        let members = [
            wanted(1, "web1"),
            wanted(2, "web2"),
            wanted(3, "web3"),
            wanted(4, "web4"),
        ];
        let (coming, changes) = compare(Some("web"), &members, &domains);
        let names: Vec<_> = coming.iter().map(|domain| &*domain.name).collect();
        assert_eq!(names, ["web1", "renamed"]);
        let changes = changes.join("\n");
        for part in [
            "web2 is called renamed now",
            "web3 is shut off",
            "web4 is not there any more",
            "new has joined the gang",
        ] {
            assert!(changes.contains(part), "{part}: {changes}");
        }
        assert!(!changes.contains("other"), "{changes}");
    }
}
