//! The D-Bus surface as a client sees it, with jobs run end to end against a scripted host:
//! no bus daemon, no libvirt, no peer.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::collections::HashMap;
use std::time::Duration;

use common::{Fake, Options, Rig, Script, URI, domain, error_of, names};
use vmgang_libvirt::MetadataError;
use zbus::{OwnedObjectPath, OwnedVariant, Variant};

#[tokio::test]
async fn a_gang_is_made_shown_and_unmade() {
    let rig = Rig::new(Fake::new(&[("vm1", Script::Good), ("vm2", Script::Good)])).await;
    rig.fake.push(domain("off", false));
    let mut broken = domain("broken", true);
    broken.membership = Err(MetadataError {
        domain: "broken".into(),
        reason: "bad order".into(),
        gang: Some("db".into()),
    });
    rig.fake.push(broken);
    let manager = rig.manager().await;

    let changed: Vec<String> = manager
        .call("AddToGang", &("web", vec!["vm1", "off"]))
        .await
        .expect("adds");
    assert_eq!(changed, ["vm1", "off"]);
    let changed: Vec<String> = manager
        .call("AddToGang", &("web", vec!["vm1"]))
        .await
        .expect("is in it already");
    assert!(changed.is_empty());

    type Listed = (Vec<(String, u32, u32)>, Vec<(String, String)>);
    let (gangs, problems): Listed = manager.call("ListGangs", &()).await.expect("lists");
    assert_eq!(gangs, [("web".to_owned(), 1, 2)]);
    assert_eq!(problems[0].0, "broken");
    let members: Vec<(String, String, String, i64, u64, bool)> =
        manager.call("GetGang", &"web").await.expect("there");
    let states: Vec<_> = members
        .iter()
        .map(|m| (m.0.as_str(), m.2.as_str(), m.3))
        .collect();
    assert_eq!(states, [("off", "shut off", -1), ("vm1", "running", -1)]);

    let other: zbus::Result<Vec<String>> = manager.call("AddToGang", &("db", vec!["vm1"])).await;
    let (name, text) = error_of(other);
    assert_eq!(name, "org.vmgang.Error.AlreadyInGang");
    assert!(text.contains("vmgang gang remove web vm1"), "{text}");
    let unknown: zbus::Result<Vec<String>> =
        manager.call("AddToGang", &("web", vec!["vm2", "x"])).await;
    assert_eq!(error_of(unknown).0, "org.vmgang.Error.UnknownDomain");
    let (gangs, _): Listed = manager.call("ListGangs", &()).await.expect("lists");
    assert_eq!(gangs[0].2, 2, "a refused call changes nothing");

    let changed: Vec<String> = manager
        .call("RemoveFromGang", &("db", vec!["broken"]))
        .await
        .expect("repairs");
    assert_eq!(changed, ["broken"]);
    let _: Vec<String> = manager
        .call("RemoveFromGang", &("web", vec!["vm1", "off"]))
        .await
        .expect("removes");
    let gone: zbus::Result<zbus::message::Body> = manager
        .call_method("GetGang", &"web")
        .await
        .map(|m| m.body());
    assert_eq!(error_of(gone).0, "org.vmgang.Error.UnknownGang");
}

#[tokio::test]
async fn bad_input_gets_a_named_error_and_no_job() {
    let rig = Rig::new(Fake::new(&[("vm1", Script::Good)])).await;
    rig.fake.push(domain("off", false));
    let manager = rig.manager().await;
    let _: Vec<String> = manager
        .call("AddToGang", &("dead", vec!["off"]))
        .await
        .expect("adds");
    let all = || Options::from([("all", Variant::from(true))]);
    let cases = [
        ("nope", URI, Options::new(), "UnknownGang", "nope"),
        ("dead", URI, Options::new(), "NoRunningMember", "dead"),
        (
            "",
            "qemu:///system",
            all(),
            "InvalidDestination",
            "no host part",
        ),
        (
            "",
            "qemu+tls://myself/system",
            all(),
            "InvalidDestination",
            "this host itself",
        ),
        (
            "",
            "qemu+tls://unreachable/system",
            all(),
            "DestinationUnreachable",
            "no route",
        ),
        (
            "",
            URI,
            Options::from([("domains", Variant::from(vec!["x"]))]),
            "UnknownDomain",
            "x",
        ),
        (
            "",
            URI,
            Options::from([("zerocopy", Variant::from(true))]),
            "InvalidOption",
            "nothing to migrate",
        ),
        (
            "",
            URI,
            Options::from([("all", Variant::from(true)), ("tls", Variant::from(true))]),
            "TlsFailed",
            "`tls = false`",
        ),
        (
            "dead",
            URI,
            Options::from([("zerocopy", Variant::from(true))]),
            "InvalidOption",
            "zerocopy",
        ),
    ];
    for (gang, uri, options, error, expected) in cases {
        let (name, text) = error_of(rig.migrate(gang, uri, options).await);
        assert_eq!(name, format!("org.vmgang.Error.{error}"), "{text}");
        assert!(text.contains(expected), "{text}");
    }
    assert!(rig.coordinator.jobs().is_empty());
    assert_eq!(rig.fake.active_names(), ["vm1"]);
    // Nothing stays reserved either.
    let job = rig.migrate("", URI, all()).await.expect("starts");
    assert_eq!(rig.report(&job).await["state"], "completed");
}

