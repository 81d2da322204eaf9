//! Gathers what the doctor judges: asks libvirt here and at the destination, reads certificates and
//! directory rights, and tries, for each gang, all that a migration checks before it begins.
//!
//! Must not: judge (see `doctor.rs`), or change or hold anything that a migration could need. The
//! session with the peer, in which it takes the gang, ends as soon as it is open.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::time::timeout;
use uuid::Uuid;
use vmgang_engine::CertificateFacts;
use vmgang_libvirt::{DomainInfo, Hardware, QemuUser};

use crate::clock;
use crate::config::TlsConfig;
use crate::coordinator::Parts;
use crate::doctor::{self, CertificateRole, Check, Diagnosis, Finding, Level, Step};
use crate::error::ServiceError;
use crate::gangs;
use crate::hypervisor::{DestinationFit, ask};
use crate::jobs::Jobs;
use crate::libvirt_access::DestinationLibvirt;
use crate::preflight::{Preflight, REACH_TIMEOUT};
use crate::request::{DiagnoseRequest, Selection, Target};
use crate::scans::unix_seconds;

/// Domains that would migrate as one job.
struct Group {
    /// `None`: single domains, of no gang.
    gang: Option<String>,
    members: Vec<DomainInfo>,
}

impl Group {
    /// What findings about all of it are about.
    fn subject(&self) -> String {
        match &self.gang {
            Some(gang) => format!("gang {gang}"),
            None => "running domains".into(),
        }
    }
}

/// A member's hardware, with its name and UUID.
struct Machine {
    name: String,
    uuid: Uuid,
    hardware: Hardware,
}

pub(crate) struct Examination<'a> {
    parts: &'a Parts,
    jobs: &'a Arc<Jobs>,
    request: &'a DiagnoseRequest,
    /// What this host calls itself.
    host: String,
    findings: Vec<Finding>,
}

