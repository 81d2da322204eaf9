//! Members that a job has taken away come back: what both hosts' daemons do for that, without libvirt.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::collections::HashMap;

use common::{Fake, Peer, Rig, Script};
use vmgang_service::bring_back::ReturnRequest;
use vmgang_service::history::{History, Record};
use vmgang_service::hypervisor::Hypervisor;
use vmgang_service::job::Control;
use vmgang_service::report::{Bytes, DomainOutcome, DomainReport, JobState, Report};

const JOB: &str = "00000000000000000000000000000abc";

/// The record of a job that has moved all that runs there.
fn taken_away(there: &Fake, peer: &Peer) -> Record {
    let domains = there.domains().expect("there");
    let domains = domains.into_iter().map(|domain| DomainReport {
        name: domain.name,
        uuid: domain.uuid,
        state: DomainOutcome::Migrated,
        elapsed_ms: 1,
        downtime_ms: None,
        iterations: None,
        qemu_stream_bytes: 0,
        wire_bytes: 0,
        ballooned_bytes: None,
        error: None,
    });
    Record {
        started_unix_s: 1,
        barrier_approximate: false,
        balloons: Vec::new(),
        peer: Some(format!("127.0.0.1:{}", peer.port)),
        report: Report {
            job: JOB.into(),
            gang: None,
            destination: common::URI.into(),
            state: JobState::Completed,
            error: None,
            elapsed_ms: 1,
            switchover_spread_ms: None,
            bytes: Bytes::default(),
            domains: domains.collect(),
        },
        timeline: None,
    }
}

#[tokio::test]
async fn who_comes_back_stays_as_it_is_and_the_history_knows_from_the_beginning() {
    let there = Fake::new(&[
        ("defined", Script::NeverReady),
        ("transient", Script::NeverReady),
    ]);
    there.change("transient", |domain| domain.persistent = false);
    let there = Rig::new(there).await;
    let peer = Peer::listen(Some(there.coordinator.clone())).await;
    let here = Rig::new(Fake::new(&[])).await;
    let history = History::open(here.state_dir.path()).expect("opens");
    let record = taken_away(&there.fake, &peer);
    history.write(&record).expect("writes");

    let request = ReturnRequest {
        job: JOB.into(),
        destination: None,
        options: HashMap::new(),
    };
    let (job, changes) = here.coordinator.bring_back(request).await.expect("starts");
    assert!(changes.is_empty(), "{changes:?}");
    let recorded = || {
        let records = history.load().expect("loads");
        let record = records.into_iter().find(|it| it.report.job == job.id);
        record.expect("it is in the history").report
    };
    // A daemon that is killed now leaves this.
    let unseen = recorded();
    assert_eq!(unseen.state, JobState::Partial);
    let error = unseen.error.as_deref().unwrap_or_default();
    assert!(
        error.contains(&format!("vmgang status {}", job.id)),
        "{error}"
    );
    let states: Vec<_> = unseen
        .domains
        .iter()
        .map(|it| (&*it.name, it.state))
        .collect();
    let failed = DomainOutcome::Failed;
    assert_eq!(states, [("defined", failed), ("transient", failed)]);
    let error = unseen.domains[0].error.as_deref().unwrap_or_default();
    assert!(error.contains("domstate defined"), "{error}");

    // Each as it is over there.
    let mut changes = job.watch();
    while *there.fake.started.lock().expect("lock") < 2 {
        changes.changed().await.expect("goes on");
    }
    let with = there.fake.migrated_with.lock().expect("lock").clone();
    for (name, persistent) in [("defined", true), ("transient", false)] {
        let options = &with[name];
        assert_eq!(options.persistent, persistent, "{name}");
        assert_eq!(options.undefine_source, persistent, "{name}");
    }

    job.control(Control::Abort).expect("runs");
    while !job.state().ended() {
        changes.changed().await.expect("ends");
    }
    let ended = recorded();
    assert_eq!(ended.state, JobState::Aborted);
    let stayed = |it: &DomainReport| it.state == DomainOutcome::Source;
    assert!(ended.domains.iter().all(stayed), "{ended:?}");
}
