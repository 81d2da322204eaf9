//! The made-up libvirt and its QEMUs: what migrations do by their fate.
//! Must not: release anybody, `tunnel.rs` does.

use super::*;

/// libvirt of the source.
pub struct SimHypervisor(pub World);

pub(super) fn refused(name: &str, message: &str) -> LibvirtError {
    LibvirtError::Domain {
        action: "migrate",
        domain: name.to_owned(),
        failure: Failure {
            code: 9,
            message: message.to_owned(),
        },
    }
}

impl SimHypervisor {
    fn info(guest: &Guest) -> DomainInfo {
        DomainInfo {
            name: guest.name.clone(),
            uuid: guest.uuid,
            id: (guest.here != Here::Absent).then_some(1),
            state: match guest.here {
                Here::Running => DomainState::Running,
                Here::Paused | Here::Incoming => DomainState::Paused,
                Here::Absent => DomainState::ShutOff,
            },
            persistent: true,
            memory_bytes: 1 << 30,
            membership: Ok(None),
        }
    }
}

impl Hypervisor for SimHypervisor {
    fn answers_at_once(&self) -> bool {
        true
    }
    fn hostname(&self) -> Result<String, LibvirtError> {
        Ok("a".into())
    }
    fn host_uuid(&self) -> Result<Uuid, LibvirtError> {
        Ok(Uuid::from_u128(1))
    }
    fn domains(&self) -> Result<Vec<DomainInfo>, LibvirtError> {
        Ok(self.0.lock().guests.iter().map(Self::info).collect())
    }
    fn running(&self) -> Result<Vec<Uuid>, LibvirtError> {
        Ok(Vec::new())
    }
    fn domain(&self, uuid: Uuid) -> Result<DomainInfo, LibvirtError> {
        let state = self.0.lock();
        Ok(Self::info(&state.guests[state.index(uuid)]))
    }
    fn set_membership(&self, _: Uuid, _: Option<&Membership>) -> Result<(), LibvirtError> {
        Ok(())
    }
    fn qemu_user(&self) -> Result<QemuUser, LibvirtError> {
        Ok(QemuUser { uid: 0, gid: 0 })
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
    fn takes_switchover_rate(&self) -> Result<bool, LibvirtError> {
        Ok(true)
    }
    fn pages_go_parallel(&self) -> Result<bool, LibvirtError> {
        Ok(true)
    }

    fn post_copy_goes_parallel(&self) -> Result<bool, LibvirtError> {
        Ok(true)
    }
    fn set_max_downtime(&self, _: Uuid, _: u64) -> Result<(), LibvirtError> {
        Ok(())
    }
    fn start_post_copy(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let mut state = self.0.lock();
        let number = state.index(uuid);
        let guest = &state.guests[number];
        if !guest.under_way || guest.stopped {
            return Err(refused(&guest.name, "no migration to switch"));
        }
        guest.to_post_copy.send_replace(true);
        let text = format!("{} is told to go to post-copy", guest.name);
        state.say(&text);
        Ok(())
    }
    fn suspend(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let mut state = self.0.lock();
        let number = state.index(uuid);
        let (here, there) = (state.guests[number].here, state.guests[number].there);
        if !state.guests[number].under_way && here == Here::Running {
            state.place(number, Here::Paused, there);
            return Ok(());
        }
        state.guests[number].suspended.send_replace(true);
        state.say("a guest is suspended");
        Ok(())
    }
    fn resume(&self, uuid: Uuid) -> Result<(), LibvirtError> {
        let mut state = self.0.lock();
        let number = state.index(uuid);
        let there = state.guests[number].there;
        assert_ne!(there, Here::Running, "resumed while it runs there");
        state.place(number, Here::Running, there);
        Ok(())
    }
    fn balloon(&self, _: Uuid) -> Result<Option<Balloon>, LibvirtError> {
        Ok(None)
    }
    fn set_balloon_period(&self, _: Uuid, _: u32) -> Result<(), LibvirtError> {
        Ok(())
    }
    fn set_memory(&self, _: Uuid, _: u64) -> Result<(), LibvirtError> {
        Ok(())
    }
    fn restore_memory(&self, _: &str, _: Uuid, _: u64, _: u32) -> Result<(), LibvirtError> {
        Ok(())
    }
    fn running_job(&self, uuid: Uuid) -> Result<JobStats, LibvirtError> {
        let state = self.0.lock();
        Ok(JobStats {
            active: state.guests[state.index(uuid)].under_way,
            ..JobStats::default()
        })
    }
    fn completed_job(&self, _: Uuid) -> Result<JobStats, LibvirtError> {
        Ok(JobStats::default())
    }
    fn versions(&self) -> Result<Versions, LibvirtError> {
        Ok(Versions::default())
    }
    fn hardware(&self, _: Uuid) -> Result<Hardware, LibvirtError> {
        Ok(Hardware::default())
    }
    fn fit_destination(
        &self,
        _: &str,
        hardware: &[Hardware],
    ) -> Result<DestinationFit, LibvirtError> {
        Ok(DestinationFit {
            versions: Versions::default(),
            fits: vec![Fit::Fits; hardware.len()],
        })
    }
    fn inspect_destination(&self, _: &str) -> Result<DestinationInfo, LibvirtError> {
        let state = self.0.lock();
        let there = state
            .guests
            .iter()
            .filter(|guest| guest.there != Here::Absent);
        let listed = |guest: &Guest| ListedDomain {
            name: guest.name.clone(),
            uuid: guest.uuid,
            active: true,
        };
        Ok(DestinationInfo {
            libvirt_version: None,
            host_uuid: Some(Uuid::from_u128(2)),
            domains: there.map(listed).collect(),
        })
    }
    fn migrate(
        &self,
        uuid: Uuid,
        _: &str,
        options: MigrateOptions,
    ) -> Result<Verdict, LibvirtError> {
        let world = self.0.clone();
        let number = {
            let mut state = world.lock();
            let number = state.index(uuid);
            let under_way = state.guests.iter().filter(|guest| guest.under_way).count();
            let policy = state.policy.expect("a job");
            assert!(under_way < policy.concurrency.get(), "too many at once");
            let guest = &mut state.guests[number];
            assert!(!guest.under_way, "{} twice at once", guest.name);
            guest.under_way = true;
            guest.stopped = false;
            guest.starts += 1;
            guest.closed = false;
            guest.abort.send_replace(false);
            let text = format!("{} starts, {:?}", guest.name, guest.fate);
            state.say(&text);
            number
        };
        // Goes on also when nobody waits for it any more.
        let migrating = tokio::spawn(async move {
            let result = migration(&world, number, &options).await;
            let mut state = world.lock();
            state.guests[number].under_way = false;
            if let Err(error) = &result {
                let text = error.to_string();
                state.say(&text);
            }
            result
        });
        Ok(Box::pin(async move {
            match migrating.await {
                Ok(result) => result,
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }))
    }
    fn abort_job(&self, uuid: Uuid, _: &AtomicBool) -> Result<(), LibvirtError> {
        let mut state = self.0.lock();
        let number = state.index(uuid);
        let guest = &state.guests[number];
        if !guest.under_way || guest.starts == 0 {
            return Err(refused(&guest.name, "no job is active"));
        }
        if guest.post_copy {
            return Err(refused(&guest.name, "cannot be aborted in post-copy"));
        }
        guest.abort.send_replace(true);
        let text = format!("{} is aborted", guest.name);
        state.say(&text);
        Ok(())
    }
}

/// Why a migration ends early.
enum Stop {
    Aborted,
    TunnelBroke,
    DestinationDied,
}

/// One migration, as libvirt and both QEMUs do it.
async fn migration(
    world: &World,
    number: usize,
    options: &MigrateOptions,
) -> Result<(), LibvirtError> {
    let (name, fate) = {
        let state = world.lock();
        (state.guests[number].name.clone(), state.guests[number].fate)
    };
    let copied = copy(world, number, options).await;
    if let Err(stop) = copied {
        let mut state = world.lock();
        let (message, is_failure) = match stop {
            Stop::Aborted => ("canceled by client", false),
            Stop::TunnelBroke => ("Unable to write to socket: Broken pipe", true),
            Stop::DestinationDied => ("the destination QEMU has gone", true),
        };
        if is_failure {
            state.failed();
        }
        let post_copy = state.guests[number].post_copy;
        match post_copy {
            // Each half has a part of the memory.
            true => state.place(number, Here::Paused, Here::Paused),
            false => state.place(number, Here::Running, Here::Absent),
        }
        state.guests[number].stopped = false;
        return Err(refused(&name, message));
    }
    if fate == Fate::AnswerLost {
        // libvirt takes the lost answer for a failure.
        let mut state = world.lock();
        state.failed();
        state.guests[number].doubt = true;
        state.place(number, Here::Running, Here::Running);
        return Err(refused(
            &name,
            "End of file while reading data: libvirtd has gone",
        ));
    }
    Ok(())
}

/// Up to the guest's run at the destination.
async fn copy(world: &World, number: usize, options: &MigrateOptions) -> Result<(), Stop> {
    let fate = world.lock().guests[number].fate;
    let member = number;
    let mut steps = 0;
    world.pause(5, 400).await;
    if fate == Fate::Refused {
        return Err(Stop::DestinationDied);
    }
    if fate == Fate::Hangs {
        world.pause(1_000, 150_000).await;
    }
    if world.lock().guests[number].closed {
        return Err(Stop::TunnelBroke);
    }
    world.lock().place(number, Here::Running, Here::Incoming);
    let tell = |event| world.lock().tell(event);
    tell(SourceEvent::ChannelOpened { member });
    if fate == Fate::Unreadable {
        tell(SourceEvent::Unreadable { member });
    }
    step(world, number, &mut steps, 5, 50).await?;
    if !matches!(fate, Fate::NoAck | Fate::HeldInFirstPass) && world.lock().holds(number) {
        tell(SourceEvent::AckWithheld { member });
    }
    for _ in 0..3 {
        step(world, number, &mut steps, 10, 2000).await?;
    }
    if fate == Fate::HeldInFirstPass && world.lock().holds(number) {
        tell(SourceEvent::HeldInFirstPass { member });
        wait_for_release(world, number, &mut steps).await?;
    }
    if fate != Fate::Unreadable {
        tell(SourceEvent::FirstPassDone { member });
    }
    let mut left: u64 = 400 << 20;
    loop {
        let took = Duration::from_millis(1000);
        step(world, number, &mut steps, 900, 1100).await?;
        let (post_copy, suspended, released) = {
            let state = world.lock();
            let guest = &state.guests[number];
            let released = state
                .session
                .as_ref()
                .is_some_and(|session| session.released.borrow()[number]);
            let post_copy = *guest.to_post_copy.borrow();
            (post_copy, *guest.suspended.borrow(), released)
        };
        let converges = match fate {
            Fate::Stalls => options.auto_converge,
            Fate::AlwaysStalls => false,
            _ => true,
        };
        if converges || suspended {
            left /= 4;
        }
        if suspended {
            left = 0;
        }
        if fate != Fate::Unreadable {
            tell(SourceEvent::PassDone {
                member,
                sent_bytes: left,
                took,
            });
        }
        let may_go = released || !world.lock().holds(number);
        if may_go && (post_copy || left < 1 << 20) {
            break;
        }
    }
    switch(world, number, options, &mut steps).await
}

async fn wait_for_release(world: &World, number: usize, steps: &mut u64) -> Result<(), Stop> {
    loop {
        let released = world
            .lock()
            .session
            .as_ref()
            .is_some_and(|session| session.released.borrow()[number]);
        if released {
            return Ok(());
        }
        step(world, number, steps, 50, 51).await?;
        // Waiting is no step towards a fate.
        *steps -= 1;
    }
}

/// The guest stops here, and goes on there.
async fn switch(
    world: &World,
    number: usize,
    options: &MigrateOptions,
    steps: &mut u64,
) -> Result<(), Stop> {
    {
        let mut state = world.lock();
        let released = state
            .session
            .as_ref()
            .is_some_and(|session| session.released.borrow()[number]);
        assert!(
            released || !state.holds(number),
            "switched over before the release"
        );
        let post_copy = *state.guests[number].to_post_copy.borrow();
        assert!(
            !post_copy || options.post_copy,
            "post-copy was not prepared"
        );
        state.guests[number].stopped = true;
        state.guests[number].post_copy = post_copy;
        state.stopped_any = true;
        let there = if post_copy {
            Here::Running
        } else {
            Here::Incoming
        };
        state.place(number, Here::Paused, there);
        state.tell(SourceEvent::GuestStopped {
            member: number,
            at: std::time::Instant::now(),
        });
    }
    // A cancelled migration of a stopped guest goes back; in post-copy nothing does.
    step(world, number, steps, 20, 600).await?;
    let mut state = world.lock();
    state.tell(SourceEvent::StreamEnded { member: number });
    state.place(number, Here::Absent, Here::Running);
    Ok(())
}

/// Some time of a migration, in which what ends it may happen.
async fn step(
    world: &World,
    number: usize,
    steps: &mut u64,
    from_ms: u64,
    to_ms: u64,
) -> Result<(), Stop> {
    let (mut abort, mut broken, fate) = {
        let state = world.lock();
        let guest = &state.guests[number];
        let broken = state
            .session
            .as_ref()
            .map(|session| session.broken[number].subscribe());
        (guest.abort.subscribe(), broken, guest.fate)
    };
    *steps += 1;
    if fate == Fate::Breaks(*steps) {
        {
            let mut state = world.lock();
            state.failed();
            state.tell(SourceEvent::MemberFailed {
                member: number,
                error: "the destination QEMU hung up".into(),
            });
        }
        world.pause(1, 300).await;
        return Err(Stop::DestinationDied);
    }
    let breaks = async {
        // No session, no socket to write to.
        if let Some(broken) = &mut broken
            && broken.wait_for(|broken| *broken).await.is_err()
        {
            std::future::pending::<()>().await;
        }
    };
    let aborted = async {
        let _ = abort.wait_for(|abort| *abort).await;
    };
    tokio::select! {
        biased;
        () = aborted => {
            world.pause(1, 100).await;
            Err(Stop::Aborted)
        }
        () = breaks => {
            world.pause(1, 100).await;
            Err(Stop::TunnelBroke)
        }
        () = world.pause(from_ms, to_ms) => Ok(()),
    }
}
