//! What `vmgang doctor` says of a host, and of a pair of hosts: facts in, findings out. The names of
//! checks, levels and fields are a contract.
//!
//! What preflight refuses is told by preflight itself ([`refusal`]), so that the doctor and a migration
//! never disagree. Must not: look anything up; `examination.rs` does.

use std::path::{Path, PathBuf};

use serde::Serialize;
use vmgang_engine::CertificateFacts;
use vmgang_libvirt::{Fit, Hardware, Processor, QemuUser, Versions};

use crate::error::ServiceError;

/// A certificate that expires sooner is to be renewed now.
const RENEW_S: i64 = 30 * 86_400;

/// What was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    Libvirt,
    Versions,
    Certificates,
    Directory,
    Clock,
    Gang,
    Job,
    MemoryBacking,
    Devices,
    Destination,
    Cpu,
    Peer,
    WayBack,
}

/// How much it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Ok,
    /// It works, and could be better.
    Advice,
    /// It works now; later, or in another way, it may not.
    Warning,
    /// A migration would be refused.
    Refused,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: Check,
    pub level: Level,
    /// The domain, gang, peer, host or file that it is about.
    pub subject: String,
    pub what: String,
    /// What to do; `None` only where all is well.
    pub fix: Option<String>,
}

/// The whole answer.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    /// No migration would be refused.
    pub ready: bool,
    pub host: String,
    pub destination: Option<String>,
    pub peer: Option<String>,
    /// Gangs that were looked at.
    pub gangs: Vec<String>,
    pub findings: Vec<Finding>,
}

impl Finding {
    pub(crate) fn ok(check: Check, subject: impl Into<String>, what: impl Into<String>) -> Finding {
        Finding {
            check,
            level: Level::Ok,
            subject: subject.into(),
            what: what.into(),
            fix: None,
        }
    }

    pub(crate) fn new(
        check: Check,
        level: Level,
        subject: impl Into<String>,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) -> Finding {
        Finding {
            check,
            level,
            subject: subject.into(),
            what: what.into(),
            fix: Some(fix.into()),
        }
    }
}

impl Diagnosis {
    /// Puts findings in order, each of them once, and tells whether a migration would be refused.
    pub(crate) fn conclude(mut self) -> Diagnosis {
        let mut known = Vec::new();
        for finding in std::mem::take(&mut self.findings) {
            if !known.contains(&finding) {
                known.push(finding);
            }
        }
        known.sort_by_key(|finding| finding.check);
        self.ready = known.iter().all(|finding| finding.level < Level::Refused);
        self.findings = known;
        self
    }
}

/// What a migration would be refused with.
pub(crate) fn refusal(subject: &str, error: &ServiceError) -> Finding {
    let (check, else_fix) = match error {
        ServiceError::UnknownGang(_)
        | ServiceError::UnknownDomain(_)
        | ServiceError::AlreadyInGang(_)
        | ServiceError::NoRunningMember(_)
        | ServiceError::InvalidMetadata(_)
        | ServiceError::InvalidOption(_) => (Check::Gang, "see `vmgang gang list`"),
        ServiceError::Busy(_) | ServiceError::JobEnded(_) => (Check::Job, "see `vmgang status`"),
        ServiceError::InvalidDestination(_)
        | ServiceError::DestinationUnreachable(_)
        | ServiceError::MemberNotMigratable(_) => (
            Check::Destination,
            "try `virsh -c DESTURI list --all` as root on this host",
        ),
        ServiceError::PeerUnreachable(_)
        | ServiceError::PeerRefused(_)
        | ServiceError::VersionMismatch(_)
        | ServiceError::NotAuthorized(_) => (
            Check::Peer,
            "see the log of vmgangd there: `journalctl -u vmgangd`",
        ),
        ServiceError::TlsFailed(_) => (
            Check::Certificates,
            "put the certificates of libvirt's qemu+tls in place on both hosts",
        ),
        ServiceError::LibvirtFailed(_) => (
            Check::Libvirt,
            "see that libvirtd runs: `virsh -c qemu:///system list` as root",
        ),
        ServiceError::Internal(_) => (
            Check::Peer,
            "see the log of vmgangd on both hosts: `journalctl -u vmgangd`",
        ),
    };
    // Sentences say what to do behind their last semicolon.
    let (what, fix) = match error.sentence().rsplit_once("; ") {
        Some((what, fix)) => (what, fix),
        None => (error.sentence(), else_fix),
    };
    Finding::new(check, Level::Refused, subject, what, fix)
}

