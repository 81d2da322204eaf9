//! Memory balloons around a job, against a scripted host: who gives up how much, and that it comes
//! back wherever the guest runs, whatever becomes of the job.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::time::Duration;

use common::{Fake, Options, Rig, Script, URI, names};
use vmgang_libvirt::Balloon;
use vmgang_service::hypervisor::Hypervisor;
use zbus::Variant;

const GIB: u64 = 1 << 30;

/// One that uses three quarters of a gigabyte of its four, and is asked every 7 seconds.
fn roomy() -> Balloon {
    Balloon {
        maximum_bytes: 4 * GIB,
        current_bytes: 4 * GIB,
        usable_bytes: Some(4 * GIB - 3 * GIB / 4),
        told_unix_s: 0,
        period_s: 7,
    }
}

fn options() -> Options<'static> {
    Options::from([
        ("all", Variant::from(true)),
        ("balloon", Variant::from(true)),
    ])
}

fn with_balloons(fake: Fake, balloons: &[(&str, Balloon)]) -> Fake {
    let named = balloons
        .iter()
        .map(|(name, balloon)| ((*name).to_owned(), *balloon));
    fake.balloons.lock().expect("lock").extend(named);
    fake
}

/// Both of a domain's balloon that have to come back.
fn now(rig: &Rig, name: &str) -> (u64, u32) {
    let balloon = rig.fake.balloons.lock().expect("lock")[name];
    (balloon.current_bytes, balloon.period_s)
}

fn record(rig: &Rig, job: &str) -> String {
    let file = format!("{}.json", job.rsplit('/').next().expect("an id"));
    std::fs::read_to_string(rig.state_dir.path().join("jobs").join(file)).expect("written")
}

#[tokio::test]
async fn guests_give_up_what_they_do_not_need_and_get_it_back_where_they_run_then() {
    let fake = Fake::new(&[
        ("vm1", Script::Good),
        ("vm2", Script::Good),
        ("vm3", Script::Good),
    ]);
    let silent = Balloon {
        usable_bytes: Some(0),
        ..roomy()
    };
    let rig = Rig::new(with_balloons(fake, &[("vm1", roomy()), ("vm2", silent)])).await;
    let job = rig.migrate("", URI, options()).await.expect("starts");
    let report = rig.report(&job).await;
    assert_eq!(report["state"], "completed", "{report}");
    // Three quarters and a tenth of four, in whole MiB.
    let given = report["domains"][0]["ballooned_bytes"]
        .as_u64()
        .expect("a number");
    assert_eq!(given, 4 * GIB - (768 + 410) * (GIB / 1024), "{report}");
    assert_eq!(
        report["domains"][1]["ballooned_bytes"], 0,
        "it needs all it has"
    );
    assert!(
        report["domains"][2].get("ballooned_bytes").is_none(),
        "it has no balloon"
    );
    let restored = rig.fake.restored_there.lock().expect("lock").clone();
    let expected = [
        ("vm1".to_owned(), 4 * GIB, 7),
        ("vm2".to_owned(), 4 * GIB, 7),
    ];
    assert_eq!(restored, expected);
    assert!(
        !record(&rig, job.as_str()).contains("balloons"),
        "nothing is owed"
    );
}

#[tokio::test]
async fn a_job_that_fails_gives_back_here() {
    let fake = Fake::new(&[("vm1", Script::Good), ("vm2", Script::EndsUnstopped)]);
    let rig = Rig::new(with_balloons(fake, &[("vm1", roomy()), ("vm2", roomy())])).await;
    let job = rig.migrate("", URI, options()).await.expect("starts");
    let report = rig.report(&job).await;
    assert_eq!(names(&report, "state"), ["source", "source"], "{report}");
    assert!(report["domains"][0]["ballooned_bytes"].as_u64() > Some(2 * GIB));
    assert_eq!(now(&rig, "vm1"), (4 * GIB, 7));
    assert_eq!(now(&rig, "vm2"), (4 * GIB, 7));
    assert!(rig.fake.restored_there.lock().expect("lock").is_empty());
}

#[tokio::test]
async fn an_abort_does_not_wait_for_a_guest_that_gives_up_nothing() {
    let mut fake = Fake::new(&[("vm1", Script::Good)]);
    fake.balloons_are_slow = true;
    let rig = Rig::new(with_balloons(fake, &[("vm1", roomy())])).await;
    let job = rig.migrate("", URI, options()).await.expect("starts");
    while now(&rig, "vm1").0 == 4 * GIB {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let () = rig
        .job(&job)
        .await
        .call("Abort", &())
        .await
        .expect("aborts");
    let report = rig.report(&job).await;
    assert_eq!(report["state"], "aborted", "{report}");
    assert_eq!(
        *rig.fake.started.lock().expect("lock"),
        0,
        "no migration was begun"
    );
    assert_eq!(now(&rig, "vm1"), (4 * GIB, 7));
}

#[tokio::test]
async fn nothing_is_asked_of_guests_unless_it_is_said() {
    let fake = Fake::new(&[("vm1", Script::Good)]);
    let rig = Rig::new(with_balloons(fake, &[("vm1", roomy())])).await;
    let all = Options::from([("all", Variant::from(true))]);
    let job = rig.migrate("", URI, all).await.expect("starts");
    let report = rig.report(&job).await;
    assert!(
        report["domains"][0].get("ballooned_bytes").is_none(),
        "{report}"
    );
    assert_eq!(now(&rig, "vm1"), (4 * GIB, 7));
}

#[tokio::test]
async fn a_daemon_that_was_killed_gives_back_when_it_starts_again() {
    let fake = Fake::new(&[("vm1", Script::Good)]);
    let fake = with_balloons(fake, &[("vm1", roomy())]);
    let uuid = fake.domains().expect("domains")[0].uuid;
    // As a killed daemon leaves it.
    let job = "7".repeat(32);
    let left = serde_json::json!({
        "started_unix_s": 1, "balloons": [
            {"uuid": uuid, "name": "vm1", "memory_bytes": 3 * GIB, "period_s": 2}],
        "report": {"job": job, "gang": null, "destination": URI, "state": "running", "error": null,
            "elapsed_ms": 0, "switchover_spread_ms": null,
            "bytes": {"qemu_stream": 0, "wire": 0, "literal": 0, "saved": {"zero": 0, "uniform": 0,
                "intra_vm": 0, "cross_vm": 0, "staged": 0, "destination": 0, "sub_page": 0,
                "delta": 0, "compression": 0}},
            "domains": []},
    });
    let state_dir = tempfile::tempdir().expect("a directory");
    let jobs = state_dir.path().join("jobs");
    std::fs::create_dir(&jobs).expect("a directory");
    std::fs::write(jobs.join(format!("{job}.json")), left.to_string()).expect("written");
    let rig = Rig::after(fake, state_dir).await;
    for _ in 0..200 {
        if now(&rig, "vm1") == (3 * GIB, 2) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(now(&rig, "vm1"), (3 * GIB, 2));
    for _ in 0..200 {
        if !record(&rig, &job).contains("balloons") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{}", record(&rig, &job));
}
