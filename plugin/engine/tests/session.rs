//! Whole sessions over loopback TCP, with this test in the place of both QEMUs: byte
//! exactness both ways, the barrier, flow control, and what a failure leaves behind.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use vmgang_engine::{
    Admission, DestinationHost, Listener, MemberOffer, MemberOutcome, Offer, PeerAddress, PeerName,
    SocketOwner, SourceError, SourceEvent, SourceOptions, SourceSession, Techniques, TlsFiles,
    TlsIdentity, Transport,
};
use vmgang_stream::synthetic::StreamBuilder;

const JOB: Uuid = Uuid::from_u128(0xabc);
const ACK: [u8; 4] = [0, 7, 0, 0];
const SOON: Duration = Duration::from_secs(20);

struct Host {
    owner: SocketOwner,
    refuse: Option<String>,
    budget: u64,
    ended: Mutex<Vec<Uuid>>,
    peers: Mutex<Vec<PeerName>>,
}

impl DestinationHost for Host {
    fn admit(&self, offer: &Offer, peer: &PeerName) -> Result<Admission, String> {
        self.peers.lock().unwrap().push(peer.clone());
        match &self.refuse {
            Some(reason) => Err(reason.clone()),
            None => Ok(Admission {
                window_budget_bytes: self.budget.min(offer.window_budget_bytes),
                socket_owner: self.owner,
            }),
        }
    }

    fn outcome(&self, member: Uuid) -> Option<MemberOutcome> {
        (member == member_uuid(0)).then_some(MemberOutcome {
            downtime_ms: Some(42),
            iterations: Some(3),
            memory_bytes: None,
        })
    }

    fn session_ended(&self, job: Uuid) {
        self.ended.lock().unwrap().push(job);
    }
}

fn member_uuid(member: usize) -> Uuid {
    Uuid::from_u128(0x100 + member as u128)
}

fn me() -> SocketOwner {
    use std::os::unix::fs::MetadataExt;
    let here = tempfile::tempdir().unwrap();
    let meta = std::fs::metadata(here.path()).unwrap();
    SocketOwner {
        uid: meta.uid(),
        gid: meta.gid(),
    }
}

/// A listening destination on loopback, and a place for the source's sockets.
struct Pair {
    source_dir: TempDir,
    destination_dir: TempDir,
    port: u16,
    host: Arc<Host>,
    stop: Option<oneshot::Sender<()>>,
}

impl Pair {
    async fn new(transport: Transport, refuse: Option<&str>, budget: u64) -> Self {
        let destination_dir = tempfile::tempdir().unwrap();
        let host = Arc::new(Host {
            owner: me(),
            refuse: refuse.map(str::to_owned),
            budget,
            ended: Mutex::default(),
            peers: Mutex::default(),
        });
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stop, stopped) = oneshot::channel::<()>();
        let (dir, serving) = (destination_dir.path().to_owned(), host.clone());
        tokio::spawn(listener.serve(transport, dir, serving, async {
            let _ = stopped.await;
        }));
        Self {
            source_dir: tempfile::tempdir().unwrap(),
            destination_dir,
            port,
            host,
            stop: Some(stop),
        }
    }

    fn options(&self, members: usize, transport: Transport) -> SourceOptions {
        SourceOptions {
            peer: PeerAddress {
                host: "127.0.0.1".to_owned(),
                port: self.port,
            },
            transport,
            offer: Offer {
                job: JOB,
                gang: "web".to_owned(),
                source_host: "a".to_owned(),
                window_budget_bytes: 64 << 20,
                members: (0..members)
                    .map(|i| MemberOffer {
                        uuid: member_uuid(i),
                        name: format!("g{i}"),
                        memory_bytes: 1 << 20,
                        fixed_owner: None,
                    })
                    .collect(),
            },
            runtime_dir: self.source_dir.path().to_owned(),
            socket_owners: vec![me(); members],
            techniques: Techniques::ALL,
            bandwidth_bytes_per_s: None,
            hold: false,
        }
    }

    fn socket(dir: &Path, member: usize) -> PathBuf {
        dir.join(format!("migrate/{}/{member}/stream.sock", JOB.simple()))
    }

    /// What the destination's libvirt does in Prepare: a QEMU that listens.
    fn destination_qemu(&self, member: usize) -> UnixListener {
        UnixListener::bind(Self::socket(self.destination_dir.path(), member)).unwrap()
    }

    async fn source_qemu(&self, session: &SourceSession, member: usize) -> UnixStream {
        let path = Self::socket(self.source_dir.path(), member);
        assert_eq!(
            session.migrate_uri(member),
            format!("unix://{}", path.display())
        );
        UnixStream::connect(path).await.unwrap()
    }
}