#[tokio::test]
async fn missing_certificates_refuse_the_migration_only() {
    let mut fake = Fake::new(&[("vm1", Script::Good)]);
    fake.transport = Err("there is no /etc/pki/CA/cacert.pem".into());
    let rig = Rig::new(fake).await;
    let refused = rig
        .migrate("", URI, Options::from([("all", Variant::from(true))]))
        .await;
    let (name, text) = error_of(refused);
    assert_eq!(name, "org.vmgang.Error.TlsFailed");
    assert!(text.contains("cacert.pem"), "{text}");
}

#[tokio::test]
async fn why_a_bare_hosts_libvirt_is_not_reached_is_told_by_the_peer_and_nothing_is_left() {
    let rig = Rig::new(Fake::new(&[("vm1", Script::Good)])).await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let peer = closed.local_addr().expect("bound").to_string();
    drop(closed);
    let options = Options::from([
        ("all", Variant::from(true)),
        ("peer", Variant::from(peer.as_str())),
    ]);
    let (name, text) = error_of(rig.migrate("", "b", options).await);
    assert_eq!(name, "org.vmgang.Error.PeerUnreachable", "{text}");
    assert!(
        text.contains(&peer) && !text.contains("End of file"),
        "{text}"
    );
    assert_eq!(rig.fake.active_names(), ["vm1"]);
    let sockets = rig.state_dir.path().join("libvirt");
    let left = std::fs::read_dir(sockets).expect("it was made").count();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_gang_migrates_as_one_and_is_reported() {
    let rig = Rig::new(Fake::new(&[("vm1", Script::Good), ("vm2", Script::Good)])).await;
    let manager = rig.manager().await;
    let _: Vec<String> = manager
        .call("AddToGang", &("web", vec!["vm1", "vm2"]))
        .await
        .expect("adds");
    let job = rig
        .migrate("web", URI, Options::new())
        .await
        .expect("starts");
    let report = rig.report(&job).await;
    assert_eq!(report["state"], "completed");
    assert_eq!(report["gang"], "web");
    assert_eq!(report["error"], serde_json::Value::Null);
    assert_eq!(names(&report, "name"), ["vm1", "vm2"]);
    assert_eq!(names(&report, "state"), ["migrated", "migrated"]);
    assert_eq!(report["domains"][0]["downtime_ms"], 7);
    assert_eq!(
        report["domains"][0]["iterations"], 4,
        "from the source's own statistics"
    );
    assert!(report["switchover_spread_ms"].is_u64());
    assert_eq!(report["bytes"]["saved"]["compression"], -100);

    let proxy = rig.job(&job).await;
    let statistics: HashMap<String, OwnedVariant> =
        proxy.get_property("Statistics").await.expect("statistics");
    assert_eq!(
        u64::try_from(statistics["wire"].try_clone().expect("plain")).expect("t"),
        300
    );
    let progress: HashMap<String, OwnedVariant> =
        proxy.get_property("Progress").await.expect("progress");
    assert!(progress.contains_key("members") && progress.contains_key("elapsed_ms"));

    // It stays known, also to a daemon started later.
    let id = report["job"].as_str().expect("an id");
    assert_eq!(job.as_str(), format!("/org/vmgang/jobs/{id}"));
    assert!(
        rig.state_dir
            .path()
            .join(format!("jobs/{id}.json"))
            .exists()
    );
    let (name, _) = error_of(proxy.call::<_, _, ()>("Abort", &()).await);
    assert_eq!(name, "org.vmgang.Error.JobEnded");
    type Line = (OwnedObjectPath, String, String, String, String, u64);
    let jobs: Vec<Line> = manager.call("ListJobs", &()).await.expect("lists");
    assert_eq!(
        (jobs[0].2.as_str(), jobs[0].4.as_str()),
        ("web", "completed")
    );
}

#[tokio::test]
async fn one_that_cannot_migrate_keeps_all_on_the_source() {
    let rig = Rig::new(Fake::new(&[
        ("vm1", Script::Good),
        ("vm2", Script::Refused),
    ]))
    .await;
    let all = Options::from([("all", Variant::from(true))]);
    let report = rig
        .report(&rig.migrate("", URI, all).await.expect("starts"))
        .await;
    assert_eq!(report["state"], "failed");
    assert_eq!(names(&report, "state"), ["source", "source"]);
    assert!(
        report["error"].as_str().is_some_and(|e| e.contains("vm2")),
        "{report}"
    );
    assert_eq!(report["domains"][0]["error"], serde_json::Value::Null);
    assert_eq!(rig.fake.active_names(), ["vm1", "vm2"]);
}

#[tokio::test]
async fn what_happened_when_is_told_and_kept() {
    let rig = Rig::new(Fake::new(&[("vm1", Script::Good), ("vm2", Script::Good)])).await;
    let options = Options::from([("all", Variant::from(true))]);
    let job = rig.migrate("", URI, options).await.expect("starts");
    let report = rig.report(&job).await;
    let proxy = rig.job(&job).await;
    let told: String = proxy.call("GetTimeline", &()).await.expect("told");
    let timeline: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    for member in 0..2 {
        let phases = timeline["members"][member]["phases"]
            .as_array()
            .expect("phases");
        let words: Vec<&str> = phases
            .iter()
            .filter_map(|phase| phase["phase"].as_str())
            .collect();
        assert_eq!(words.first(), Some(&"waiting"), "{timeline}");
        assert!(
            words.contains(&"copying") && words.contains(&"switching"),
            "{timeline}"
        );
        assert_eq!(words.last(), Some(&"migrated"), "{timeline}");
        let times: Vec<u64> = phases
            .iter()
            .filter_map(|phase| phase["at_ms"].as_u64())
            .collect();
        assert!(times.is_sorted(), "{timeline}");
    }
    assert!(timeline["switching_ms"].is_u64(), "{timeline}");
    // The engine's last word.
    assert_eq!(
        timeline["samples"]["wire"]
            .as_array()
            .and_then(|wire| wire.last()),
        Some(&300.into())
    );
    assert_eq!(timeline["shared_pages"], serde_json::json!([[1, 0, 0]]));

    let id = report["job"].as_str().expect("an id");
    let file = rig.state_dir.path().join(format!("jobs/{id}.json"));
    let record = std::fs::read_to_string(&file).expect("a record");
    let mut record: serde_json::Value = serde_json::from_str(&record).expect("JSON");
    assert_eq!(record["timeline"], timeline);
    assert!(
        record["report"].get("timeline").is_none(),
        "the result is a contract"
    );

    // A later daemon tells it as well; of a record without one it says so.
    let old = "00000000000000000000000000000001";
    record["report"]["job"] = old.into();
    record
        .as_object_mut()
        .expect("an object")
        .remove("timeline");
    let without = rig.state_dir.path().join(format!("jobs/{old}.json"));
    std::fs::write(without, record.to_string()).expect("writes");
    let later = Rig::after(Fake::new(&[("vm1", Script::Good)]), rig.state_dir).await;
    let kept: String = later
        .job(&job)
        .await
        .call("GetTimeline", &())
        .await
        .expect("kept");
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&kept).expect("JSON"),
        timeline
    );
    let path = zbus::OwnedObjectPath::try_from(format!("/org/vmgang/jobs/{old}")).expect("a path");
    let nothing: String = later
        .job(&path)
        .await
        .call("GetTimeline", &())
        .await
        .expect("told");
    assert_eq!(nothing, "");
}

