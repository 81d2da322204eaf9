//! The gang's barrier: when a member starts, when members may switch over, when all of it is taken
//! back.
//!
//! Pure: it turns what happened ([`Input`]) into what to do ([`Action`]), with no I/O, clock or
//! thread. Invariants, each tested below:
//! - a held gang is never released before every live member has converged and its switchover
//!   acknowledgement is withheld, or its guest has stopped already and cannot be held, or it is
//!   held by other means and that is said, or it goes to post-copy and its memory has been sent
//!   once, unless post-copy was asked for at once;
//! - a member of a gang that is too large to be held is let go alone, once in each of its migrations,
//!   and when it is ready itself;
//! - inputs that arrived together are decided together: none of them is overtaken by a release;
//! - after a failure under [`OnFailure::Abort`] nobody is released any more;
//! - no more members are under way than the policy says;
//! - finish exactly once, when libvirt has answered for every member that was started.

use std::collections::BTreeMap;

use crate::policy::{OnFailure, OnStall, OnTimeout, Policy, Switchover};

/// Something that happened. Members are indices into the job's members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Its stream has begun, so QEMU migrates.
    Streaming(usize),
    /// Every page has been sent once.
    FirstPassDone(usize),
    /// The stream is not understood: the end of its first pass will never be seen.
    Unreadable(usize),
    /// So little is left to send that the member could switch over with a short pause.
    Converged(usize),
    /// That was so, and is not any more.
    Diverged(usize),
    /// The member dirties memory as fast as it can be sent; what was measured, for people.
    Stalled(usize, String),
    /// The destination's QEMU has said SWITCHOVER_ACK and the tunnel keeps it.
    AckWithheld(usize),
    /// No SWITCHOVER_ACK has come; the tunnel does not read on near the end of the first pass.
    HeldInFirstPass(usize),
    /// The guest is stopped on the source; its switchover runs.
    GuestStopped(usize),
    /// The member's channel broke.
    MemberFailed(usize, String),
    /// The peer is gone, and with it every channel.
    SessionFailed(String),
    /// libvirt says the member now runs on the destination.
    Migrated(usize),
    /// libvirt says the member was not migrated.
    MigrateFailed(usize, String),
    AbortRequested,
    /// Switch to post-copy now, whatever is left to send.
    PostCopyRequested,
    /// The gang was not released in the time the user gave.
    TimedOut,
}

impl Input {
    /// Whose stream tells this, if it does.
    fn of_stream(&self) -> Option<usize> {
        match self {
            Input::Streaming(member)
            | Input::FirstPassDone(member)
            | Input::Unreadable(member)
            | Input::Converged(member)
            | Input::Diverged(member)
            | Input::Stalled(member, _)
            | Input::AckWithheld(member)
            | Input::HeldInFirstPass(member) => Some(*member),
            _ => None,
        }
    }

    /// In which order inputs that arrived together are taken: libvirt's verdicts and stopped
    /// guests first, because they limit what an abort may still touch; readiness last.
    fn rank(&self) -> u8 {
        match self {
            Input::Migrated(_) | Input::GuestStopped(_) => 0,
            Input::AbortRequested => 1,
            // What broke the tunnel tells more than libvirt's "broken pipe".
            Input::SessionFailed(_) => 2,
            Input::MemberFailed(..) => 3,
            Input::MigrateFailed(..) => 4,
            Input::TimedOut => 5,
            Input::PostCopyRequested => 6,
            _ => 7,
        }
    }
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start this member's migration; `throttled`: QEMU may slow its guest down. A second time if
    /// the first one was aborted for that.
    Start { member: usize, throttled: bool },
    /// Suspend these guests, so that they converge; they run again at the destination.
    Suspend(Vec<usize>),
    /// Switch these members to post-copy. Their release follows, if they are held.
    PostCopy(Vec<usize>),
    /// The commit point: let these members switch over, together, or the one whose turn it is.
    Release(Vec<usize>),
    /// Cancel this member's migration, and keep trying until libvirt has returned.
    AbortMember(usize),
    /// libvirt has answered for every member.
    Finish,
}

/// Why the gang as a whole did not simply complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    Failure(String),
    Aborted,
    TimedOut,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Migrated,
    Failed(String),
}

