//! Jobs in which something goes wrong, or comes at a bad moment, end to end against a scripted
//! host. What must hold: no release past a failure, nothing claimed that is not known.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Fake, Options, Rig, Script, URI, error_of, names};
use uuid::Uuid;
use vmgang_engine::{DestinationHost, MemberOffer, Offer, PeerName};
use vmgang_service::memory::Memory;
use vmgang_service::peers::{Admittance, Peers};
use zbus::{OwnedVariant, Variant};

fn all() -> Options<'static> {
    Options::from([("all", Variant::from(true))])
}

/// Migrates all domains of a host and returns the report.
async fn run(fake: Fake, options: Options<'_>) -> (Rig, serde_json::Value) {
    let rig = Rig::new(fake).await;
    let job = rig.migrate("", URI, options).await.expect("starts");
    let report = rig.report(&job).await;
    (rig, report)
}

/// One wave of twelve and a second one.
fn two_waves(first: Script, others: Script) -> Fake {
    let names: Vec<String> = (0..14).map(|n| format!("vm{n:02}")).collect();
    let domains: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(n, name)| (name.as_str(), if n == 0 { first } else { others }))
        .collect();
    Fake::new(&domains)
}

#[tokio::test]
async fn a_stream_that_ends_before_its_guest_stopped_releases_nobody() {
    let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::EndsUnstopped)]);
    let (rig, report) = run(fake, all()).await;
    assert_eq!(report["state"], "failed", "{report}");
    assert_eq!(names(&report, "state"), ["source", "source"]);
    assert_eq!(rig.fake.active_names(), ["vm1", "vm2"]);
}

#[tokio::test]
async fn an_unreadable_stream_makes_the_barrier_approximate_and_blocks_nobody() {
    let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::Unreadable)]);
    let rig = Rig::new(fake).await;
    let job = rig.migrate("", URI, all()).await.expect("starts");
    assert_eq!(rig.report(&job).await["state"], "completed");
    let statistics: HashMap<String, OwnedVariant> = rig
        .job(&job)
        .await
        .get_property("Statistics")
        .await
        .expect("statistics");
    assert_eq!(*statistics["barrier"], Variant::from("approximate"));
    // It is known later as well.
    let record = rig.state_dir.path().join("jobs").join(format!(
        "{}.json",
        job.as_str().rsplit('/').next().expect("an id")
    ));
    let record = std::fs::read_to_string(record).expect("written");
    assert!(record.contains("\"barrier_approximate\":true"), "{record}");
}

#[tokio::test]
async fn a_member_that_cannot_be_held_switches_over_and_the_rest_follows() {
    let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::NoAck)]);
    let (rig, report) = run(fake, all()).await;
    assert_eq!(report["state"], "completed", "{report}");
    assert!(rig.fake.active_names().is_empty());
}

#[tokio::test]
async fn a_failure_in_the_queue_is_read_before_the_release() {
    let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::BreaksWhenReady)]);
    let (rig, report) = run(fake, all()).await;
    assert_eq!(report["state"], "failed", "{report}");
    assert!(
        report["error"]
            .as_str()
            .is_some_and(|e| e.contains("digest mismatch")),
        "{report}"
    );
    assert_eq!(rig.fake.active_names(), ["vm1", "vm2"]);
}

#[tokio::test]
async fn no_abort_reaches_a_domain_after_libvirts_answer() {
    let mut fake = Fake::new(&[("vm1", Script::NeverReady), ("vm2", Script::EndsUnstopped)]);
    // vm2's answer comes after 200 ms, while the first abort still connects.
    fake.abort_delay = Duration::from_millis(400);
    let rig = Rig::new(fake).await;
    let job = rig.migrate("", URI, all()).await.expect("starts");
    let () = rig
        .job(&job)
        .await
        .call("Abort", &())
        .await
        .expect("aborts");
    assert_eq!(rig.report(&job).await["state"], "aborted");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (calls, reached) = rig.fake.aborts.lock().expect("lock").clone();
    assert_eq!(reached, ["vm1"], "once each, and never after the answer");
    assert!(calls >= 2, "vm2's abort was under way");
}

