//! libvirt's RPC over a peer connection, with sockets of these tests in the place of libvirtd.

use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use vmgang_engine::{
    LIBVIRT_CONNECTIONS_MAX, LibvirtConnection, PeerAddress, SourceError, Transport,
};

use crate::handshake::{authority, identity};
use crate::pair::{Pair, SOON};

/// A destination whose libvirt listens, and that offers it.
async fn offering(transport: Transport) -> (Pair, UnixListener) {
    let pair = Pair::new(transport, None, 1 << 20).await;
    let there = pair.destination_dir.path().join("libvirt-sock");
    let libvirt = UnixListener::bind(&there).unwrap();
    // The first one is not there: this host has no modular daemons.
    let sockets = vec![pair.destination_dir.path().join("virtqemud-sock"), there];
    *pair.host.libvirt.lock().unwrap() = Ok(sockets);
    (pair, libvirt)
}

fn address(host: &str, port: u16) -> PeerAddress {
    PeerAddress {
        host: host.to_owned(),
        port,
    }
}

async fn open(peer: PeerAddress, transport: &Transport) -> Result<LibvirtConnection, SourceError> {
    LibvirtConnection::open(&*vmgang_engine::system(), &peer, transport).await
}

/// What speaks libvirt here, and the relay behind it.
fn speak(connection: LibvirtConnection) -> (UnixStream, JoinHandle<std::io::Result<()>>) {
    let (client, mut carried) = UnixStream::pair().unwrap();
    let relay = tokio::spawn(async move { connection.relay(&mut carried).await });
    (client, relay)
}

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed)
        .collect()
}

