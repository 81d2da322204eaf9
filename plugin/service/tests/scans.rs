//! What a host knows of its guests' memory, and what it gives of that to a gang that arrives.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::{Fake, Rig, Script, knowledge, page};
use uuid::Uuid;
use vmgang_dedup::{Page, PageDigest};
use vmgang_engine::{MemberOffer, Offer, Transport};
use vmgang_libvirt::Membership;
use vmgang_service::hypervisor::Hypervisor;
use zbus::Variant;

fn key() -> vmgang_engine::PageKey {
    Transport::Plain.page_key()
}

fn digest(content: u64) -> PageDigest {
    PageDigest::of(key().digest_key(), &page(content))
}

/// Guests of the gang `web`, with memory of these contents each; 0 is a hole.
fn gang(members: &[(&str, &[u64])]) -> (Fake, Vec<Uuid>) {
    let scripts: Vec<_> = members
        .iter()
        .map(|(name, _)| (*name, Script::Good))
        .collect();
    let fake = Fake::new(&scripts);
    let mut uuids = Vec::new();
    for (domain, (_, contents)) in fake.domains().expect("listed").iter().zip(members) {
        let membership = Membership {
            gang: "web".into(),
            order: None,
        };
        fake.set_membership(domain.uuid, Some(&membership))
            .expect("set");
        let content = |content: &u64| (*content > 0).then(|| page(*content));
        fake.ram
            .add(domain.uuid, contents.iter().map(content).collect());
        uuids.push(domain.uuid);
    }
    (fake, uuids)
}

#[test]
fn a_scan_is_used_again_until_it_is_old_or_its_guest_is_another_one() {
    let (fake, uuids) = gang(&[("a", &[1, 2, 0])]);
    let ram = fake
        .ram
        .add(uuids[0], vec![Some(page(1)), Some(page(2)), None]);
    let (scans, ..) = knowledge(&fake);
    assert!(
        scans.last(uuids[0], &key()).is_none(),
        "nothing is scanned unasked"
    );
    let hour = Duration::from_secs(3600);
    let stranger = Uuid::new_v4();
    let found = scans.scan_now(&[uuids[0], stranger], &key(), hour);
    assert!(found[0].is_ok());
    assert!(
        found[1]
            .as_ref()
            .is_err_and(|problem| problem.contains("not found"))
    );
    scans.scan_now(&uuids, &key(), hour);
    assert_eq!(ram.scans.load(SeqCst), 1, "it is fresh");
    let scan = scans
        .scan_now(&uuids, &key(), Duration::ZERO)
        .remove(0)
        .expect("scanned");
    assert_eq!((ram.scans.load(SeqCst), scan.snapshot.scans()), (2, 2));
    assert_eq!(scan.snapshot.blocks()[0].stable_scans(0), 1);

    // More memory: what was known of the old shape is forgotten.
    ram.pages.lock().expect("lock").push(Some(page(3)));
    let scan = scans
        .scan_now(&uuids, &key(), Duration::ZERO)
        .remove(0)
        .expect("scanned");
    assert_eq!((scan.snapshot.pages(), scan.snapshot.scans()), (4, 1));

    // Another trust domain's digests mean nothing.
    let other = vmgang_engine::PageKey::of_authorities(&[b"x"]);
    assert!(scans.last(uuids[0], &other).is_none());
    scans.forget(&[uuids[0]].into());
    assert!(scans.last(uuids[0], &key()).is_none(), "it has left");
    scans.scan_now(&uuids, &key(), Duration::ZERO);
    assert!(scans.last(uuids[0], &key()).is_some());
    ram.alive.store(false, SeqCst);
    assert!(scans.last(uuids[0], &key()).is_none(), "its QEMU is gone");
}

fn offer(gang: &str, members: &[Uuid]) -> Offer {
    Offer {
        job: Uuid::new_v4(),
        gang: gang.into(),
        source_host: "b".into(),
        window_budget_bytes: 1 << 30,
        members: members
            .iter()
            .map(|uuid| MemberOffer {
                uuid: *uuid,
                name: "vm".into(),
                memory_bytes: 1 << 30,
                fixed_owner: None,
            })
            .collect(),
    }
}