#[tokio::test]
async fn a_channel_error_of_a_member_that_migrated_is_no_failure() {
    let fake = two_waves(Script::BreaksAfterRelease, Script::Good);
    let (_rig, report) = run(fake, all()).await;
    assert_eq!(report["state"], "completed", "{report}");
    assert_eq!(report["error"], serde_json::Value::Null);
}

#[tokio::test]
async fn no_wave_follows_a_lost_session() {
    let fake = two_waves(Script::SessionLost, Script::Good);
    let mut options = all();
    options.insert("on-failure", Variant::from("continue"));
    let (rig, report) = run(fake, options).await;
    assert_eq!(report["state"], "failed", "{report}");
    assert!(
        report["error"]
            .as_str()
            .is_some_and(|e| e.contains("connection reset")),
        "{report}"
    );
    assert_eq!(*rig.fake.started.lock().expect("lock"), 12);
}

#[tokio::test]
async fn the_timeout_counts_from_the_start_of_each_wave() {
    let mut options = all();
    options.insert("timeout", Variant::from(1u64));
    let (_rig, report) = run(two_waves(Script::Slow, Script::Slow), options).await;
    assert_eq!(report["state"], "completed", "{report}");
}

#[tokio::test]
async fn a_guest_left_paused_is_reported_with_what_to_do() {
    let (_rig, report) = run(Fake::new(&[("vm1", Script::LeftPaused)]), all()).await;
    assert_eq!(report["state"], "partial");
    assert_eq!(names(&report, "state"), ["failed"]);
    let error = report["domains"][0]["error"].as_str().expect("an error");
    let (look, resume) = (
        error.find("virsh -c qemu+tls://b/system domstate vm1"),
        error.find("virsh resume vm1"),
    );
    assert!(look.is_some() && look < resume, "{error}");
}

#[tokio::test]
async fn a_daemon_that_stops_starts_no_job_any_more() {
    let mut fake = Fake::new(&[("vm1", Script::Good)]);
    fake.connect_delay = Duration::from_millis(300);
    let rig = Rig::new(fake).await;
    let (migrated, ()) = tokio::join!(rig.migrate("", URI, all()), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        rig.coordinator.shutdown().await;
    });
    let (name, text) = error_of(migrated);
    assert_eq!(name, "org.vmgang.Error.Busy");
    assert!(text.contains("stopping"), "{text}");
    assert!(rig.coordinator.jobs().is_empty());
    assert_eq!(*rig.fake.started.lock().expect("lock"), 0);
}

#[test]
fn memory_is_promised_once() {
    const GIB: u64 = 1 << 30;
    let host = Admittance {
        hypervisor: Arc::new(Fake::new(&[])),
        peers: Arc::new(Peers::default()),
        allow_peers: Vec::new(),
        window_budget_bytes: GIB,
        memory: Box::new(|| {
            Ok(Memory {
                total_bytes: 8 * GIB,
                available_bytes: 4 * GIB,
            })
        }),
        sessions: Mutex::new(BTreeMap::new()),
    };
    let peer = PeerName {
        address: "10.0.0.1:5000".parse().expect("an address"),
        certificate_names: Vec::new(),
    };
    let offer = || Offer {
        job: Uuid::new_v4(),
        gang: String::new(),
        source_host: "a".into(),
        window_budget_bytes: GIB,
        members: vec![MemberOffer {
            uuid: Uuid::new_v4(),
            name: "vm".into(),
            memory_bytes: 3 * GIB / 2,
            fixed_owner: None,
        }],
    };
    let budget = |offer: &Offer| host.admit(offer, &peer).map(|a| a.window_budget_bytes);
    let first = offer();
    assert_eq!(budget(&first), Ok(GIB));
    let error = budget(&first).expect_err("the same job twice");
    assert!(error.contains("already"), "{error}");
    // 1.5 GiB are left, which the guest alone would take.
    let second = offer();
    let error = budget(&second).expect_err("promised to the first");
    assert!(error.contains("2560 MiB"), "{error}");
    host.session_ended(first.job);
    assert_eq!(budget(&second), Ok(GIB));
}