#[tokio::test]
async fn with_continue_the_rest_migrates() {
    let rig = Rig::new(Fake::new(&[
        ("vm1", Script::Good),
        ("vm2", Script::Refused),
    ]))
    .await;
    let options = Options::from([
        ("all", Variant::from(true)),
        ("on-failure", Variant::from("continue")),
    ]);
    let report = rig
        .report(&rig.migrate("", URI, options).await.expect("starts"))
        .await;
    assert_eq!(report["state"], "partial");
    assert_eq!(names(&report, "state"), ["migrated", "source"]);
}

#[tokio::test]
async fn abort_and_timeout_bring_everybody_back() {
    let rig = Rig::new(Fake::new(&[
        ("vm1", Script::Good),
        ("vm2", Script::NeverReady),
    ]))
    .await;
    let all = || Options::from([("all", Variant::from(true))]);
    let job = rig.migrate("", URI, all()).await.expect("starts");
    let (name, text) = error_of(rig.migrate("", URI, all()).await);
    assert_eq!(name, "org.vmgang.Error.Busy");
    assert!(text.contains("vmgang abort"), "{text}");
    let proxy = rig.job(&job).await;
    let () = proxy.call("SetBandwidth", &50u64).await.expect("capped");
    let () = proxy.call("Abort", &()).await.expect("aborts");
    let report = rig.report(&job).await;
    assert_eq!(report["state"], "aborted");
    assert_eq!(names(&report, "state"), ["source", "source"]);

    let mut options = all();
    options.insert("timeout", Variant::from(1u64));
    let report = rig
        .report(&rig.migrate("", URI, options).await.expect("starts"))
        .await;
    assert_eq!(report["state"], "failed");
    assert!(
        report["error"].as_str().is_some_and(|e| e.contains("1 s")),
        "{report}"
    );
    assert_eq!(rig.fake.active_names(), ["vm1", "vm2"]);
}

