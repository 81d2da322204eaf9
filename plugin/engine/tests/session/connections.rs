//! Sessions over several TCP connections: the same bytes in the same order, and the same end when
//! any of the connections ends.

use std::net::Shutdown;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vmgang_engine::{SourceEvent, SourceSession, Transport};
use vmgang_wire::{
    FEATURE_CONNECTIONS, Frame, FrameHeader, HEADER_BYTES, Hello, Join, MemberHello,
    MoreConnections, Purpose,
};

use crate::pair::{JOB, Pair, SOON, event, guest_stream, member_uuid, swallow};

/// Stands between the two halves, counts, and cuts a connection when told to.
struct Proxy {
    port: u16,
    /// Bytes towards the destination, by connection, counted as they come.
    passed: Arc<Mutex<Vec<u64>>>,
}

impl Proxy {
    /// Cuts connection `cut.0` after `cut.1` bytes.
    async fn start(towards: u16, cut: Option<(usize, u64)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let passed: Arc<Mutex<Vec<u64>>> = Arc::default();
        let counts = passed.clone();
        tokio::spawn(async move {
            for connection in 0.. {
                let Ok((near, _)) = listener.accept().await else {
                    return;
                };
                let counts = counts.clone();
                counts.lock().unwrap().push(0);
                let limit = cut.filter(|(which, _)| *which == connection);
                let limit = limit.map_or(u64::MAX, |(_, bytes)| bytes);
                tokio::spawn(async move {
                    let far = TcpStream::connect(("127.0.0.1", towards)).await.unwrap();
                    let (mut from, mut back_to) = near.into_split();
                    let (mut back, mut to) = far.into_split();
                    let there = async {
                        let mut buffer = vec![0; 64 * 1024];
                        while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
                            let count = {
                                let mut counts = counts.lock().unwrap();
                                counts[connection] += bytes as u64;
                                counts[connection]
                            };
                            if count > limit || to.write_all(&buffer[..bytes]).await.is_err() {
                                break;
                            }
                        }
                    };
                    let and_back = tokio::io::copy(&mut back, &mut back_to);
                    // The first direction that ends takes the other one with it.
                    tokio::select! { () = there => {}, _ = and_back => {} }
                });
            }
        });
        Self { port, passed }
    }
}

fn connections(number: usize) -> NonZeroUsize {
    NonZeroUsize::new(number).unwrap()
}

