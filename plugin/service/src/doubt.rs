//! Guests that may run on both hosts: the destination had all of the guest when the answer of its libvirt
//! was lost, and libvirt here takes a lost answer for a failure and lets the guest go on.
//!
//! So the guest here is suspended at once, and goes on only when the destination's libvirt has said
//! that it does not run there. Must not: end a guest on either host.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;
use vmgang_libvirt::DomainInfo;

use crate::destination::domstate_there;
use crate::hypervisor::{Hypervisor, ask};
use crate::libvirt_access::DestinationLibvirt;
use crate::outcome::{self, PostCopy};
use crate::report::DomainOutcome;

const ATTEMPTS: u32 = 20;
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// How long a job waits for the destination's word.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long it is asked afterwards, and how often: its network may come back, or the host.
const ASKED_FOR: Duration = Duration::from_secs(24 * 3600);
/// How often a job asks, unless it hears the same twice.
const ASKED: u32 = 4;
const ASKED_EVERY: Duration = Duration::from_secs(5);

/// Suspends the guest here, which libvirt has let go on or is about to.
pub(crate) async fn suspend(hypervisor: Arc<dyn Hypervisor>, uuid: Uuid) {
    for _ in 0..ATTEMPTS {
        let suspended = ask(&hypervisor, move |hypervisor| {
            hypervisor.suspend(uuid)?;
            hypervisor.domain(uuid)
        });
        match suspended.await {
            Ok(domain) if domain.state != vmgang_libvirt::DomainState::Running => return,
            _ => tokio::time::sleep(RETRY_PAUSE).await,
        }
    }
    tracing::error!(domain = %uuid, "cannot be suspended, and may run on both hosts");
}

/// What the destination says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    Active,
    Absent,
    Unknown,
}

async fn there(
    hypervisor: &Arc<dyn Hypervisor>,
    uuid: Uuid,
    libvirt: &DestinationLibvirt,
) -> There {
    let uri = libvirt.uri().to_owned();
    let asked = ask(hypervisor, move |hypervisor| {
        hypervisor.inspect_destination(&uri)
    });
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(found)) => {
            let active = found
                .domains
                .iter()
                .any(|there| there.uuid == uuid && there.active);
            if active { There::Active } else { There::Absent }
        }
        _ => There::Unknown,
    }
}

/// Finds out where the suspended guest is to run, and says so. If the destination, which goes by that
/// name and has that libvirt, does not answer, it is asked on and on, also when the job is over.
pub(crate) async fn settle(
    hypervisor: Arc<dyn Hypervisor>,
    domain: DomainInfo,
    (destination, libvirt): (&str, DestinationLibvirt),
    error: Option<String>,
) -> (DomainOutcome, Option<String>) {
    let name = domain.name.clone();
    let because = error.unwrap_or_else(|| "libvirt's answer about the end was lost".into());
    let failed = |what: String| (DomainOutcome::Failed, Some(format!("{because}; {what}")));
    // What libvirt there is about to end is still there at first.
    let mut found = There::Unknown;
    let mut in_a_row = 0;
    for _ in 0..ASKED {
        let now = there(&hypervisor, domain.uuid, &libvirt).await;
        in_a_row = if now == found { in_a_row + 1 } else { 1 };
        found = now;
        if found != There::Active && in_a_row == 2 {
            break;
        }
        tokio::time::sleep(ASKED_EVERY).await;
    }
    match found {
        There::Active => failed(runs_there(&name, destination)),
        There::Absent => {
            go_on(&hypervisor, &domain).await;
            // Its QEMU may have ended meanwhile.
            let never = PostCopy::Never;
            outcome::after_failure(&hypervisor, &domain, destination, never, Some(because)).await
        }
        There::Unknown => {
            let there = destination.to_owned();
            tokio::spawn(ask_on(hypervisor, domain, there, libvirt));
            failed(format!(
                "the guest may run on the destination, which does not answer, so it is paused on this host; it goes on by itself as soon as the destination says that it does not run there. Otherwise make sure that it does not ({}), and then `virsh resume {name}`",
                domstate_there(destination, &name)
            ))
        }
    }
}

fn runs_there(name: &str, destination: &str) -> String {
    format!(
        "the guest has arrived on the destination ({}), and what is left of it on this host is paused and must not be resumed; `virsh destroy {name}` on this host removes it",
        domstate_there(destination, name)
    )
}

async fn go_on(hypervisor: &Arc<dyn Hypervisor>, domain: &DomainInfo) {
    let uuid = domain.uuid;
    let name = &domain.name;
    match ask(hypervisor, move |hypervisor| hypervisor.resume(uuid)).await {
        Ok(()) => tracing::info!(
            domain = name,
            "does not run on the destination: goes on here"
        ),
        Err(error) => {
            let error = error.sentence();
            tracing::error!(
                domain = name,
                error,
                "cannot be resumed here; use `virsh resume`"
            );
        }
    }
}

async fn ask_on(
    hypervisor: Arc<dyn Hypervisor>,
    domain: DomainInfo,
    destination: String,
    libvirt: DestinationLibvirt,
) {
    let until = tokio::time::Instant::now() + ASKED_FOR;
    while tokio::time::Instant::now() < until {
        tokio::time::sleep(ASKED_EVERY).await;
        let uuid = domain.uuid;
        let here = ask(&hypervisor, move |hypervisor| hypervisor.domain(uuid)).await;
        // Somebody else has decided.
        if here.is_ok_and(|here| here.state != vmgang_libvirt::DomainState::Paused) {
            return;
        }
        match there(&hypervisor, uuid, &libvirt).await {
            There::Active => {
                tracing::warn!(
                    domain = domain.name,
                    "{}",
                    runs_there(&domain.name, &destination)
                );
                return;
            }
            There::Absent => {
                go_on(&hypervisor, &domain).await;
                return;
            }
            There::Unknown => {}
        }
    }
}
