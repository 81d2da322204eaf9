//! The crate against libvirt's built-in test driver: real libvirt calls, no daemon, no guest.

use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use vmgang_libvirt::{DomainState, Host, LibvirtError, Membership, MigrateOptions, Migration};

const URI: &str = "test:///default";

/// All connections of a process share the driver's domain: one test at a time looks at its
/// metadata.
static METADATA: Mutex<()> = Mutex::new(());

#[test]
fn lists_the_domain_of_the_test_driver() {
    let _alone = METADATA.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::open(URI).expect("opens");
    assert!(host.is_alive());
    let domains = host.domains().expect("lists");
    let domain = domains
        .iter()
        .find(|domain| domain.name == "test")
        .expect("there");
    assert_eq!(domain.state, DomainState::Running);
    assert!(domain.active() && domain.persistent);
    assert_eq!(domain.memory_bytes, 8 << 30);
    assert_eq!(domain.membership, Ok(None));
    assert_eq!(
        host.domain_by_uuid(domain.uuid).expect("there").name,
        "test"
    );
}

#[test]
fn membership_is_written_read_and_removed() {
    let _alone = METADATA.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::open(URI).expect("opens");
    let uuid = host.domain_by_name("test").expect("there").uuid;
    let member = Membership {
        gang: "web".into(),
        order: Some(3),
    };
    host.set_membership(uuid, Some(&member)).expect("writes");
    let read = host.domain_by_uuid(uuid).expect("there").membership;
    assert_eq!(read, Ok(Some(member)));
    host.set_membership(uuid, None).expect("removes");
    assert_eq!(
        host.domain_by_uuid(uuid).expect("there").membership,
        Ok(None)
    );

    let bad = Membership {
        gang: "a b".into(),
        order: None,
    };
    let error = host.set_membership(uuid, Some(&bad)).expect_err("refused");
    assert!(error.to_string().contains("domain test"), "{error}");
}

#[test]
fn errors_name_the_domain_and_the_uri() {
    let host = Host::open(URI).expect("opens");
    let error = host.domain_by_name("nope").expect_err("unknown");
    assert!(matches!(error, LibvirtError::NoSuchDomain { .. }));
    assert!(error.to_string().contains("nope"));
    assert!(matches!(
        host.domain_by_name("a\0b"),
        Err(LibvirtError::Nul { .. })
    ));

    let error = Host::open("test:///no/such/file.xml")
        .err()
        .expect("refused");
    assert!(
        error.to_string().contains("test:///no/such/file.xml"),
        "{error}"
    );
    assert!(error.code().is_some());
}

#[tokio::test]
async fn a_migration_that_libvirt_refuses_reports_its_reason() {
    let host = Host::open(URI).expect("opens");
    let uuid = host.domain_by_name("test").expect("there").uuid;
    let options = MigrateOptions {
        destination_uri: "test://nowhere/default".into(),
        migrate_uri: "unix:///nowhere.sock".into(),
        persistent: true,
        ..MigrateOptions::default()
    };
    let migration = Migration::start(URI, uuid, "test", options).expect("starts");
    let error = migration.wait().await.expect_err("the test driver cannot");
    assert!(error.to_string().contains("migrate domain test"), "{error}");
    let abort = |answered| vmgang_libvirt::abort_job(URI, uuid, &AtomicBool::new(answered));
    assert!(abort(false).is_err(), "the test driver has no jobs");
    assert!(abort(true).is_ok(), "nothing is aborted after the answer");
}
