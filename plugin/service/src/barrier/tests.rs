//! The barrier's rules one by one, and its invariants under any order of inputs.

use proptest::prelude::*;

use super::*;

fn ready(barrier: &mut Barrier, member: usize) -> Vec<Action> {
    let mut actions = barrier.handle([Input::FirstPassDone(member)]);
    actions.extend(barrier.handle([Input::AckWithheld(member)]));
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
        assert_eq!(barrier.handle([Input::GuestStopped(member)]), []);
        assert_eq!(barrier.handle([Input::Migrated(member)]), []);
    }
    assert_eq!(barrier.handle([Input::Migrated(2)]), [Action::Finish]);
    assert_eq!(barrier.cause(), None);
}

#[test]
fn a_failure_before_the_release_takes_everybody_back() {
    let mut barrier = Barrier::new(0..3, OnFailure::Abort);
    ready(&mut barrier, 0);
    let actions = barrier.handle([Input::MigrateFailed(1, "no such CPU".into())]);
    assert_eq!(actions, [Action::AbortMember(0), Action::AbortMember(2)]);
    assert_eq!(ready(&mut barrier, 2), []);
    let hung_up = Input::MemberFailed(0, "the destination hung up".into());
    assert_eq!(barrier.handle([hung_up]), []);
    assert_eq!(
        barrier.handle([Input::MigrateFailed(0, "canceled".into())]),
        []
    );
    let last = barrier.handle([Input::MigrateFailed(2, "canceled".into())]);
    assert_eq!(last, [Action::Finish]);
    assert_eq!(barrier.cause(), Some(&Cause::Failure("no such CPU".into())));
    assert_eq!(barrier.member_error(1), Some("no such CPU"));
    assert_eq!(barrier.member_error(0), None, "it was only taken back");
}

#[test]
fn a_failure_with_continue_drops_only_that_member() {
    let mut barrier = Barrier::new(0..3, OnFailure::Continue);
    ready(&mut barrier, 0);
    let actions = barrier.handle([Input::MemberFailed(1, "broken pipe".into())]);
    assert_eq!(actions, [Action::AbortMember(1)]);
    assert_eq!(ready(&mut barrier, 2), [Action::Release(vec![0, 2])]);
    assert_eq!(
        barrier.handle([Input::MigrateFailed(1, "canceled".into())]),
        []
    );
    assert_eq!(barrier.member_error(1), Some("broken pipe"));
    // The last one that kept the others waiting may also be the one that fails.
    let mut barrier = Barrier::new(0..2, OnFailure::Continue);
    ready(&mut barrier, 0);
    let actions = barrier.handle([Input::MigrateFailed(1, "x".into())]);
    assert_eq!(actions, [Action::Release(vec![0])]);
}

#[test]
fn a_member_that_was_never_held_does_not_block_the_rest() {
    let mut barrier = Barrier::new(0..2, OnFailure::Abort);
    assert_eq!(barrier.handle([Input::GuestStopped(0)]), []);
    assert!(barrier.approximate());
    assert_eq!(barrier.handle([Input::Migrated(0)]), []);
    assert_eq!(ready(&mut barrier, 1), [Action::Release(vec![1])]);
}

#[test]
fn an_unreadable_member_is_ready_by_its_acknowledgement_alone() {
    let mut barrier = Barrier::new(0..2, OnFailure::Abort);
    ready(&mut barrier, 0);
    assert_eq!(barrier.handle([Input::Unreadable(7)]), []);
    assert!(!barrier.approximate(), "not of this wave");
    assert_eq!(barrier.handle([Input::Unreadable(1)]), []);
    assert!(barrier.approximate());
    assert_eq!(
        barrier.handle([Input::AckWithheld(1)]),
        [Action::Release(vec![0, 1])]
    );
}

#[test]
fn a_failure_that_arrived_with_the_last_readiness_prevents_the_release() {
    let readiness = || vec![Input::FirstPassDone(0), Input::AckWithheld(0)];
    for trouble in [
        Input::AbortRequested,
        Input::SessionFailed("peer gone".into()),
        Input::MemberFailed(0, "channel".into()),
        Input::TimedOut,
    ] {
        let mut barrier = Barrier::new(0..1, OnFailure::Abort);
        let mut inputs = readiness();
        inputs.push(trouble);
        assert_eq!(barrier.handle(inputs), [Action::AbortMember(0)]);
        assert!(!barrier.released());
    }
}

#[test]
fn a_member_that_libvirt_has_answered_for_is_not_aborted() {
    let mut barrier = Barrier::new(0..3, OnFailure::Abort);
    let actions = barrier.handle([
        Input::SessionFailed("peer gone".into()),
        Input::MigrateFailed(0, "broken pipe".into()),
        Input::Migrated(1),
    ]);
    assert_eq!(actions, [Action::AbortMember(2)]);
    assert_eq!(barrier.cause(), Some(&Cause::Failure("peer gone".into())));
}

