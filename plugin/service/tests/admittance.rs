//! What a destination promises to the jobs of other hosts: memory once, and none that is there.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use common::{Fake, domain, knowledge};
use uuid::Uuid;
use vmgang_engine::{DestinationHost, MemberOffer, Offer, PeerName, Purpose, Transport};
use vmgang_hook::{Announcement, Event, Expected, is_expected};
use vmgang_libvirt::DomainState;
use vmgang_service::announcements::Announcements;
use vmgang_service::config::WindowBudget;
use vmgang_service::peers::{Admittance, Peers};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A host with so much memory available, whatever happens.
fn host(fake: &Fake, available_bytes: u64) -> Admittance {
    let (_, stages, contents) = knowledge(fake);
    Admittance {
        ambient_names: None,
        coordinator: None,
        stages,
        contents,
        page_key: Box::new(|| Some(Transport::Plain.page_key())),
        hypervisor: Arc::new(fake.clone()),
        peers: Arc::new(Peers::default()),
        access: Arc::default(),
        libvirt_sockets: Vec::new(),
        window_budget: WindowBudget::Auto,
        connections: std::num::NonZeroUsize::MIN,
        available_memory: Box::new(move || Ok(available_bytes)),
        sessions: Mutex::new(BTreeMap::new()),
        announcements: Arc::new(Announcements::none()),
        expected: None,
    }
}

/// A job of one guest.
fn offer(guest_bytes: u64) -> Offer {
    Offer {
        job: Uuid::new_v4(),
        gang: String::new(),
        source_host: "a".into(),
        window_budget_bytes: 64 * GIB,
        members: vec![MemberOffer {
            uuid: Uuid::new_v4(),
            name: "vm".into(),
            memory_bytes: guest_bytes,
            fixed_owner: None,
        }],
    }
}

fn admit(host: &Admittance, offer: &Offer) -> Result<u64, String> {
    admit_for(host, offer, Purpose::Migrate { stage: None })
}

fn admit_for(host: &Admittance, offer: &Offer, purpose: Purpose) -> Result<u64, String> {
    let peer = PeerName {
        address: "10.0.0.1:5000".parse().expect("an address"),
        certificate_names: Vec::new(),
    };
    host.admit(offer, purpose, &peer)
        .map(|a| a.window_budget_bytes)
}

#[test]
fn an_ambient_session_comes_under_this_hosts_name_and_brings_no_memory() {
    let mut host = host(&Fake::new(&[]), 4 * GIB);
    let mut offer = offer(64 * GIB);
    offer.gang = "b".into();
    let off = admit_for(&host, &offer, Purpose::Ambient).expect_err("it is off");
    assert!(off.contains("[ambient]"), "{off}");
    host.ambient_names = Some(vec!["b.example.org".into()]);
    let other = admit_for(&host, &offer, Purpose::Ambient).expect_err("another name");
    assert!(other.contains("b.example.org"), "{other}");
    host.ambient_names = Some(vec!["b.example.org".into(), "b".into()]);
    assert_eq!(admit_for(&host, &offer, Purpose::Ambient), Ok(GIB));
    // As a job the guest would not fit.
    offer.job = Uuid::new_v4();
    let job = admit(&host, &offer).expect_err("too much memory");
    assert!(job.contains("free memory there"), "{job}");
}

#[test]
fn memory_is_promised_once() {
    let host = host(&Fake::new(&[]), 4 * GIB);
    let first = offer(5 * GIB / 2);
    // A quarter of the 1.5 GiB that are left.
    assert_eq!(admit(&host, &first), Ok(384 * MIB));
    let error = admit(&host, &first).expect_err("the same job twice");
    assert!(error.contains("already"), "{error}");
    let second = offer(3 * GIB / 2);
    let error = admit(&host, &second).expect_err("promised to the first");
    assert!(error.contains("need 2944 MiB"), "{error}");
    host.session_ended(first.job);
    assert_eq!(admit(&host, &second), Ok(640 * MIB));
}

#[test]
fn the_next_job_gets_a_smaller_window_before_it_is_refused() {
    let host = host(&Fake::new(&[]), 4 * GIB);
    assert_eq!(admit(&host, &offer(GIB)), Ok(768 * MIB));
    assert_eq!(admit(&host, &offer(GIB)), Ok(320 * MIB));
    assert_eq!(admit(&host, &offer(832 * MIB)), Ok(64 * MIB));
    let error = admit(&host, &offer(GIB)).expect_err("too little is left");
    assert!(error.contains("other jobs"), "{error}");
}