#[derive(Debug, Default)]
struct Member {
    started: bool,
    streaming: bool,
    first_pass_done: bool,
    converged: bool,
    /// It does not converge, and why.
    stalled: Option<String>,
    ack_withheld: bool,
    /// Held without an acknowledgement.
    held_in_first_pass: bool,
    /// Goes to post-copy instead of converging.
    to_post_copy: bool,
    /// Was told to.
    in_post_copy: bool,
    /// May switch over.
    released: bool,
    /// Past holding: its guest has stopped.
    gone: bool,
    /// Told to abort, to start again with its guest slowed down.
    restarting: bool,
    throttled: bool,
    /// Told to abort.
    aborted: bool,
    /// Stays behind for this reason, the rest goes on.
    left: Option<String>,
    channel_error: Option<String>,
    outcome: Option<Outcome>,
}

impl Member {
    /// Still hoped to migrate, and without a verdict yet.
    fn live(&self) -> bool {
        self.outcome.is_none() && !self.aborted
    }

    fn under_way(&self) -> bool {
        self.started && self.outcome.is_none()
    }

    /// As if it had just been started.
    fn begin_anew(&mut self) {
        *self = Member {
            started: true,
            throttled: true,
            ..Member::default()
        };
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Until all are ready.
    Holding,
    /// Nobody waits for all; each switches over when it has converged.
    Free,
    /// Released one by one.
    Staggering,
    Released,
    Aborting,
    Finished,
}

/// The barrier of a job's members.
#[derive(Debug)]
pub struct Barrier {
    members: BTreeMap<usize, Member>,
    policy: Policy,
    phase: Phase,
    /// While [`Phase::Free`]: each waits to be let go when it is ready, so that not all who are ready at
    /// the same moment stand still at the same moment.
    turns: bool,
    /// Members go to post-copy after their first pass.
    post_copy: bool,
    /// And need not have ended it.
    post_copy_now: bool,
    cause: Option<Cause>,
    approximate: bool,
}

impl Barrier {
    /// A gang that is larger than the policy's concurrency is never held: its members take turns.
    pub fn new(members: impl IntoIterator<Item = usize>, policy: Policy) -> Barrier {
        let members: BTreeMap<usize, Member> = members
            .into_iter()
            .map(|index| (index, Member::default()))
            .collect();
        let held = policy.holds(members.len());
        let turns = policy.takes_turns(members.len());
        Barrier {
            phase: if held { Phase::Holding } else { Phase::Free },
            turns,
            approximate: turns,
            post_copy: policy.post_copy,
            post_copy_now: false,
            members,
            policy,
            cause: None,
        }
    }

    /// Takes what has arrived, in any order, and returns what to do, in order. Unknown members
    /// are ignored. Without any input it says what to start with.
    pub fn handle(&mut self, inputs: impl IntoIterator<Item = Input>) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.phase == Phase::Finished {
            return actions;
        }
        let mut inputs: Vec<Input> = inputs.into_iter().collect();
        inputs.sort_by_key(Input::rank);
        // Every verdict counts before anything is decided: an answered member is not aborted.
        for input in &inputs {
            if let Input::MigrateFailed(member, error) = input {
                self.note(*member, |m| {
                    m.outcome = Some(Outcome::Failed(error.clone()));
                });
            }
        }
        // What came together with a verdict was said by the stream that has ended; another one may begin.
        let answered = |input: &Input| match input {
            Input::MigrateFailed(member, _) => Some(*member),
            _ => None,
        };
        let answered: Vec<usize> = inputs.iter().filter_map(answered).collect();
        for input in inputs {
            let stale = input.of_stream().is_some_and(|it| answered.contains(&it));
            if !stale {
                self.take(input, &mut actions);
            }
        }
        self.settle(&mut actions);
        actions
    }

