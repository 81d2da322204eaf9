//! The barrier's rules one by one. Its invariants under any order of inputs are in `any_order.rs`.

use std::num::NonZeroUsize;

use super::*;

mod any_order;

/// A barrier whose members have all been started.
fn started(members: usize, policy: Policy) -> Barrier {
    let mut barrier = Barrier::new(0..members, policy);
    let starts: Vec<Action> = (0..members).map(start).collect();
    assert_eq!(barrier.handle([]), starts);
    barrier
}

fn start(member: usize) -> Action {
    Action::Start {
        member,
        throttled: false,
    }
}

fn on_failure(on_failure: OnFailure) -> Policy {
    Policy {
        on_failure,
        ..Policy::default()
    }
}

fn on_stall(on_stall: OnStall) -> Policy {
    Policy {
        on_stall,
        ..Policy::default()
    }
}

fn switchover(switchover: Switchover, concurrency: usize) -> Policy {
    Policy {
        switchover,
        concurrency: NonZeroUsize::new(concurrency).expect("some"),
        ..Policy::default()
    }
}

fn ready(barrier: &mut Barrier, member: usize) -> Vec<Action> {
    let mut actions = barrier.handle([Input::FirstPassDone(member)]);
    actions.extend(barrier.handle([Input::AckWithheld(member)]));
    actions.extend(barrier.handle([Input::Converged(member)]));
    actions
}

fn stalled(member: usize) -> Input {
    Input::Stalled(member, "it dirties 90 MB/s".into())
}

fn failed(member: usize) -> Input {
    Input::MigrateFailed(member, "canceled".into())
}

#[test]
fn releases_together_when_the_last_member_is_ready() {
    let mut barrier = started(3, on_failure(OnFailure::Abort));
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
    let mut barrier = started(3, on_failure(OnFailure::Abort));
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
    let mut barrier = started(3, on_failure(OnFailure::Continue));
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
    let mut barrier = started(2, on_failure(OnFailure::Continue));
    ready(&mut barrier, 0);
    let actions = barrier.handle([Input::MigrateFailed(1, "x".into())]);
    assert_eq!(actions, [Action::Release(vec![0])]);
}

#[test]
fn a_member_that_was_never_held_does_not_block_the_rest() {
    let mut barrier = started(2, on_failure(OnFailure::Abort));
    assert_eq!(barrier.handle([Input::GuestStopped(0)]), []);
    assert!(barrier.approximate());
    assert_eq!(barrier.handle([Input::Migrated(0)]), []);
    assert_eq!(ready(&mut barrier, 1), [Action::Release(vec![1])]);
}

#[test]
fn an_unreadable_member_is_ready_by_its_acknowledgement_alone() {
    let mut barrier = started(2, on_failure(OnFailure::Abort));
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
    let readiness = || vec![Input::Converged(0), Input::AckWithheld(0)];
    for trouble in [
        Input::AbortRequested,
        Input::SessionFailed("peer gone".into()),
        Input::MemberFailed(0, "channel".into()),
        Input::TimedOut,
    ] {
        let mut barrier = started(1, on_failure(OnFailure::Abort));
        let mut inputs = readiness();
        inputs.push(trouble);
        assert_eq!(barrier.handle(inputs), [Action::AbortMember(0)]);
        assert!(!barrier.released());
    }
}

#[test]
fn a_member_that_libvirt_has_answered_for_is_not_aborted() {
    let mut barrier = started(3, on_failure(OnFailure::Abort));
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
        let mut barrier = started(1, on_failure(OnFailure::Abort));
        ready(&mut barrier, 0);
        barrier.handle([Input::MemberFailed(0, "hung up".into())]);
        barrier
    };
    let mut barrier = released();
    assert_eq!(barrier.handle([Input::Migrated(0)]), [Action::Finish]);
    assert_eq!(barrier.cause(), None);
    let mut barrier = released();
    let broken = Input::MigrateFailed(0, "broken pipe".into());
    assert_eq!(barrier.handle([broken]), [Action::Finish]);
    assert_eq!(barrier.cause(), Some(&Cause::Failure("hung up".into())));
}

#[test]
fn abort_after_the_release_spares_stopped_guests() {
    let mut barrier = started(2, on_failure(OnFailure::Abort));
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
    let mut barrier = started(1, on_failure(OnFailure::Continue));
    assert_eq!(barrier.handle([Input::TimedOut]), [Action::AbortMember(0)]);
    assert_eq!(barrier.cause(), Some(&Cause::TimedOut));
    let mut barrier = started(1, on_failure(OnFailure::Abort));
    ready(&mut barrier, 0);
    assert_eq!(barrier.handle([Input::TimedOut]), []);
}

