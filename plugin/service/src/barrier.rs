//! The gang's barrier: when to let every member switch over, when to take all of it back.
//!
//! Pure: it turns what happened ([`Input`]) into what to do ([`Action`]), with no I/O, clock or
//! thread. Invariants, each tested below:
//! - never a release before every live member has ended its first pass (or that end can never
//!   be seen) and its switchover acknowledgement is withheld, or its guest has stopped already
//!   and cannot be held;
//! - inputs that arrived together are decided together: none of them is overtaken by a release;
//! - at most one release; after a failure under [`OnFailure::Abort`] none at all;
//! - finish exactly once, when libvirt has answered for every member.

use std::collections::BTreeMap;

/// What a failure before the release does to the other members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    /// All or nothing.
    Abort,
    /// The failed member is left out, the rest goes on.
    Continue,
}

/// Something that happened. Members are indices into the job's members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Every page has been sent once.
    FirstPassDone(usize),
    /// The stream is not understood: the end of its first pass will never be seen.
    Unreadable(usize),
    /// The destination's QEMU has said SWITCHOVER_ACK and the tunnel keeps it.
    AckWithheld(usize),
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
    /// The gang was not released in the time the user gave.
    TimedOut,
}

impl Input {
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
            Input::FirstPassDone(_) | Input::Unreadable(_) | Input::AckWithheld(_) => 6,
        }
    }
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The commit point: let these members switch over, together.
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
    first_pass_done: bool,
    ack_withheld: bool,
    /// Past holding: its guest has stopped.
    gone: bool,
    /// Told to abort.
    aborted: bool,
    channel_error: Option<String>,
    outcome: Option<Outcome>,
}

impl Member {
    /// Still hoped to migrate, and without a verdict yet.
    fn live(&self) -> bool {
        self.outcome.is_none() && !self.aborted
    }

    fn ready(&self) -> bool {
        self.gone || (self.first_pass_done && self.ack_withheld)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Holding,
    Released,
    Aborting,
    Finished,
}

/// The barrier of one wave of members.
#[derive(Debug)]
pub struct Barrier {
    members: BTreeMap<usize, Member>,
    on_failure: OnFailure,
    phase: Phase,
    cause: Option<Cause>,
    approximate: bool,
}

impl Barrier {
    pub fn new(members: impl IntoIterator<Item = usize>, on_failure: OnFailure) -> Barrier {
        Barrier {
            members: members
                .into_iter()
                .map(|index| (index, Member::default()))
                .collect(),
            on_failure,
            phase: Phase::Holding,
            cause: None,
            approximate: false,
        }
    }

    /// Takes what has arrived, in any order, and returns what to do, in order. Unknown members
    /// are ignored.
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
                    m.outcome = Some(Outcome::Failed(error.clone()))
                });
            }
        }
        for input in inputs {
            self.take(input, &mut actions);
        }
        self.settle(&mut actions);
        actions
    }

    fn take(&mut self, input: Input, actions: &mut Vec<Action>) {
        match input {
            Input::FirstPassDone(member) => {
                self.note(member, |m| m.first_pass_done = true);
            }
            Input::Unreadable(member) => {
                let known = self.note(member, |m| m.first_pass_done = true);
                self.approximate |= known && self.phase == Phase::Holding;
            }
            Input::AckWithheld(member) => {
                self.note(member, |m| m.ack_withheld = true);
            }
            Input::GuestStopped(member) => {
                let known = self.note(member, |m| m.gone = true);
                self.approximate |= known && self.phase == Phase::Holding;
            }
            Input::Migrated(member) => {
                self.note(member, |m| m.outcome = Some(Outcome::Migrated));
            }
            Input::MemberFailed(member, error) => self.channel_failed(member, error, actions),
            Input::MigrateFailed(member, error) => self.member_failed(member, error, actions),
            Input::SessionFailed(error) => {
                // After the release libvirt's own verdicts tell who made it.
                if self.phase == Phase::Holding {
                    self.abort_all(Cause::Failure(error), actions);
                } else {
                    self.cause.get_or_insert(Cause::Failure(error));
                }
            }
            Input::TimedOut => {
                if self.phase == Phase::Holding {
                    self.abort_all(Cause::TimedOut, actions);
                }
            }
            Input::AbortRequested => match self.phase {
                Phase::Holding => self.abort_all(Cause::Aborted, actions),
                // Members whose guest has stopped are let through: they end sooner forward.
                Phase::Released => self.abort_still_running(actions),
                Phase::Aborting | Phase::Finished => {}
            },
        }
    }

    /// The gang has been let go.
    pub fn released(&self) -> bool {
        self.phase == Phase::Released
    }

    /// Some member switched over before the release, or was released without the end of its
    /// first pass having been seen.
    pub fn approximate(&self) -> bool {
        self.approximate
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
        if let Some(error) = &member.channel_error {
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
        if failed.aborted || failed.outcome == Some(Outcome::Migrated) {
            return;
        }
        failed.channel_error.get_or_insert(error.clone());
        // After the release only libvirt can tell whether it mattered.
        if self.phase == Phase::Holding {
            self.member_failed(member, error, actions);
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
        match (self.phase, self.on_failure) {
            (Phase::Holding, OnFailure::Abort) => {
                self.abort_all(Cause::Failure(error), actions);
            }
            (Phase::Holding, OnFailure::Continue) => {
                if failed.outcome.is_none() {
                    failed.aborted = true;
                    actions.push(Action::AbortMember(member));
                }
                self.cause.get_or_insert(Cause::Failure(error));
            }
            (Phase::Released | Phase::Aborting | Phase::Finished, _) => {
                self.cause.get_or_insert(Cause::Failure(error));
            }
        }
    }

    fn abort_all(&mut self, cause: Cause, actions: &mut Vec<Action>) {
        self.phase = Phase::Aborting;
        self.cause.get_or_insert(cause);
        for (index, member) in &mut self.members {
            if member.live() {
                member.aborted = true;
                actions.push(Action::AbortMember(*index));
            }
        }
    }

    fn abort_still_running(&mut self, actions: &mut Vec<Action>) {
        for (index, member) in &mut self.members {
            if member.live() && !member.gone {
                member.aborted = true;
                actions.push(Action::AbortMember(*index));
                self.cause.get_or_insert(Cause::Aborted);
            }
        }
    }

    fn settle(&mut self, actions: &mut Vec<Action>) {
        if self.members.values().all(|member| member.outcome.is_some()) {
            self.phase = Phase::Finished;
            actions.push(Action::Finish);
            return;
        }
        if self.phase != Phase::Holding {
            return;
        }
        let mut live = self.members.iter().filter(|(_, member)| member.live());
        if live.clone().next().is_some() && live.clone().all(|(_, member)| member.ready()) {
            let released = live.by_ref().map(|(index, _)| *index).collect();
            self.phase = Phase::Released;
            actions.push(Action::Release(released));
        }
    }
}

#[cfg(test)]
mod tests;
