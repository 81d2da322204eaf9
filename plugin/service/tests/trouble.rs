//! Jobs in which something goes wrong, or comes at a bad moment, end to end against a scripted
//! host. What must hold: no release past a failure, nothing claimed that is not known.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::{Fake, Options, Rig, Script, URI, error_of, names};
use uuid::Uuid;
use vmgang_libvirt::ListedDomain;
use vmgang_service::hypervisor::Hypervisor;
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

/// More than are under way at once.
fn large(first: Script, others: Script) -> Fake {
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
    let fake = large(Script::BreaksAfterRelease, Script::Good);
    let (_rig, report) = run(fake, all()).await;
    assert_eq!(report["state"], "completed", "{report}");
    assert_eq!(report["error"], serde_json::Value::Null);
}

#[tokio::test]
async fn nobody_starts_after_a_lost_session() {
    let fake = large(Script::SessionLost, Script::NeverReady);
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

fn with(option: &'static str, value: Variant<'static>) -> Options<'static> {
    let mut options = all();
    options.insert(option, value);
    options
}

#[tokio::test]
async fn a_member_that_does_not_converge_begins_anew_and_is_slowed_down() {
    let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::Stalls)]);
    let (rig, report) = run(fake, all()).await;
    assert_eq!(report["state"], "completed", "{report}");
    assert_eq!(*rig.fake.started.lock().expect("lock"), 3);
}

#[tokio::test]
async fn one_that_never_converges_keeps_the_gang_here_with_its_figures() {
    let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::AlwaysStalls)]);
    let (rig, report) = run(fake, all()).await;
    assert_eq!(report["state"], "failed", "{report}");
    let error = report["error"].as_str().expect("an error");
    assert!(
        error.contains("vm2") && error.contains("1073.7 MB/s"),
        "{error}"
    );
    assert_eq!(rig.fake.active_names(), ["vm1", "vm2"]);
    assert_eq!(*rig.fake.started.lock().expect("lock"), 3);
}

#[tokio::test]
async fn one_that_never_converges_stays_behind_or_goes_to_post_copy() {
    let gang = || Fake::new(&[("vm1", Script::Good), ("vm2", Script::AlwaysStalls)]);
    let (rig, report) = run(gang(), with("on-stall", "leave".into())).await;
    assert_eq!(report["state"], "partial", "{report}");
    assert_eq!(names(&report, "state"), ["migrated", "source"]);
    let error = report["domains"][1]["error"].as_str().expect("an error");
    assert!(error.contains("dirties"), "{error}");
    assert_eq!(rig.fake.active_names(), ["vm2"]);

    let (_rig, report) = run(gang(), with("on-stall", "postcopy".into())).await;
    assert_eq!(report["state"], "completed", "{report}");
}

#[tokio::test]
async fn post_copy_goes_after_the_first_pass_or_on_command() {
    let gang = || Fake::new(&[("vm1", Script::Good), ("vm2", Script::AlwaysStalls)]);
    let (_rig, report) = run(gang(), with("postcopy", true.into())).await;
    assert_eq!(report["state"], "completed", "{report}");

    let gang = Fake::new(&[("vm1", Script::Good), ("vm2", Script::Copying)]);
    let rig = Rig::new(gang).await;
    let mut options = with("timeout-postcopy", true.into());
    options.insert("timeout", Variant::from(600u64));
    let job = rig.migrate("", URI, options).await.expect("starts");
    let proxy = rig.job(&job).await;
    let () = proxy.call("StartPostCopy", &()).await.expect("goes");
    assert_eq!(rig.report(&job).await["state"], "completed");

    let rig = Rig::new(Fake::new(&[("vm1", Script::NeverReady)])).await;
    let job = rig.migrate("", URI, all()).await.expect("starts");
    let proxy = rig.job(&job).await;
    let (name, text) = error_of(proxy.call::<_, _, ()>("StartPostCopy", &()).await);
    assert_eq!(name, "org.vmgang.Error.InvalidOption");
    assert!(text.contains("option postcopy"), "{text}");
}

#[tokio::test]
async fn what_this_qemu_cannot_do_is_refused_before_anything_starts() {
    let rig = Rig::new(Fake::new(&[("vm1", Script::Good)])).await;
    let mut options = with("postcopy", true.into());
    options.insert("parallel", 2u64.into());
    let (name, text) = error_of(rig.migrate("", URI, options).await);
    assert_eq!(name, "org.vmgang.Error.InvalidOption");
    assert!(text.contains("parallel") && text.contains("10.1"), "{text}");
    assert_eq!(*rig.fake.started.lock().expect("lock"), 0);
}

#[tokio::test]
async fn pages_have_connections_of_their_own_unless_that_is_not_wanted_or_not_safe() {
    for (more, wanted) in [
        (None, Some(2)),
        (Some(("parallel", Variant::from(0u64))), None),
        (Some(("parallel", Variant::from(5u64))), Some(5)),
        (Some(("postcopy", Variant::from(true))), None),
        (Some(("on-stall", Variant::from("postcopy"))), None),
    ] {
        let mut options = all();
        let what = format!("{more:?}");
        options.extend(more);
        let (rig, report) = run(Fake::new(&[("vm1", Script::Good)]), options).await;
        assert_eq!(report["state"], "completed", "{what}: {report}");
        let with = rig.fake.migrated_with.lock().expect("lock")["vm1"].clone();
        let parallel = with.parallel.map(std::num::NonZeroU8::get);
        assert_eq!(parallel, wanted, "{what}");
    }
}