#[test]
fn members_that_run_here_answer_their_own_gang_only() {
    let (fake, uuids) = gang(&[("a", &[1, 2, 0]), ("b", &[2, 3])]);
    let (scans, _, contents) = knowledge(&fake);
    let coming = [Uuid::new_v4()];
    assert!(
        contents.for_job(&offer("web", &coming), &key()).is_none(),
        "not scanned yet"
    );
    scans.scan_now(&uuids, &key(), Duration::ZERO);
    assert!(contents.for_job(&offer("db", &coming), &key()).is_none());
    assert!(
        contents.for_job(&offer("", &coming), &key()).is_none(),
        "no gang"
    );
    let recall = contents
        .for_job(&offer("web", &coming), &key())
        .expect("it has some");
    assert_eq!(recall.contents(), 3);
    let mut found = Vec::new();
    recall.find(
        &[digest(9), digest(3), digest(1)],
        &mut |place, page: &Page| {
            found.push((place, *page));
        },
    );
    assert!(found == [(1, page(3)), (2, page(1))]);
    // The same unasked, what two pages have first, within a share of what comes.
    let mut likely = Vec::new();
    recall.likely(2, &mut |digest, page: &Page| likely.push((*digest, *page)));
    assert!(likely == [(digest(2), page(2)), (digest(1), page(1))]);
    let mut small = offer("web", &coming);
    small.members[0].memory_bytes = 8 * 4096;
    let recall = contents.for_job(&small, &key()).expect("it has some");
    let mut told = 0;
    recall.likely(99, &mut |_, _: &Page| told += 1);
    assert_eq!(told, 1);
    // A guest that comes back to itself is not asked.
    let recall = contents
        .for_job(&offer("web", &[uuids[1]]), &key())
        .expect("the other one");
    assert_eq!(recall.contents(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_estimate_counts_what_is_shared() {
    let shared: Vec<u64> = (1..=50).collect();
    let more: Vec<u64> = (41..=90).chain([0; 10]).collect();
    let (fake, _) = gang(&[("a", &shared), ("b", &more)]);
    let rig = Rig::new(fake).await;
    let options = std::collections::HashMap::<&str, Variant<'_>>::new();
    let manager = rig.manager().await;
    let result: String = manager
        .call("Estimate", &("web", options.clone()))
        .await
        .expect("estimated");
    let estimate: serde_json::Value = serde_json::from_str(&result).expect("JSON");
    let [a, b] = [0, 1].map(|member| &estimate["members"][member]);
    assert_eq!(
        (&a["name"], &a["content"], &a["distinct"]),
        (&"a".into(), &50.into(), &50.into())
    );
    assert_eq!(
        (&b["cross_vm"], &b["distinct"], &b["zero"]),
        (&10.into(), &40.into(), &10.into())
    );
    assert_eq!(estimate["shared"], serde_json::json!([[50, 10], [10, 50]]));
    let migration = &estimate["migration"];
    assert_eq!(migration["qemu_stream"], 100 * 4104 + 10 * 9);
    let saved = migration["saved"]["cross_vm"].as_i64().expect("a number");
    assert!((10 * 4000..10 * 4104).contains(&saved), "{migration}");

    let unknown: Result<String, _> = manager.call("Estimate", &("db", options)).await;
    let error = unknown.expect_err("there is no such gang").to_string();
    assert!(error.contains("db"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_prepared_is_refused_by_name() {
    let (fake, _) = gang(&[("a", &[1])]);
    let rig = Rig::new(fake).await;
    let manager = rig.manager().await;
    for (gang, destination, option, named) in [
        ("db", "b", ("for", Variant::from(60u64)), "db"),
        ("web", "localhost", ("for", Variant::from(60u64)), "itself"),
        ("web", "b", ("for", Variant::from(5u64)), "10 seconds"),
        ("web", "b", ("hope", Variant::from(5u64)), "hope"),
        (
            "web",
            "127.0.0.9",
            ("peer", Variant::from("127.0.0.1:1")),
            "127.0.0.1:1",
        ),
    ] {
        let options = std::collections::HashMap::from([option]);
        let refused: Result<String, _> =
            manager.call("Prepare", &(gang, destination, options)).await;
        let error = refused.expect_err("refused").to_string();
        assert!(error.contains(named), "{error}");
    }
    let refused: Result<(), _> = manager.call("AbortStage", &("0".repeat(32),)).await;
    assert!(
        refused
            .expect_err("there is none")
            .to_string()
            .contains("no stage")
    );
    let stages: Vec<std::collections::HashMap<String, zbus::OwnedVariant>> =
        manager.call("ListStages", &()).await.expect("listed");
    assert!(stages.is_empty());
}