impl<'a> Examination<'a> {
    pub(crate) fn new(
        parts: &'a Parts,
        jobs: &'a Arc<Jobs>,
        request: &'a DiagnoseRequest,
    ) -> Examination<'a> {
        Examination {
            parts,
            jobs,
            request,
            host: "this host".into(),
            findings: Vec::new(),
        }
    }

    /// Looks at everything. What cannot be looked at is a finding as well.
    pub(crate) async fn run(mut self) -> Diagnosis {
        let groups = match self.look_at_libvirt().await {
            Ok(groups) => groups,
            Err(error) => {
                self.findings.push(doctor::refusal("this host", &error));
                Vec::new()
            }
        };
        let machines = self.look_at_members(&groups).await;
        self.look_at_certificates();
        self.findings.push(doctor::clock(clock::synchronised()));
        if let Some(target) = &self.request.target {
            self.look_there(target, &groups, &machines).await;
            self.findings.push(doctor::way_back(&self.host));
        }
        let target = self.request.target.as_ref();
        let diagnosis = Diagnosis {
            ready: false,
            host: self.host,
            destination: target.map(|target| target.destination.name.clone()),
            peer: target.map(|target| target.peer.to_string()),
            gangs: groups.into_iter().filter_map(|group| group.gang).collect(),
            findings: self.findings,
        };
        diagnosis.conclude()
    }

    /// This host's libvirt, and whom a migration would take.
    async fn look_at_libvirt(&mut self) -> Result<Vec<Group>, ServiceError> {
        let hypervisor = &self.parts.hypervisor;
        let host = ask(hypervisor, |hypervisor| {
            Ok((hypervisor.hostname()?, hypervisor.versions()?))
        });
        let domains = ask(hypervisor, |hypervisor| hypervisor.domains());
        let (name, versions) = host.await?;
        let domains = domains.await?;
        self.host = name;
        let domain_count = domains.len();
        let counted = format!("libvirt answers, and lists {domain_count} domains");
        self.findings
            .push(Finding::ok(Check::Libvirt, "this host", counted));
        if self.request.target.is_none() {
            self.findings.push(doctor::versions(versions, None));
        }
        Ok(self.groups(&domains))
    }

    /// The gangs that were asked for; without any, the domains that run.
    fn groups(&mut self, domains: &[DomainInfo]) -> Vec<Group> {
        let wanted: Vec<String> = match &self.request.gang {
            Some(gang) => vec![gang.clone()],
            None => {
                let (gangs, problems) = gangs::summarise(domains);
                for (domain, problem) in problems {
                    let error = ServiceError::InvalidMetadata(problem);
                    self.findings.push(doctor::refusal(&domain, &error));
                }
                let running = gangs.into_iter().filter(|gang| gang.active > 0);
                running.map(|gang| gang.name).collect()
            }
        };
        let mut groups = Vec::new();
        for gang in &wanted {
            match gangs::select(&Selection::Gang(gang.clone()), domains) {
                Ok(members) => {
                    let group = Group {
                        gang: Some(gang.clone()),
                        members,
                    };
                    let running = group.members.len();
                    self.findings.push(Finding::ok(
                        Check::Gang,
                        group.subject(),
                        format!("{running} members run here"),
                    ));
                    groups.push(group);
                }
                Err(error) => {
                    let subject = format!("gang {gang}");
                    self.findings.push(doctor::refusal(&subject, &error));
                }
            }
        }
        if wanted.is_empty() {
            self.findings.push(Finding::new(
                Check::Gang,
                Level::Advice,
                "this host",
                "no gang runs here, so single domains are looked at",
                "`vmgang gang add GANG DOMAIN...` makes one",
            ));
            // None runs: then there is nothing to look at, which is no fault.
            if let Ok(members) = gangs::select(&Selection::All, domains) {
                let gang = None;
                groups.push(Group { gang, members });
            }
        }
        groups
    }

    async fn look_at_members(&mut self, groups: &[Group]) -> Vec<Machine> {
        let members: Vec<(String, Uuid)> = groups
            .iter()
            .flat_map(|group| &group.members)
            .map(|member| (member.name.clone(), member.uuid))
            .collect();
        let asked = members.clone();
        let answers = ask(&self.parts.hypervisor, move |hypervisor| {
            let host_user = hypervisor.qemu_user()?;
            let about = |(_, uuid): &(String, Uuid)| {
                let hardware = hypervisor.hardware(*uuid);
                (hardware, hypervisor.domain_qemu(*uuid))
            };
            Ok((host_user, asked.iter().map(about).collect::<Vec<_>>()))
        });
        let (host_user, answers) = match answers.await {
            Ok(answers) => answers,
            Err(error) => {
                self.findings.push(doctor::refusal("this host", &error));
                return Vec::new();
            }
        };
        let mut users = vec![(host_user, Vec::new())];
        let mut machines = Vec::new();
        for ((name, uuid), (hardware, qemu)) in members.into_iter().zip(answers) {
            match qemu {
                Ok(qemu) => match users.iter_mut().find(|(user, _)| *user == qemu.user.user) {
                    Some((_, names)) => names.push(name.clone()),
                    None => users.push((qemu.user.user, vec![name.clone()])),
                },
                Err(error) => self.findings.push(doctor::refusal(&name, &error.into())),
            }
            match hardware {
                Ok(hardware) => machines.push(Machine {
                    name,
                    uuid,
                    hardware,
                }),
                Err(error) => self.findings.push(doctor::refusal(&name, &error.into())),
            }
        }
        self.look_at_directories(&users);
        let hardware: Vec<(String, Hardware)> = machines
            .iter()
            .map(|machine| (machine.name.clone(), machine.hardware.clone()))
            .collect();
        self.findings.extend(doctor::memory_backing(&hardware));
        for (name, hardware) in &hardware {
            self.findings.extend(doctor::devices(name, hardware));
        }
        machines
    }

    fn look_at_directories(&mut self, users: &[(QemuUser, Vec<String>)]) {
        let steps = steps(&self.parts.runtime_dir.join("migrate"));
        for (user, names) in users {
            let domains = match names.as_slice() {
                [] => "the host's own user".to_owned(),
                names => names.join(", "),
            };
            let finding = doctor::directory(&steps, *user, &domains);
            self.findings.push(finding);
        }
    }

    fn look_at_certificates(&mut self) {
        let transport = (self.parts.transport)().map_err(ServiceError::TlsFailed);
        if let Err(error) = &transport {
            self.findings.push(doctor::refusal("this host", error));
        }
        let files = match &self.parts.tls {
            TlsConfig::Off => {
                self.findings.push(Finding::new(
                    Check::Certificates,
                    Level::Warning,
                    "this host",
                    "tls = false: guest memory crosses the network in the clear, and any host may send guests here",
                    "remove `tls = false` from vmgang.toml on all hosts, unless nobody else is on this network",
                ));
                return;
            }
            TlsConfig::On(paths) => paths.files(),
        };
        let now = i64::try_from(unix_seconds()).unwrap_or(i64::MAX);
        for (role, file) in [
            (CertificateRole::Authority, &files.ca),
            (CertificateRole::Server, &files.server_certificate),
            (CertificateRole::Client, &files.client_certificate),
        ] {
            // One that cannot be read was told already.
            if let Ok(facts) = CertificateFacts::read(role.name(), file) {
                let finding = doctor::certificate(role, file, &facts, &self.host, now);
                self.findings.push(finding);
            }
        }
    }

    /// Tries each group as a migration would, and then what its hardware finds there.
    async fn look_there(&mut self, target: &Target, groups: &[Group], machines: &[Machine]) {
        let nobody = Group {
            gang: None,
            members: Vec::new(),
        };
        match groups {
            // The pair is looked at all the same.
            [] => self.try_group(target, &nobody, &[]).await,
            groups => {
                for group in groups {
                    self.try_group(target, group, machines).await;
                }
            }
        }
    }

    async fn try_group(&mut self, target: &Target, group: &Group, machines: &[Machine]) {
        let gang = group.gang.as_deref();
        if let Err(error) = self.jobs.check_reservable(gang, &group.members) {
            self.findings
                .push(doctor::refusal(&group.subject(), &error));
            return;
        }
        let request = match target.request_for(&group.members) {
            Ok(request) => request,
            Err(error) => {
                self.findings
                    .push(doctor::refusal(&group.subject(), &error));
                return;
            }
        };
        let preflight = Preflight {
            parts: self.parts,
            job: Uuid::new_v4(),
            request: &request,
            members: &group.members,
        };
        let tried = match group.members.is_empty() {
            true => Err(None),
            // Single domains take no stage, so none comes back.
            false => preflight.run().await.map_err(|(error, _)| Some(error)),
        };
        let subject = group.subject();
        let (there, peer) = match tried {
            Ok(ready) => {
                self.look_at_fit(target, &ready.libvirt, group, machines)
                    .await;
                ready.opened.0.close().await;
                (Ok(()), Ok(()))
            }
            Err(first) => {
                // A migration tells the first problem; here are the others.
                if let Some(error) = &first {
                    let about = about(error, &subject, target);
                    self.findings.push(doctor::refusal(about, error));
                }
                let both = tokio::join!(preflight.try_there(), preflight.try_peer());
                if let Ok(libvirt) = &both.0 {
                    self.look_at_fit(target, libvirt, group, machines).await;
                }
                (both.0.map(drop), both.1)
            }
        };
        match there {
            Ok(()) => self.findings.push(Finding::ok(
                Check::Destination,
                &target.destination.name,
                format!("libvirt there answers, and nothing there is in the way of {subject}"),
            )),
            Err(error) => {
                let about = about(&error, &subject, target);
                self.findings.push(doctor::refusal(about, &error));
            }
        }
        match peer {
            Ok(()) => {
                let memory_mib = group.members.iter().fold(0, |sum: u64, member| {
                    sum.saturating_add(member.memory_bytes)
                }) >> 20;
                self.findings.push(Finding::ok(
                    Check::Peer,
                    target.peer.to_string(),
                    format!(
                        "vmgangd there takes {subject} ({memory_mib} MiB), and has memory for it"
                    ),
                ));
            }
            Err(error) => {
                let about = about(&error, &subject, target);
                self.findings.push(doctor::refusal(about, &error));
            }
        }
    }

    /// Versions, machines and processors there.
    async fn look_at_fit(
        &mut self,
        target: &Target,
        libvirt: &DestinationLibvirt,
        group: &Group,
        machines: &[Machine],
    ) {
        let uri = libvirt.uri().to_owned();
        let mine: Vec<&Machine> = machines
            .iter()
            .filter(|machine| {
                group
                    .members
                    .iter()
                    .any(|member| member.uuid == machine.uuid)
            })
            .collect();
        // Members are often alike: each hardware is asked about once.
        let mut kinds: Vec<Hardware> = Vec::new();
        for machine in &mine {
            if !kinds.contains(&machine.hardware) {
                kinds.push(machine.hardware.clone());
            }
        }
        let asked = kinds.clone();
        let there = ask(&self.parts.hypervisor, move |hypervisor| {
            let there = hypervisor.fit_destination(&uri, &asked)?;
            Ok((hypervisor.versions()?, there))
        });
        let (here, DestinationFit { versions, fits }) = match timeout(REACH_TIMEOUT, there).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                let finding = doctor::refusal(&target.destination.name, &error);
                self.findings.push(Finding {
                    level: Level::Warning,
                    ..finding
                });
                return;
            }
            Err(_) => {
                self.findings.push(Finding::new(
                    Check::Cpu,
                    Level::Warning,
                    &target.destination.name,
                    "libvirt there does not tell in time what its QEMU can do",
                    "run the doctor again: a new QEMU takes libvirt some seconds once",
                ));
                return;
            }
        };
        let host = target.destination.host.as_str();
        self.findings
            .push(doctor::versions(here, Some((host, versions))));
        for machine in mine {
            let answered = kinds.iter().zip(&fits);
            for (kind, fit) in answered.filter(|(kind, _)| **kind == machine.hardware) {
                let finding = doctor::cpu(&machine.name, kind, fit, host);
                self.findings.push(finding);
            }
        }
    }
}

/// What a refusal is about: what is there, or the group.
fn about<'b>(error: &ServiceError, group: &'b str, target: &'b Target) -> &'b str {
    match error {
        ServiceError::DestinationUnreachable(_) | ServiceError::InvalidDestination(_) => {
            &target.destination.name
        }
        ServiceError::PeerUnreachable(_)
        | ServiceError::PeerRefused(_)
        | ServiceError::TlsFailed(_)
        | ServiceError::VersionMismatch(_) => &target.destination.host,
        _ => group,
    }
}

/// The directories from the root to this one, as far as they exist. What is missing the daemon makes.
fn steps(directory: &Path) -> Vec<Step> {
    let mut paths: Vec<PathBuf> = directory.ancestors().map(Path::to_owned).collect();
    paths.reverse();
    paths
        .into_iter()
        .filter_map(|path| {
            let metadata = std::fs::metadata(&path).ok()?;
            Some(Step {
                path,
                mode: metadata.permissions().mode(),
                uid: metadata.uid(),
                gid: metadata.gid(),
            })
        })
        .collect()
}