#[tokio::test]
async fn a_large_gang_goes_in_a_rolling_queue() {
    let names: Vec<String> = (0..15).map(|n| format!("vm{n:02}")).collect();
    let domains: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), Script::Slow))
        .collect();
    let rig = Rig::new(Fake::new(&domains)).await;
    let with = |concurrency: u64| {
        Options::from([
            ("all", Variant::from(true)),
            ("concurrency", Variant::from(concurrency)),
        ])
    };
    let mut together = with(12);
    together.insert("switchover", Variant::from("together"));
    let (_, text) = error_of(rig.migrate("", URI, together).await);
    assert!(text.contains("15 members"), "{text}");
    let report = rig
        .report(&rig.migrate("", URI, with(6)).await.expect("starts"))
        .await;
    assert_eq!(report["state"], "completed");
    assert_eq!(report["domains"].as_array().map(Vec::len), Some(15));
    assert_eq!(*rig.fake.most_at_once.lock().expect("lock"), 6);
    // All six are ready at the same moment, and leave in turn: the next one when one has arrived, or late.
    let (_, at_once) = *rig.fake.let_go.lock().expect("lock");
    assert!((1..=2).contains(&at_once), "{at_once}");
}

#[tokio::test]
async fn stopping_the_daemon_aborts_what_runs() {
    let rig = Rig::new(Fake::new(&[("vm1", Script::NeverReady)])).await;
    let all = || Options::from([("all", Variant::from(true))]);
    let job = rig.migrate("", URI, all()).await.expect("starts");
    rig.coordinator.shutdown().await;
    let report = rig.report(&job).await;
    assert_eq!(report["state"], "aborted");
    let error = report["error"].as_str().expect("an error");
    assert!(error.contains("vmgangd was stopped"), "{error}");
    assert_eq!(
        error_of(rig.migrate("", URI, all()).await).0,
        "org.vmgang.Error.Busy"
    );
}

#[tokio::test]
async fn object_manager_shows_jobs_and_changes_are_announced() {
    use zbus::fdo::{ObjectManagerProxy, PropertiesProxy};
    let rig = Rig::new(Fake::new(&[("vm1", Script::NeverReady)])).await;
    let all = Options::from([("all", Variant::from(true))]);
    let path = rig.migrate("", URI, all).await.expect("starts");
    let objects = ObjectManagerProxy::new(&rig.client, "org.vmgang.VMGang1", "/org/vmgang")
        .await
        .expect("a proxy")
        .get_managed_objects()
        .await
        .expect("objects");
    let job = &objects[&path]["org.vmgang.Job1"];
    assert!(job.contains_key("Progress") && job.contains_key("Statistics"));

    let properties = PropertiesProxy::new(&rig.client, "org.vmgang.VMGang1", path.clone())
        .await
        .expect("a proxy");
    let mut changes = properties
        .receive_properties_changed()
        .await
        .expect("a stream");
    let () = rig
        .job(&path)
        .await
        .call("Abort", &())
        .await
        .expect("aborts");
    let last = async {
        use futures_util::StreamExt;
        loop {
            let signal = changes.next().await.expect("a change");
            let args = signal.args().expect("arguments");
            let state = args.changed_properties["State"].to_string();
            if state.contains("aborted") {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), last)
        .await
        .expect("announced");
}