#[test]
fn a_lost_session_aborts_all_even_with_continue() {
    let mut barrier = started(2, on_failure(OnFailure::Continue));
    let actions = barrier.handle([Input::SessionFailed("peer gone".into())]);
    assert_eq!(actions, [Action::AbortMember(0), Action::AbortMember(1)]);
}

#[test]
fn a_member_that_has_not_converged_holds_the_gang() {
    let mut barrier = started(2, Policy::default());
    ready(&mut barrier, 0);
    barrier.handle([Input::FirstPassDone(1), Input::AckWithheld(1)]);
    assert!(!barrier.released());
    // What converged may dirty more again.
    barrier.handle([Input::Diverged(0)]);
    assert_eq!(barrier.handle([Input::Converged(1)]), []);
    let release = [Action::Release(vec![0, 1])];
    assert_eq!(barrier.handle([Input::Converged(0)]), release);
    assert!(!barrier.approximate());
}

#[test]
fn a_stall_is_dealt_with_once_nothing_else_holds_the_gang() {
    let mut barrier = started(2, on_stall(OnStall::Abort));
    assert_eq!(barrier.handle([stalled(0)]), []);
    assert_eq!(
        barrier.stalled().collect::<Vec<_>>(),
        [(0, "it dirties 90 MB/s")]
    );
    let actions = ready(&mut barrier, 1);
    assert_eq!(actions, [Action::AbortMember(0), Action::AbortMember(1)]);
    assert_eq!(barrier.member_error(0), Some("it dirties 90 MB/s"));
    assert_eq!(barrier.member_error(1), None);
    assert_eq!(barrier.handle([failed(0), failed(1)]), [Action::Finish]);

    // The link may be enough once the others do not need it any more.
    let mut barrier = started(2, on_stall(OnStall::Abort));
    barrier.handle([stalled(0), Input::AckWithheld(0)]);
    assert_eq!(barrier.handle([Input::Converged(0)]), []);
    assert_eq!(ready(&mut barrier, 1), [Action::Release(vec![0, 1])]);
}

#[test]
fn a_stalled_member_begins_anew_throttled_and_then_holds_nobody_for_ever() {
    let mut barrier = started(2, on_stall(OnStall::Throttle));
    ready(&mut barrier, 1);
    ready(&mut barrier, 0);
    let mut barrier = started(2, on_stall(OnStall::Throttle));
    ready(&mut barrier, 1);
    assert_eq!(barrier.handle([stalled(0)]), [Action::AbortMember(0)]);
    // Its channel ends because of that.
    let hung_up = Input::MemberFailed(0, "hung up".into());
    assert_eq!(barrier.handle([hung_up]), []);
    let throttled = Action::Start {
        member: 0,
        throttled: true,
    };
    assert_eq!(barrier.handle([failed(0)]), [throttled]);
    assert_eq!(barrier.handle([Input::Converged(0)]), []);
    let release = [Action::Release(vec![0, 1])];
    assert_eq!(barrier.handle([Input::AckWithheld(0)]), release);

    let mut barrier = started(1, on_stall(OnStall::Throttle));
    barrier.handle([stalled(0)]);
    barrier.handle([failed(0)]);
    assert_eq!(barrier.handle([stalled(0)]), [Action::AbortMember(0)]);
    assert_eq!(barrier.handle([failed(0)]), [Action::Finish]);
    assert_eq!(barrier.member_error(0), Some("it dirties 90 MB/s"));
}

#[test]
fn an_abort_while_a_member_begins_anew_is_an_abort() {
    let mut barrier = started(1, on_stall(OnStall::Throttle));
    assert_eq!(barrier.handle([stalled(0)]), [Action::AbortMember(0)]);
    assert_eq!(
        barrier.handle([Input::AbortRequested]),
        [Action::AbortMember(0)]
    );
    assert_eq!(barrier.handle([failed(0)]), [Action::Finish]);
    assert_eq!(barrier.cause(), Some(&Cause::Aborted));
    // Or it had migrated just before.
    let mut barrier = started(1, switchover(Switchover::Free, 1));
    barrier.handle([stalled(0)]);
    assert_eq!(barrier.handle([Input::Migrated(0)]), [Action::Finish]);
}

