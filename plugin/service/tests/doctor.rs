//! The doctor over the bus, with a made-up host: what it finds, and that a migration agrees.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::collections::HashMap;

use common::{Fake, Options, Rig, Script, URI, error_of};
use serde_json::Value;
use vmgang_libvirt::{Fit, Hardware, ListedDomain, Membership, Versions};
use vmgang_service::hypervisor::Hypervisor;
use zbus::Variant;

async fn diagnose(rig: &Rig, destination: &str, options: Options<'_>) -> Value {
    let manager = rig.manager().await;
    let told: String = manager
        .call("Diagnose", &(destination, options))
        .await
        .expect("a diagnosis");
    serde_json::from_str(&told).expect("JSON")
}

/// The findings of a level: (check, subject, text and fix).
fn found<'a>(diagnosis: &'a Value, level: &str) -> Vec<(&'a str, &'a str, String)> {
    let findings = diagnosis["findings"].as_array().expect("findings");
    let text = |finding: &'a Value, field: &str| finding[field].as_str().unwrap_or_default();
    findings
        .iter()
        .filter(|finding| finding["level"] == level)
        .map(|finding| {
            let told = format!("{}; {}", text(finding, "what"), text(finding, "fix"));
            (text(finding, "check"), text(finding, "subject"), told)
        })
        .collect()
}

/// A gang of members that nothing is wrong with.
fn healthy(names: &[(&str, Script)]) -> Fake {
    let mut fake = Fake::new(names);
    let member = Membership {
        gang: "web".into(),
        order: None,
    };
    for domain in fake.domains().expect("a list") {
        fake.set_membership(domain.uuid, Some(&member))
            .expect("set");
        let hardware = Hardware {
            shared_memory: true,
            checked: true,
            ..Hardware::default()
        };
        fake.hardware.insert(domain.name, hardware);
    }
    fake
}

/// What the doctor says is what a migration meets: both refuse, or neither does.
async fn agrees(rig: &Rig, refusal: Option<&str>) -> Value {
    let diagnosis = diagnose(rig, URI, Options::new()).await;
    assert_eq!(diagnosis["ready"], refusal.is_none(), "{diagnosis:#}");
    let migrated = rig.migrate("web", URI, Options::new()).await;
    match refusal {
        None => {
            migrated.expect("a job");
        }
        Some(words) => {
            let (_, sentence) = error_of(migrated);
            assert!(sentence.contains(words), "{sentence}");
            let refused = found(&diagnosis, "refused");
            assert!(
                refused.iter().any(|(_, _, told)| *told == sentence),
                "{sentence}: {refused:#?}"
            );
        }
    }
    for level in ["advice", "warning", "refused"] {
        for (check, subject, told) in found(&diagnosis, level) {
            let fix = told.rsplit("; ").next().unwrap_or_default();
            assert!(!fix.is_empty() && !subject.is_empty(), "{check}: {told}");
        }
    }
    diagnosis
}

#[tokio::test]
async fn a_healthy_pair_is_ready_and_nothing_is_held() {
    let rig = Rig::new(healthy(&[("vm1", Script::Good), ("vm2", Script::Good)])).await;
    let diagnosis = diagnose(&rig, URI, Options::new()).await;
    assert_eq!(diagnosis["ready"], true, "{diagnosis:#}");
    assert_eq!(diagnosis["host"], "a");
    assert_eq!(diagnosis["destination"], URI);
    assert_eq!(diagnosis["peer"], "b:16520");
    assert_eq!(diagnosis["gangs"], serde_json::json!(["web"]));
    let good = found(&diagnosis, "ok");
    for check in [
        "libvirt",
        "gang",
        "destination",
        "peer",
        "cpu",
        "memory_backing",
    ] {
        assert!(
            good.iter().any(|(known, ..)| *known == check),
            "{check}: {good:#?}"
        );
    }
    let open = rig.fake.sessions.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(open, 0, "its session is closed");
    assert_eq!(*rig.fake.started.lock().expect("lock"), 0);
    assert!(rig.coordinator.jobs().is_empty());
    agrees(&rig, None).await;
}

#[tokio::test]
async fn several_problems_are_told_at_once() {
    let mut fake = healthy(&[("vm1", Script::Good)]);
    // Its peer cannot be talked to, and its name is taken there.
    fake.transport = Err("there is no /pki/cert.pem; put it there".into());
    fake.there = vec![ListedDomain {
        name: "vm1".into(),
        uuid: uuid::Uuid::new_v4(),
        active: false,
    }];
    let rig = Rig::new(fake).await;
    let diagnosis = agrees(&rig, Some("/pki/cert.pem")).await;
    let refused = found(&diagnosis, "refused");
    let checks: Vec<&str> = refused.iter().map(|(check, ..)| *check).collect();
    assert!(
        checks.contains(&"certificates") && checks.contains(&"destination"),
        "{refused:#?}"
    );
    let (_, subject, told) = &refused[checks.iter().position(|c| *c == "destination").expect("is")];
    assert!(*subject == "gang web" && told.contains("rename"), "{told}");
}

