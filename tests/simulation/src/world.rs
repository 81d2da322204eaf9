//! What all parts of one run share: time, the trace, what has been found wrong, and where each guest
//! runs.
//!
//! Owns: the rule that a guest never runs in two places. Must not: run anything.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use uuid::Uuid;
use vmgang_engine::QemuConnection;

use crate::network::PeerConnection;
use crate::pipe::Link;
use crate::plan::{Event, Plan, When};
use crate::random::Random;

/// One incarnation of a daemon.
#[derive(Debug)]
pub struct Life {
    pub host: &'static str,
    alive: AtomicBool,
}

impl Life {
    pub fn new(host: &'static str) -> Arc<Life> {
        Arc::new(Life {
            host,
            alive: AtomicBool::new(true),
        })
    }

    pub fn alive(&self) -> bool {
        self.alive.load(SeqCst)
    }

    pub fn end(&self) {
        self.alive.store(false, SeqCst);
    }
}

/// A guest's QEMU on the source host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Here {
    Running,
    Paused,
    /// libvirt has ended it, because the guest has migrated.
    Gone,
    Dead,
}

/// And on the destination host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum There {
    Nothing,
    Incoming,
    /// It has its whole stream, and waits to be let run.
    Loaded,
    Running,
}

/// One guest.
#[derive(Debug)]
pub struct Guest {
    pub name: String,
    pub uuid: Uuid,
    pub here: Here,
    pub there: There,
    /// All that its source QEMU wrote.
    pub written: Vec<u8>,
    /// How much of it its destination QEMU has read.
    pub read: usize,
    /// Its source QEMU has written all.
    pub whole: bool,
    /// All that its destination QEMU wrote.
    pub returned: Vec<u8>,
    /// How much of it its source QEMU has read.
    pub return_read: usize,
    /// Its source QEMU has written every page once.
    pub first_pass_done: bool,
    /// Its destination QEMU has said that it may switch over.
    pub ack_said: bool,
    /// When it was released.
    pub released: Option<Instant>,
    /// libvirt is at it, from its call to its verdict.
    pub called: bool,
    /// When the last verdict came.
    pub answered: Option<Instant>,
    /// QEMU is.
    pub migrating: bool,
    pub limit_ms: u64,
    pub cancelled: watch::Sender<bool>,
    /// The destination QEMU reads nothing before.
    pub reads_from: Instant,
    pub destination_dies: watch::Sender<bool>,
}

impl Guest {
    /// A migration of it is under way.
    pub fn busy(&self) -> bool {
        self.called
    }
}

/// Who accepts connections.
#[derive(Debug, Default)]
pub struct Net {
    pub peers: BTreeMap<String, (Arc<Life>, mpsc::UnboundedSender<PeerConnection>)>,
    pub sockets: BTreeMap<PathBuf, (Option<Arc<Life>>, mpsc::UnboundedSender<QemuConnection>)>,
    /// Between daemons, in the order in which they were opened.
    pub links: Vec<Link>,
    /// Connections with a daemon at an end.
    pub ends: Vec<(Arc<Life>, Link)>,
}

#[derive(Debug, Default)]
struct Trace {
    steps: u64,
    hash: u64,
    lines: Option<Vec<String>>,
}

