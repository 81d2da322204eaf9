//! What goes right: byte exactness both ways, the books, the barrier, flow control.

use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use vmgang_engine::{Hold, SourceEvent, SourceSession, Transport};
use vmgang_stream::synthetic::{MultifdBuilder, StreamBuilder};

use crate::pair::{ACK, JOB, Pair, SOON, event, guest_stream, page, swallow};

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
    let counters = session.close().await.counters;
    assert_eq!(counters.qemu_stream_bytes, stream_bytes);
    let saved = counters.saved;
    assert_eq!(
        saved.total(),
        stream_bytes as i64 - counters.wire_bytes as i64
    );
    // Of three guests' shared thirds each page crossed as a reference.
    assert!(saved.cross_vm > 3 * 899 * 4000, "{saved:?}");
    let pages = &counters.shared_pages;
    let members = counters.members.len();
    let others = |row: usize| (0..members).filter(move |column| *column != row);
    let from_others: u64 = (0..members)
        .flat_map(|row| others(row).map(move |column| pages[row][column]))
        .sum();
    assert!(from_others > 3 * 899, "{pages:?}");
    assert!(saved.zero > 0);
    assert!(saved.uniform >= 4 * 100 * 4000, "{saved:?}");
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
    options.hold = Hold::Anything;
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
async fn a_guest_that_dirties_a_page_now_and_then_trickles_and_its_pages_do_not() {
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let mut options = pair.options(1, Transport::Plain);
    options.hold = Hold::Anything;
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let destination = tokio::spawn(async move {
        let (mut main, _) = qemu.accept().await.unwrap();
        main.write_all(&ACK).await.unwrap();
        let (mut pages, _) = qemu.accept().await.unwrap();
        let (mut from_main, mut from_pages) = (Vec::new(), Vec::new());
        let (main, pages) = tokio::join!(
            main.read_to_end(&mut from_main),
            pages.read_to_end(&mut from_pages)
        );
        (main.unwrap(), pages.unwrap())
    });
    let (main_reader, mut main) = pair.source_qemu(&session, 0).await.into_split();
    let mut builder = StreamBuilder::new(16 * 4096);
    builder.raw(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    builder.multifd_flush().end_ram_section();
    let start = builder.bytes().len();
    builder.begin_part().multifd_flush().end_ram_section();
    let pass = builder.bytes()[start..].to_vec();
    builder.begin_part().multifd_flush().end_ram_section();
    main.write_all(builder.bytes()).await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::AckWithheld { .. })
    })
    .await;
    let (pages_reader, mut pages) = pair.source_qemu(&session, 0).await.into_split();
    event(&mut events, |e| {
        matches!(e, SourceEvent::FirstPassDone { .. })
    })
    .await;
    let until = tokio::time::Instant::now() + Duration::from_secs(1);
    let passes = pass.repeat(100);
    let spin = tokio::spawn(async move {
        while let Ok(written) = tokio::time::timeout_at(until, main.write(&passes)).await {
            written.unwrap();
        }
        main
    });
    let dirty = tokio::spawn(async move {
        let mut builder = MultifdBuilder::new(0);
        let mut sent = 0;
        for i in 0.. {
            builder.packet(&[(i % 16 * 4096, page(i))], &[]);
            pages.write_all(&builder.bytes()[sent..]).await.unwrap();
            sent = builder.bytes().len();
            tokio::time::sleep(Duration::from_millis(5)).await;
            if tokio::time::Instant::now() > until {
                break;
            }
        }
        (sent as u64, pages)
    });
    let main = spin.await.unwrap();
    let (dirtied, pages) = dirty.await.unwrap();
    let held = session.counters().qemu_stream_bytes;
    // All pages, but for what is on its way; of the passes twenty reads of 18 bytes a second, and what
    // came before the hold.
    assert!(held > dirtied * 3 / 4, "{held} of {dirtied}");
    let passes = held.saturating_sub(dirtied);
    assert!(
        passes < builder.bytes().len() as u64 + 100 * pass.len() as u64 + 40 * 18,
        "{passes}"
    );
    session.release();
    drop((main, main_reader, pages, pages_reader));
    let (from_main, from_pages) = destination.await.unwrap();
    // Nothing was lost on the way.
    assert!(from_main > 0 && from_pages as u64 == dirtied);
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
        taken <= (8 << 20) + (1 << 20) && taken < total,
        "{taken} of {total}"
    );
    writer.abort();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_understood_any_more_after_its_first_pass_is_reported() {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let options = pair.options(1, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let qemu = pair.destination_qemu(0);
    let destination = tokio::spawn(async move { swallow(qemu, b"").await });
    let mut source = pair.source_qemu(&session, 0).await;
    let mut stream = StreamBuilder::new(16 * 4096);
    stream.begin_part();
    for index in 0..16 {
        stream.page(index * 4096, &page(index));
    }
    stream.end_ram_section().begin_part().end_ram_section();
    source.write_all(stream.bytes()).await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::FirstPassDone { member: 0 })
    })
    .await;
    source.write_all(&b"NEWFORMAT".repeat(1000)).await.unwrap();
    event(&mut events, |e| {
        matches!(e, SourceEvent::Unreadable { member: 0 })
    })
    .await;
    source.shutdown().await.unwrap();
    // Nor is it known whether its guest had stopped: it may end.
    event(&mut events, |e| {
        matches!(e, SourceEvent::StreamEnded { member: 0 })
    })
    .await;
    destination.await.unwrap();
    session.close().await;
}

