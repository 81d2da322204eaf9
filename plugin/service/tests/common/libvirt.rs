//! The libvirt of a scripted host: answers by the script, notes what it is asked.
//! Must not: know what a test expects.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;
use vmgang_engine::SourceEvent;
use vmgang_libvirt::{
    Balloon, DomainInfo, DomainQemu, DomainQemuUser, DomainState, Failure, Hardware, JobStats,
    LibvirtError, ListedDomain, Membership, MigrateOptions, QemuUser, Versions,
};
use vmgang_service::hypervisor::{DestinationFit, DestinationInfo, Hypervisor, Verdict};

use super::{Fake, Script};

impl Hypervisor for Fake {
    fn hostname(&self) -> Result<String, LibvirtError> {
        Ok("a".into())
    }
    fn host_uuid(&self) -> Result<Uuid, LibvirtError> {
        Ok(Uuid::from_u128(1))
    }
    fn domains(&self) -> Result<Vec<DomainInfo>, LibvirtError> {
        Ok(self.domains.lock().expect("lock").clone())
    }
    fn running(&self) -> Result<Vec<Uuid>, LibvirtError> {
        let domains = self.domains.lock().expect("lock");
        let running = domains.iter().filter(|d| d.state == DomainState::Running);
        Ok(running.map(|d| d.uuid).collect())
    }
    fn domain(&self, uuid: Uuid) -> Result<DomainInfo, LibvirtError> {
        std::thread::sleep(self.domain_delay);
        let domains = self.domains.lock().expect("lock");
        domains
            .iter()
            .find(|d| d.uuid == uuid)
            .cloned()
            .ok_or(LibvirtError::NoSuchDomain {
                domain: uuid.to_string(),
            })
    }
    fn set_membership(&self, uuid: Uuid, member: Option<&Membership>) -> Result<(), LibvirtError> {
        let mut domains = self.domains.lock().expect("lock");
        if let Some(domain) = domains.iter_mut().find(|d| d.uuid == uuid) {
            domain.membership = Ok(member.cloned());
        }
        Ok(())
    }
    fn qemu_user(&self) -> Result<QemuUser, LibvirtError> {
        Ok(QemuUser { uid: 0, gid: 0 })
    }
    fn takes_switchover_rate(&self) -> Result<bool, LibvirtError> {
        Ok(true)
    }
    fn pages_go_parallel(&self) -> Result<bool, LibvirtError> {
        Ok(true)
    }