/// One run.
#[derive(Debug)]
pub struct World {
    pub plan: Plan,
    began: Instant,
    random: Mutex<Random>,
    trace: Mutex<Trace>,
    wrong: Mutex<Vec<String>>,
    /// When the first member could not migrate any more, and which, or the user wanted the gang back.
    given_up: Mutex<Option<(Instant, Option<usize>)>>,
    abort_requested: AtomicBool,
    guests: Vec<Mutex<Guest>>,
    net: Mutex<Net>,
    due: Mutex<VecDeque<Event>>,
    pub due_now: Notify,
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub fn new(plan: Plan, keep_trace: bool) -> Arc<World> {
        let guests = (0..plan.guests.len()).map(|member| {
            Mutex::new(Guest {
                name: format!("g{member}"),
                uuid: Uuid::from_u128(0x100 + member as u128),
                here: Here::Running,
                there: There::Nothing,
                written: Vec::new(),
                read: 0,
                whole: false,
                returned: Vec::new(),
                return_read: 0,
                first_pass_done: false,
                ack_said: false,
                released: None,
                called: false,
                answered: None,
                migrating: false,
                limit_ms: 0,
                cancelled: watch::Sender::new(false),
                reads_from: Instant::now(),
                destination_dies: watch::Sender::new(false),
            })
        });
        Arc::new(World {
            began: Instant::now(),
            random: Mutex::new(Random::new(plan.seed ^ 0x7077)),
            trace: Mutex::new(Trace {
                hash: 0xcbf2_9ce4_8422_2325,
                lines: keep_trace.then(Vec::new),
                ..Trace::default()
            }),
            wrong: Mutex::default(),
            given_up: Mutex::default(),
            abort_requested: AtomicBool::new(false),
            guests: guests.collect(),
            net: Mutex::default(),
            due: Mutex::default(),
            due_now: Notify::new(),
            plan,
        })
    }