/// Versions of this host, and of the destination if it is known.
pub(crate) fn versions(here: Versions, there: Option<(&str, Versions)>) -> Finding {
    let told = format!(
        "vmgang {}, libvirt {}, QEMU {}",
        env!("CARGO_PKG_VERSION"),
        dotted(here.libvirt),
        dotted(here.qemu)
    );
    let Some((destination, there)) = there else {
        return Finding::ok(Check::Versions, "this host", told);
    };
    let told_there = format!(
        "libvirt {}, QEMU {} there",
        dotted(there.libvirt),
        dotted(there.qemu)
    );
    // Releases of one minor version migrate to each other.
    if there.qemu / 1000 < here.qemu / 1000 {
        return Finding::new(
            Check::Versions,
            Level::Warning,
            destination,
            format!(
                "{told_there}: its QEMU is older than this host's {}, and QEMU supports moving to the same or a newer version only",
                dotted(here.qemu)
            ),
            "upgrade QEMU there, or move one unimportant guest first; its machine type must be one that both versions have",
        );
    }
    Finding::ok(
        Check::Versions,
        destination,
        format!("{told} here; {told_there}"),
    )
}

/// libvirt's way of writing versions, 11003002, as people write them.
fn dotted(version: u32) -> String {
    format!(
        "{}.{}.{}",
        version / 1_000_000,
        version / 1000 % 1000,
        version % 1000
    )
}

/// Whether the kernel takes its clock for synchronised; `None` if it does not tell.
pub(crate) fn clock(synchronised: Option<bool>) -> Finding {
    let here = "this host";
    match synchronised {
        Some(true) => Finding::ok(Check::Clock, here, "the clock is synchronised"),
        Some(false) => Finding::new(
            Check::Clock,
            Level::Warning,
            here,
            "the clock is not synchronised; certificates are judged by it, and guests that move to a host with another time see their clocks jump",
            "start chronyd or systemd-timesyncd: `timedatectl set-ntp true`",
        ),
        None => Finding::new(
            Check::Clock,
            Level::Advice,
            here,
            "the kernel does not tell whether the clock is synchronised",
            "see `timedatectl` on both hosts",
        ),
    }
}

/// Which of a host's two certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CertificateRole {
    Authority,
    Server,
    Client,
}

impl CertificateRole {
    pub(crate) fn name(self) -> &'static str {
        match self {
            CertificateRole::Authority => "CA certificate",
            CertificateRole::Server => "server certificate",
            CertificateRole::Client => "client certificate",
        }
    }
}

/// One certificate of this host, which calls itself `host`, at a time in seconds since 1970.
pub(crate) fn certificate(
    role: CertificateRole,
    file: &Path,
    facts: &CertificateFacts,
    host: &str,
    now_unix_s: i64,
) -> Finding {
    let subject = file.display().to_string();
    let name = role.name();
    let renew = "have the authority issue a new one, and put it there";
    // The client's own certificate is what the peer looks at. The server's counts when a gang comes here,
    // the authority's date only for libvirt.
    let level = match role {
        CertificateRole::Client => Level::Refused,
        CertificateRole::Authority | CertificateRole::Server => Level::Warning,
    };
    let finding = |level, what: String, fix: &str| {
        Finding::new(Check::Certificates, level, &subject, what, fix)
    };
    if facts.valid_to_unix_s <= now_unix_s {
        let date = day(facts.valid_to_unix_s);
        return finding(level, format!("the {name} expired on {date}"), renew);
    }
    if facts.valid_from_unix_s > now_unix_s {
        let date = day(facts.valid_from_unix_s);
        return finding(
            level,
            format!("the {name} is valid from {date} only"),
            "see whether this host's clock is right, or have the authority issue a new one",
        );
    }
    if facts.valid_to_unix_s - now_unix_s < RENEW_S {
        let days = (facts.valid_to_unix_s - now_unix_s) / 86_400;
        let date = day(facts.valid_to_unix_s);
        let what = format!("the {name} expires on {date}, in {days} days");
        return finding(Level::Warning, what, renew);
    }
    if role == CertificateRole::Server && !names_host(&facts.names, host) {
        let what = match facts.names.is_empty() {
            true => format!("the {name} has no subjectAltName, so other hosts refuse it"),
            false => format!(
                "the {name} is for {}, not for {host}, as this host calls itself; hosts that call it by that name refuse it",
                facts.names.join(", ")
            ),
        };
        let level = match facts.names.is_empty() {
            true => Level::Warning,
            false => Level::Advice,
        };
        let fix = "have the authority issue one with the names and addresses of this host as subjectAltName";
        return finding(level, what, fix);
    }
    let date = day(facts.valid_to_unix_s);
    Finding::ok(
        Check::Certificates,
        subject,
        format!("the {name} is valid until {date}"),
    )
}

fn names_host(names: &[String], host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    names.iter().any(|name| {
        let name = name.to_ascii_lowercase();
        match name.strip_prefix("*.") {
            Some(parent) => host
                .split_once('.')
                .is_some_and(|(_, domain)| domain == parent),
            None => name == host,
        }
    })
}

