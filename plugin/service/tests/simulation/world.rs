//! Two hosts, their libvirt and QEMUs, and the tunnel between them, as far as a job sees them.
//!
//! Owns: where each guest runs, and the checks of what must hold. A guest never runs in two places,
//! never in none for good; nobody who can be held switches over before the release; after a failure
//! or an abort that came before there is no release; a report says what is so.

mod hypervisor;
mod tunnel;

pub use hypervisor::SimHypervisor;
pub use tunnel::SimTunnel;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use uuid::Uuid;
use vmgang_engine::{
    Hold, MemberCounters, MemberOutcome, SessionCounters, SessionEnd, SourceError, SourceEvent,
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
    hold: Hold,
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
        let hold = self.session.as_ref().map_or(Hold::Nothing, |it| it.hold);
        match hold {
            Hold::Nothing => false,
            Hold::Ack => !matches!(guest.fate, Fate::NoAck | Fate::HeldInFirstPass),
            Hold::Anything => !matches!(guest.fate, Fate::NoAck),
        }
    }
}

/// Nobody's memory can be read here.
pub struct NoRam;

impl Guests for NoRam {
    fn open(&self, _: &[Uuid]) -> Vec<(Uuid, OpenedGuest)> {
        Vec::new()
    }
}