    pub fn random(&self) -> MutexGuard<'_, Random> {
        lock(&self.random)
    }

    pub fn net(&self) -> MutexGuard<'_, Net> {
        lock(&self.net)
    }

    pub fn guests(&self) -> impl Iterator<Item = MutexGuard<'_, Guest>> {
        self.guests.iter().map(lock)
    }

    pub fn guest(&self, member: usize) -> MutexGuard<'_, Guest> {
        lock(&self.guests[member])
    }

    pub fn member(&self, uuid: Uuid) -> Option<usize> {
        self.guests().position(|guest| guest.uuid == uuid)
    }

    /// A step of the run: goes into the trace, and may be what a fault waits for.
    pub fn step(&self, what: fmt::Arguments<'_>) {
        let line = format!("{} {what}", self.began.elapsed().as_millis());
        let step = {
            let mut trace = lock(&self.trace);
            for byte in line.bytes() {
                trace.hash = (trace.hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
            if let Some(lines) = &mut trace.lines {
                lines.push(line);
            }
            trace.steps += 1;
            trace.steps
        };
        for (when, event) in &self.plan.faults {
            if *when == When::Step(step) {
                self.happen(*event);
            }
        }
    }

    pub fn happen(&self, event: Event) {
        lock(&self.due).push_back(event);
        self.due_now.notify_one();
    }

    pub fn next_due(&self) -> Option<Event> {
        lock(&self.due).pop_front()
    }

    /// An invariant does not hold.
    pub fn wrong(&self, what: String) {
        self.step(format_args!("WRONG: {what}"));
        lock(&self.wrong).push(what);
    }

    /// The user has asked for an abort, and was not refused; or the source's daemon is told to end.
    pub fn abort_requested(&self) {
        self.abort_requested.store(true, SeqCst);
        lock(&self.given_up).get_or_insert((Instant::now(), None));
    }

    pub fn abort_was_requested(&self) -> bool {
        self.abort_requested.load(SeqCst)
    }

    /// A member's migration has failed because it is to begin anew.
    pub fn begins_anew(&self, member: usize) {
        self.step(format_args!("{member} begins anew"));
        let mut given_up = lock(&self.given_up);
        if given_up.is_some_and(|(_, by)| by == Some(member)) {
            *given_up = None;
        }
    }

    /// libvirt's verdict on a member.
    pub fn verdict(&self, member: usize, result: &Result<(), String>) {
        {
            let mut guest = self.guest(member);
            guest.called = false;
            guest.answered = Some(Instant::now());
        }
        self.step(format_args!("libvirt's verdict on {member}: {result:?}"));
        // Once the first one was let go the others follow, whatever becomes of it.
        let released = self.guests().any(|guest| guest.released.is_some());
        if result.is_err() && !self.plan.continue_on_failure && !released {
            lock(&self.given_up).get_or_insert((Instant::now(), Some(member)));
        }
    }

    /// A member is released now.
    pub fn released(&self, member: usize) {
        let ready = {
            let mut guest = self.guest(member);
            guest.released = Some(Instant::now());
            // One whose destination says nothing is held in its first pass.
            // The verdict may cross the release.
            let called = guest.called || guest.answered == Some(Instant::now());
            called && (guest.first_pass_done || !guest.ack_said)
        };
        self.step(format_args!("released {member}"));
        if !ready {
            self.wrong(format!("guest {member} was released before it was ready"));
        }
        let given_up = *lock(&self.given_up);
        let first = self.guests().filter_map(|guest| guest.released).min();
        // Within a moment a failure and the first release may cross, and then the others follow.
        let too_late = |(at, by): (Instant, Option<usize>)| match by {
            Some(_) => first.is_some_and(|first| at < first),
            None => at < Instant::now(),
        };
        if given_up.is_some_and(too_late) {
            self.wrong("released after the gang was given up".to_owned());
        }
    }

    pub fn findings(&self) -> Vec<String> {
        lock(&self.wrong).clone()
    }

    /// Hash, steps and lines of the trace.
    pub fn trace(&self) -> (u64, u64, Vec<String>) {
        let trace = lock(&self.trace);
        let lines = trace.lines.clone().unwrap_or_default();
        (trace.hash, trace.steps, lines)
    }

    /// A guest that runs on the destination goes on here as well, because libvirt was not told.
    pub fn goes_on_by_mistake(&self, member: usize) {
        self.guest(member).here = Here::Running;
        self.step(format_args!("guest {member} here Running, by mistake"));
    }

    pub fn runs_twice(&self, member: usize) -> bool {
        let guest = self.guest(member);
        guest.here == Here::Running && guest.there == There::Running
    }

    /// Changes where a guest is, on the source host.
    pub fn set_here(&self, member: usize, here: Here) {
        let both = {
            let mut guest = self.guest(member);
            guest.here = here;
            guest.here == Here::Running && guest.there == There::Running
        };
        self.step(format_args!("guest {member} here {here:?}"));
        if both {
            self.wrong(format!("guest {member} runs in two places"));
        }
    }

    /// And on the destination host.
    pub fn set_there(&self, member: usize, there: There) {
        let (both, torn) = {
            let mut guest = self.guest(member);
            guest.there = there;
            let whole = guest.whole && guest.read == guest.written.len();
            (
                guest.here == Here::Running && guest.there == There::Running,
                there == There::Running && !whole,
            )
        };
        self.step(format_args!("guest {member} there {there:?}"));
        if both {
            self.wrong(format!("guest {member} runs in two places"));
        }
        if torn {
            self.wrong(format!("guest {member} runs without its whole stream"));
        }
    }

    /// A daemon is gone, and with it its ends of all connections.
    pub fn sever(&self, life: &Arc<Life>) {
        life.end();
        let mut net = self.net();
        net.peers.retain(|_, (owner, _)| !Arc::ptr_eq(owner, life));
        for (owner, link) in &net.ends {
            if Arc::ptr_eq(owner, life) {
                link.reset();
            }
        }
        net.ends.retain(|(owner, _)| !Arc::ptr_eq(owner, life));
        let of_life = |owner: &Option<Arc<Life>>| {
            owner.as_ref().is_some_and(|owner| Arc::ptr_eq(owner, life))
        };
        net.sockets.retain(|_, (owner, _)| !of_life(owner));
    }
}

/// What is the same on both hosts of a socket's path.
pub fn below_migrate(socket: &Path) -> PathBuf {
    let mut parts: Vec<_> = socket.iter().rev().take(4).collect();
    parts.reverse();
    parts.iter().collect()
}