    fn take(&mut self, input: Input, actions: &mut Vec<Action>) {
        match input {
            Input::Streaming(member) => {
                self.note(member, |m| m.streaming = true);
            }
            Input::FirstPassDone(member) => {
                self.note(member, |m| m.first_pass_done = true);
            }
            Input::Unreadable(member) => {
                // Whether it converges will never be seen either.
                let known = self.note(member, |m| {
                    m.first_pass_done = true;
                    m.converged = true;
                });
                self.approximate |= known && self.phase == Phase::Holding;
            }
            Input::Converged(member) => {
                self.note(member, |m| {
                    m.first_pass_done = true;
                    m.converged = true;
                    m.stalled = None;
                });
            }
            Input::Diverged(member) => {
                self.note(member, |m| m.converged = false);
            }
            Input::Stalled(member, why) => {
                self.note(member, |m| {
                    m.converged = false;
                    m.stalled = Some(why);
                });
            }
            Input::AckWithheld(member) => {
                self.note(member, |m| {
                    m.ack_withheld = true;
                    m.held_in_first_pass = false;
                });
            }
            Input::HeldInFirstPass(member) => {
                let known = self.note(member, |m| m.held_in_first_pass = true);
                self.approximate |= known && self.phase == Phase::Holding;
            }
            Input::GuestStopped(member) => {
                let known = self.note(member, |m| m.gone = true);
                self.approximate |= known && self.phase == Phase::Holding;
            }
            Input::Migrated(member) => {
                self.note(member, |m| {
                    m.outcome = Some(Outcome::Migrated);
                    m.restarting = false;
                });
            }
            Input::MemberFailed(member, error) => self.channel_failed(member, error, actions),
            Input::MigrateFailed(member, error) => self.migration_failed(member, error, actions),
            Input::SessionFailed(error) => match self.phase {
                Phase::Holding => self.abort_all(Cause::Failure(error), actions),
                Phase::Free | Phase::Staggering => {
                    self.abort_still_running(Cause::Failure(error), actions);
                }
                // After the release libvirt's own verdicts tell who made it.
                Phase::Released | Phase::Aborting | Phase::Finished => {
                    self.cause.get_or_insert(Cause::Failure(error));
                }
            },
            Input::TimedOut => self.timed_out(actions),
            Input::PostCopyRequested => {
                self.post_copy |= self.policy.can_post_copy();
                self.post_copy_now |= self.post_copy;
            }
            Input::AbortRequested => match self.phase {
                Phase::Holding => self.abort_all(Cause::Aborted, actions),
                // Members whose guest has stopped are let through: they end sooner forward.
                Phase::Free | Phase::Staggering | Phase::Released => {
                    self.abort_still_running(Cause::Aborted, actions);
                }
                Phase::Aborting | Phase::Finished => {}
            },
        }
    }

    fn timed_out(&mut self, actions: &mut Vec<Action>) {
        match (self.phase, self.policy.on_timeout) {
            (Phase::Holding, OnTimeout::Abort) => self.abort_all(Cause::TimedOut, actions),
            (Phase::Free, OnTimeout::Abort) => self.abort_still_running(Cause::TimedOut, actions),
            (Phase::Holding | Phase::Free, OnTimeout::PostCopy) => self.post_copy = true,
            (Phase::Holding | Phase::Free, OnTimeout::Suspend) => {
                let running = self.members.iter().filter(|(_, member)| {
                    let copying = member.started && !member.gone && !member.restarting;
                    member.live() && copying && !member.in_post_copy
                });
                let running: Vec<usize> = running.map(|(index, _)| *index).collect();
                if !running.is_empty() {
                    actions.push(Action::Suspend(running));
                }
            }
            _ => {}
        }
    }

    /// The gang, or its first member, has been let go.
    pub fn released(&self) -> bool {
        matches!(self.phase, Phase::Released | Phase::Staggering)
    }

    /// Some member switched over before the release, or was released without having been seen to
    /// converge, or the gang is too large to be held.
    pub fn approximate(&self) -> bool {
        self.approximate
    }

    /// Members that do not converge, and what was measured of them.
    pub fn stalled(&self) -> impl Iterator<Item = (usize, &str)> {
        self.members.iter().filter_map(|(index, member)| {
            let stalled = member.stalled.as_deref().filter(|_| member.live());
            stalled.map(|why| (*index, why))
        })
    }

    /// Its guest may be slowed down in the migration that runs.
    pub fn throttled(&self, member: usize) -> bool {
        self.members.get(&member).is_some_and(|m| m.throttled)
    }

    /// The first thing that went wrong, or the abort.
    pub fn cause(&self) -> Option<&Cause> {
        self.cause.as_ref()
    }

    /// libvirt's verdict about a member; `None` until it came.
    pub fn outcome(&self, member: usize) -> Option<&Outcome> {
        self.members.get(&member)?.outcome.as_ref()
    }

    /// What broke first for this member; `None` if it was only taken back with the gang.
    pub fn member_error(&self, member: usize) -> Option<&str> {
        let member = self.members.get(&member)?;
        if let Some(error) = member.left.as_ref().or(member.channel_error.as_ref()) {
            return Some(error);
        }
        match &member.outcome {
            Some(Outcome::Failed(error)) if !member.aborted => Some(error),
            _ => None,
        }
    }

    /// Changes a member; false if there is none of that number.
    fn note(&mut self, member: usize, change: impl FnOnce(&mut Member)) -> bool {
        match self.members.get_mut(&member) {
            Some(member) => {
                change(member);
                true
            }
            None => false,
        }
    }

