//! The first 2,000 seeds, and that a seed is all that a run depends on.
//! `make simulate-sessions` runs many more.

use vmgang_service::report::JobState;
use vmgang_simulation::{Ending, run};

const SEEDS: u64 = 2_000;

#[test]
fn nothing_goes_wrong() {
    let mut completed = 0;
    for seed in 0..SEEDS {
        let outcome = run(seed, false);
        assert!(
            outcome.findings.is_empty(),
            "seed {seed}: {:#?}\nreplay: SEED={seed} make simulate-sessions",
            outcome.findings
        );
        let all_well = matches!(outcome.ending, Ending::Reported(JobState::Completed, _));
        completed += u64::from(all_well);
    }
    // Runs that get nowhere would find nothing either.
    assert!(completed > SEEDS / 4, "only {completed} gangs migrated");
    assert!(
        completed < SEEDS * 3 / 4,
        "{completed} gangs migrated: what went wrong?"
    );
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 0..300 {
        let (first, second) = (run(seed, true), run(seed, true));
        let differs = first
            .trace
            .iter()
            .zip(&second.trace)
            .position(|(a, b)| a != b);
        assert_eq!(
            (first.hash, first.steps),
            (second.hash, second.steps),
            "seed {seed} differs from line {differs:?} on: {:?}",
            differs.map(|line| (&first.trace[line], &second.trace[line]))
        );
        assert_eq!(first.ending, second.ending, "seed {seed}");
    }
}