fn page(seed: u64) -> [u8; 4096] {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = [0; 4096];
    for byte in &mut page {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = (state >> 32) as u8;
    }
    page
}

/// A guest of `pages` pages: a third zero, a third the same on all guests, a third its own.
fn guest_stream(member: usize, pages: usize) -> Vec<u8> {
    let first: Vec<_> = (0..pages as u64)
        .map(|i| match i % 3 {
            0 => None,
            1 => Some(page(i)),
            _ => Some(page(i + 1_000_000 * (member as u64 + 1))),
        })
        .collect();
    let dirty: Vec<_> = (0..20.min(pages))
        .map(|i| (i, page(i as u64 + 77)))
        .collect();
    StreamBuilder::migration(&first, &dirty)
}

/// Reads all the stream of one destination QEMU, answering with `reply` at its start.
async fn swallow(listener: UnixListener, reply: &[u8]) -> Vec<u8> {
    let (mut connection, _) = listener.accept().await.unwrap();
    connection.write_all(reply).await.unwrap();
    let mut bytes = Vec::new();
    connection.read_to_end(&mut bytes).await.unwrap();
    bytes
}

async fn event(
    events: &mut mpsc::UnboundedReceiver<SourceEvent>,
    wanted: impl Fn(&SourceEvent) -> bool,
) -> SourceEvent {
    let find = async {
        loop {
            let event = events.recv().await.expect("the session goes on");
            if wanted(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(SOON, find)
        .await
        .expect("the event comes")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_arrives_byte_exact_and_the_books_balance() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let options = pair.options(4, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let mut tasks = Vec::new();
    for member in 0..4 {
        let qemu = pair.destination_qemu(member);
        let destination = tokio::spawn(async move { swallow(qemu, b"\0\x01\0\x04\0\0\0\0").await });
        let source = pair.source_qemu(&session, member).await;
        tasks.push(tokio::spawn(async move {
            let (mut reader, mut writer) = source.into_split();
            let bytes = guest_stream(member, 3000);
            writer.write_all(&bytes).await.unwrap();
            writer.shutdown().await.unwrap();
            let mut returned = Vec::new();
            reader.read_to_end(&mut returned).await.unwrap();
            assert_eq!(returned, b"\0\x01\0\x04\0\0\0\0");
            assert!(
                destination.await.unwrap() == bytes,
                "member {member} differs"
            );
            bytes.len() as u64
        }));
    }
    let mut stream_bytes = 0;
    for task in tasks {
        stream_bytes += task.await.unwrap();
    }
    for _ in 0..4 {
        event(&mut events, |e| {
            matches!(e, SourceEvent::StreamEnded { .. })
        })
        .await;
    }
    let outcome = session.member_outcome(0).await.unwrap().unwrap();
    assert_eq!(outcome.downtime_ms, Some(42));
    assert_eq!(session.member_outcome(1).await.unwrap(), None);
    let counters = session.close().await;
    assert_eq!(counters.qemu_stream_bytes, stream_bytes);
    let saved = counters.saved;
    assert_eq!(
        saved.total(),
        stream_bytes as i64 - counters.wire_bytes as i64
    );
    // Of three guests' shared thirds each page crossed as a reference.
    assert!(saved.cross_vm > 3 * 999 * 4000, "{saved:?}");
    assert!(saved.zero > 0);
    let by_member: u64 = counters.members.iter().map(|m| m.qemu_stream_bytes).sum();
    assert_eq!(by_member, stream_bytes);
    // Nothing is left on either side.
    for dir in [&pair.source_dir, &pair.destination_dir] {
        let left = std::fs::read_dir(dir.path().join("migrate"))
            .unwrap()
            .count();
        assert_eq!(left, 0);
    }
    assert_eq!(*pair.host.ended.lock().unwrap(), [JOB]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ack_waits_for_the_release_and_an_idle_guest_trickles() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = true;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let (to_qemu, mut from_test) = mpsc::unbounded_channel::<()>();
    let destination = tokio::spawn(async move {
        let (mut connection, _) = qemu.accept().await.unwrap();
        connection
            .write_all(&[&ACK[..], b"\0\x02\0\x04\0\0\0\x01"].concat())
            .await
            .unwrap();
        from_test.recv().await;
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).await.unwrap();
        bytes
    });
    let source = pair.source_qemu(&session, 0).await;
    let (mut reader, mut writer) = source.into_split();
    let mut builder = StreamBuilder::new(16 * 4096);
    builder.begin_part();
    for i in 0..16 {
        builder.page(i * 4096, &page(i));
    }
    builder.end_ram_section();
    writer.write_all(builder.bytes()).await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::AckWithheld { .. })
    })
    .await;
    // Idle passes without end, as a held QEMU makes them.
    let mut empty = StreamBuilder::new(16 * 4096);
    let start = empty.bytes().len();
    for _ in 0..100 {
        empty.begin_part().end_ram_section();
    }
    let empty = empty.bytes()[start..].to_vec();
    writer.write_all(&empty).await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::FirstPassDone { .. })
    })
    .await;
    let spin = tokio::spawn(async move {
        let mut sent = 100 * 18u64;
        let until = tokio::time::Instant::now() + Duration::from_secs(1);
        while let Ok(written) = tokio::time::timeout_at(until, writer.write(&empty)).await {
            sent += written.unwrap() as u64;
        }
        (sent, writer)
    });
    let mut first = [0; 1];
    let early = tokio::time::timeout(Duration::from_millis(600), reader.read(&mut first)).await;
    assert!(early.is_err(), "the ACK slipped through");
    let (_, writer) = spin.await.unwrap();
    let held = session.counters().qemu_stream_bytes;
    // Twenty reads a second of 18 bytes, and what came before the hold.
    assert!(
        held < builder.bytes().len() as u64 + 100 * 18 + 40 * 18,
        "{held}"
    );
    session.release();
    let mut returned = [0; 12];
    tokio::time::timeout(SOON, reader.read_exact(&mut returned))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(returned[..4], ACK);
    assert_eq!(returned[4..], *b"\0\x02\0\x04\0\0\0\x01");
    to_qemu.send(()).unwrap();
    drop(writer);
    drop(reader);
    destination.await.unwrap();
    session.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_does_not_read_stops_only_its_own_channel() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let options = pair.options(2, Transport::Plain);
    let (session, _events) = SourceSession::connect(options).await.unwrap();
    let stuck = pair.destination_qemu(0);
    let healthy = pair.destination_qemu(1);
    let mut stuck_source = pair.source_qemu(&session, 0).await;
    let (_stuck_connection, _) = stuck.accept().await.unwrap();
    let stuck_stream = guest_stream(0, 20_000);
    let total = stuck_stream.len() as u64;
    let writer = tokio::spawn(async move { stuck_source.write_all(&stuck_stream).await });
    tokio::time::sleep(Duration::from_millis(500)).await;

    let destination = tokio::spawn(async move { swallow(healthy, b"").await });
    let mut source = pair.source_qemu(&session, 1).await;
    let bytes = guest_stream(1, 20_000);
    source.write_all(&bytes).await.unwrap();
    source.shutdown().await.unwrap();
    let arrived = tokio::time::timeout(SOON, destination)
        .await
        .expect("not blocked")
        .unwrap();
    assert!(arrived == bytes);
    // And the stuck one is bounded by its credit and the kernel's socket buffer.
    let taken = session.counters().members[0].qemu_stream_bytes;
    assert!(
        taken <= (8 << 20) + (512 << 10) && taken < total,
        "{taken} of {total}"
    );
    writer.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vanished_peer_closes_every_connection_and_leaves_nothing() {
    let mut pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let options = pair.options(1, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let mut source = pair.source_qemu(&session, 0).await;
    source.write_all(b"QEVM\0\0\0\x03").await.unwrap();
    let (mut connection, _) = qemu.accept().await.unwrap();
    pair.stop.take().unwrap().send(()).unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::SessionFailed { .. })
    })
    .await;
    // Both QEMUs see the end: the source goes on, the destination gives up.
    let mut rest = Vec::new();
    for _ in 0..2 {
        let read = if rest.is_empty() {
            source.read(&mut [0; 64]).await
        } else {
            Ok(0)
        };
        assert!(matches!(read, Ok(0) | Err(_)));
        rest.push(0);
    }
    let mut arrived = Vec::new();
    let _ = connection.read_to_end(&mut arrived).await;
    drop(session);
    assert!(!Pair::socket(pair.destination_dir.path(), 0).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_qemu_that_dies_fails_only_its_member() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let options = pair.options(2, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let (dying, healthy) = (pair.destination_qemu(0), pair.destination_qemu(1));
    let mut dying_source = pair.source_qemu(&session, 0).await;
    let (connection, _) = dying.accept().await.unwrap();
    drop(connection);
    let writer = tokio::spawn(async move {
        let bytes = guest_stream(0, 20_000);
        let written = dying_source.write_all(&bytes).await;
        // The source QEMU learns it from its socket.
        assert!(written.is_err() || matches!(dying_source.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    });
    let failed = event(&mut events, |e| {
        matches!(e, SourceEvent::MemberFailed { .. })
    })
    .await;
    assert!(
        matches!(failed, SourceEvent::MemberFailed { member: 0, .. }),
        "{failed:?}"
    );
    writer.await.unwrap();

    let destination = tokio::spawn(async move { swallow(healthy, b"").await });
    let mut source = pair.source_qemu(&session, 1).await;
    let bytes = guest_stream(1, 500);
    source.write_all(&bytes).await.unwrap();
    source.shutdown().await.unwrap();
    assert!(
        tokio::time::timeout(SOON, destination)
            .await
            .unwrap()
            .unwrap()
            == bytes
    );
    session.close().await;
}

/// `virsh domjobabort` on a member: its QEMU simply closes. That must not look like a member
/// that is done, or the barrier would let the others go.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_before_the_guest_stopped_is_a_failure() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = true;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let destination = tokio::spawn(async move { swallow(qemu, &ACK).await });
    let mut source = pair.source_qemu(&session, 0).await;
    let mut builder = StreamBuilder::new(4 * 4096);
    builder.begin_part().page(0, &page(1)).end_ram_section();
    source.write_all(builder.bytes()).await.unwrap();
    drop(source);
    let end = event(&mut events, |e| {
        matches!(
            e,
            SourceEvent::StreamEnded { .. } | SourceEvent::MemberFailed { .. }
        )
    })
    .await;
    assert!(
        matches!(end, SourceEvent::MemberFailed { member: 0, .. }),
        "{end:?}"
    );
    assert!(destination.await.unwrap() == builder.bytes());
    session.close().await;
}

/// libvirtd connects and QEMU then refuses to migrate: not one byte comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_a_stream_is_a_failure() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let options = pair.options(1, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let _qemu = pair.destination_qemu(0);
    drop(pair.source_qemu(&session, 0).await);
    let end = event(&mut events, |e| {
        matches!(
            e,
            SourceEvent::StreamEnded { .. } | SourceEvent::MemberFailed { .. }
        )
    })
    .await;
    assert!(matches!(end, SourceEvent::MemberFailed { .. }), "{end:?}");
}

/// While its ACK is withheld a member has nothing to say; its destination's end is news.
#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_quits_while_held_is_a_failure_at_once() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = true;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let mut source = pair.source_qemu(&session, 0).await;
    source
        .write_all(StreamBuilder::new(4096).bytes())
        .await
        .unwrap();
    let (mut connection, _) = qemu.accept().await.unwrap();
    connection.write_all(&ACK).await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::AckWithheld { .. })
    })
    .await;
    drop(connection);
    event(&mut events, |e| {
        matches!(e, SourceEvent::MemberFailed { .. })
    })
    .await;
    // The ACK of the dead destination never reached the source.
    let mut rest = Vec::new();
    let _ = source.read_to_end(&mut rest).await;
    assert!(rest.is_empty(), "{rest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_understood_is_reported_and_passes() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let options = pair.options(1, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let destination = tokio::spawn(async move { swallow(qemu, b"").await });
    let mut source = pair.source_qemu(&session, 0).await;
    let bytes = [b"NEWFORMAT".repeat(1000), vec![9; 50_000]].concat();
    source.write_all(&bytes).await.unwrap();
    source.shutdown().await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::Unreadable { member: 0 })
    })
    .await;
    event(&mut events, |e| {
        matches!(e, SourceEvent::StreamEnded { member: 0 })
    })
    .await;
    assert!(destination.await.unwrap() == bytes);
    session.close().await;
}