    fn channel_failed(&mut self, member: usize, error: String, actions: &mut Vec<Action>) {
        let Some(failed) = self.members.get_mut(&member) else {
            return;
        };
        // A channel that breaks because of the abort is no news, nor is one that breaks once
        // the guest runs on the destination.
        if failed.aborted || failed.restarting || failed.outcome == Some(Outcome::Migrated) {
            return;
        }
        failed.channel_error.get_or_insert(error.clone());
        // Once its guest may have stopped only libvirt can tell whether it mattered.
        if matches!(self.phase, Phase::Holding | Phase::Free) && !failed.gone {
            self.member_failed(member, error, actions);
        }
    }

    fn migration_failed(&mut self, member: usize, error: String, actions: &mut Vec<Action>) {
        let Some(failed) = self.members.get_mut(&member) else {
            return;
        };
        if !failed.restarting {
            self.member_failed(member, error, actions);
        } else if matches!(self.phase, Phase::Holding | Phase::Free) && !failed.aborted {
            failed.begin_anew();
            actions.push(Action::Start {
                member,
                throttled: true,
            });
        } else {
            // Its end was wanted, for whatever reason.
            failed.aborted = true;
        }
    }

    fn member_failed(&mut self, member: usize, error: String, actions: &mut Vec<Action>) {
        let Some(failed) = self.members.get_mut(&member) else {
            return;
        };
        if failed.aborted {
            return;
        }
        // What broke first tells more than what libvirt made of it.
        let error = failed.channel_error.clone().unwrap_or(error);
        let cause = Cause::Failure(error);
        match (self.phase, self.policy.on_failure) {
            (Phase::Holding, OnFailure::Abort) => self.abort_all(cause, actions),
            (Phase::Free, OnFailure::Abort) => self.abort_still_running(cause, actions),
            (Phase::Holding | Phase::Free, OnFailure::Continue) => {
                if failed.outcome.is_none() {
                    failed.aborted = true;
                    actions.push(Action::AbortMember(member));
                }
                self.cause.get_or_insert(cause);
            }
            (Phase::Staggering | Phase::Released | Phase::Aborting | Phase::Finished, _) => {
                self.cause.get_or_insert(cause);
            }
        }
    }

    fn abort_all(&mut self, cause: Cause, actions: &mut Vec<Action>) {
        self.phase = Phase::Aborting;
        self.cause.get_or_insert(cause);
        for (index, member) in &mut self.members {
            if member.started && member.live() {
                member.aborted = true;
                actions.push(Action::AbortMember(*index));
            }
        }
    }

    /// Takes back whose guest runs here; whose has stopped ends sooner forward.
    fn abort_still_running(&mut self, cause: Cause, actions: &mut Vec<Action>) {
        let waits = |member: &Member| member.live() && !member.started;
        let mut any = self.members.values().any(waits);
        for (index, member) in &mut self.members {
            if member.started && member.live() && !member.gone {
                member.aborted = true;
                actions.push(Action::AbortMember(*index));
                any = true;
            }
        }
        if any || matches!(cause, Cause::Failure(_)) {
            self.cause.get_or_insert(cause);
        }
        // Nobody is started, or let go, any more.
        self.phase = match self.phase {
            Phase::Released => Phase::Released,
            _ => Phase::Aborting,
        };
    }

    /// Whether the member may switch over as far as it goes.
    fn ready(&self, member: &Member) -> bool {
        if !member.started || member.restarting {
            return false;
        }
        if member.gone || member.held_in_first_pass {
            return true;
        }
        // Post-copy waits for no acknowledgement: QEMU switches when it is told to.
        self.can_go_to_post_copy(member)
            || (member.ack_withheld && member.first_pass_done && member.converged)
    }

    /// Whether the member is to go to post-copy, and QEMU can be told so.
    fn can_go_to_post_copy(&self, member: &Member) -> bool {
        let at_once = self.post_copy_now && member.streaming;
        (self.post_copy || member.to_post_copy) && (member.first_pass_done || at_once)
    }

    fn settle(&mut self, actions: &mut Vec<Action>) {
        self.start_waiting(actions);
        match self.phase {
            Phase::Holding => self.settle_held(actions),
            Phase::Free => self.settle_free(actions),
            Phase::Staggering => self.release_next(actions),
            Phase::Released | Phase::Aborting | Phase::Finished => {}
        }
        let nobody_starts = matches!(self.phase, Phase::Aborting | Phase::Released);
        let over = |member: &Member| {
            member.outcome.is_some() || (!member.started && (nobody_starts || member.aborted))
        };
        if self.members.values().all(over) {
            self.phase = Phase::Finished;
            actions.push(Action::Finish);
        }
    }