#[test]
fn a_channel_error_after_the_release_counts_only_if_libvirt_fails_too() {
    let released = || {
        let mut barrier = Barrier::new(0..1, OnFailure::Abort);
        ready(&mut barrier, 0);
        barrier.handle([Input::MemberFailed(0, "hung up".into())]);
        barrier
    };
    let mut barrier = released();
    assert_eq!(barrier.handle([Input::Migrated(0)]), [Action::Finish]);
    assert_eq!(barrier.cause(), None);
    let mut barrier = released();
    let failed = Input::MigrateFailed(0, "broken pipe".into());
    assert_eq!(barrier.handle([failed]), [Action::Finish]);
    assert_eq!(barrier.cause(), Some(&Cause::Failure("hung up".into())));
}

#[test]
fn abort_after_the_release_spares_stopped_guests() {
    let mut barrier = Barrier::new(0..2, OnFailure::Abort);
    ready(&mut barrier, 0);
    ready(&mut barrier, 1);
    barrier.handle([Input::GuestStopped(0)]);
    assert_eq!(
        barrier.handle([Input::AbortRequested]),
        [Action::AbortMember(1)]
    );
    assert_eq!(barrier.handle([Input::AbortRequested]), []);
    assert_eq!(barrier.cause(), Some(&Cause::Aborted));
}

#[test]
fn a_timeout_counts_only_until_the_release() {
    let mut barrier = Barrier::new(0..1, OnFailure::Continue);
    assert_eq!(barrier.handle([Input::TimedOut]), [Action::AbortMember(0)]);
    assert_eq!(barrier.cause(), Some(&Cause::TimedOut));
    let mut barrier = Barrier::new(0..1, OnFailure::Abort);
    ready(&mut barrier, 0);
    assert_eq!(barrier.handle([Input::TimedOut]), []);
}

#[test]
fn a_lost_session_aborts_all_even_with_continue() {
    let mut barrier = Barrier::new(0..2, OnFailure::Continue);
    let actions = barrier.handle([Input::SessionFailed("peer gone".into())]);
    assert_eq!(actions, [Action::AbortMember(0), Action::AbortMember(1)]);
}

fn any_input(members: usize) -> impl Strategy<Value = Input> {
    // One index beyond the members, which must be ignored.
    let member = 0..=members;
    prop_oneof![
        8 => member.clone().prop_map(Input::FirstPassDone),
        8 => member.clone().prop_map(Input::AckWithheld),
        2 => member.clone().prop_map(Input::GuestStopped),
        1 => member.clone().prop_map(Input::Unreadable),
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
        batches in prop::collection::vec(prop::collection::vec(any_input(5), 1..4), 0..30),
    ) {
        let policy = if keep_going { OnFailure::Continue } else { OnFailure::Abort };
        let mut barrier = Barrier::new(0..members, policy);
        // A model kept apart from the machine's own bookkeeping.
        let mut first_pass = vec![false; members];
        let mut ack = vec![false; members];
        let mut gone = vec![false; members];
        let mut verdict = vec![false; members];
        let mut arrived = vec![false; members];
        let mut aborted = vec![false; members];
        let mut failed = false;
        let mut releases = 0;
        let mut finishes = 0;
        // In the end libvirt always answers for everybody.
        let ending = (0..members).map(|m| vec![Input::Migrated(m)]);
        for batch in batches.into_iter().chain(ending) {
            let set = |flags: &mut Vec<bool>, m: usize| if m < members { flags[m] = true };
            // A verdict in the same batch makes a broken channel no news.
            let migrated: Vec<usize> = batch
                .iter()
                .filter_map(|input| match input {
                    Input::Migrated(m) => Some(*m),
                    _ => None,
                })
                .collect();
            for m in migrated {
                set(&mut verdict, m);
                set(&mut arrived, m);
            }
            for input in &batch {
                match input {
                    Input::FirstPassDone(m) | Input::Unreadable(m) => set(&mut first_pass, *m),
                    Input::AckWithheld(m) => set(&mut ack, *m),
                    Input::GuestStopped(m) => set(&mut gone, *m),
                    Input::Migrated(_) => {}
                    Input::MigrateFailed(m, _) => {
                        set(&mut verdict, *m);
                        failed |= *m < members;
                    }
                    Input::MemberFailed(m, _) => failed |= *m < members && !arrived[*m],
                    Input::SessionFailed(_) | Input::AbortRequested | Input::TimedOut => failed = true,
                }
            }
            for action in barrier.handle(batch) {
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
