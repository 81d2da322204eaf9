//! libvirt's qemu hook: tells vmgangd what libvirt is about to do with a domain, and refuses an incoming
//! migration if the administrator's policy says so. `hooks/qemu` starts it.
//!
//! Must not: be in the way. It never calls libvirt, never waits for the daemon, writes nothing to its
//! standard output (libvirt would take that for the domain's new XML), and whatever goes wrong is no
//! reason to fail the operation.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use vmgang_hook::{
    Announcement, Event, MEETING_PLACE, POLICY_PATH, Policy, is_expected, read_uuid, socket_path,
};

/// What `hooks/qemu` passes on to libvirt as a failure. No other code is one: not that of a panic,
/// nor those of a shell that cannot start the program.
const REFUSED: u8 = 3;

/// libvirt writes the XML at once, so it is there unless the host is very busy.
const PATIENCE: Duration = Duration::from_millis(100);
/// When a policy needs to know which domain comes.
const PATIENCE_FOR_POLICY: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let mut next = || {
        let argument = arguments.next().unwrap_or_default();
        argument.to_string_lossy().into_owned()
    };
    let (name, operation, suboperation) = (next(), next(), next());
    let Some(event) = Event::of_hook(&operation, &suboperation) else {
        return ExitCode::SUCCESS;
    };
    match hook(&Places::of_this_host(), name, event) {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            // libvirt makes it a part of its own message.
            let _ = writeln!(std::io::stderr(), "vmgang: {refusal}");
            ExitCode::from(REFUSED)
        }
    }
}

/// Where things are on this host.
struct Places {
    meeting_place: PathBuf,
    policy: PathBuf,
}

impl Places {
    /// libvirt gives its hooks no environment of anybody's, so the variable is for tests.
    fn of_this_host() -> Places {
        let root = std::env::var_os("VMGANG_HOOK_ROOT").unwrap_or_default();
        let place = |path: &str| match root.is_empty() {
            true => PathBuf::from(path),
            false => Path::new(&root).join(path.trim_start_matches('/')),
        };
        Places {
            meeting_place: place(MEETING_PLACE),
            policy: place(POLICY_PATH),
        }
    }
}

/// Tells the daemon. The error is why the domain may not come.
fn hook(places: &Places, name: String, event: Event) -> Result<(), String> {
    let objection = match event {
        Event::Incoming => objection(&places.policy, &name),
        Event::Started | Event::Stopped => None,
    };
    let daemon = reach(&places.meeting_place);
    if daemon.is_none() && objection.is_none() {
        return Ok(());
    }
    let patience = match objection {
        Some(_) => PATIENCE_FOR_POLICY,
        None => PATIENCE,
    };
    let uuid = read_uuid(std::io::stdin().as_fd(), patience);
    // What an earlier daemon expected does not count.
    let through_vmgang =
        || daemon.is_some() && uuid.is_some_and(|uuid| is_expected(&places.meeting_place, uuid));
    if let Some(objection) = objection
        && !through_vmgang()
    {
        return Err(objection);
    }
    if let (Some(daemon), Some(uuid)) = (daemon, uuid) {
        let announcement = Announcement { event, uuid, name };
        // A full queue, or a daemon that has just ended: it will ask libvirt.
        let _ = daemon.send(&announcement.to_bytes());
    }
    Ok(())
}

/// Why a domain may not come unless it comes through vmgang.
fn objection(policy: &Path, name: &str) -> Option<String> {
    match Policy::load(policy) {
        Ok(policy) if policy.lets_in(name) => None,
        Ok(_) => Some(format!(
            "domain {name} may come to this host only through vmgang, says require_vmgang in {}; \
             use `vmgang migrate`, or have the name put under `except` there",
            policy.display()
        )),
        Err(error) => Some(format!(
            "domain {name} may come to this host only through vmgang until its policy is put right: {error}"
        )),
    }
}

/// The socket of a daemon that lives, connected; nothing that is done with it blocks.
fn reach(meeting_place: &Path) -> Option<UnixDatagram> {
    let socket = UnixDatagram::unbound().ok()?;
    socket.set_nonblocking(true).ok()?;
    socket.connect(socket_path(meeting_place)).ok()?;
    Some(socket)
}