/// Two guests through a session with `number` connections allowed on each side; returns how many
/// connections carried more than 100 KiB.
async fn carry(at_source: usize, at_destination: usize) -> usize {
    let pair = Pair::with_connections(
        Transport::Plain,
        None,
        32 << 20,
        connections(at_destination),
    )
    .await;
    let proxy = Proxy::start(pair.port, None).await;
    let mut options = pair.options(2, Transport::Plain);
    options.peer.port = proxy.port;
    options.connections = connections(at_source);
    // So that there is something to carry.
    options.techniques = "page".parse().unwrap();
    let (session, _events) = SourceSession::connect(options).await.unwrap();
    let members: Vec<_> = (0..2)
        .map(|member| {
            let qemu = pair.destination_qemu(member);
            tokio::spawn(async move { swallow(qemu, b"").await })
        })
        .collect();
    let mut sources = Vec::new();
    for member in 0..2 {
        let mut source = pair.source_qemu(&session, member).await;
        sources.push(tokio::spawn(async move {
            let bytes = guest_stream(member, 9_000);
            source.write_all(&bytes).await.unwrap();
            source.shutdown().await.unwrap();
            source.read_to_end(&mut Vec::new()).await.unwrap();
            bytes
        }));
    }
    for (member, source) in members.into_iter().zip(sources) {
        let arrived = tokio::time::timeout(SOON, member).await.unwrap().unwrap();
        assert!(arrived == source.await.unwrap());
    }
    let counters = session.close().await.counters;
    let saved = counters.qemu_stream_bytes as i64 - counters.wire_bytes as i64;
    assert_eq!(counters.saved.total(), saved, "every connection is counted");
    drop(pair);
    let passed = proxy.passed.lock().unwrap();
    assert_eq!(passed.len(), at_source.min(at_destination));
    passed.iter().filter(|bytes| **bytes > 100 << 10).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_arrive_byte_exact_over_one_two_and_four() {
    for number in [1, 2, 4] {
        assert_eq!(carry(number, number).await, number);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_smaller_limit_counts() {
    assert_eq!(carry(4, 2).await, 2);
    assert_eq!(carry(1, 4).await, 1);
    // A destination that grants none is one that does not know the feature.
    assert_eq!(carry(4, 1).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_in_the_middle_ends_the_session() {
    for broken in 0..3 {
        let pair = Pair::with_connections(Transport::Plain, None, 32 << 20, connections(3)).await;
        let proxy = Proxy::start(pair.port, Some((broken, 1 << 20))).await;
        let mut options = pair.options(1, Transport::Plain);
        options.peer.port = proxy.port;
        options.connections = connections(3);
        options.techniques = "none".parse().unwrap();
        let (session, mut events) = SourceSession::connect(options).await.unwrap();
        let qemu = pair.destination_qemu(0);
        let destination = tokio::spawn(async move { swallow(qemu, b"").await });
        let mut source = pair.source_qemu(&session, 0).await;
        let bytes = guest_stream(0, 20_000);
        let sent = bytes.clone();
        let writer = tokio::spawn(async move { source.write_all(&sent).await });
        event(&mut events, |e| {
            matches!(e, SourceEvent::SessionFailed { .. })
        })
        .await;
        // The source QEMU learns it, and the destination QEMU got nothing but a beginning.
        assert!(writer.await.unwrap().is_err());
        let arrived = tokio::time::timeout(SOON, destination).await.unwrap();
        let arrived = arrived.unwrap();
        assert!(arrived.len() < bytes.len() && bytes.starts_with(&arrived));
        drop(session);
        assert!(!Pair::socket(pair.source_dir.path(), 0).exists());
    }
}

async fn send(stream: &mut TcpStream, frame: &Frame<'_>) {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    stream.write_all(&bytes).await.unwrap();
}

/// The next frame, by `look`; `None` at the end of the connection.
async fn receive<T>(stream: &mut TcpStream, look: impl FnOnce(Frame<'_>) -> T) -> Option<T> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.ok()?;
    let header = FrameHeader::decode(&header).unwrap();
    let mut body = vec![0; header.body_len as usize];
    stream.read_exact(&mut body).await.unwrap();
    Some(look(Frame::decode(&header, &body).unwrap()))
}

/// A source of our own that was granted further connections.
async fn granted(pair: &Pair) -> (TcpStream, MoreConnections) {
    let mut stream = TcpStream::connect(("127.0.0.1", pair.port)).await.unwrap();
    let hello = Hello {
        job: JOB,
        integrity_key: [4; 32],
        features: FEATURE_CONNECTIONS | 0x8000_0000,
        purpose: Purpose::Migrate { stage: None },
        page_key_id: 0,
        window_budget_bytes: 1 << 20,
        source_host: "a".to_owned(),
        gang: "web".to_owned(),
        members: vec![MemberHello {
            uuid: member_uuid(0),
            memory_bytes: 1 << 20,
            fixed_owner: None,
            name: "g".to_owned(),
        }],
    };
    send(&mut stream, &Frame::Hello(hello)).await;
    let more = receive(&mut stream, |frame| match frame {
        Frame::Welcome(welcome) => welcome.more_connections.unwrap(),
        other => panic!("{other:?}"),
    });
    let more = more.await.unwrap();
    (stream, more)
}

/// What the destination says to a JOIN: `None` for welcome.
async fn join(pair: &Pair, join: Join) -> (TcpStream, Option<String>) {
    let mut stream = TcpStream::connect(("127.0.0.1", pair.port)).await.unwrap();
    send(&mut stream, &Frame::Join(join)).await;
    let answer = receive(&mut stream, |frame| match frame {
        Frame::Alive => None,
        Frame::Refuse { text, .. } => Some(text),
        other => panic!("{other:?}"),
    });
    let answer = answer.await.unwrap();
    (stream, answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_was_granted_joins_and_only_once() {
    let pair = Pair::with_connections(Transport::Plain, None, 1 << 20, connections(3)).await;
    let (main, more) = granted(&pair).await;
    assert_eq!(more.connections, 3);
    let good = Join {
        job: JOB,
        token: more.token,
        connection: 1,
    };
    let mut token = more.token;
    token[15] ^= 1;
    for (wrong, reason) in [
        (
            Join {
                token,
                ..good.clone()
            },
            "with that token",
        ),
        (
            Join {
                job: member_uuid(0),
                ..good.clone()
            },
            "with that token",
        ),
        (
            Join {
                connection: 3,
                ..good.clone()
            },
            "not granted so many",
        ),
    ] {
        let (_stream, refused) = join(&pair, wrong).await;
        assert!(refused.unwrap().contains(reason));
    }
    let (mut further, welcome) = join(&pair, good.clone()).await;
    assert_eq!(welcome, None);
    let (_again, refused) = join(&pair, good.clone()).await;
    assert!(refused.unwrap().contains("joined already"));

    // When the session ends, so do its further connections, and the token is worth nothing.
    drop(main);
    let mut rest = Vec::new();
    let end = further.read_to_end(&mut rest);
    tokio::time::timeout(SOON, end).await.unwrap().unwrap();
    let late = Join {
        connection: 2,
        ..good
    };
    let (_stream, refused) = join(&pair, late).await;
    assert!(refused.unwrap().contains("with that token"));
}

/// The reason that the destination gives on the first connection for ending the session.
async fn refusal(main: &mut TcpStream) -> String {
    let reason = async {
        loop {
            let text = receive(main, |frame| match frame {
                Frame::Refuse { text, .. } => Some(text),
                _ => None,
            });
            match text.await {
                Some(Some(text)) => return text,
                Some(None) => {}
                None => panic!("hung up without a reason"),
            }
        }
    };
    tokio::time::timeout(SOON, reason).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_breaks_the_rules_of_connections_is_told_so() {
    let pair = Pair::with_connections(Transport::Plain, None, 1 << 20, connections(3)).await;
    let joining = |more: &MoreConnections| Join {
        job: JOB,
        token: more.token,
        connection: 2,
    };

    // A frame on a connection that has not joined.
    let (mut main, _) = granted(&pair).await;
    send(&mut main, &Frame::Elsewhere { connection: 1 }).await;
    assert!(refusal(&mut main).await.contains("has not joined"));

    // Anything but DATA on a further connection.
    let (mut main, more) = granted(&pair).await;
    let (mut further, _) = join(&pair, joining(&more)).await;
    send(&mut further, &Frame::Goodbye).await;
    assert!(refusal(&mut main).await.contains("no place on a further"));

    // One that ends, whether the session waits for it or not.
    for waits in [false, true] {
        let (mut main, more) = granted(&pair).await;
        let (further, _) = join(&pair, joining(&more)).await;
        if waits {
            send(&mut main, &Frame::Elsewhere { connection: 2 }).await;
        }
        drop(further);
        let reason = refusal(&mut main).await;
        assert!(
            reason.contains("hung up one of its connections"),
            "{reason}"
        );
    }
}

/// A firewall, or a destination with many jobs coming in: one connection would do.
#[tokio::test(flavor = "multi_thread")]
async fn a_gang_moves_over_the_connections_that_there_are() {
    let pair = Pair::with_connections(Transport::Plain, None, 1 << 20, connections(3)).await;
    // The first and the last connection reach the destination, the second one somebody else.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut options = pair.options(1, Transport::Plain);
    options.peer.port = listener.local_addr().unwrap().port();
    options.connections = connections(3);
    options.techniques = "page".parse().unwrap();
    let towards = pair.port;
    let refused = Arc::new(Mutex::new(None));
    let turned_away = refused.clone();
    tokio::spawn(async move {
        for number in 0..3 {
            let (mut near, _) = listener.accept().await.unwrap();
            if number != 1 {
                let mut far = TcpStream::connect(("127.0.0.1", towards)).await.unwrap();
                tokio::spawn(async move {
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
                continue;
            }
            receive(&mut near, |frame| {
                let Frame::Join(join) = frame else {
                    panic!("{frame:?}");
                };
                *turned_away.lock().unwrap() = Some(join.connection);
            })
            .await;
            let refuse = Frame::Refuse {
                code: vmgang_wire::RefuseCode::Offer,
                text: "full".to_owned(),
            };
            send(&mut near, &refuse).await;
            let std = near.into_std().unwrap();
            std.shutdown(Shutdown::Write).unwrap();
        }
    });
    let (session, _events) = SourceSession::connect(options).await.unwrap();
    assert!(refused.lock().unwrap().is_some());
    let qemu = pair.destination_qemu(0);
    let arrived = tokio::spawn(async move { swallow(qemu, b"").await });
    let mut source = pair.source_qemu(&session, 0).await;
    let bytes = guest_stream(0, 9_000);
    source.write_all(&bytes).await.unwrap();
    source.shutdown().await.unwrap();
    source.read_to_end(&mut Vec::new()).await.unwrap();
    let arrived = tokio::time::timeout(SOON, arrived).await.unwrap().unwrap();
    assert!(arrived == bytes);
    session.close().await;
}
