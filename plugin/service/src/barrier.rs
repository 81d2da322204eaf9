//! The gang's barrier: when to let every member switch over, when to take all of it back.
//!
//! Pure: it turns what happened ([`Input`]) into what to do ([`Action`]), with no I/O, clock or
//! thread. Invariants, each tested below:
//! - never a release before every live member has ended its first pass and its switchover
//!   acknowledgement is withheld (or its guest has stopped already and cannot be held);
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
    /// The destination's QEMU has said SWITCHOVER_ACK and the tunnel keeps it.
    AckWithheld(usize),
    /// The guest is stopped on the source; its switchover runs.
    GuestStopped(usize),
    StreamEnded(usize),
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
    /// Past holding: its guest has stopped, or its stream has ended.
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

    /// Takes one input and returns what to do, in order. Unknown members are ignored.
    pub fn handle(&mut self, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.phase == Phase::Finished {
            return actions;
        }
        match input {
            Input::FirstPassDone(member) => self.note(member, |m| m.first_pass_done = true),
            Input::AckWithheld(member) => self.note(member, |m| m.ack_withheld = true),
            Input::GuestStopped(member) | Input::StreamEnded(member) => {
                self.note(member, |m| m.gone = true);
                if self.phase == Phase::Holding {
                    self.approximate = true;
                }
            }
            Input::Migrated(member) => {
                self.note(member, |m| m.outcome = Some(Outcome::Migrated));
            }
            Input::MemberFailed(member, error) => {
                // A channel that breaks because of the abort is no news.
                self.note(member, |m| {
                    if !m.aborted {
                        m.channel_error.get_or_insert(error.clone());
                    }
                });
                self.member_failed(member, error, &mut actions);
            }
            Input::MigrateFailed(member, error) => {
                self.note(member, |m| m.outcome = Some(Outcome::Failed(error.clone())));
                self.member_failed(member, error, &mut actions);
            }
            Input::SessionFailed(error) => {
                // After the release libvirt's own verdicts tell who made it.
                if self.phase == Phase::Holding {
                    self.abort_all(Cause::Failure(error), &mut actions);
                } else {
                    self.cause.get_or_insert(Cause::Failure(error));
                }
            }
            Input::TimedOut => {
                if self.phase == Phase::Holding {
                    self.abort_all(Cause::TimedOut, &mut actions);
                }
            }
            Input::AbortRequested => match self.phase {
                Phase::Holding => self.abort_all(Cause::Aborted, &mut actions),
                // Members whose guest has stopped are let through: they end sooner forward.
                Phase::Released => self.abort_still_running(&mut actions),
                Phase::Aborting | Phase::Finished => {}
            },
        }
        self.settle(&mut actions);
        actions
    }

    /// The gang has been let go.
    pub fn released(&self) -> bool {
        self.phase == Phase::Released
    }

    /// Some member switched over before the release: it could not be held.
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

    fn note(&mut self, member: usize, change: impl FnOnce(&mut Member)) {
        if let Some(member) = self.members.get_mut(&member) {
            change(member);
        }
    }

    fn member_failed(&mut self, member: usize, error: String, actions: &mut Vec<Action>) {
        let Some(failed) = self.members.get_mut(&member) else {
            return;
        };
        if failed.aborted {
            return;
        }
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ready(barrier: &mut Barrier, member: usize) -> Vec<Action> {
        let mut actions = barrier.handle(Input::FirstPassDone(member));
        actions.extend(barrier.handle(Input::AckWithheld(member)));
        actions
    }

    #[test]
    fn releases_together_when_the_last_member_is_ready() {
        let mut barrier = Barrier::new(0..3, OnFailure::Abort);
        assert_eq!(ready(&mut barrier, 2), []);
        assert_eq!(ready(&mut barrier, 0), []);
        assert_eq!(ready(&mut barrier, 1), [Action::Release(vec![0, 1, 2])]);
        assert!(barrier.released() && !barrier.approximate());
        for member in 0..2 {
            assert_eq!(barrier.handle(Input::GuestStopped(member)), []);
            assert_eq!(barrier.handle(Input::Migrated(member)), []);
        }
        assert_eq!(barrier.handle(Input::Migrated(2)), [Action::Finish]);
        assert_eq!(barrier.cause(), None);
    }

    #[test]
    fn a_failure_before_the_release_takes_everybody_back() {
        let mut barrier = Barrier::new(0..3, OnFailure::Abort);
        ready(&mut barrier, 0);
        let actions = barrier.handle(Input::MigrateFailed(1, "no such CPU".into()));
        assert_eq!(actions, [Action::AbortMember(0), Action::AbortMember(2)]);
        assert_eq!(ready(&mut barrier, 2), []);
        let hung_up = Input::MemberFailed(0, "the destination hung up".into());
        assert_eq!(barrier.handle(hung_up), []);
        assert_eq!(
            barrier.handle(Input::MigrateFailed(0, "canceled".into())),
            []
        );
        let last = barrier.handle(Input::MigrateFailed(2, "canceled".into()));
        assert_eq!(last, [Action::Finish]);
        assert_eq!(barrier.cause(), Some(&Cause::Failure("no such CPU".into())));
        assert_eq!(barrier.member_error(1), Some("no such CPU"));
        assert_eq!(barrier.member_error(0), None, "it was only taken back");
    }

    #[test]
    fn a_failure_with_continue_drops_only_that_member() {
        let mut barrier = Barrier::new(0..3, OnFailure::Continue);
        ready(&mut barrier, 0);
        let actions = barrier.handle(Input::MemberFailed(1, "broken pipe".into()));
        assert_eq!(actions, [Action::AbortMember(1)]);
        assert_eq!(ready(&mut barrier, 2), [Action::Release(vec![0, 2])]);
        assert_eq!(
            barrier.handle(Input::MigrateFailed(1, "canceled".into())),
            []
        );
        assert_eq!(barrier.member_error(1), Some("broken pipe"));
        // The last one that kept the others waiting may also be the one that fails.
        let mut barrier = Barrier::new(0..2, OnFailure::Continue);
        ready(&mut barrier, 0);
        let actions = barrier.handle(Input::MigrateFailed(1, "x".into()));
        assert_eq!(actions, [Action::Release(vec![0])]);
    }

    #[test]
    fn a_member_that_was_never_held_does_not_block_the_rest() {
        let mut barrier = Barrier::new(0..2, OnFailure::Abort);
        assert_eq!(barrier.handle(Input::GuestStopped(0)), []);
        assert!(barrier.approximate());
        assert_eq!(barrier.handle(Input::Migrated(0)), []);
        assert_eq!(ready(&mut barrier, 1), [Action::Release(vec![1])]);
    }

    #[test]
    fn abort_after_the_release_spares_stopped_guests() {
        let mut barrier = Barrier::new(0..2, OnFailure::Abort);
        ready(&mut barrier, 0);
        ready(&mut barrier, 1);
        barrier.handle(Input::GuestStopped(0));
        assert_eq!(
            barrier.handle(Input::AbortRequested),
            [Action::AbortMember(1)]
        );
        assert_eq!(barrier.handle(Input::AbortRequested), []);
        assert_eq!(barrier.cause(), Some(&Cause::Aborted));
    }

    #[test]
    fn a_timeout_counts_only_until_the_release() {
        let mut barrier = Barrier::new(0..1, OnFailure::Continue);
        assert_eq!(barrier.handle(Input::TimedOut), [Action::AbortMember(0)]);
        assert_eq!(barrier.cause(), Some(&Cause::TimedOut));
        let mut barrier = Barrier::new(0..1, OnFailure::Abort);
        ready(&mut barrier, 0);
        assert_eq!(barrier.handle(Input::TimedOut), []);
    }

    #[test]
    fn a_lost_session_aborts_all_even_with_continue() {
        let mut barrier = Barrier::new(0..2, OnFailure::Continue);
        let actions = barrier.handle(Input::SessionFailed("peer gone".into()));
        assert_eq!(actions, [Action::AbortMember(0), Action::AbortMember(1)]);
    }

    fn any_input(members: usize) -> impl Strategy<Value = Input> {
        // One index beyond the members, which must be ignored.
        let member = 0..=members;
        prop_oneof![
            8 => member.clone().prop_map(Input::FirstPassDone),
            8 => member.clone().prop_map(Input::AckWithheld),
            2 => member.clone().prop_map(Input::GuestStopped),
            2 => member.clone().prop_map(Input::StreamEnded),
            4 => member.clone().prop_map(Input::Migrated),
            1 => member.clone().prop_map(|m| Input::MemberFailed(m, "channel".into())),
            1 => member.prop_map(|m| Input::MigrateFailed(m, "libvirt".into())),
            1 => Just(Input::SessionFailed("session".into())),
            1 => Just(Input::AbortRequested),
            1 => Just(Input::TimedOut),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn invariants_hold_in_any_order(
            members in 1usize..6,
            keep_going in any::<bool>(),
            inputs in prop::collection::vec(any_input(5), 0..60),
        ) {
            let policy = if keep_going { OnFailure::Continue } else { OnFailure::Abort };
            let mut barrier = Barrier::new(0..members, policy);
            // A model kept apart from the machine's own bookkeeping.
            let mut first_pass = vec![false; members];
            let mut ack = vec![false; members];
            let mut gone = vec![false; members];
            let mut verdict = vec![false; members];
            let mut aborted = vec![false; members];
            let mut failed = false;
            let mut releases = 0;
            let mut finishes = 0;
            // In the end libvirt always answers for everybody.
            let ending = (0..members).map(Input::Migrated);
            for input in inputs.into_iter().chain(ending) {
                let set = |flags: &mut Vec<bool>, m: usize| if m < members { flags[m] = true };
                match &input {
                    Input::FirstPassDone(m) => set(&mut first_pass, *m),
                    Input::AckWithheld(m) => set(&mut ack, *m),
                    Input::GuestStopped(m) | Input::StreamEnded(m) => set(&mut gone, *m),
                    Input::Migrated(m) => set(&mut verdict, *m),
                    Input::MigrateFailed(m, _) => {
                        set(&mut verdict, *m);
                        failed |= *m < members;
                    }
                    Input::MemberFailed(m, _) => failed |= *m < members,
                    Input::SessionFailed(_) | Input::AbortRequested | Input::TimedOut => failed = true,
                }
                for action in barrier.handle(input) {
                    prop_assert_eq!(finishes, 0, "nothing after the end");
                    match action {
                        Action::Release(released) => {
                            releases += 1;
                            prop_assert_eq!(releases, 1);
                            prop_assert!(keep_going || !failed);
                            for m in 0..members {
                                let live = !verdict[m] && !aborted[m];
                                prop_assert_eq!(released.contains(&m), live);
                                prop_assert!(!live || gone[m] || (first_pass[m] && ack[m]));
                            }
                        }
                        Action::AbortMember(m) => {
                            prop_assert!(m < members && !verdict[m] && !aborted[m]);
                            aborted[m] = true;
                        }
                        Action::Finish => {
                            finishes += 1;
                            prop_assert!(verdict.iter().all(|done| *done));
                        }
                    }
                }
            }
            prop_assert_eq!(finishes, 1, "a job always ends");
        }
    }
}
