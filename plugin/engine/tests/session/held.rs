//! Members that are held in unusual ways, and members whose migration begins anew.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmgang_engine::{SourceEvent, SourceSession, Transport};

use crate::pair::{ACK, Pair, SOON, event, guest_stream, swallow};

#[tokio::test(flavor = "multi_thread")]
async fn without_an_ack_a_member_is_held_near_the_end_of_its_first_pass() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = true;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let destination = tokio::spawn(async move { swallow(qemu, b"").await });
    let mut source = pair.source_qemu(&session, 0).await;
    let bytes = guest_stream(0, 3000);
    let sent = bytes.clone();
    let writing = tokio::spawn(async move {
        source.write_all(&sent).await.unwrap();
        source.shutdown().await.unwrap();
        let mut rest = Vec::new();
        source.read_to_end(&mut rest).await.unwrap();
    });
    event(&mut events, |e| {
        matches!(
            e,
            SourceEvent::HeldInFirstPass { .. } | SourceEvent::FirstPassDone { .. }
        )
    })
    .await;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let counters = session.counters();
    assert!(!counters.members[0].first_pass_done);
    assert!(
        counters.qemu_stream_bytes > bytes.len() as u64 / 2,
        "it is held late"
    );
    assert!(counters.qemu_stream_bytes < bytes.len() as u64);
    session.release();
    assert!(destination.await.unwrap() == bytes);
    writing.await.unwrap();
    session.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_begins_anew_is_held_and_arrives() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut options = pair.options(2, Transport::Plain);
    options.hold = true;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let bytes = guest_stream(0, 3000);

    let qemu = pair.destination_qemu(0);
    let first = tokio::spawn(async move { swallow(qemu, &ACK).await });
    let mut source = pair.source_qemu(&session, 0).await;
    source.write_all(&bytes[..bytes.len() / 2]).await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::AckWithheld { member: 0 })
    })
    .await;
    drop(source);
    event(&mut events, |e| {
        matches!(e, SourceEvent::MemberFailed { member: 0, .. })
    })
    .await;
    first.await.unwrap();

    session.restart_member(0);
    let socket = Pair::socket(pair.destination_dir.path(), 0);
    std::fs::remove_file(socket).unwrap();
    let qemu = pair.destination_qemu(0);
    let second = tokio::spawn(async move { swallow(qemu, &ACK).await });
    let source = pair.source_qemu(&session, 0).await;
    let (mut reader, mut writer) = source.into_split();
    let (first, last) = bytes.split_at(bytes.len() / 3 * 2);
    writer.write_all(first).await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::AckWithheld { member: 0 })
    })
    .await;
    let mut returned = [0; 4];
    let early = tokio::time::timeout(
        std::time::Duration::from_millis(300),
        reader.read_exact(&mut returned),
    );
    let early = early.await;
    assert!(early.is_err(), "the ACK slipped through: {early:?}");
    session.release();
    tokio::time::timeout(SOON, reader.read_exact(&mut returned))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(returned, ACK);
    writer.write_all(last).await.unwrap();
    writer.shutdown().await.unwrap();
    assert!(second.await.unwrap() == bytes);
    // What had been sent already was not sent again.
    let saved = session.close().await.counters.saved;
    assert!(saved.intra_vm > 2 << 20, "{saved:?}");
}
