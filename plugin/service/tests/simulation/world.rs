//! Two hosts, their libvirt and QEMUs, and the tunnel between them, as far as a job sees them.
//!
//! Owns: where each guest runs, and the checks of what must hold. A guest never runs in two places,
//! never in none for good; nobody who can be held switches over before the release; after a failure
//! or an abort that came before there is no release; a report says what is so.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use uuid::Uuid;
use vmgang_engine::{
    MemberCounters, MemberOutcome, SessionCounters, SessionEnd, SourceError, SourceEvent,
    SourceOptions,
};
use vmgang_libvirt::{
    Balloon, DomainInfo, DomainQemu, DomainQemuUser, DomainState, Failure, Fit, Hardware, JobStats,
    LibvirtError, ListedDomain, Membership, MigrateOptions, QemuUser, Versions,
};
use vmgang_service::guests::{Guests, Opened as OpenedGuest};
use vmgang_service::hypervisor::{DestinationFit, DestinationInfo, Hypervisor, Verdict};
use vmgang_service::policy::{OnFailure, Policy};
use vmgang_service::report::{DomainOutcome, JobState, Report};
use vmgang_service::tunnel::{BoxFuture, OfferContents, Opened, Session, Tunnel};

use super::Shown;

/// Splitmix64: all there is of chance.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

/// How a guest fares on one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Here {
    Absent,
    /// Arriving.
    Incoming,
    Running,
    Paused,
}

/// What will happen to a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Good,
    /// libvirt refuses it at once.
    Refused,
    /// Its destination QEMU dies after so many steps of its migration.
    Breaks(u64),
    /// Converges only when its guest is slowed down.
    Stalls,
    AlwaysStalls,
    /// Its destination sends no acknowledgement, and nothing holds it.
    NoAck,
    /// The same, and the tunnel holds it in its first pass.
    HeldInFirstPass,
    Unreadable,
    /// It arrives, and libvirtd dies before it says so.
    AnswerLost,
    /// libvirt takes long to reach the destination, and hears nothing meanwhile.
    Hangs,
}

#[derive(Debug)]
struct Guest {
    uuid: Uuid,
    name: String,
    here: Here,
    there: Here,
    fate: Fate,
    /// libvirt migrates it.
    under_way: bool,
    /// Its QEMU cannot connect to the tunnel any more.
    closed: bool,
    /// Its guest has stopped here in this migration.
    stopped: bool,
    post_copy: bool,
    /// libvirt lets it go on here although it runs there.
    doubt: bool,
    abort: watch::Sender<bool>,
    to_post_copy: watch::Sender<bool>,
    suspended: watch::Sender<bool>,
    /// Dies with the daemon.
    starts: u32,
}

struct SessionState {
    events: mpsc::UnboundedSender<SourceEvent>,
    released: watch::Sender<Vec<bool>>,
    /// By guest, because one channel wakes those who wait for it in any order.
    broken: Vec<watch::Sender<bool>>,
    hold: bool,
}

struct State {
    random: Random,
    guests: Vec<Guest>,
    session: Option<SessionState>,
    /// When the session breaks, after it has opened.
    breaks_after: Option<Duration>,
    policy: Option<Policy>,
    has_timeout: bool,
    /// Something went wrong before anybody was released.
    failed_before_release: bool,
    released_any: bool,
    /// Somebody's guest has stopped here.
    stopped_any: bool,
    abort_asked: Option<Instant>,
    aborted_before_any_switchover: bool,
    started: Option<Instant>,
    trace: Vec<String>,
}

/// All of it. Clones are the same world.
#[derive(Clone)]
pub struct World(Arc<Mutex<State>>);

