//! What goes wrong in the middle, whom it concerns, and what it leaves behind.

use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use vmgang_engine::{Hold, SourceEvent, SourceSession, Transport};
use vmgang_stream::synthetic::StreamBuilder;

use crate::pair::{ACK, Pair, SOON, event, guest_stream, member_uuid, page, swallow};

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
async fn a_member_that_libvirt_has_not_announced_is_not_connected_to() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let options = pair.options(2, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    // Something listens in the place of its QEMU, as the right user.
    let (impostor, qemu) = (pair.destination_qemu(0), pair.destination_qemu(1));
    *pair.host.announced.lock().unwrap() = Err("not announced".into());
    let mut source = pair.source_qemu(&session, 0).await;
    let _ = source.write_all(&guest_stream(0, 100)).await;
    let failed = event(&mut events, |e| {
        matches!(e, SourceEvent::MemberFailed { .. })
    })
    .await;
    let SourceEvent::MemberFailed { member: 0, error } = failed else {
        panic!("{failed:?}");
    };
    assert!(error.contains("not announced"), "{error}");

    // Another member comes all the same, and is asked about once for all its connections.
    *pair.host.announced.lock().unwrap() = Ok(());
    let mut connections = Vec::new();
    for _ in 0..2 {
        let mut source = pair.source_qemu(&session, 1).await;
        source.write_all(b"QEVM\0\0\0\x03").await.unwrap();
        let accepted = tokio::time::timeout(SOON, qemu.accept()).await;
        connections.push((source, accepted.unwrap().unwrap()));
    }
    let asked = pair.host.asked.lock().unwrap().clone();
    assert_eq!(asked, [member_uuid(0), member_uuid(1)]);
    let nobody = tokio::time::timeout(Duration::ZERO, impostor.accept()).await;
    assert!(nobody.is_err(), "somebody connected: {nobody:?}");
    session.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_before_the_guest_stopped_is_a_failure() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = Hold::Anything;
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
    // What it had not read yet it need not have either.
    assert!(builder.bytes().starts_with(&destination.await.unwrap()));
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
    options.hold = Hold::Anything;
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
    // All of it is read: an ending in order, not a reset by the kernel.
    let sent = StreamBuilder::new(4096).bytes().len();
    connection.read_exact(&mut vec![0; sent]).await.unwrap();
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
