//! Members that are held in unusual ways, and members whose migration begins anew.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmgang_engine::{Hold, SourceEvent, SourceSession, Transport};

use vmgang_stream::synthetic::StreamBuilder;

use crate::pair::{ACK, Pair, SOON, event, guest_stream, page, swallow};

#[tokio::test(flavor = "multi_thread")]
async fn without_an_ack_a_member_is_held_near_the_end_of_its_first_pass() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = Hold::Anything;
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
async fn what_is_held_by_its_ack_alone_passes_without_one() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = Hold::Ack;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let destination = tokio::spawn(async move { swallow(qemu, b"").await });
    let mut source = pair.source_qemu(&session, 0).await;
    let bytes = guest_stream(0, 3000);
    source.write_all(&bytes).await.unwrap();
    source.shutdown().await.unwrap();
    event(&mut events, |told| {
        assert!(!matches!(told, SourceEvent::HeldInFirstPass { .. }));
        matches!(told, SourceEvent::StreamEnded { .. })
    })
    .await;
    assert!(destination.await.unwrap() == bytes);
    session.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_begins_anew_is_held_and_arrives() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut options = pair.options(2, Transport::Plain);
    options.hold = Hold::Anything;
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

/// Nobody says so: QEMU, started by who knows nothing of this session, just connects again.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_begins_anew_begins_its_first_pass_anew() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = Hold::Anything;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let beginning = StreamBuilder::new(16 * 4096);

    // All of its pages go over a second connection, and then it fails.
    let mut main = pair.source_qemu(&session, 0).await;
    main.write_all(beginning.bytes()).await.unwrap();
    let (there, _) = qemu.accept().await.unwrap();
    let mut beside = pair.source_qemu(&session, 0).await;
    let mut pages = StreamBuilder::new(16 * 4096);
    pages.begin_part();
    for index in 0..16 {
        pages.page(index * 4096, &page(index));
    }
    pages.end_ram_section();
    beside.write_all(pages.bytes()).await.unwrap();
    let (mut beside_there, _) = qemu.accept().await.unwrap();
    let mut came = vec![0; pages.bytes().len()];
    beside_there.read_exact(&mut came).await.unwrap();
    drop((main, there, beside, beside_there));
    for _ in 0..2 {
        event(&mut events, |e| {
            matches!(
                e,
                SourceEvent::MemberFailed { .. } | SourceEvent::StreamEnded { .. }
            )
        })
        .await;
    }
    // Its tasks end right after they have said so.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    while events.try_recv().is_ok() {}

    let mut main = pair.source_qemu(&session, 0).await;
    main.write_all(beginning.bytes()).await.unwrap();
    let (mut there, _) = qemu.accept().await.unwrap();
    let mut came = vec![0; beginning.bytes().len()];
    there.read_exact(&mut came).await.unwrap();
    // It has not sent a page yet: it is neither near the end of its first pass, nor is its stream one whose
    // pages go elsewhere.
    let mut first = beginning;
    let from = first.bytes().len();
    first.begin_part().page(0, &page(0)).end_ram_section();
    main.write_all(&first.bytes()[from..]).await.unwrap();
    let mut came = vec![0; first.bytes().len() - from];
    tokio::time::timeout(SOON, there.read_exact(&mut came))
        .await
        .expect("it is read on")
        .unwrap();
    while let Ok(told) = events.try_recv() {
        assert!(!matches!(told, SourceEvent::Unreadable { .. }), "{told:?}");
    }
    session.close().await;
}
