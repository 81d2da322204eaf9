//! What must hold at the end of a run, whatever went wrong. What must hold at every step is checked
//! where it happens: bytes in `qemu`, places in `world`.

use std::path::Path;
use std::time::Duration;

use vmgang_service::report::{DomainOutcome, JobState, Report};

use crate::run::Ending;
use crate::world::{Here, There, World};

/// What only a peer says that does not keep to the protocol, or a window that differs.
const BROKEN_RULES: [&str; 12] = [
    "digest",
    "keep to the protocol",
    "has no place",
    "than it was",
    "not open",
    "out of order",
    "credits",
    "frame was lost",
    "session was lost",
    "again and again",
    "slot",
    "ended early; see the log",
];

/// From the first member that is let go to the last.
const SPREAD: Duration = Duration::from_millis(351);

/// A report tells where each member is now.
pub fn report(world: &World, report: &Report) {
    world.step(format_args!("report {:?}", report.state));
    let mut states = Vec::new();
    for domain in &report.domains {
        let Some(member) = world.member(domain.uuid) else {
            world.wrong(format!("nobody knows {}", domain.name));
            continue;
        };
        states.push(domain.state);
        let (here, there) = {
            let guest = world.guest(member);
            (guest.here, guest.there)
        };
        world.step(format_args!("member {member} {:?}", domain.state));
        let true_word = match domain.state {
            DomainOutcome::Migrated => here == Here::Gone && there == There::Running,
            DomainOutcome::Source => {
                // What the next daemon finds when nobody was left to suspend it.
                let mistaken = world.plan.verdict_lost == Some(member);
                here == Here::Running && (there != There::Running || mistaken)
            }
            DomainOutcome::Failed => domain.error.is_some(),
        };
        if !true_word {
            world.wrong(format!(
                "member {member} is reported as {:?}, and is {here:?} here and {there:?} there",
                domain.state
            ));
        }
    }
    let all = |state| states.iter().all(|one| *one == state);
    let right = match report.state {
        JobState::Completed => all(DomainOutcome::Migrated),
        JobState::Failed | JobState::Aborted => all(DomainOutcome::Source),
        JobState::Partial => !all(DomainOutcome::Migrated) && !all(DomainOutcome::Source),
        _ => false,
    };
    if !right {
        world.wrong(format!("{:?} with members {states:?}", report.state));
    }
    if report.state != JobState::Completed && report.error.is_none() {
        world.wrong(format!("{:?} without a reason", report.state));
    }
}

/// All have settled.
pub fn at_the_end(world: &World, ending: &Ending) {
    let plan = &world.plan;
    let members: Vec<_> = world
        .guests()
        .map(|guest| (guest.here, guest.there, guest.released.is_some()))
        .collect();
    let killed = matches!(ending, Ending::ToldLater(..) | Ending::NoJob);
    for (member, (here, there, released)) in members.iter().enumerate() {
        let runs = usize::from(*here == Here::Running) + usize::from(*there == There::Running);
        // Suspended because it might have run there, when the daemon that knew that was killed.
        let waits = *here == Here::Paused && matches!(ending, Ending::ToldLater(..));
        // And nobody suspends it when the daemon is killed in that moment.
        let mistaken = plan.verdict_lost == Some(member) && killed;
        let excused = (waits && runs == 0) || (mistaken && runs == 2);
        if runs != 1 && *here != Here::Dead && !excused {
            world.wrong(format!("guest {member} runs in {runs} places"));
        }
        if *there == There::Running && !released {
            world.wrong(format!("guest {member} migrated without a release"));
        }
        if matches!(there, There::Incoming | There::Loaded) {
            world.wrong(format!(
                "guest {member} is left {there:?} at the destination"
            ));
        }
    }
    if !plan.continue_on_failure && !killed && !world.abort_was_requested() {
        released_together(world);
    }
    let text = match ending {
        Ending::Refused(text) => text.clone(),
        Ending::Reported(_, text) | Ending::ToldLater(_, text) => text.clone().unwrap_or_default(),
        Ending::NoJob => String::new(),
    };
    if !plan.corrupts()
        && let Some(rule) = BROKEN_RULES.iter().find(|rule| text.contains(**rule))
    {
        world.wrong(format!("nobody broke a rule ({rule}): {text}"));
    }
    let short_of_memory = plan.available.1 < 1 << 40;
    if plan.is_clean() {
        let completed = matches!(ending, Ending::Reported(JobState::Completed, None));
        let refused = matches!(ending, Ending::Refused(_)) && short_of_memory;
        if !completed && !refused {
            world.wrong(format!("nothing was in the way, and yet: {ending:?}"));
        }
    }
}

/// No file and no socket.
pub fn nothing_left(world: &World, root: &Path) {
    for host in ["a", "b"] {
        for runtime in ["r", "r.left", "r.left.left"] {
            let path = root.join(host).join(runtime).join("migrate");
            let left = std::fs::read_dir(path).map_or(0, Iterator::count);
            if left > 0 {
                world.wrong(format!("{left} jobs' directories are left on {host}"));
            }
        }
    }
    let sockets = world.net().sockets.len();
    if sockets > 0 {
        world.wrong(format!("{sockets} sockets are left"));
    }
}

/// Nobody stays held for long once the first one was let go, unless libvirt has answered for it.
fn released_together(world: &World) {
    let Some(first) = world.guests().filter_map(|guest| guest.released).min() else {
        return;
    };
    for (member, guest) in world.guests().enumerate() {
        let end = guest.released.or(guest.answered);
        if end.is_none_or(|end| end > first + SPREAD) {
            drop(guest);
            world.wrong(format!("guest {member} was not released with the others"));
        }
    }
}