#[test]
fn what_the_ended_stream_had_said_counts_not_for_the_next() {
    let policy = Policy {
        on_timeout: OnTimeout::PostCopy,
        ..on_stall(OnStall::Throttle)
    };
    let mut barrier = started(1, policy);
    barrier.handle([Input::TimedOut]);
    assert_eq!(barrier.handle([stalled(0)]), [Action::AbortMember(0)]);
    let anew = [Action::Start {
        member: 0,
        throttled: true,
    }];
    assert_eq!(barrier.handle([failed(0), Input::FirstPassDone(0)]), anew);
}

#[test]
fn a_stalled_member_is_left_or_goes_to_post_copy() {
    let mut barrier = started(2, on_stall(OnStall::Leave));
    ready(&mut barrier, 1);
    assert_eq!(
        barrier.handle([stalled(0)]),
        [Action::AbortMember(0), Action::Release(vec![1])]
    );
    barrier.handle([failed(0)]);
    assert_eq!(barrier.handle([Input::Migrated(1)]), [Action::Finish]);
    assert_eq!(barrier.member_error(0), Some("it dirties 90 MB/s"));

    let mut barrier = started(2, on_stall(OnStall::PostCopy));
    ready(&mut barrier, 1);
    barrier.handle([Input::FirstPassDone(0), Input::AckWithheld(0)]);
    assert_eq!(
        barrier.handle([stalled(0)]),
        [Action::PostCopy(vec![0]), Action::Release(vec![0, 1])]
    );
}

#[test]
fn a_post_copy_gang_goes_after_the_first_pass_or_on_command() {
    let policy = Policy {
        post_copy: true,
        ..Policy::default()
    };
    // With or without the acknowledgement: old QEMUs send none.
    let mut barrier = started(2, policy);
    barrier.handle([Input::AckWithheld(0)]);
    assert_eq!(barrier.handle([Input::FirstPassDone(0)]), []);
    let all = [Action::PostCopy(vec![0, 1]), Action::Release(vec![0, 1])];
    assert_eq!(barrier.handle([Input::FirstPassDone(1)]), all);

    let mut barrier = started(2, policy);
    assert_eq!(barrier.handle([Input::PostCopyRequested]), []);
    assert_eq!(barrier.handle([Input::Streaming(0)]), []);
    assert_eq!(barrier.handle([Input::Streaming(1)]), all);

    let mut barrier = started(1, Policy::default());
    barrier.handle([Input::Streaming(0), Input::AckWithheld(0)]);
    assert_eq!(barrier.handle([Input::PostCopyRequested]), []);
}

#[test]
fn a_timeout_suspends_or_goes_to_post_copy_if_that_was_asked_for() {
    let policy = |on_timeout| Policy {
        on_timeout,
        ..Policy::default()
    };
    let mut barrier = started(2, policy(OnTimeout::Suspend));
    barrier.handle([Input::GuestStopped(0)]);
    let suspend = [Action::Suspend(vec![1])];
    assert_eq!(barrier.handle([Input::TimedOut]), suspend);
    assert_eq!(barrier.cause(), None);
    let mut barrier = started(1, policy(OnTimeout::PostCopy));
    barrier.handle([Input::AckWithheld(0), Input::FirstPassDone(0)]);
    assert_eq!(
        barrier.handle([Input::TimedOut]),
        [Action::PostCopy(vec![0]), Action::Release(vec![0])]
    );
}

#[test]
fn staggered_members_go_one_after_the_other() {
    let mut barrier = started(3, switchover(Switchover::Staggered, 3));
    ready(&mut barrier, 0);
    ready(&mut barrier, 2);
    assert_eq!(ready(&mut barrier, 1), [Action::Release(vec![0])]);
    assert_eq!(barrier.handle([Input::GuestStopped(0)]), []);
    let next = [Action::Release(vec![1])];
    assert_eq!(barrier.handle([Input::Migrated(0)]), next);
    // Behind the commit point the rest goes on.
    assert_eq!(barrier.handle([failed(1)]), [Action::Release(vec![2])]);
    assert_eq!(barrier.handle([Input::Migrated(2)]), [Action::Finish]);
    assert!(!barrier.approximate());

    let mut barrier = started(2, switchover(Switchover::Staggered, 2));
    ready(&mut barrier, 0);
    ready(&mut barrier, 1);
    barrier.handle([Input::GuestStopped(0)]);
    assert_eq!(
        barrier.handle([Input::AbortRequested]),
        [Action::AbortMember(1)]
    );
    assert_eq!(
        barrier.handle([failed(1), Input::Migrated(0)]),
        [Action::Finish]
    );
}

