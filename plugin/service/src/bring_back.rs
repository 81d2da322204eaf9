//! `Return`: the members of a job that has ended come back. The host they are on now is asked to migrate
//! them, and tells how it goes; here that is shown as a job of the same id.
//!
//! What is said over the connection is lines of JSON, see docs/protocol.md.
//! Must not: decide who may ask; `access.rs` does. Whoever is asked does what it does for a call on its own bus.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader,
};
use uuid::Uuid;
use vmgang_engine::{Connection, PeerAddress, PeerName, connect_control};
use vmgang_libvirt::DomainInfo;
use zbus::{OwnedVariant, Variant};

use crate::coordinator::Coordinator;
use crate::destination::Destination;
use crate::error::ServiceError;
use crate::history::Record;
use crate::hypervisor::ask;
use crate::job::{Control, Job, JobView};
use crate::peers::describe;
use crate::report::{Bytes, DomainOutcome, DomainReport, JobState, Report};
use crate::request::MigrateRequest;

/// A peer that has been let in says what it wants at once.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The other host looks at its members and at this host before it answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// At most so often the state of the job is told.
const CHANGES_INTERVAL: Duration = Duration::from_millis(500);
/// Names of 1024 members and some options.
const REQUEST_BYTES_MAX: u64 = 256 * 1024;
/// The state of 1024 members.
const ANSWER_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// These are to come back.
    Return {
        /// What had brought them, for the log.
        job: String,
        gang: Option<String>,
        members: Vec<Wanted>,
        /// The host that asks, as the other one reaches it.
        destination: String,
        options: HashMap<String, Choice>,
    },
    Abort,
    SetBandwidth(Option<u64>),
}

/// A member as it was when it left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Wanted {
    uuid: Uuid,
    name: String,
}

/// The value of an option.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Choice {
    Flag(bool),
    Number(u64),
    Text(String),
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// Nothing has changed. A sentence for the person who asked.
    Refused(String),
    Started {
        job: Uuid,
        /// What is not as it was when the members left.
        changes: Vec<String>,
    },
    View(Box<JobView>),
    Ended(Box<Report>),
}

/// A request to bring members back.
#[derive(Debug)]
pub struct ReturnRequest {
    /// The job that has taken them away.
    pub job: String,
    /// This host as the other one reaches it; `None`: in the way in which that one was named.
    pub destination: Option<String>,
    /// As for a migration, but for the selection.
    pub options: HashMap<String, OwnedVariant>,
}

impl Choice {
    fn read(name: &str, value: &OwnedVariant) -> Result<Choice, ServiceError> {
        let value: &Variant<'_> = value;
        let value = value.clone();
        if let Ok(flag) = bool::try_from(value.clone()) {
            return Ok(Choice::Flag(flag));
        }
        if let Ok(number) = u64::try_from(value.clone()) {
            return Ok(Choice::Number(number));
        }
        String::try_from(value).map(Choice::Text).map_err(|_| {
            ServiceError::InvalidOption(format!(
                "the option {name} is neither a flag (b), a number (t) nor a text (s)"
            ))
        })
    }

    fn into_variant(self) -> Result<OwnedVariant, ServiceError> {
        let value = match self {
            Choice::Flag(flag) => Variant::from(flag),
            Choice::Number(number) => Variant::from(number),
            Choice::Text(text) => Variant::from(text),
        };
        OwnedVariant::try_from(value)
            .map_err(|error| ServiceError::InvalidOption(error.to_string()))
    }
}