impl World {
    pub fn new(random: &mut Random) -> World {
        let members = 1 + random.below(8);
        let trouble = random.below(3);
        let guests = (0..members).map(|number| Guest {
            uuid: Uuid::from_u128(0x100 + u128::from(number)),
            name: format!("vm{number}"),
            here: Here::Running,
            there: Here::Absent,
            fate: fate(random, trouble),
            under_way: false,
            closed: false,
            stopped: false,
            post_copy: false,
            doubt: false,
            abort: watch::Sender::new(false),
            to_post_copy: watch::Sender::new(false),
            suspended: watch::Sender::new(false),
            starts: 0,
        });
        let guests = guests.collect();
        let breaks = random.below(100) < 20;
        let when = Duration::from_millis(random.below(20_000));
        World(Arc::new(Mutex::new(State {
            random: Random(random.next()),
            guests,
            session: None,
            breaks_after: breaks.then_some(when),
            policy: None,
            has_timeout: false,
            failed_before_release: false,
            released_any: false,
            stopped_any: false,
            abort_asked: None,
            aborted_before_any_switchover: false,
            started: None,
            trace: Vec::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic before")
    }

    pub fn guests(&self) -> usize {
        self.lock().guests.len()
    }

    pub fn takes_policy(&self, policy: Policy, has_timeout: bool) {
        let mut state = self.lock();
        state.policy = Some(policy);
        state.has_timeout = has_timeout;
        state.started = Some(Instant::now());
        state.say(&format!("{policy:?}"));
    }

    pub fn say(&self, text: &str) {
        self.lock().say(text);
    }

    pub fn abort_asked(&self) {
        let mut state = self.lock();
        if !state.released_any {
            state.failed_before_release = true;
        }
        state.aborted_before_any_switchover = !state.stopped_any;
        state.abort_asked = Some(Instant::now());
    }

    /// With an abort that came before any guest had stopped, everything is as before, and soon.
    pub fn check_abort_was_quick(&self) {
        let state = self.lock();
        if let Some(asked) = state
            .abort_asked
            .filter(|_| state.aborted_before_any_switchover)
        {
            let hangs = state.guests.iter().any(|guest| guest.fate == Fate::Hangs);
            // What libvirt takes at most to begin a migration, and to end it.
            assert!(
                asked.elapsed() < Duration::from_secs(if hangs { 7 } else { 3 }),
                "{:?}",
                asked.elapsed()
            );
            assert!(
                state.guests.iter().all(|guest| guest.here == Here::Running),
                "{:#?}",
                state.trace
            );
        }
    }

    /// The migrations' threads have gone with the daemon, and the tunnel.
    pub fn daemon_is_gone(&self) {
        let mut state = self.lock();
        state.session = None;
        // Its clock has stopped, too.
        state.started = None;
        for number in 0..state.guests.len() {
            if !state.guests[number].under_way {
                continue;
            }
            let (stopped, post_copy) =
                (state.guests[number].stopped, state.guests[number].post_copy);
            // Whose last bytes were there arrives all the same.
            let arrives = stopped && state.random.below(2) == 0;
            let guest = &mut state.guests[number];
            guest.under_way = false;
            (guest.here, guest.there) = match (arrives, post_copy && stopped) {
                (true, _) => (Here::Absent, Here::Running),
                (false, true) => (Here::Paused, Here::Paused),
                (false, false) => (Here::Running, Here::Absent),
            };
            state.check(number);
        }
    }

    /// libvirt has cleaned up by the time the next daemon asks.
    pub async fn settle(&self) {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }

    /// Nothing has been started.
    pub fn check_untouched(&self) {
        for guest in &self.lock().guests {
            assert_eq!((guest.here, guest.there), (Here::Running, Here::Absent));
        }
    }

    /// Each guest runs in one place; after a broken post-copy it waits in both.
    pub fn check_guests(&self) {
        for guest in &self.lock().guests {
            let post_copy_broke =
                guest.post_copy && (guest.here, guest.there) == (Here::Paused, Here::Paused);
            let places = [guest.here, guest.there];
            let running = places.iter().filter(|place| **place == Here::Running);
            // The daemon was killed before it could suspend what libvirt had let go on.
            let in_doubt = guest.doubt && guest.here == Here::Running;
            assert!(
                running.count() == 1 || post_copy_broke || in_doubt,
                "{guest:?}"
            );
        }
    }

    /// The report says what is so. `told`: by the daemon that ran the job.
    pub fn check_report(&self, report: &Report, told: bool) {
        let mut state = self.lock();
        let text = format!("{:?}: {:?}", report.state, report.error);
        state.say(&text);
        assert!(report.state.ended());
        for (guest, domain) in state.guests.iter().zip(&report.domains) {
            assert_eq!(guest.name, domain.name);
            match domain.state {
                DomainOutcome::Migrated => assert_eq!(guest.there, Here::Running, "{guest:?}"),
                DomainOutcome::Source => assert_eq!(guest.here, Here::Running, "{guest:?}"),
                DomainOutcome::Failed => assert!(domain.error.is_some()),
            }
        }
        let all = |place: fn(&Guest) -> Here| {
            state
                .guests
                .iter()
                .all(|guest| place(guest) == Here::Running)
        };
        match report.state {
            JobState::Completed => assert!(all(|guest| guest.there)),
            JobState::Failed | JobState::Aborted => assert!(!told || all(|guest| guest.here)),
            _ => {}
        }
        let policy = state.policy.expect("a job");
        let all_or_nothing = policy.on_failure == OnFailure::Abort
            && policy.holds(state.guests.len())
            && state.failed_before_release
            && !state.stopped_any;
        if all_or_nothing {
            assert!(all(|guest| guest.here), "all or nothing");
        }
    }

    pub fn shown(&self, report: String) -> Shown {
        Shown {
            trace: self.lock().trace.clone(),
            report,
        }
    }

    async fn pause(&self, from_ms: u64, to_ms: u64) {
        let time = from_ms + self.lock().random.below(to_ms - from_ms);
        tokio::time::sleep(Duration::from_millis(time)).await;
    }
}

fn fate(random: &mut Random, trouble: u64) -> Fate {
    if random.below(10) >= trouble * 4 {
        return Fate::Good;
    }
    match random.below(10) {
        0 => Fate::Refused,
        8 => Fate::Hangs,
        1 | 2 => Fate::Breaks(random.below(12)),
        3 => Fate::Stalls,
        4 => Fate::AlwaysStalls,
        5 => Fate::NoAck,
        6 => Fate::HeldInFirstPass,
        7 => Fate::Unreadable,
        _ => Fate::AnswerLost,
    }
}

impl State {
    fn say(&mut self, text: &str) {
        let at = self
            .started
            .map_or(Duration::ZERO, |started| started.elapsed());
        self.trace.push(format!("{} ms: {text}", at.as_millis()));
    }

    fn index(&self, uuid: Uuid) -> usize {
        let found = self.guests.iter().position(|guest| guest.uuid == uuid);
        found.expect("a guest of this world")
    }

    fn tell(&self, event: SourceEvent) {
        if let Some(session) = &self.session {
            let _ = session.events.send(event);
        }
    }

    fn failed(&mut self) {
        self.failed_before_release |= !self.released_any;
    }

    fn check(&self, number: usize) {
        let guest = &self.guests[number];
        let twice = guest.here == Here::Running && guest.there == Here::Running;
        assert!(!twice || guest.doubt, "{} runs in two places", guest.name);
        let nowhere = guest.here == Here::Absent && guest.there != Here::Running;
        assert!(!nowhere, "{} is lost", guest.name);
    }

    fn place(&mut self, number: usize, here: Here, there: Here) {
        // Within a moment the two may cross.
        if here == Here::Paused && self.abort_asked == Some(Instant::now()) {
            self.aborted_before_any_switchover = false;
        }
        let guest = &mut self.guests[number];
        (guest.here, guest.there) = (here, there);
        let text = format!("{} is {here:?} here, {there:?} there", guest.name);
        self.say(&text);
        self.check(number);
    }

    fn holds(&self, number: usize) -> bool {
        let guest = &self.guests[number];
        let held = self.session.as_ref().is_some_and(|session| session.hold);
        held && !matches!(guest.fate, Fate::NoAck)
    }
}

/// libvirt of the source.
pub struct SimHypervisor(pub World);

fn refused(name: &str, message: &str) -> LibvirtError {
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

/// The engine.
pub struct SimTunnel(pub World);

struct SimSession {
    world: World,
    members: usize,
    _breaking: tokio::task::JoinSet<()>,
}

impl Tunnel for SimTunnel {
    fn connect(&self, options: SourceOptions) -> BoxFuture<'_, Result<Opened, SourceError>> {
        Box::pin(async move {
            self.0.pause(1, 300).await;
            let (events, receiver) = mpsc::unbounded_channel();
            let members = options.offer.members.len();
            let mut state = self.0.lock();
            state.session = Some(SessionState {
                events,
                released: watch::Sender::new(vec![!options.hold; members]),
                broken: (0..members).map(|_| watch::Sender::new(false)).collect(),
                hold: options.hold,
            });
            state.say("the session opens");
            let mut breaking = tokio::task::JoinSet::new();
            if let Some(after) = state.breaks_after {
                let world = self.0.clone();
                breaking.spawn(async move {
                    tokio::time::sleep(after).await;
                    let mut state = world.lock();
                    state.failed();
                    state.say("the session breaks");
                    state.tell(SourceEvent::SessionFailed {
                        error: "connection reset by peer".into(),
                    });
                    if let Some(session) = &state.session {
                        for broken in &session.broken {
                            broken.send_replace(true);
                        }
                    }
                });
            }
            let session = SimSession {
                world: self.0.clone(),
                members,
                _breaking: breaking,
            };
            Ok((Box::new(session) as Box<dyn Session>, receiver))
        })
    }
}

impl SimSession {
    fn let_go(&self, member: usize) {
        let mut state = self.world.lock();
        let policy = state.policy.expect("a job");
        let keeps_all = policy.on_failure == OnFailure::Abort;
        let first = !state.released_any;
        assert!(
            !(first && keeps_all && state.failed_before_release && !state.stopped_any),
            "released after something had gone wrong"
        );
        state.released_any = true;
        state.say("released");
        if let Some(session) = &state.session {
            session
                .released
                .send_modify(|released| released[member] = true);
        }
    }
}

impl Session for SimSession {
    fn migrate_uri(&self, member: usize) -> String {
        format!("unix:///sim/{member}")
    }
    fn release_member(&self, member: usize) {
        self.let_go(member);
    }
    fn close_socket(&self, member: usize) {
        self.world.lock().guests[member].closed = true;
    }
    fn restart_member(&self, member: usize) {
        let state = self.world.lock();
        assert!(
            !state.guests[member].under_way,
            "begins anew before its end"
        );
    }
    fn set_bandwidth(&self, _: Option<u64>) {}
    fn counters(&self) -> SessionCounters {
        SessionCounters {
            members: vec![MemberCounters::default(); self.members],
            ..SessionCounters::default()
        }
    }
    fn member_outcome(
        &self,
        _: usize,
    ) -> BoxFuture<'_, Result<Option<MemberOutcome>, SourceError>> {
        Box::pin(async { Ok(None) })
    }
    fn has_stage(&self) -> bool {
        false
    }
    fn may_find_contents(&self) -> bool {
        false
    }
    fn offers(&self) -> Box<OfferContents> {
        Box::new(|_| Box::pin(async { 0 }))
    }
    fn close(self: Box<Self>) -> BoxFuture<'static, SessionEnd> {
        Box::pin(async { SessionEnd::default() })
    }
}

/// Nobody's memory can be read here.
pub struct NoRam;

impl Guests for NoRam {
    fn open(&self, _: &[Uuid]) -> Vec<(Uuid, OpenedGuest)> {
        Vec::new()
    }
}