#[test]
fn a_guest_that_has_arrived_is_not_counted_twice() {
    let fake = Fake::new(&[]);
    let host = host(&fake, 4 * GIB);
    let first = offer(5 * GIB / 2);
    let mut guest = domain("vm", true);
    guest.uuid = first.members[0].uuid;
    guest.state = DomainState::Paused;
    assert_eq!(admit(&host, &first), Ok(384 * MIB));
    fake.push(guest.clone());
    let second = offer(3 * GIB / 2);
    let refused = admit(&host, &second);
    assert!(refused.is_err(), "still arriving: {refused:?}");
    guest.state = DomainState::Running;
    fake.push(guest);
    // 4 GiB less the first one's window and its own guest, a quarter.
    assert_eq!(admit(&host, &second), Ok((2560 - 384) * MIB / 4));
}

#[test]
fn a_stage_takes_its_window_and_its_migration_takes_that_over() {
    let host = host(&Fake::new(&[]), 4 * GIB);
    let mut gang = offer(GIB);
    gang.gang = "web".into();
    let mut stage = gang.clone();
    stage.job = Uuid::new_v4();
    let window = admit_for(&host, &stage, Purpose::Stage { seconds: 60 });
    assert_eq!(window, Ok(768 * MIB));
    let shown = host.stages.list();
    assert_eq!(
        (shown.len(), shown[0].outgoing, shown[0].gang.as_str()),
        (1, false, "web")
    );
    host.staged(stage.job, 7, 2);
    assert_eq!(
        (host.stages.list()[0].contents, host.stages.list()[0].found),
        (7, 2)
    );
    // Its guests do not come yet: another gang gets more than if they did.
    let other = offer(GIB);
    assert_eq!(admit(&host, &other), Ok(576 * MIB));
    host.session_ended(other.job);

    // The migration asks for what the stage has got, and gets that, neither more nor less.
    gang.window_budget_bytes = 768 * MIB;
    let taking = Purpose::Migrate {
        stage: Some(stage.job),
    };
    assert_eq!(admit_for(&host, &gang, taking), Ok(768 * MIB));
    host.session_ended(stage.job);
    assert!(host.stages.list().is_empty());
    // Its guests count now, and the window once.
    let error = admit(&host, &offer(9 * GIB / 4)).expect_err("1792 MiB are promised");
    assert!(error.contains("need 1792 MiB"), "{error}");
}

#[tokio::test]
async fn only_who_libvirt_has_announced_is_taken_in() {
    let place = tempfile::tempdir().expect("a directory");
    let path = vmgang_hook::socket_path(place.path());
    let fake = Fake::new(&[]);
    let mut host = host(&fake, 4 * GIB);
    host.announcements = Arc::new(Announcements::listen(&path, |_| {}).expect("listens"));
    host.expected = Some(Expected::open(place.path()).expect("opens"));
    let gang = offer(GIB);
    let member = gang.members[0].uuid;
    admit(&host, &gang).expect("admitted");
    assert!(is_expected(place.path(), member), "the hook can see it");

    let refused = host.announced(member).expect_err("nobody has said a word");
    assert!(refused.contains("announced"), "{refused}");
    let say = |event| {
        let told = Announcement {
            event,
            uuid: member,
            name: "vm".into(),
        };
        let hook = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
        hook.send_to(&told.to_bytes(), &path).expect("sends");
    };
    say(Event::Incoming);
    assert_eq!(host.announced(member), Ok(()));
    say(Event::Stopped);
    host.announced(member)
        .expect_err("its migration has failed");

    // The hook's word was lost: libvirt knows.
    let mut guest = domain("vm", true);
    (guest.uuid, guest.id, guest.state) = (member, Some(7), DomainState::Paused);
    fake.push(guest);
    assert_eq!(host.announced(member), Ok(()));
    let mut defined = domain("defined", true);
    (defined.id, defined.state) = (None, DomainState::ShutOff);
    fake.push(defined.clone());
    host.announced(defined.uuid).expect_err("not active here");

    say(Event::Incoming);
    host.session_ended(gang.job);
    assert!(!is_expected(place.path(), member));
    // A stage brings nobody.
    let mut stage = offer(GIB);
    stage.gang = "web".into();
    admit_for(&host, &stage, Purpose::Stage { seconds: 60 }).expect("admitted");
    assert!(!is_expected(place.path(), stage.members[0].uuid));
}