impl Coordinator {
    /// Has the members of an ended job brought back. Returns once the other host has started to, with what
    /// has changed meanwhile; an error means that nothing is under way.
    pub async fn bring_back(
        self: &Arc<Self>,
        request: ReturnRequest,
    ) -> Result<(Arc<Job>, Vec<String>), ServiceError> {
        let (record, destination) = self.ended_migration(&request.job)?;
        let (there, peer) = match &record.peer {
            Some(peer) => {
                let peer: PeerAddress = peer
                    .parse()
                    .map_err(|error| ServiceError::Internal(format!("{error}")))?;
                (destination, peer)
            }
            None => {
                let peer = destination.peer();
                (destination, peer)
            }
        };
        let away = self.away(&record).await?;
        let host = ask(&self.parts.hypervisor, |hypervisor| hypervisor.hostname()).await?;
        let here = match request.destination {
            Some(here) => here,
            None => there.seen_from_there(&host),
        };
        Destination::parse(&here).map_err(ServiceError::InvalidDestination)?;
        let mut options = HashMap::new();
        for (name, value) in &request.options {
            if ["domains", "all"].contains(&name.as_str()) {
                return Err(ServiceError::InvalidOption(format!(
                    "the option {name} does not go with a return: the job's members come back"
                )));
            }
            options.insert(name.clone(), Choice::read(name, value)?);
        }
        let order = Order::Return {
            job: record.report.job.clone(),
            gang: record.report.gang.clone(),
            members: away,
            destination: here.clone(),
            options,
        };
        let transport = (self.parts.transport)().map_err(ServiceError::TlsFailed)?;
        let connection = connect_control(&*vmgang_engine::system(), &peer, &transport).await?;
        self.parts.peers.connected(&peer.to_string());
        let (reader, mut writer) = tokio::io::split(connection);
        let mut reader = BufReader::new(reader);
        let broke = |error: io::Error| {
            ServiceError::PeerUnreachable(format!(
                "vmgangd on {peer} was asked to bring the members back and has not answered ({error}); see there with `vmgang status` whether it does"
            ))
        };
        say(&mut writer, &order).await.map_err(broke)?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, hear(&mut reader, ANSWER_BYTES_MAX));
        let answer = answer
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let (id, changes) = match answer.map_err(broke)? {
            Some(Answer::Started { job, changes }) => (job, changes),
            Some(Answer::Refused(reason)) => {
                return Err(ServiceError::PeerRefused(format!(
                    "vmgangd on {peer} does not bring the members back: {reason}"
                )));
            }
            _ => return Err(broke(io::Error::other("it answers something else"))),
        };
        let (job, mut control) = Job::start(id, record.report.gang.as_deref(), &here, &[], false);
        let job = Arc::new(job);
        self.add(&job)?;
        tracing::info!(job = job.id, peer = %peer, of = record.report.job, "members are brought back");
        let (coordinator, started) = (self.clone(), job.clone());
        tokio::spawn(async move {
            let said = async {
                while let Some(control) = control.recv().await {
                    let order = match control {
                        Control::Abort | Control::DaemonEnds => Order::Abort,
                        Control::SetBandwidth(bytes_per_s) => Order::SetBandwidth(bytes_per_s),
                        // Not offered for such a job.
                        Control::StartPostCopy => continue,
                    };
                    if say(&mut writer, &order).await.is_err() {
                        break;
                    }
                }
                std::future::pending::<()>().await;
            };
            let report = tokio::select! {
                report = follow(&mut reader, &job) => report,
                () = said => None,
            };
            let report = match report {
                Some(report) => report,
                None => coordinator.lost_sight(&job, &record, &peer).await,
            };
            job.close_timeline(&report, Vec::new());
            coordinator.write_record(&Record {
                started_unix_s: job.started_unix_s,
                barrier_approximate: job.view().barrier_approximate,
                balloons: Vec::new(),
                // It is this host that they came to.
                peer: None,
                timeline: job.timeline().map(Arc::unwrap_or_clone),
                report: report.clone(),
            });
            tracing::info!(
                job = job.id,
                state = report.state.as_str(),
                error = report.error,
                "job ended"
            );
            coordinator.has_ended(&job, report);
        });
        Ok((started, changes))
    }

    /// A job that has moved members away from here.
    fn ended_migration(&self, id: &str) -> Result<(Record, Destination), ServiceError> {
        let records = self.parts.history.load().map_err(|error| {
            ServiceError::Internal(format!("the job history cannot be read: {error}"))
        })?;
        let record = records.into_iter().find(|record| record.report.job == id);
        let Some(record) = record else {
            return Err(ServiceError::InvalidOption(format!(
                "there is no job {id}; `vmgang history` lists those there are"
            )));
        };
        if record.running() {
            return Err(ServiceError::Busy(format!(
                "the job {id} has not ended; wait for it (`vmgang status {id}`) or stop it (`vmgang abort {id}`)"
            )));
        }
        let destination = Destination::parse(&record.report.destination).map_err(|_| {
            ServiceError::InvalidOption(format!(
                "the job {id} was not a migration that this host had begun; migrate its members from {}",
                record.report.destination
            ))
        })?;
        Ok((record, destination))
    }

    /// Those of its members that were moved and do not run here.
    async fn away(&self, record: &Record) -> Result<Vec<Wanted>, ServiceError> {
        let running = ask(&self.parts.hypervisor, |hypervisor| hypervisor.running()).await?;
        let id = &record.report.job;
        let moved = record.report.domains.iter();
        let moved = moved.filter(|domain| domain.state == DomainOutcome::Migrated);
        let mut moved = moved.peekable();
        if moved.peek().is_none() {
            return Err(ServiceError::NoRunningMember(format!(
                "the job {id} has moved nobody, so nobody can come back"
            )));
        }
        let away: Vec<Wanted> = moved
            .filter(|domain| !running.contains(&domain.uuid))
            .map(|domain| Wanted {
                uuid: domain.uuid,
                name: domain.name.clone(),
            })
            .collect();
        if away.is_empty() {
            return Err(ServiceError::NoRunningMember(format!(
                "all members of the job {id} run here already"
            )));
        }
        Ok(away)
    }

    /// What can be said without the other host.
    async fn lost_sight(&self, job: &Job, of: &Record, peer: &PeerAddress) -> Report {
        let view = job.view();
        let running = ask(&self.parts.hypervisor, |hypervisor| hypervisor.running()).await;
        let running = running.unwrap_or_default();
        let domains = view.members.iter().map(|member| {
            let here = running.contains(&member.uuid);
            DomainReport {
                name: member.name.clone(),
                uuid: member.uuid,
                state: match here {
                    true => DomainOutcome::Migrated,
                    false => DomainOutcome::Failed,
                },
                elapsed_ms: 0,
                downtime_ms: None,
                iterations: None,
                qemu_stream_bytes: member.qemu_stream_bytes,
                wire_bytes: member.wire_bytes,
                ballooned_bytes: None,
                error: (!here).then(|| {
                    let name = &member.name;
                    format!(
                        "where it runs is not known; check `virsh domstate {name}` on {}",
                        of.report.destination
                    )
                }),
            }
        });
        Report {
            job: job.id.clone(),
            gang: job.gang.clone(),
            destination: job.destination.clone(),
            state: JobState::Partial,
            error: Some(format!(
                "lost vmgangd on {peer} while it brought the members back; it may go on: see there with `vmgang status {}`",
                job.id
            )),
            elapsed_ms: u64::try_from(job.elapsed().as_millis()).unwrap_or(u64::MAX),
            switchover_spread_ms: None,
            bytes: Bytes::default(),
            domains: domains.collect(),
        }
    }

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
        // As it was over there, where they are persistent if they are here.
        for name in ["persistent", "undefinesource"] {
            if coming.iter().any(|domain| domain.persistent) {
                choices.insert(name.to_owned(), Choice::Flag(true).into_variant()?);
            }
        }
        let uuids: Vec<String> = coming
            .iter()
            .map(|domain| domain.uuid.to_string())
            .collect();
        let selection = OwnedVariant::try_from(Variant::from(uuids))
            .map_err(|error| ServiceError::Internal(error.to_string()))?;
        choices.insert("domains".to_owned(), selection);
        let request = MigrateRequest::parse("", &destination, choices)?;
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