/// Two members with a main connection and two of pages each, of the same pages but for a few.
#[tokio::test(flavor = "multi_thread")]
async fn multifd_pages_are_shared_across_connections_and_members() {
    const PAGES: u64 = 2000;
    let pair = Pair::new(Transport::Plain, None, 64 << 20).await;
    let options = pair.options(2, Transport::Plain);
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let mut main = StreamBuilder::new(PAGES * 4096);
    main.raw(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    main.multifd_flush().end_ram_section();
    for _ in 0..50 {
        main.begin_part().end_ram_section();
    }
    main.begin_part().multifd_flush().end_ram_section();
    main.begin_part().multifd_flush().end_ram_section();
    main.switchover_start().begin_end().end_ram_section();
    let main = main.bytes().to_vec();
    let channel = |member: u64, channel: u8| {
        let mut builder = MultifdBuilder::new(channel);
        for packet in 0..PAGES / 100 {
            if packet % 2 != u64::from(channel) {
                continue;
            }
            let first = packet * 100;
            // A tenth is each member's own.
            let own = |i: u64| {
                if i.is_multiple_of(10) {
                    1_000_000 * (member + 1)
                } else {
                    0
                }
            };
            let pages: Vec<_> = (first..first + 100)
                .map(|i| (i * 4096, page(i + own(i))))
                .collect();
            let zeros: Vec<u64> = (0..28).map(|i| (PAGES + first + i) * 4096).collect();
            builder.packet(&pages, &zeros);
        }
        builder.sync().bytes().to_vec()
    };
    let mut stream_bytes = 0;
    for member in 0..2 {
        let streams = [main.clone(), channel(member, 0), channel(member, 1)];
        stream_bytes += streams.iter().map(Vec::len).sum::<usize>();
        let qemu = pair.destination_qemu(member as usize);
        let wanted = streams.clone();
        let destination = tokio::spawn(async move {
            // In the order in which the source has connected.
            for bytes in wanted {
                let (mut connection, _) = qemu.accept().await.unwrap();
                let mut arrived = Vec::new();
                connection.read_to_end(&mut arrived).await.unwrap();
                assert!(arrived == bytes);
            }
        });
        let mut sources = Vec::new();
        for bytes in streams {
            let mut source = pair.source_qemu(&session, member as usize).await;
            // The next one connects when this one is known.
            event(&mut events, |e| {
                matches!(e, SourceEvent::ChannelOpened { .. })
            })
            .await;
            sources.push(tokio::spawn(async move {
                source.write_all(&bytes).await.unwrap();
                source.shutdown().await.unwrap();
                let mut rest = Vec::new();
                source.read_to_end(&mut rest).await.unwrap();
            }));
        }
        destination.await.unwrap();
        for source in sources {
            source.await.unwrap();
        }
    }
    let counters = session.close().await.counters;
    assert_eq!(counters.qemu_stream_bytes, stream_bytes as u64);
    assert!(counters.members.iter().all(|member| member.first_pass_done));
    let saved = counters.saved;
    assert!(saved.cross_vm > PAGES as i64 * 4096 / 10 * 8, "{saved:?}");
    // 20 lists of 128 addresses each, for both.
    assert!(saved.zero > 2 * 20 * 128 * 8 * 9 / 10, "{saved:?}");
    assert_eq!(
        saved.total(),
        stream_bytes as i64 - counters.wire_bytes as i64
    );
}
