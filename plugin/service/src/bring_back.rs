//! `Return`: the members of a job that has ended come back. The host they are on now is asked to migrate
//! them (`bring_back/giving.rs` is its end), and tells how it goes; here that is shown as a job of the same id.
//!
//! Must not: move anything. Where members are when the other host is lost sight of is not guessed.

mod giving;
mod words;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufRead, BufReader};
use uuid::Uuid;
use vmgang_engine::{PeerAddress, connect_control};
use zbus::OwnedVariant;

use crate::coordinator::Coordinator;
use crate::destination::Destination;
use crate::error::ServiceError;
use crate::history::Record;
use crate::hypervisor::ask;
use crate::job::{Control, Job, JobView, MemberState, MemberView};
use crate::report::{Bytes, DomainOutcome, JobState, Report};
use crate::timeline::Timeline;
use words::{ANSWER_BYTES_MAX, Answer, Choice, Order, Wanted, hear, say};

/// The other host looks at its members and at this host before it answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);
/// The other host tells of the job every few seconds; one that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(30);

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
            members: away.clone(),
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
        let known = self.parts.history.load().unwrap_or_default();
        if known
            .iter()
            .any(|known| known.report.job == id.simple().to_string())
        {
            return Err(broke(io::Error::other(
                "it answers with the id of another job",
            )));
        }
        let (job, mut control) = Job::start(id, record.report.gang.as_deref(), &here, &[], false);
        let job = Arc::new(job);
        self.add(&job)?;
        let back = ComingBack {
            job: job.clone(),
            members: away,
            from: record.report.destination,
        };
        // This daemon may be killed meanwhile, and then knows nothing of how it ends.
        let ended =
            format!("vmgangd here has ended while vmgangd on {peer} brought the members back");
        self.write_record(&back.record(back.unseen(&ended, &[]), None));
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
                // Of what was asked for and nothing else, whatever the other host says.
                Some(report) => Report {
                    gang: job.gang.clone(),
                    destination: job.destination.clone(),
                    domains: report
                        .domains
                        .into_iter()
                        .filter(|domain| back.is_wanted(domain.uuid))
                        .collect(),
                    ..report
                },
                None => {
                    let hypervisor = &coordinator.parts.hypervisor;
                    let running = ask(hypervisor, |hypervisor| hypervisor.running()).await;
                    let lost = format!("lost vmgangd on {peer} while it brought the members back");
                    back.unseen(&lost, &running.unwrap_or_default())
                }
            };
            job.close_timeline(&report, Vec::new());
            let timeline = job.timeline().map(Arc::unwrap_or_clone);
            coordinator.write_record(&back.record(report.clone(), timeline));
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
}

/// Members on their way back to this host.
struct ComingBack {
    job: Arc<Job>,
    members: Vec<Wanted>,
    /// What the host on which they are was called when they went there.
    from: String,
}

impl ComingBack {
    fn is_wanted(&self, uuid: Uuid) -> bool {
        self.members.iter().any(|member| member.uuid == uuid)
    }

    /// What can be said without the other host, after what has happened.
    fn unseen(&self, happened: &str, running: &[Uuid]) -> Report {
        let job = &self.job;
        let mut members = job.view().members;
        members.retain(|member| self.is_wanted(member.uuid));
        if members.is_empty() {
            // It has not told yet who comes.
            let wanted = self.members.iter();
            let waits = |it: &Wanted| MemberView::new(&it.name, it.uuid, 0, MemberState::Waiting);
            members = wanted.map(waits).collect();
        }
        let domains = members
            .iter()
            .map(|member| match running.contains(&member.uuid) {
                true => member.report(DomainOutcome::Migrated, None),
                false => {
                    let (name, from) = (&member.name, &self.from);
                    let error = format!(
                        "where it runs is not known; check `virsh domstate {name}` on {from}"
                    );
                    member.report(DomainOutcome::Failed, Some(error))
                }
            });
        Report {
            job: job.id.clone(),
            gang: job.gang.clone(),
            destination: job.destination.clone(),
            state: JobState::Partial,
            error: Some(format!(
                "{happened}; it may go on: see there with `vmgang status {}`",
                job.id
            )),
            elapsed_ms: u64::try_from(job.elapsed().as_millis()).unwrap_or(u64::MAX),
            switchover_spread_ms: None,
            bytes: Bytes::default(),
            domains: domains.collect(),
        }
    }

    fn record(&self, report: Report, timeline: Option<Timeline>) -> Record {
        Record {
            started_unix_s: self.job.started_unix_s,
            barrier_approximate: self.job.view().barrier_approximate,
            balloons: Vec::new(),
            // It is this host that they come to.
            peer: None,
            timeline,
            report,
        }
    }
}

/// Shows what the other host tells, to the job's report; `None` if that does not come.
async fn follow(reader: &mut (impl AsyncBufRead + Unpin), job: &Job) -> Option<Report> {
    loop {
        let heard = tokio::time::timeout(SILENCE, hear(reader, ANSWER_BYTES_MAX)).await;
        match heard.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
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
