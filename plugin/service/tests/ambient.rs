//! Ambient mode with these tests in the place of all QEMUs: who may connect, and what is said of guests when a
//! session ends in another way than by itself.

#[allow(dead_code, reason = "each test binary uses a part")]
mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use common::{Fake, Peer, Rig, Script};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use vmgang_service::ambient;
use vmgang_service::announcements::Announcements;
use vmgang_service::config::AmbientConfig;
use vmgang_service::job::{Control, Job, MemberState};
use vmgang_service::report::{DomainOutcome, JobState, Report};

/// The beginning of QEMU's stream, and what its destination says when it has all of it.
const BEGINNING: &[u8] = b"QEVM\0\0\0\x03";
const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
const SOON: Duration = Duration::from_secs(10);

/// Waits for what is bound to happen.
async fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let waiting = Instant::now();
    while !happened() {
        assert!(waiting.elapsed() < SOON, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn socket(directory: &tempfile::TempDir, name: &str) -> PathBuf {
    let there = directory.path().join("to").join("127.0.0.1");
    there.join(format!("{name}.sock"))
}

/// A host in ambient mode, for a peer on that port.
async fn host(fake: Fake, port: u16) -> Rig {
    lingering(fake, port, 60).await
}

/// The same, whose sessions wait so long for the next migration.
async fn lingering(fake: Fake, port: u16, linger_s: u64) -> Rig {
    let names: Vec<String> = fake.active_names();
    let rig = Rig::new(fake).await;
    let config = AmbientConfig {
        peers: vec![format!("127.0.0.1:{port}").parse().expect("an address")],
        names: vec!["a".into()],
        linger_s,
    };
    let announcements = Arc::new(Announcements::none());
    tokio::spawn(ambient::run(config, rig.coordinator.clone(), announcements));
    for name in &names {
        let socket = socket(&rig.state_dir, name);
        until("its socket is there", || socket.exists()).await;
    }
    rig
}

/// What its source QEMU does when a client has asked for a migration.
async fn connect(host: &Rig, name: &str) -> UnixStream {
    let socket = socket(&host.state_dir, name);
    UnixStream::connect(socket).await.expect("connects")
}

/// Its end, or that of its return path.
async fn hung_up(connection: &mut UnixStream) {
    let read = tokio::time::timeout(SOON, connection.read(&mut [0; 64])).await;
    let read = read.expect("it is hung up on");
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

/// A guest under way, with both its QEMUs.
async fn migrate(host: &Rig, peer: &Peer, name: &str) -> (UnixStream, UnixStream) {
    let socket = socket(&peer.runtime_dir, name);
    std::fs::create_dir_all(socket.parent().expect("a directory")).expect("made");
    let listener = UnixListener::bind(socket).expect("listens");
    let mut source = connect(host, name).await;
    source.write_all(BEGINNING).await.expect("written");
    let accepted = tokio::time::timeout(SOON, listener.accept()).await;
    let (mut there, _) = accepted.expect("comes").expect("accepted");
    let mut begun = [0; BEGINNING.len()];
    there.read_exact(&mut begun).await.expect("read");
    (source, there)
}

fn only_job(host: &Rig) -> Arc<Job> {
    let jobs = host.coordinator.jobs();
    assert_eq!(jobs.len(), 1);
    jobs[0].clone()
}

async fn report(job: &Job) -> Report {
    until("the job ends", || job.state().ended()).await;
    job.view().report.expect("a report")
}

fn everybody_migrates(names: &[&str]) -> Fake {
    let scripts: Vec<_> = names.iter().map(|name| (*name, Script::Good)).collect();
    let fake = Fake::new(&scripts);
    let mut migrate = fake.others_migrate.lock().expect("lock");
    migrate.extend(names.iter().map(|name| (*name).to_owned()));
    drop(migrate);
    fake
}

#[tokio::test]
async fn who_has_arrived_and_runs_here_is_not_said_to_have_migrated() {
    let peer = Peer::listen(None).await;
    let fake = everybody_migrates(&["left", "lied", "under-way"]);
    let host = host(fake, peer.port).await;
    let mut connections = Vec::new();
    for name in ["left", "lied", "under-way"] {
        connections.push(migrate(&host, &peer, name).await);
    }
    let job = only_job(&host);
    for (_, there) in &mut connections[..2] {
        there.write_all(&SHUT).await.expect("said");
    }
    let arrived = |it: &vmgang_service::job::MemberView| it.state == MemberState::Migrated;
    until("two have arrived", || {
        job.view().members.iter().filter(|it| arrived(it)).count() == 2
    })
    .await;
    // One leaves, and is back before the session ends.
    host.fake.change("left", |domain| domain.id = None);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    host.fake.change("left", |domain| domain.id = Some(2));
    job.control(Control::Abort).expect("runs");

    let report = report(&job).await;
    assert_eq!(report.state, JobState::Partial, "{report:?}");
    let told = |name: &str| {
        let domain = report.domains.iter().find(|it| it.name == name);
        let domain = domain.expect("told of").clone();
        (domain.state, domain.error)
    };
    assert_eq!(told("left"), (DomainOutcome::Migrated, None));
    assert_eq!(told("under-way"), (DomainOutcome::Source, None));
    let (state, error) = told("lied");
    assert_eq!(state, DomainOutcome::Source);
    assert!(error.is_some_and(|it| it.contains("runs on this host")));
}

#[tokio::test]
async fn an_aborted_session_is_left_before_libvirt_is_asked() {
    let peer = Peer::listen(None).await;
    let mut fake = everybody_migrates(&["one", "two"]);
    fake.domain_delay = Duration::from_secs(2);
    let host = host(fake, peer.port).await;
    let (mut one, _there) = migrate(&host, &peer, "one").await;
    let job = only_job(&host);
    let asked = Instant::now();
    job.control(Control::Abort).expect("runs");
    hung_up(&mut one).await;
    // Who comes now has a session of its own.
    let (_two, _there) = migrate(&host, &peer, "two").await;
    assert!(
        asked.elapsed() < Duration::from_millis(1500),
        "it waited for libvirt"
    );
    assert_eq!(host.coordinator.jobs().len(), 2);
    let report = report(&job).await;
    assert_eq!(report.state, JobState::Aborted, "{report:?}");
    assert_eq!(report.domains.len(), 1, "{report:?}");
}

#[tokio::test]
async fn only_who_libvirt_migrates_gets_through() {
    let peer = Peer::listen(None).await;
    // One of them is only saved to a file.
    let fake = Fake::new(&[("one", Script::Good), ("saved", Script::BeingSaved)]);
    let host = host(fake, peer.port).await;
    for name in ["one", "saved"] {
        hung_up(&mut connect(&host, name).await).await;
    }
    assert!(host.coordinator.jobs().is_empty(), "a session was opened");
    let migrate_it = |name: &str| {
        let mut others = host.fake.others_migrate.lock().expect("lock");
        others.push(name.into());
    };
    migrate_it("one");
    migrate(&host, &peer, "one").await;
}

#[tokio::test]
async fn a_peer_that_does_not_answer_is_tried_once_for_all_who_wait() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let port = silent.local_addr().expect("an address").port();
    let tried = Arc::new(AtomicUsize::new(0));
    let counted = tried.clone();
    tokio::spawn(async move {
        loop {
            let connection = silent.accept().await;
            counted.fetch_add(1, SeqCst);
            tokio::time::sleep(Duration::from_millis(500)).await;
            drop(connection);
        }
    });
    let names = ["one", "two", "three"];
    let host = host(everybody_migrates(&names), port).await;
    let mut waiting = Vec::new();
    for name in names {
        waiting.push(connect(&host, name).await);
    }
    for connection in &mut waiting {
        hung_up(connection).await;
    }
    assert_eq!(tried.load(SeqCst), 1);
    // It is not remembered for long.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    hung_up(&mut connect(&host, "one").await).await;
    assert_eq!(tried.load(SeqCst), 2);
}

/// Carries connections to a port, or lets them hang.
async fn relay(port: u16, hang: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
    let own = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            let hangs = hang.load(SeqCst);
            tokio::spawn(async move {
                if hangs {
                    std::future::pending::<()>().await;
                }
                let mut to = TcpStream::connect(("127.0.0.1", port))
                    .await
                    .expect("connects");
                let _ = copy_bidirectional(&mut from, &mut to).await;
            });
        }
    });
    own
}

#[tokio::test]
async fn a_session_ends_while_another_one_is_being_opened() {
    let peer = Peer::listen(None).await;
    let hang = Arc::new(AtomicBool::new(false));
    let port = relay(peer.port, hang.clone()).await;
    let fake = everybody_migrates(&["one", "late"]);
    let host = lingering(fake, port, 1).await;
    // It does not run when the session begins.
    host.fake.change("late", |domain| domain.id = None);
    let (one, there) = migrate(&host, &peer, "one").await;
    let job = only_job(&host);
    host.fake.change("late", |domain| domain.id = Some(2));
    hang.store(true, SeqCst);
    let _late = connect(&host, "late").await;
    drop((one, there));
    // Long enough for a look at whether anybody may still come.
    tokio::time::sleep(Duration::from_secs(2)).await;
    job.control(Control::Abort).expect("runs");
    let asked = Instant::now();
    report(&job).await;
    assert!(
        asked.elapsed() < Duration::from_millis(1500),
        "it waited for the other"
    );
}