    fn post_copy_goes_parallel(&self) -> Result<bool, LibvirtError> {
        Ok(false)
    }
    fn set_max_downtime(&self, uuid: Uuid, limit_ms: u64) -> Result<(), LibvirtError> {
        let (wires, member) = self.wires_of(uuid);
        let released = wires.released.borrow()[member];
        let unheld = self.scripts[&self.domain(uuid)?.name] == Script::NoAck;
        if limit_ms != 1 && !released && !unheld {
            // A panic here would end in the daemon's log.
            self.too_early.lock().expect("lock").push(limit_ms);
        }
        wires.limits.send_modify(|limits| limits[member] = limit_ms);
        Ok(())
    }
    fn domain_qemu(&self, _: Uuid) -> Result<DomainQemu, LibvirtError> {
        Ok(DomainQemu {
            user: DomainQemuUser {
                user: self.qemu_user()?,
                fixed: false,
            },
            emulated: false,
        })
    }
    fn start_post_copy(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let (wires, member) = self.wires_of(uuid);
        wires
            .post_copy
            .send_modify(|post_copy| post_copy[member] = true);
        Ok(())
    }
    fn suspend(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let name = self.domain(uuid)?.name;
        self.suspended.lock().expect("lock").push(name);
        // A guest that does not run dirties nothing.
        let (wires, member) = self.wires_of(uuid);
        let _ = wires.events.send(SourceEvent::PassDone {
            member,
            sent_bytes: 0,
            took: Duration::from_millis(1),
        });
        Ok(())
    }
    fn resume(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        self.domain(uuid).map(drop)
    }
    fn balloon(&self, uuid: Uuid) -> Result<Option<Balloon>, LibvirtError> {
        let mut balloons = self.balloons.lock().expect("lock");
        Ok(balloons.get_mut(&self.domain(uuid)?.name).map(|balloon| {
            balloon.told_unix_s += u64::from(balloon.period_s) * 1_000_000_000;
            *balloon
        }))
    }
    fn set_balloon_period(&self, uuid: Uuid, seconds: u32) -> Result<(), LibvirtError> {
        let mut balloons = self.balloons.lock().expect("lock");
        if let Some(balloon) = balloons.get_mut(&self.domain(uuid)?.name) {
            balloon.period_s = seconds;
        }
        Ok(())
    }
    fn set_memory(&self, uuid: Uuid, bytes: u64) -> Result<(), LibvirtError> {
        let mut balloons = self.balloons.lock().expect("lock");
        if let Some(balloon) = balloons.get_mut(&self.domain(uuid)?.name) {
            balloon.current_bytes = match bytes < balloon.current_bytes && self.balloons_are_slow {
                true => balloon.current_bytes - (balloon.current_bytes - bytes) / 2,
                false => bytes,
            };
        }
        Ok(())
    }
    fn restore_memory(
        &self,
        _: &str,
        uuid: Uuid,
        bytes: u64,
        period_s: u32,
    ) -> Result<(), LibvirtError> {
        let name = self.domain(uuid)?.name;
        self.restored_there
            .lock()
            .expect("lock")
            .push((name, bytes, period_s));
        Ok(())
    }
    fn running_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError> {
        let domains = self.domains()?;
        let domain = domains.iter().find(|domain| domain.uuid == uuid);
        let name = domain.map_or("", |domain| &domain.name);
        let outgoing = self.others_migrate.lock().expect("lock");
        let outgoing = outgoing.iter().any(|other| other == name);
        Ok(JobStats {
            active: outgoing || self.scripts.get(name) == Some(&Script::BeingSaved),
            outgoing,
            ..JobStats::default()
        })
    }
    fn completed_job(&self, _: Uuid) -> Result<JobStats, LibvirtError> {
        Ok(JobStats {
            iterations: Some(4),
            ..JobStats::default()
        })
    }
    fn versions(&self) -> Result<Versions, LibvirtError> {
        Ok(self.versions)
    }
    fn hardware(&self, uuid: Uuid) -> Result<Hardware, LibvirtError> {
        let name = self.domain(uuid)?.name;
        Ok(self.hardware.get(&name).cloned().unwrap_or_default())
    }
    fn fit_destination(
        &self,
        _: &str,
        hardware: &[Hardware],
    ) -> Result<DestinationFit, LibvirtError> {
        Ok(DestinationFit {
            versions: self.versions_there,
            fits: vec![self.fit.clone(); hardware.len()],
        })
    }
    fn inspect_destination(&self, uri: &str) -> Result<DestinationInfo, LibvirtError> {
        let failed = |message: &str| {
            Err(LibvirtError::Connect {
                uri: uri.into(),
                failure: Failure {
                    code: 38,
                    message: message.into(),
                },
            })
        };
        if self.answers_after_call {
            let calls = self.calls.0.lock().expect("lock");
            let called = self
                .calls
                .1
                .wait_timeout_while(calls, Duration::from_secs(10), |calls| *calls == 0);
            if called.expect("lock").1.timed_out() {
                return failed("nobody called the peer meanwhile");
            }
        }
        if uri.contains("unreachable") {
            return failed("no route");
        }
        // As libvirt would; whoever carries that has nobody behind.
        if let Some(path) = uri.strip_prefix("qemu+unix:///system?socket=") {
            use std::io::Read;
            let socket = std::os::unix::net::UnixStream::connect(path);
            let read = socket.and_then(|mut socket| socket.read(&mut [0; 8]));
            assert_eq!(read.expect("a socket that is closed"), 0);
            return failed("End of file while reading data");
        }
        let same = uri.contains("myself");
        Ok(DestinationInfo {
            host_uuid: Some(Uuid::from_u128(if same { 1 } else { 2 })),
            libvirt_version: self.libvirt_there,
            domains: [
                self.there.clone(),
                self.arrived.lock().expect("lock").clone(),
            ]
            .concat(),
        })
    }
    fn migrate(
        &self,
        uuid: Uuid,
        name: &str,
        options: MigrateOptions,
    ) -> Result<Verdict, LibvirtError> {
        assert!(
            options.migrate_uri.starts_with("unix:///fake/"),
            "{options:?}"
        );
        let script = self.scripts[name];
        *self.started.lock().expect("lock") += 1;
        let mut migrated_with = self.migrated_with.lock().expect("lock");
        migrated_with.insert(name.to_owned(), options.clone());
        drop(migrated_with);
        let name = name.to_owned();
        let (wires, member) = self.wires_of(uuid);
        let held = options.switchover_mib_s == Some(1);
        assert!(held || wires.released.borrow()[member]);
        let fake = self.clone();
        let failed = move |message: &str| LibvirtError::Domain {
            action: "migrate",
            domain: name.clone(),
            failure: Failure {
                code: 1,
                message: message.into(),
            },
        };
        Ok(Box::pin(async move {
            if script == Script::Refused {
                return Err(failed("this domain cannot be migrated"));
            }
            {
                let mut running = fake.running.lock().expect("lock");
                *running += 1;
                let mut most = fake.most_at_once.lock().expect("lock");
                *most = (*most).max(*running);
            }
            let event = |event| wires.events.send(event).is_ok();
            let pass = |sent_bytes| SourceEvent::PassDone {
                member,
                sent_bytes,
                took: Duration::from_secs(1),
            };
            let stalls = match script {
                Script::Stalls => !options.auto_converge,
                script => matches!(script, Script::AlwaysStalls | Script::Copying),
            };
            let passes = if script == Script::Copying { 1 } else { 30 };
            let ready = matches!(
                script,
                Script::Good | Script::Slow | Script::BreaksWhenReady | Script::BreaksAfterRelease
            ) || (script == Script::Stalls && !stalls);
            event(SourceEvent::ChannelOpened { member });
            match script {
                Script::Slow => tokio::time::sleep(Duration::from_millis(700)).await,
                Script::Unreadable => {
                    event(SourceEvent::Unreadable { member });
                    event(SourceEvent::AckWithheld { member });
                }
                Script::NoAck => {
                    event(SourceEvent::FirstPassDone { member });
                }
                Script::EndsUnstopped => {
                    event(SourceEvent::StreamEnded { member });
                }
                Script::SessionLost => {
                    let error = "connection reset".into();
                    event(SourceEvent::SessionFailed { error });
                }
                _ => {}
            }
            if ready {
                event(SourceEvent::AckWithheld { member });
                event(SourceEvent::FirstPassDone { member });
                event(pass(0));
            }
            if stalls {
                event(SourceEvent::AckWithheld { member });
                event(SourceEvent::FirstPassDone { member });
                for _ in 0..passes {
                    event(pass(1 << 30));
                }
            }
            if script == Script::BreaksWhenReady {
                let error = "digest mismatch".into();
                event(SourceEvent::MemberFailed { member, error });
            }
            let gives_up = matches!(script, Script::EndsUnstopped | Script::LeftPaused);
            let mut released = wires.released.subscribe();
            let mut limits = wires.limits.subscribe();
            let mut aborted = wires.aborted.subscribe();
            let result = tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(200)), if gives_up => {
                    if script == Script::LeftPaused {
                        let mut domains = fake.domains.lock().expect("lock");
                        let domain = domains.iter_mut().find(|d| d.uuid == uuid).expect("there");
                        domain.state = DomainState::Paused;
                    }
                    Err(failed("the stream ended early"))
                }
                () = async {
                    if matches!(script, Script::NeverReady | Script::SessionLost) {
                        std::future::pending::<()>().await;
                    }
                    if script != Script::NoAck {
                        let _ = released.wait_for(|released| released[member]).await;
                    }
                    if stalls {
                        let mut post_copy = wires.post_copy.subscribe();
                        let _ = post_copy.wait_for(|post_copy| post_copy[member]).await;
                    }
                    // QEMU has more to send than a held member may have left.
                    if held {
                        let _ = limits.wait_for(|limits| limits[member] >= 1000).await;
                    }
                } => {
                    event(SourceEvent::GuestStopped { member, at: Instant::now() });
                    if script == Script::BreaksAfterRelease {
                        let error = "the peer hung up".into();
                        event(SourceEvent::MemberFailed { member, error });
                    } else {
                        event(SourceEvent::StreamEnded { member });
                    }
                    let mut domains = fake.domains.lock().expect("lock");
                    let domain = domains.iter_mut().find(|d| d.uuid == uuid).expect("there");
                    domain.id = None;
                    domain.state = DomainState::ShutOff;
                    fake.arrived.lock().expect("lock").push(ListedDomain {
                        name: domain.name.clone(),
                        uuid,
                        active: true,
                    });
                    Ok(())
                }
                _ = aborted.wait_for(|aborted| aborted[member]) => {
                    // The last that it says: it has converged after all.
                    if stalls {
                        event(pass(0));
                    }
                    Err(failed("canceled by client"))
                }
            };
            *fake.running.lock().expect("lock") -= 1;
            let mut let_go = fake.let_go.lock().expect("lock");
            let_go.0 = let_go.0.saturating_sub(1);
            result
        }))
    }
    fn abort_job(&self, uuid: Uuid, answered: &AtomicBool) -> Result<(), LibvirtError> {
        std::thread::sleep(self.abort_delay);
        self.aborts.lock().expect("lock").0 += 1;
        if answered.load(Ordering::SeqCst) {
            return Ok(());
        }
        let name = self.domain(uuid)?.name;
        self.aborts.lock().expect("lock").1.push(name);
        let (wires, member) = self.wires_of(uuid);
        wires.aborted.send_modify(|aborted| aborted[member] = true);
        Ok(())
    }
}
