//! The barrier's invariants under any order of inputs and any policy, beside a model that is kept apart from
//! its own bookkeeping.

use proptest::prelude::*;

use super::*;

fn any_input(members: usize) -> impl Strategy<Value = Input> {
    // One index beyond the members, which must be ignored.
    let member = 0..=members;
    prop_oneof![
        8 => member.clone().prop_map(Input::Streaming),
        8 => member.clone().prop_map(Input::FirstPassDone),
        8 => member.clone().prop_map(Input::AckWithheld),
        8 => member.clone().prop_map(Input::Converged),
        1 => member.clone().prop_map(Input::Diverged),
        2 => member.clone().prop_map(stalled),
        2 => member.clone().prop_map(Input::GuestStopped),
        1 => member.clone().prop_map(Input::Unreadable),
        1 => member.clone().prop_map(Input::HeldInFirstPass),
        4 => member.clone().prop_map(Input::Migrated),
        1 => member.clone().prop_map(|m| Input::MemberFailed(m, "channel".into())),
        2 => member.prop_map(failed),
        1 => Just(Input::SessionFailed("session".into())),
        1 => Just(Input::AbortRequested),
        1 => Just(Input::TimedOut),
        1 => Just(Input::PostCopyRequested),
    ]
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let failure = prop_oneof![Just(OnFailure::Abort), Just(OnFailure::Continue)];
    let stall = prop_oneof![
        Just(OnStall::Throttle),
        Just(OnStall::PostCopy),
        Just(OnStall::Leave),
        Just(OnStall::Abort)
    ];
    let timeout = prop_oneof![
        Just(OnTimeout::Abort),
        Just(OnTimeout::Suspend),
        Just(OnTimeout::PostCopy)
    ];
    let switchover = prop_oneof![
        2 => Just(Switchover::Together),
        1 => Just(Switchover::Staggered),
        1 => Just(Switchover::Free)
    ];
    (
        failure,
        stall,
        timeout,
        switchover,
        1usize..7,
        any::<bool>(),
    )
        .prop_map(
            |(on_failure, on_stall, on_timeout, switchover, concurrency, post_copy)| Policy {
                on_failure,
                on_stall,
                on_timeout,
                switchover,
                concurrency: NonZeroUsize::new(concurrency).expect("some"),
                post_copy,
            },
        )
}

/// What is known of a member, kept apart from the machine's own bookkeeping.
#[derive(Debug, Default, Clone)]
struct Model {
    starts: usize,
    streaming: bool,
    first_pass: bool,
    converged: bool,
    ack: bool,
    held: bool,
    gone: bool,
    stalled: bool,
    aborted: bool,
    verdict: bool,
    released: bool,
    to_post_copy: bool,
}

impl Model {
    fn live(&self) -> bool {
        self.starts > 0 && !self.aborted && !self.verdict
    }

    fn learn(&mut self, input: &Input) {
        match input {
            Input::Streaming(_) => self.streaming = true,
            Input::FirstPassDone(_) => self.first_pass = true,
            Input::Converged(_) | Input::Unreadable(_) => {
                self.first_pass = true;
                self.converged = true;
            }
            Input::Diverged(_) => self.converged = false,
            Input::Stalled(..) => {
                self.converged = false;
                self.stalled = true;
            }
            Input::AckWithheld(_) => self.ack = true,
            Input::HeldInFirstPass(_) => self.held = true,
            Input::GuestStopped(_) => self.gone = true,
            Input::Migrated(_) | Input::MigrateFailed(..) => self.verdict = true,
            _ => {}
        }
    }
}