#[test]
fn a_gang_too_large_to_be_held_goes_in_a_rolling_queue() {
    let mut barrier = Barrier::new(0..4, switchover(Switchover::Together, 2));
    assert_eq!(barrier.handle([]), [start(0), start(1)]);
    assert!(barrier.approximate(), "and that is said");
    assert_eq!(barrier.handle([Input::Migrated(1)]), [start(2)]);
    assert_eq!(barrier.handle([Input::Converged(0)]), []);
    // All that can be is taken back, and nobody begins any more.
    barrier.handle([Input::GuestStopped(2)]);
    assert_eq!(barrier.handle([failed(0)]), []);
    assert_eq!(barrier.handle([Input::Migrated(2)]), [Action::Finish]);
    assert_eq!(barrier.outcome(3), None);

    let policy = Policy {
        on_failure: OnFailure::Continue,
        ..switchover(Switchover::Free, 2)
    };
    let mut barrier = Barrier::new(0..3, policy);
    barrier.handle([]);
    assert!(!barrier.approximate());
    assert_eq!(ready(&mut barrier, 0), [], "nobody was held");
    assert_eq!(barrier.handle([failed(0)]), [start(2)]);
    assert_eq!(
        barrier.handle([Input::Migrated(1), Input::Migrated(2)]),
        [Action::Finish]
    );
}

#[test]
fn members_of_a_gang_too_large_to_be_held_are_let_go_one_by_one() {
    let mut barrier = Barrier::new(0..3, switchover(Switchover::Together, 2));
    barrier.handle([]);
    assert_eq!(ready(&mut barrier, 1), [Action::Release(vec![1])]);
    assert_eq!(barrier.handle([Input::Converged(1)]), [], "once");
    assert_eq!(barrier.handle([Input::Migrated(1)]), [start(2)]);
    // Nobody waits for another; who has gone by itself is not let go.
    assert_eq!(barrier.handle([Input::GuestStopped(0)]), []);
    assert_eq!(ready(&mut barrier, 2), [Action::Release(vec![2])]);
    // A failure takes back who was let go and has not gone.
    assert_eq!(barrier.handle([failed(0)]), [Action::AbortMember(2)]);
    assert_eq!(barrier.handle([failed(2)]), [Action::Finish]);

    let policy = Policy {
        post_copy: true,
        ..switchover(Switchover::Together, 1)
    };
    let mut barrier = Barrier::new(0..2, policy);
    barrier.handle([]);
    assert_eq!(
        barrier.handle([Input::FirstPassDone(0)]),
        [Action::PostCopy(vec![0]), Action::Release(vec![0])]
    );
}

#[test]
fn a_member_that_stalls_after_it_was_let_go_is_dealt_with_all_the_same() {
    let large = |on_stall| {
        let policy = Policy {
            on_stall,
            ..switchover(Switchover::Together, 2)
        };
        let mut barrier = Barrier::new(0..3, policy);
        barrier.handle([]);
        barrier
    };
    let mut barrier = large(OnStall::Throttle);
    assert_eq!(ready(&mut barrier, 0), [Action::Release(vec![0])]);
    assert_eq!(barrier.handle([stalled(0)]), [Action::AbortMember(0)]);
    let anew = Action::Start {
        member: 0,
        throttled: true,
    };
    assert_eq!(barrier.handle([failed(0)]), [anew]);
    assert_eq!(ready(&mut barrier, 0), [Action::Release(vec![0])], "anew");
    // To post-copy it goes without being let go twice.
    let mut barrier = large(OnStall::PostCopy);
    ready(&mut barrier, 1);
    assert_eq!(barrier.handle([stalled(1)]), [Action::PostCopy(vec![1])]);
    assert_eq!(barrier.handle([stalled(1), Input::PostCopyRequested]), []);
    // Who is ready together with a stall that ends everything is not let go.
    let mut barrier = large(OnStall::Abort);
    barrier.handle([Input::FirstPassDone(0), Input::AckWithheld(0)]);
    assert_eq!(
        barrier.handle([Input::Converged(0), stalled(1)]),
        [Action::AbortMember(0), Action::AbortMember(1)]
    );
}

#[test]
fn a_member_that_cannot_be_held_by_an_acknowledgement_is_held_otherwise() {
    let mut barrier = started(2, Policy::default());
    assert_eq!(barrier.handle([Input::HeldInFirstPass(0)]), []);
    assert!(barrier.approximate());
    assert_eq!(ready(&mut barrier, 1), [Action::Release(vec![0, 1])]);
}