/// A guest that has broken out of its QEMU could link to another socket, for root to talk to.
#[tokio::test(flavor = "multi_thread")]
async fn the_destination_follows_no_link() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let options = pair.options(1, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let elsewhere = pair.destination_dir.path().join("libvirt-sock");
    let libvirt = UnixListener::bind(&elsewhere).unwrap();
    let link = Pair::socket(pair.destination_dir.path(), 0);
    std::os::unix::fs::symlink(&elsewhere, link).unwrap();
    let _source = pair.source_qemu(&session, 0).await;
    event(&mut events, |e| {
        matches!(e, SourceEvent::MemberFailed { .. })
    })
    .await;
    let accepted = tokio::time::timeout(Duration::from_millis(100), libvirt.accept()).await;
    assert!(accepted.is_err(), "somebody connected to it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_the_user_as_it_was_written() {
    let pair = Pair::new(Transport::Plain, Some("only 3 MiB are free here"), 1).await;
    let refused = SourceSession::connect(pair.options(1, Transport::Plain))
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("only 3 MiB are free here"),
        "{refused}"
    );
    assert!(
        !pair
            .source_dir
            .path()
            .join("migrate")
            .join(JOB.simple().to_string())
            .exists()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_peers_and_other_versions_are_named() {
    let pair = Pair::new(Transport::Plain, None, 1).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut options = pair.options(1, Transport::Plain);
    options.peer.port = closed.local_addr().unwrap().port();
    drop(closed);
    let error = SourceSession::connect(options).await.unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");

    // A peer of version 9 refuses in its own words; ours names both versions.
    for answer in [
        "vmga\x09\x03\0\0\0\0\0\0\x05\0\0\0\x01\0\x01\x009",
        "HTTP/1.1 400 Bad Request\r\n",
    ] {
        let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut options = pair.options(1, Transport::Plain);
        options.peer.port = other.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut peer, _) = other.accept().await.unwrap();
            peer.write_all(answer.as_bytes()).await.unwrap();
            let _ = peer.read(&mut [0; 4096]).await;
        });
        let error = SourceSession::connect(options).await.unwrap_err();
        match answer.starts_with("vmga") {
            true => assert!(
                matches!(error, SourceError::VersionMismatch { .. }),
                "{error}"
            ),
            false => assert!(matches!(error, SourceError::Protocol { .. }), "{error}"),
        }
    }
    // And a destination of ours answers a source of another version with a refusal.
    let mut source = tokio::net::TcpStream::connect(("127.0.0.1", pair.port))
        .await
        .unwrap();
    source
        .write_all(b"vmga\x09\x01\0\0\0\0\0\0\0\0\0\0")
        .await
        .unwrap();
    let mut answer = Vec::new();
    source.read_to_end(&mut answer).await.unwrap();
    assert_eq!(&answer[..6], b"vmga\x01\x03");
}