#[tokio::test]
async fn a_timeout_suspends_what_does_not_converge() {
    let mut options = with("timeout", 1u64.into());
    options.insert("timeout-suspend", true.into());
    let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::NeverReady)]);
    let rig = Rig::new(fake).await;
    let job = rig.migrate("", URI, options).await.expect("starts");
    let both = async {
        while rig.fake.suspended.lock().expect("lock").len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(30), both).await;
    waited.expect("both are suspended");
    let mut suspended = rig.fake.suspended.lock().expect("lock").clone();
    suspended.sort();
    assert_eq!(suspended, ["vm1", "vm2"]);
    let () = rig
        .job(&job)
        .await
        .call("Abort", &())
        .await
        .expect("aborts");
    assert_eq!(rig.report(&job).await["state"], "aborted");
}

#[tokio::test]
async fn staggered_and_free_members_all_arrive() {
    for how in ["staggered", "free", "together"] {
        let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::Slow)]);
        let (_rig, report) = run(fake, with("switchover", how.into())).await;
        assert_eq!(report["state"], "completed", "{how}: {report}");
    }
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

#[tokio::test]
async fn a_member_that_libvirt_works_on_is_refused() {
    let rig = Rig::new(Fake::new(&[
        ("vm1", Script::Good),
        ("vm2", Script::BeingSaved),
    ]))
    .await;
    let (name, text) = error_of(rig.migrate("", URI, all()).await);
    assert_eq!(name, "org.vmgang.Error.Busy");
    assert!(text.contains("virsh domjobabort vm2"), "{text}");
    assert_eq!(rig.fake.sessions.load(SeqCst), 0, "the peer was not called");
}

#[tokio::test]
async fn domains_that_are_there_already_are_named() {
    let listed = |name: &str, uuid, active| ListedDomain {
        name: name.into(),
        uuid,
        active,
    };
    let fake = || Fake::new(&[("vm1", Script::Good)]);
    let refused = async |fake: Fake| error_of(Rig::new(fake).await.migrate("", URI, all()).await);

    let mut runs = fake();
    let uuid = runs.domains().expect("listed")[0].uuid;
    runs.there = vec![listed("other-name", uuid, true)];
    let (name, text) = refused(runs).await;
    assert_eq!(name, "org.vmgang.Error.MemberNotMigratable");
    assert!(text.contains("vm1 runs on"), "{text}");

    let mut same_name = fake();
    same_name.there = vec![listed("vm1", Uuid::new_v4(), false)];
    let (_, text) = refused(same_name).await;
    assert!(text.contains("another domain named vm1"), "{text}");

    // Its own definition, left there by an earlier migration.
    let mut defined = fake();
    let uuid = defined.domains().expect("listed")[0].uuid;
    defined.there = vec![listed("vm1", uuid, false)];
    let (_rig, report) = run(defined, all()).await;
    assert_eq!(report["state"], "completed", "{report}");
}

#[tokio::test]
async fn the_session_opens_while_the_destination_is_looked_at() {
    let mut fake = Fake::new(&[("vm1", Script::Good)]);
    fake.answers_after_call = true;
    let (_rig, report) = run(fake, all()).await;
    assert_eq!(report["state"], "completed", "{report}");
}

#[tokio::test]
async fn a_session_that_opened_for_nothing_ends() {
    let mut fake = Fake::new(&[("vm1", Script::Good)]);
    fake.answers_after_call = true;
    let rig = Rig::new(fake).await;
    let uri = "qemu+tls://unreachable/system";
    let (name, text) = error_of(rig.migrate("", uri, all()).await);
    assert_eq!(name, "org.vmgang.Error.DestinationUnreachable");
    assert!(text.contains("no route"), "{text}");
    let ended = async {
        while rig.fake.sessions.load(SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(10), ended).await;
    assert!(ended.is_ok(), "the session stays open");
    assert_eq!(*rig.fake.started.lock().expect("lock"), 0);
    // Nothing stays reserved either.
    let job = rig.migrate("", URI, all()).await.expect("starts");
    assert_eq!(rig.report(&job).await["state"], "completed");
}

#[tokio::test]
async fn the_peer_is_asked_about_all_members_at_once() {
    let mut fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::Good)]);
    fake.outcomes = Arc::new(tokio::sync::Barrier::new(2));
    let (_rig, report) = run(fake, all()).await;
    assert_eq!(names(&report, "state"), ["migrated", "migrated"]);
    for domain in 0..2 {
        assert_eq!(report["domains"][domain]["downtime_ms"], 7, "{report}");
    }
}

#[tokio::test]
async fn the_offer_follows_the_gangs_memory_and_this_hosts() {
    const GIB: u64 = 1 << 30;
    for (available, offered) in [(64 * GIB, 2 * GIB + (128 << 20)), (4 * GIB, GIB)] {
        let mut fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::Good)]);
        fake.available_bytes = available;
        let (rig, report) = run(fake, all()).await;
        assert_eq!(report["state"], "completed", "{report}");
        assert_eq!(*rig.fake.window_offered.lock().expect("lock"), offered);
    }
}

#[tokio::test]
async fn a_libvirt_that_would_crash_is_not_asked_to_go_on_with_a_post_copy() {
    let mut fake = Fake::new(&[("vm1", Script::Good)]);
    fake.libvirt_there = Some(11_003_000);
    let rig = Rig::new(fake).await;
    let resume = Options::from([
        ("all", Variant::from(true)),
        ("postcopy-resume", Variant::from(true)),
    ]);
    let (_, message) = error_of(rig.migrate("", URI, resume).await);
    assert!(message.contains("11.3"), "{message}");
    assert_eq!(*rig.fake.started.lock().expect("lock"), 0);
    rig.migrate("", URI, all()).await.expect("starts");
}