    /// As one member ends, the next one begins.
    fn start_waiting(&mut self, actions: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Holding | Phase::Free) {
            return;
        }
        let under_way = self.members.values().filter(|m| m.under_way()).count();
        let room = self.policy.concurrency.get().saturating_sub(under_way);
        let waiting = self.members.iter_mut().filter(|(_, m)| !m.started);
        for (member, waiting) in waiting.take(room) {
            waiting.started = true;
            actions.push(Action::Start {
                member: *member,
                throttled: false,
            });
        }
    }

    fn settle_held(&mut self, actions: &mut Vec<Action>) {
        let live = |member: &&usize| self.members[*member].live();
        let all: Vec<usize> = self.members.keys().filter(live).copied().collect();
        if all.is_empty() {
            return;
        }
        let waits = |member: &usize| !self.ready(&self.members[member]);
        let waiting: Vec<usize> = all.iter().copied().filter(waits).collect();
        if waiting.is_empty() {
            self.let_go(all, actions);
            return;
        }
        // What is done about a stall is done when nothing else holds the gang.
        let stalled = |member: &usize| self.members[member].stalled.is_some();
        if waiting.iter().all(stalled) {
            for member in waiting {
                self.unstall(member, actions);
            }
            if self.phase == Phase::Holding {
                self.settle_held(actions);
            }
        }
    }

    /// The commit point.
    fn let_go(&mut self, members: Vec<usize>, actions: &mut Vec<Action>) {
        if self.policy.switchover == Switchover::Staggered && !self.post_copy {
            self.phase = Phase::Staggering;
            self.release_next(actions);
        } else {
            self.phase = Phase::Released;
            self.release(members, actions);
        }
    }

    fn release(&mut self, members: Vec<usize>, actions: &mut Vec<Action>) {
        let goes_to_post_copy = |index: &usize| {
            let member = &self.members[index];
            !member.gone && (self.post_copy || member.to_post_copy)
        };
        let to_post_copy: Vec<usize> = members.iter().copied().filter(goes_to_post_copy).collect();
        if !to_post_copy.is_empty() {
            actions.push(Action::PostCopy(to_post_copy));
        }
        for member in &members {
            self.note(*member, |m| m.released = true);
        }
        actions.push(Action::Release(members));
    }

    /// Lets the next one go when the one before runs at the destination, or will not.
    fn release_next(&mut self, actions: &mut Vec<Action>) {
        let mut live = self.members.iter().filter(|(_, member)| member.live());
        if live.clone().any(|(_, member)| member.released) {
            return;
        }
        match live.next().map(|(index, _)| *index) {
            Some(next) => self.release(vec![next], actions),
            None => self.phase = Phase::Released,
        }
    }

    fn settle_free(&mut self, actions: &mut Vec<Action>) {
        let copying = |member: &Member| {
            let here = !member.gone && !member.restarting && !member.in_post_copy;
            member.started && member.live() && here
        };
        let all: Vec<usize> = self.members.keys().copied().collect();
        // First of all: it may take everybody back, and then nobody is let go any more.
        for index in &all {
            let member = &self.members[index];
            let stalled = member.stalled.is_some() && !self.can_go_to_post_copy(member);
            if copying(member) && stalled && self.phase == Phase::Free {
                self.unstall(*index, actions);
            }
        }
        for index in all {
            let member = &self.members[&index];
            if !copying(member) {
                continue;
            }
            let to_post_copy = member.to_post_copy || self.can_go_to_post_copy(member);
            let turn = self.turns && !member.released && (to_post_copy || self.ready(member));
            self.note(index, |m| {
                m.in_post_copy = to_post_copy;
                m.released |= turn;
            });
            if to_post_copy {
                actions.push(Action::PostCopy(vec![index]));
            }
            if turn {
                actions.push(Action::Release(vec![index]));
            }
        }
    }

    /// Does what the policy says about a member that does not converge.
    fn unstall(&mut self, member: usize, actions: &mut Vec<Action>) {
        let Some(stalled) = self.members.get_mut(&member) else {
            return;
        };
        let Some(why) = stalled.stalled.take() else {
            return;
        };
        match self.policy.on_stall {
            OnStall::Throttle if !stalled.throttled => {
                stalled.restarting = true;
                actions.push(Action::AbortMember(member));
            }
            OnStall::PostCopy => stalled.to_post_copy = true,
            OnStall::Leave => {
                stalled.aborted = true;
                stalled.left = Some(why.clone());
                actions.push(Action::AbortMember(member));
                self.cause.get_or_insert(Cause::Failure(why));
            }
            OnStall::Throttle | OnStall::Abort => {
                stalled.left = Some(why.clone());
                if self.phase == Phase::Holding {
                    self.abort_all(Cause::Failure(why), actions);
                } else {
                    self.abort_still_running(Cause::Failure(why), actions);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