/// Each direction carries its own bytes, and ends by itself.
async fn carries_both_ways(transport: Transport, host: &str) {
    let (pair, libvirt) = offering(transport.clone()).await;
    let connection = open(address(host, pair.port), &transport).await.unwrap();
    let (client, relay) = speak(connection);
    let (mut server, _) = libvirt.accept().await.unwrap();
    let (question, answer) = (bytes(1, 3_000_000), bytes(2, 2_000_000));
    let (mut from_client, mut to_client) = client.into_split();

    // The server says nothing before the client has ended its direction.
    let asking = {
        let question = question.clone();
        tokio::spawn(async move {
            to_client.write_all(&question).await.unwrap();
            to_client.shutdown().await.unwrap();
            to_client
        })
    };
    let mut asked = Vec::new();
    timeout(SOON, server.read_to_end(&mut asked))
        .await
        .expect("the end of one direction arrives")
        .unwrap();
    assert!(asked == question, "{} of {}", asked.len(), question.len());
    let answering = {
        let answer = answer.clone();
        tokio::spawn(async move {
            server.write_all(&answer).await.unwrap();
            server.shutdown().await.unwrap();
        })
    };
    let mut answered = Vec::new();
    timeout(SOON, from_client.read_to_end(&mut answered))
        .await
        .expect("and the other one still goes")
        .unwrap();
    assert!(answered == answer, "{} of {}", answered.len(), answer.len());
    answering.await.unwrap();
    drop(asking.await.unwrap());
    timeout(SOON, relay).await.expect("ended").unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn both_directions_are_carried_and_end_by_themselves() {
    carries_both_ways(Transport::Plain, "127.0.0.1").await;
    let ours = authority();
    carries_both_ways(Transport::Tls(identity(&ours, "localhost")), "localhost").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_decides_by_the_names_in_the_certificate() {
    let ours = authority();
    let (pair, _libvirt) = offering(Transport::Tls(identity(&ours, "localhost"))).await;
    let source = Transport::Tls(identity(&ours, "source.example"));
    let connection = open(address("localhost", pair.port), &source).await;
    drop(connection.unwrap());
    let asked = pair.host.peers.lock().unwrap().clone();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].certificate_names, ["source.example"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_is_told_why_and_connects_to_nothing() {
    let (pair, libvirt) = offering(Transport::Plain).await;
    *pair.host.libvirt.lock().unwrap() = Err("libvirt is not for you".to_owned());
    let error = open(address("127.0.0.1", pair.port), &Transport::Plain)
        .await
        .err()
        .expect("refused");
    assert!(
        matches!(&error, SourceError::Refused { reason, .. } if reason == "libvirt is not for you"),
        "{error}"
    );
    let accepted = timeout(std::time::Duration::from_millis(50), libvirt.accept()).await;
    assert!(accepted.is_err(), "somebody connected");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_libvirt_that_is_not_there_is_named_with_where_it_was_looked_for() {
    let (pair, libvirt) = offering(Transport::Plain).await;
    drop(libvirt);
    let error = open(address("127.0.0.1", pair.port), &Transport::Plain)
        .await
        .err()
        .expect("refused");
    let text = error.to_string();
    assert!(matches!(error, SourceError::Refused { .. }), "{text}");
    for word in ["virtqemud-sock", "libvirt-sock", "libvirt_sockets"] {
        assert!(text.contains(word), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn either_end_that_dies_takes_its_connection_with_it_and_no_other() {
    let (mut pair, libvirt) = offering(Transport::Plain).await;
    let peer = || address("127.0.0.1", pair.port);
    let mut connections = Vec::new();
    for _ in 0..3 {
        let (client, relay) = speak(open(peer(), &Transport::Plain).await.unwrap());
        let (server, _) = libvirt.accept().await.unwrap();
        connections.push((client, server, relay));
    }
    let (mut first, server, relay) = connections.remove(0);
    // libvirtd is gone: both directions end.
    drop(server);
    let read = timeout(SOON, first.read(&mut [0; 8])).await.expect("ends");
    assert_eq!(read.unwrap(), 0);
    drop(first);
    let _ = timeout(SOON, relay).await.expect("ended").unwrap();
    // The client is gone.
    let (client, mut server, _) = connections.remove(0);
    drop(client);
    let read = timeout(SOON, server.read(&mut [0; 8])).await.expect("ends");
    assert_eq!(read.unwrap(), 0);
    // The others do not notice.
    let (mut client, mut server, _) = connections.remove(0);
    client.write_all(b"still there").await.unwrap();
    let mut heard = [0; 11];
    server.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"still there");
    // The peer's daemon is gone, and everything with it.
    drop(pair.stop.take());
    for end in [&mut client, &mut server] {
        let read = timeout(SOON, end.read(&mut [0; 8])).await.expect("ends");
        assert_eq!(read.unwrap_or(0), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_before_the_answer_is_not_lost_and_another_answer_is_an_error() {
    // The destination's end, fed as fast as a source could ever be.
    let (pair, libvirt) = offering(Transport::Plain).await;
    let mut source = TcpStream::connect(("127.0.0.1", pair.port)).await.unwrap();
    source
        .write_all(b"vmga\x01\x14\0\0\0\0\0\0\0\0\0\0early")
        .await
        .unwrap();
    let (mut server, _) = libvirt.accept().await.unwrap();
    let mut heard = [0; 5];
    let early = timeout(SOON, server.read_exact(&mut heard)).await;
    early.expect("what came early arrives").unwrap();
    assert_eq!(&heard, b"early");
    let mut answer = [0; 16];
    source.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"vmga\x01\x15\0\0\0\0\0\0\0\0\0\0");

    // And the source's end: CONNECTED with bytes of libvirt behind it, another frame, and none.
    for (answer, expected) in [
        (&b"vmga\x01\x15\0\0\0\0\0\0\0\0\0\0hi"[..], None),
        (b"vmga\x01\x0c\0\0\0\0\0\0\0\0\0\0", Some("another frame")),
        (b"", Some("too old")),
        (b"HTTP/1.1 400 Bad Request\r\n", Some("not a vmgang peer")),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let answering = tokio::spawn(async move {
            let (mut peer, _) = listener.accept().await.unwrap();
            peer.read_exact(&mut [0; 16]).await.unwrap();
            peer.write_all(answer).await.unwrap();
        });
        let opened = open(address("127.0.0.1", port), &Transport::Plain).await;
        answering.await.unwrap();
        match (opened, expected) {
            (Ok(connection), None) => {
                let (mut client, _relay) = speak(connection);
                let mut heard = [0; 2];
                let early = timeout(SOON, client.read_exact(&mut heard)).await;
                early.expect("what came early arrives").unwrap();
                assert_eq!(&heard, b"hi");
            }
            (Err(error), Some(expected)) => {
                assert!(error.to_string().contains(expected), "{error}");
            }
            (opened, expected) => panic!("{:?}, not {expected:?}", opened.err()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_not_more_than_so_many_and_each_that_ends_makes_room() {
    let (pair, libvirt) = offering(Transport::Plain).await;
    let libvirt = Arc::new(libvirt);
    let mut open_ones = Vec::new();
    for _ in 0..LIBVIRT_CONNECTIONS_MAX {
        let peer = address("127.0.0.1", pair.port);
        let connection = open(peer, &Transport::Plain).await.unwrap();
        let (server, _) = libvirt.accept().await.unwrap();
        open_ones.push((connection, server));
    }
    let peer = || address("127.0.0.1", pair.port);
    let error = open(peer(), &Transport::Plain).await.err().expect("full");
    assert!(error.to_string().contains("already"), "{error}");
    drop(open_ones.pop());
    let room = async {
        while open(peer(), &Transport::Plain).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, room).await.expect("there is room again");
}
