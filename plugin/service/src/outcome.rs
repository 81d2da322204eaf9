//! Where a member is after its migration has ended, and what the migration cost its guest.
//! Asks libvirt and the peer; never guesses: what is not known is said to be unknown.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmgang_libvirt::{DomainInfo, DomainState};

use crate::destination::domstate_there;
use crate::hypervisor::{Hypervisor, ask};
use crate::report::DomainOutcome;
use crate::tunnel::Session;

/// libvirt resumes a guest right after a cancelled migration; this is how long it may take.
const RESUME_TRIES: u32 = 20;
const RESUME_INTERVAL: Duration = Duration::from_millis(100);
const PEER_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Default, Clone, Copy)]
pub struct Measured {
    pub downtime_ms: Option<u64>,
    pub iterations: Option<u64>,
}

/// Downtime and iterations of a member that migrated: from the destination's libvirt, else from
/// this one's (which has them only if the domain is persistent here).
pub async fn measured(
    hypervisor: &Arc<dyn Hypervisor>,
    session: &dyn Session,
    member: usize,
    uuid: Uuid,
) -> Measured {
    let asked = tokio::time::timeout(PEER_TIMEOUT, session.member_outcome(member)).await;
    let there = match asked {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => {
            tracing::debug!(%error, "the peer could not tell a member's outcome");
            None
        }
        Err(_) => None,
    };
    let mut measured = there.map_or(Measured::default(), |outcome| Measured {
        downtime_ms: outcome.downtime_ms,
        iterations: outcome.iterations,
    });
    if (measured.downtime_ms.is_none() || measured.iterations.is_none())
        && let Ok(here) = ask(hypervisor, move |hypervisor| hypervisor.completed_job(uuid)).await
    {
        measured.downtime_ms = measured.downtime_ms.or(here.downtime_ms);
        measured.iterations = measured.iterations.or(here.iterations);
    }
    measured
}

/// What a member that is paused here may have been doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostCopy {
    Never,
    /// It may have gone to post-copy.
    Possible,
    /// It had done so before this job.
    Broken,
}

/// Where a member is that did not migrate. `error` is what went wrong with it, if anything.
pub async fn after_failure(
    hypervisor: &Arc<dyn Hypervisor>,
    domain: &DomainInfo,
    destination: &str,
    post_copy: PostCopy,
    error: Option<String>,
) -> (DomainOutcome, Option<String>) {
    let uuid = domain.uuid;
    let mut unknown = String::new();
    for attempt in 0..RESUME_TRIES {
        if attempt > 0 {
            tokio::time::sleep(RESUME_INTERVAL).await;
        }
        let asked = ask(hypervisor, move |hypervisor| hypervisor.domain(uuid)).await;
        unknown = match asked {
            // As it was before: a guest the user had paused stays paused.
            Ok(now)
                if now.active() && now.state == domain.state && post_copy != PostCopy::Broken =>
            {
                return (DomainOutcome::Source, error);
            }
            Ok(now) if now.state == DomainState::Running => return (DomainOutcome::Source, error),
            Ok(now) if now.state == DomainState::Paused && post_copy != PostCopy::Never => {
                post_copy_broke(&domain.name, destination)
            }
            Ok(now) if now.state == DomainState::Paused => paused(&domain.name, destination),
            Ok(now) if now.active() => {
                format!("the guest is {} on this host", now.state.as_str())
            }
            Ok(now) => {
                unknown = format!(
                    "the domain is {} on this host; look for it on the destination before starting it here",
                    now.state.as_str()
                );
                break;
            }
            Err(crate::error::ServiceError::UnknownDomain(_)) => {
                unknown = "the domain is not on this host any more; look for it on the destination"
                    .into();
                break;
            }
            Err(asked) => format!("its state is not known: {}", asked.sentence()),
        };
    }
    let text = match error {
        Some(error) => format!("{error}; {unknown}"),
        None => unknown,
    };
    (DomainOutcome::Failed, Some(text))
}

/// What to do about a guest that is paused here: it may have been started over there, and must
/// never run twice.
pub(crate) fn paused(name: &str, destination: &str) -> String {
    format!(
        "the guest is paused on this host; make sure first that it does not run on the destination ({}), then `virsh resume {name}` lets it go on",
        domstate_there(destination, name)
    )
}

/// What to do about a guest that is paused here and may have gone to post-copy: then each host has a
/// part of its memory.
fn post_copy_broke(name: &str, destination: &str) -> String {
    format!(
        "the guest is paused on this host; if it went to post-copy, only `vmgang migrate --postcopy-resume --domains {name} {destination}` lets it go on, once both hosts reach each other, and it must not be resumed here; `virsh domstate --reason {name}` tells whether it did"
    )
}