/// Shows what the other host tells, to the job's report; `None` if that does not come.
async fn follow(reader: &mut (impl AsyncBufRead + Unpin), job: &Job) -> Option<Report> {
    loop {
        match hear(reader, ANSWER_BYTES_MAX).await {
            Ok(Some(Answer::View(now))) if !now.state.ended() => {
                job.update(|view| {
                    *view = JobView {
                        report: None,
                        ..*now
                    };
                });
            }
            Ok(Some(Answer::Ended(report))) if report.state.ended() && report.job == job.id => {
                return Some(*report);
            }
            Ok(other) => {
                tracing::debug!(
                    job = job.id,
                    ended = other.is_none(),
                    "the other host is not followed any more"
                );
                return None;
            }
            Err(error) => {
                tracing::debug!(job = job.id, %error, "the other host is not followed any more");
                return None;
            }
        }
    }
}

async fn say(writer: &mut (impl AsyncWrite + Unpin), what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    writer.flush().await
}

/// The next line, of so many bytes at most; `None` at the end. Not cancel-safe.
async fn hear<T: DeserializeOwned>(
    reader: &mut (impl AsyncBufRead + Unpin),
    bytes_max: u64,
) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let mut bounded = (&mut *reader).take(bytes_max);
    if bounded.read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::other("a line is cut off or too long"));
    }
    Ok(Some(serde_json::from_slice(&line)?))
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

    #[tokio::test]
    async fn lines_are_bounded_and_whole() {
        let said = Order::SetBandwidth(Some(5));
        let mut bytes = Vec::new();
        say(&mut bytes, &said).await.expect("written");
        let read = hear::<Order>(&mut &*bytes, 100).await.expect("read");
        assert_eq!(read, Some(said));
        assert!(hear::<Order>(&mut &*bytes, 5).await.is_err(), "too long");
        assert!(
            hear::<Order>(&mut &bytes[..5], 100).await.is_err(),
            "cut off"
        );
        assert!(
            hear::<Order>(&mut &b"{}\n"[..], 100).await.is_err(),
            "nothing"
        );
        assert_eq!(
            hear::<Order>(&mut &b""[..], 100).await.expect("the end"),
            None
        );
    }
}
