//! What happened when in a job: each member's phases, and how many bytes had moved by then. Kept beside
//! the job's result, for pictures. Bounded, however long the job takes; nothing is measured here.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::job::{JobView, MemberState};
use crate::report::{Bytes, JobState, Report, SavedBytes};

/// When there are so many samples, every second one goes.
const SAMPLES_MAX: usize = 256;
const SAMPLE_MS: u64 = 100;
/// A member that begins anew for ever is not told of for ever.
const PHASES_MAX: usize = 64;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    pub members: Vec<MemberTimeline>,
    /// When the first of them was let go.
    pub switching_ms: Option<u64>,
    pub samples: Samples,
    /// Pages of the row's member that went as references to what the column's had sent first; behind the members'
    /// columns that of staged contents, and that of contents the destination had. Empty if not counted.
    #[serde(default)]
    pub shared_pages: Vec<Vec<u64>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberTimeline {
    pub name: String,
    pub uuid: Uuid,
    pub phases: Vec<Phase>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Since the job's start.
    pub at_ms: u64,
    pub phase: MemberState,
}

/// Totals at these times, column by column.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    pub at_ms: Vec<u64>,
    pub qemu_stream: Vec<u64>,
    pub wire: Vec<u64>,
    pub saved: Vec<SavedBytes>,
}

impl Samples {
    fn push(&mut self, at_ms: u64, bytes: &Bytes) {
        self.at_ms.push(at_ms);
        self.qemu_stream.push(bytes.qemu_stream);
        self.wire.push(bytes.wire);
        self.saved.push(bytes.saved.clone());
    }

    /// Keeps every second one, the first of all included.
    fn thin(&mut self) {
        fn every_second<T>(column: &mut Vec<T>) {
            let mut at = 0;
            column.retain(|_| {
                at += 1;
                at % 2 == 1
            });
        }
        every_second(&mut self.at_ms);
        every_second(&mut self.qemu_stream);
        every_second(&mut self.wire);
        every_second(&mut self.saved);
    }
}

/// Writes a job's timeline while it runs.
#[derive(Debug)]
pub(crate) struct Recorder {
    timeline: Timeline,
    /// Samples are at least so far apart.
    apart_ms: u64,
}

impl Default for Recorder {
    fn default() -> Recorder {
        Recorder {
            timeline: Timeline::default(),
            apart_ms: SAMPLE_MS,
        }
    }
}

impl Recorder {
    /// Takes note of what has changed.
    pub(crate) fn note(&mut self, elapsed: Duration, view: &JobView) {
        let at_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        for (at, member) in view.members.iter().enumerate() {
            if at == self.timeline.members.len() {
                self.timeline.members.push(MemberTimeline {
                    name: member.name.clone(),
                    uuid: member.uuid,
                    phases: Vec::new(),
                });
            }
            let phases = &mut self.timeline.members[at].phases;
            enter(phases, at_ms, member.state);
        }
        if view.state == JobState::Switching {
            self.timeline.switching_ms.get_or_insert(at_ms);
        }
        let samples = &mut self.timeline.samples;
        let due = samples
            .at_ms
            .last()
            .is_none_or(|last| at_ms >= last + self.apart_ms);
        if due && samples.wire.last() != Some(&view.bytes.wire) {
            samples.push(at_ms, &view.bytes);
            if samples.at_ms.len() >= SAMPLES_MAX {
                samples.thin();
                self.apart_ms *= 2;
            }
        }
    }

    /// The job has ended like this.
    pub(crate) fn close(
        mut self,
        elapsed: Duration,
        report: &Report,
        shared: Vec<Vec<u64>>,
    ) -> Timeline {
        let at_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        for member in &mut self.timeline.members {
            let domain = report.domains.iter().find(|one| one.uuid == member.uuid);
            if let Some(domain) = domain {
                enter(&mut member.phases, at_ms, domain.state.into());
            }
        }
        self.timeline.samples.push(at_ms, &report.bytes);
        self.timeline.shared_pages = shared;
        self.timeline
    }

    pub(crate) fn timeline(&self) -> &Timeline {
        &self.timeline
    }
}

fn enter(phases: &mut Vec<Phase>, at_ms: u64, phase: MemberState) {
    if phases.last().is_some_and(|last| last.phase == phase) {
        return;
    }
    if phases.len() == PHASES_MAX {
        phases.pop();
    }
    phases.push(Phase { at_ms, phase });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::MemberView;

    fn view(state: MemberState, wire: u64) -> JobView {
        JobView {
            state: JobState::Running,
            members: vec![MemberView::new("a", Uuid::nil(), 0, state)],
            bytes: Bytes {
                wire,
                ..Bytes::default()
            },
            switchover_spread_ms: None,
            barrier_approximate: false,
            report: None,
        }
    }

    #[test]
    fn phases_are_noted_when_they_change() {
        let mut recorder = Recorder::default();
        let mut note = |ms, state| recorder.note(Duration::from_millis(ms), &view(state, 0));
        note(0, MemberState::Waiting);
        note(10, MemberState::Copying);
        note(20, MemberState::Copying);
        note(30, MemberState::Migrated);
        let report = crate::report::tests::sample();
        let shared = vec![vec![1, 0, 0]];
        let timeline = recorder.close(Duration::from_millis(40), &report, shared);
        let phases: Vec<_> = timeline.members[0]
            .phases
            .iter()
            .map(|phase| (phase.at_ms, phase.phase.as_str()))
            .collect();
        assert_eq!(phases, [(0, "waiting"), (10, "copying"), (30, "migrated")]);
        assert_eq!(timeline.samples.at_ms, [0, 40]);
        assert_eq!(timeline.shared_pages, [[1, 0, 0]]);
    }

    #[test]
    fn a_long_job_has_as_many_samples_as_a_short_one() {
        let mut recorder = Recorder::default();
        for second in 0..10_000 {
            let at = Duration::from_secs(second);
            recorder.note(at, &view(MemberState::Copying, second + 1));
        }
        let samples = &recorder.timeline().samples;
        let count = samples.at_ms.len();
        assert!((SAMPLES_MAX / 2..SAMPLES_MAX).contains(&count), "{count}");
        assert_eq!((samples.wire.len(), samples.saved.len()), (count, count));
        assert_eq!(samples.at_ms[0], 0, "from the beginning");
        let last = samples.at_ms[count - 1];
        assert!(last > 9_800_000, "to the end: {last}");
    }
}