/// A certificate authority and a host certificate of it, as files.
fn identity(ca: &rcgen::CertifiedIssuer<'_, rcgen::KeyPair>, name: &str) -> Arc<TlsIdentity> {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    let certificate = params.signed_by(&key, ca).unwrap();
    let file = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (cert, key) = (
        file("cert.pem", certificate.pem()),
        file("key.pem", key.serialize_pem()),
    );
    TlsIdentity::load(&TlsFiles {
        ca: file("ca.pem", ca.pem()),
        server_certificate: cert.clone(),
        server_key: key.clone(),
        client_certificate: cert,
        client_key: key,
    })
    .unwrap()
}

fn authority() -> rcgen::CertifiedIssuer<'static, rcgen::KeyPair> {
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_lets_in_whom_the_authority_signed_and_nobody_else() {
    let (ours, theirs) = (authority(), authority());
    let server = Transport::Tls(identity(&ours, "localhost"));
    let pair = Pair::new(server, None, 1 << 20).await;
    let connect = |transport, host: &str| {
        let mut options = pair.options(1, transport);
        options.peer.host = host.to_owned();
        SourceSession::connect(options)
    };
    let good = Transport::Tls(identity(&ours, "source.example"));
    let (session, _) = connect(good.clone(), "localhost").await.unwrap();
    session.close().await;
    assert_eq!(
        pair.host.peers.lock().unwrap()[0].certificate_names,
        ["source.example"]
    );

    let wrong_name = connect(good, "127.0.0.1").await.unwrap_err();
    assert!(
        matches!(wrong_name, SourceError::Tls { .. }),
        "{wrong_name}"
    );
    let stranger = Transport::Tls(identity(&theirs, "source.example"));
    let error = connect(stranger, "localhost").await.unwrap_err();
    assert!(matches!(error, SourceError::Tls { .. }), "{error}");
    let plain = connect(Transport::Plain, "localhost").await.unwrap_err();
    assert!(
        matches!(
            plain,
            SourceError::Protocol { .. } | SourceError::Unreachable { .. }
        ),
        "{plain}"
    );
    assert_eq!(pair.host.peers.lock().unwrap().len(), 1);
}