#[tokio::test]
async fn what_runs_already_and_what_is_busy_is_refused() {
    let fake = healthy(&[("vm1", Script::Slow), ("vm2", Script::BeingSaved)]);
    let rig = Rig::new(fake).await;
    agrees(&rig, Some("domjobabort vm2")).await;

    let rig = Rig::new(healthy(&[("vm1", Script::NeverReady)])).await;
    let job = rig
        .migrate("web", URI, Options::new())
        .await
        .expect("a job");
    let busy = agrees(&rig, Some("is being migrated by the job")).await;
    assert_eq!(found(&busy, "refused")[0].0, "job");
    rig.job(&job)
        .await
        .call::<_, _, ()>("Abort", &())
        .await
        .expect("aborts");
    rig.report(&job).await;
    assert_eq!(diagnose(&rig, URI, Options::new()).await["ready"], true);
}

#[tokio::test]
async fn members_that_could_do_better_or_do_not_fit() {
    let mut fake = healthy(&[("vm1", Script::Good), ("vm2", Script::Good)]);
    let worse = fake.hardware.get_mut("vm2").expect("known");
    worse.shared_memory = false;
    worse.host_devices = vec!["1 pci".into()];
    fake.versions_there = Versions {
        libvirt: 9_000_000,
        qemu: 7_002_000,
    };
    let rig = Rig::new(fake).await;
    let diagnosis = agrees(&rig, None).await;
    let advice = found(&diagnosis, "advice");
    let backing = advice.iter().find(|(check, ..)| *check == "memory_backing");
    let (_, subject, told) = backing.expect("told");
    assert!(*subject == "vm2" && told.contains("memfd"), "{told}");
    let warnings = found(&diagnosis, "warning");
    for check in ["devices", "versions"] {
        assert!(
            warnings.iter().any(|(known, ..)| *known == check),
            "{warnings:#?}"
        );
    }

    let mut fake = healthy(&[("vm1", Script::Good), ("vm2", Script::Good)]);
    fake.fit = Fit::Lacks("the CPU lacks avx512f".into());
    let rig = Rig::new(fake).await;
    let diagnosis = diagnose(&rig, URI, Options::new()).await;
    assert_eq!(diagnosis["ready"], false);
    let refused = found(&diagnosis, "refused");
    let subjects: Vec<&str> = refused.iter().map(|(_, subject, _)| *subject).collect();
    assert_eq!(subjects, ["vm1", "vm2"], "{refused:#?}");
    assert!(refused[0].2.contains("avx512f") && refused[0].2.contains("virsh edit vm1"));
}

#[tokio::test]
async fn one_host_alone_and_single_domains() {
    let fake = healthy(&[("vm1", Script::Good)]);
    let single = Fake::new(&[("alone", Script::Good)]);
    let rig = Rig::new(fake).await;
    let here = diagnose(&rig, "", Options::new()).await;
    assert!(here["ready"] == true && here["destination"].is_null() && here["peer"].is_null());
    let text = here.to_string();
    assert!(text.contains("libvirt 11.2.0, QEMU 10.0.0"), "{text}");
    assert!(!text.contains("way_back"), "{text}");

    let unknown = HashMap::from([("gang", Variant::from("db"))]);
    let unknown = diagnose(&rig, URI, unknown).await;
    assert_eq!(unknown["ready"], false);
    assert_eq!(found(&unknown, "refused")[0].0, "gang");
    // The pair is looked at all the same.
    let good = found(&unknown, "ok");
    assert!(good.iter().any(|(check, ..)| *check == "peer"), "{good:#?}");

    let rig = Rig::new(single).await;
    let diagnosis = diagnose(&rig, URI, Options::new()).await;
    assert_eq!(diagnosis["ready"], true, "{diagnosis:#}");
    let good = found(&diagnosis, "ok");
    assert!(
        good.iter()
            .any(|(check, subject, _)| (*check, *subject) == ("cpu", "alone"))
    );
    let empty = Rig::new(Fake::new(&[])).await;
    let diagnosis = diagnose(&empty, URI, Options::new()).await;
    assert_eq!(diagnosis["ready"], true, "{diagnosis:#}");

    let bad = rig.manager().await;
    let bad: zbus::Result<String> = bad
        .call("Diagnose", &("qemu:///system", Options::new()))
        .await;
    assert_eq!(error_of(bad).0, "org.vmgang.Error.InvalidDestination");
}