fn member_of(input: &Input) -> Option<usize> {
    match input {
        Input::Streaming(m)
        | Input::FirstPassDone(m)
        | Input::Unreadable(m)
        | Input::Converged(m)
        | Input::Diverged(m)
        | Input::Stalled(m, _)
        | Input::AckWithheld(m)
        | Input::HeldInFirstPass(m)
        | Input::GuestStopped(m)
        | Input::MemberFailed(m, _)
        | Input::Migrated(m)
        | Input::MigrateFailed(m, _) => Some(*m),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn invariants_hold_in_any_order(
        members in 1usize..6,
        policy in any_policy(),
        batches in prop::collection::vec(prop::collection::vec(any_input(5), 0..4), 0..40),
    ) {
        let mut barrier = Barrier::new(0..members, policy);
        let (holds, turns) = (policy.holds(members), policy.takes_turns(members));
        let mut model = vec![Model::default(); members];
        let mut released = false;
        let mut finishes = 0;
        let mut at_once = false;
        // In the end libvirt always answers for everybody, and for those who begin anew again.
        let answers = || (0..members).map(Input::Migrated).collect::<Vec<_>>();
        let ending = std::iter::repeat_with(answers).take(members + 1);
        for batch in batches.into_iter().chain(ending) {
            // Nothing happens to a member that was not started, and libvirt answers once.
            let batch: Vec<Input> = batch
                .into_iter()
                .filter(|input| {
                    member_of(input).is_none_or(|m| {
                        model.get(m).is_none_or(|model| model.starts > 0 && !model.verdict)
                    })
                })
                .collect();
            let answered: Vec<usize> = batch
                .iter()
                .filter_map(|input| match input {
                    Input::MigrateFailed(m, _) => Some(*m),
                    _ => None,
                })
                .collect();
            for input in &batch {
                if let Some(model) = member_of(input).and_then(|m| model.get_mut(m)) {
                    model.learn(input);
                }
            }
            at_once |= batch.contains(&Input::PostCopyRequested);
            let stopping = batch.iter().any(|input| {
                matches!(input, Input::AbortRequested | Input::SessionFailed(_))
            });
            for action in barrier.handle(batch) {
                prop_assert_eq!(finishes, 0, "nothing after the end");
                match action {
                    Action::Start { member, throttled } => {
                        prop_assert!(!stopping && !released);
                        if throttled {
                            prop_assert_eq!(model[member].starts, 1);
                            prop_assert_eq!(policy.on_stall, OnStall::Throttle);
                            prop_assert!(answered.contains(&member), "before its end");
                            model[member] = Model { starts: 1, ..Model::default() };
                        } else {
                            prop_assert_eq!(model[member].starts, 0);
                        }
                        model[member].starts += 1;
                        let under_way = model.iter().filter(|m| m.starts > 0 && !m.verdict);
                        prop_assert!(under_way.count() <= policy.concurrency.get());
                    }
                    Action::PostCopy(those) => {
                        prop_assert!(policy.can_post_copy());
                        for m in those {
                            prop_assert!(model[m].live() && !model[m].to_post_copy);
                            model[m].to_post_copy = true;
                        }
                    }
                    Action::Suspend(those) => {
                        prop_assert_eq!(policy.on_timeout, OnTimeout::Suspend);
                        for m in those {
                            prop_assert!(model[m].live());
                        }
                    }
                    Action::Release(those) => {
                        prop_assert!((holds || turns) && !stopping);
                        // A gang waits for all, who takes turns for nobody.
                        let concerned = |m: usize| match turns {
                            true => those.contains(&m),
                            false => model[m].live() && !released,
                        };
                        for model in (0..members).filter(|m| concerned(*m)).map(|m| &model[m]) {
                            let ready = model.first_pass && model.converged && model.ack;
                            let sent = model.first_pass || (at_once && model.streaming);
                            let told = turns && model.to_post_copy;
                            let post_copy = policy.can_post_copy() && (sent || told);
                            let gone = model.gone && !turns;
                            prop_assert!(gone || model.held || ready || post_copy);
                        }
                        if turns {
                            prop_assert_eq!(those.len(), 1);
                        } else if policy.switchover == Switchover::Together {
                            prop_assert!(!released, "one decision");
                            let live = model.iter().filter(|m| m.live()).count();
                            prop_assert_eq!(those.len(), live);
                        }
                        // While they take turns, others may still begin.
                        released |= holds;
                        for m in those {
                            prop_assert!(model[m].live() && !model[m].released);
                            model[m].released = true;
                        }
                    }
                    Action::AbortMember(m) => {
                        // Again only if the first time was for beginning anew.
                        prop_assert!(model[m].starts > 0 && !model[m].verdict);
                        prop_assert!(!model[m].aborted || model[m].stalled);
                        model[m].aborted = true;
                    }
                    Action::Finish => {
                        finishes += 1;
                        prop_assert!(model.iter().all(|m| m.starts == 0 || m.verdict));
                    }
                }
            }
            if turns && barrier.phase == Phase::Free {
                let waits = |m: &Member| m.live() && !m.gone && !m.released;
                prop_assert!(!barrier.members.values().any(|m| waits(m) && barrier.ready(m)));
            }
        }
        prop_assert_eq!(finishes, 1, "a job always ends");
    }
}