/// Seconds since 1970 as a date.
fn day(unix_s: i64) -> String {
    match time::OffsetDateTime::from_unix_timestamp(unix_s) {
        Ok(time) => time.date().to_string(),
        Err(_) => "an impossible date".into(),
    }
}

/// One directory on the way to the sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) path: PathBuf,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Step {
    fn lets_through(&self, user: QemuUser) -> bool {
        let bit = if user.uid == self.uid {
            0o100
        } else if user.gid == self.gid {
            0o010
        } else {
            0o001
        };
        user.uid == 0 || self.mode & bit != 0
    }
}

/// Whether a user of QEMU, that of these domains, gets to the sockets.
pub(crate) fn directory(steps: &[Step], user: QemuUser, domains: &str) -> Finding {
    let shut = steps.iter().find(|step| !step.lets_through(user));
    let QemuUser { uid, gid } = user;
    match shut {
        None => Finding::ok(
            Check::Directory,
            domains,
            format!("QEMU as user {uid}, group {gid} gets to the migration sockets"),
        ),
        Some(step) => Finding::new(
            Check::Directory,
            Level::Warning,
            step.path.display().to_string(),
            format!(
                "QEMU as user {uid}, group {gid} ({domains}) may not walk through this directory, so guests that arrive here or leave would fail"
            ),
            format!("`chmod o+x {}`", step.path.display()),
        ),
    }
}

/// How the members' memory is backed: one finding for those that could be faster.
pub(crate) fn memory_backing(members: &[(String, Hardware)]) -> Option<Finding> {
    if members.is_empty() {
        return None;
    }
    let private: Vec<&str> = members
        .iter()
        .filter(|(_, hardware)| !hardware.shared_memory)
        .map(|(name, _)| name.as_str())
        .collect();
    Some(match private.as_slice() {
        [] => Finding::ok(
            Check::MemoryBacking,
            "members",
            "all have shared memory, which is scanned fastest",
        ),
        some => Finding::new(
            Check::MemoryBacking,
            Level::Advice,
            some.join(", "),
            "memory is private to QEMU, so estimates, preparations and scans take about twice the time; migrations work as well",
            "with `virsh edit` set <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>, which counts from the guest's next start",
        ),
    })
}

/// Devices of this host that a member has.
pub(crate) fn devices(name: &str, hardware: &Hardware) -> Option<Finding> {
    let what = match hardware.host_devices.as_slice() {
        [] => return None,
        some => format!(
            "it has devices of this host ({}), with which libvirt migrates no guest, or only where device and driver can",
            some.join(", ")
        ),
    };
    Some(Finding::new(
        Check::Devices,
        Level::Warning,
        name,
        what,
        format!("detach them before, with `virsh detach-device {name} FILE --live`"),
    ))
}

/// Whether the destination has a member's machine and processor.
pub(crate) fn cpu(name: &str, hardware: &Hardware, fit: &Fit, destination: &str) -> Finding {
    match fit {
        Fit::NoMachine(why) => Finding::new(
            Check::Cpu,
            Level::Refused,
            name,
            format!(
                "{destination} cannot run its machine {}: {why}",
                hardware.machine
            ),
            format!(
                "install a QEMU there that has it (`virsh domcapabilities` tells), or give it a machine type that both hosts have with `virsh edit {name}` and restart it"
            ),
        ),
        Fit::Lacks(why) => Finding::new(
            Check::Cpu,
            // With check='none' libvirt starts it all the same.
            match hardware.checked {
                true => Level::Refused,
                false => Level::Warning,
            },
            name,
            format!("{destination} lacks what its processor has: {why}"),
            format!(
                "give it a processor model that both hosts have (`virsh hypervisor-cpu-baseline`) with `virsh edit {name}`, and restart it; or choose another destination"
            ),
        ),
        Fit::Unknown(why) => Finding::new(
            Check::Cpu,
            Level::Advice,
            name,
            format!("libvirt on {destination} cannot tell whether it has this processor: {why}"),
            "compare `virsh domcapabilities` of both hosts",
        ),
        Fit::Fits if hardware.processor == Processor::OfTheHost => Finding::new(
            Check::Cpu,
            Level::Advice,
            name,
            "it has whatever processor its host has (host-passthrough or maximum), which is the same at the destination only if that has the same processor and microcode",
            format!(
                "where hosts differ, use mode='host-model' or a named model with `virsh edit {name}`"
            ),
        ),
        Fit::Fits => Finding::ok(
            Check::Cpu,
            name,
            format!(
                "{destination} has its machine {} and its processor",
                hardware.machine
            ),
        ),
    }
}

/// What cannot be seen from this side.
pub(crate) fn way_back(host: &str) -> Finding {
    Finding::new(
        Check::WayBack,
        Level::Advice,
        host,
        "the way back is not looked at from here",
        format!("run `vmgang doctor {host}` on the destination, if gangs are to return"),
    )
}

#[cfg(test)]
mod tests;
