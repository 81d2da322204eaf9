//! Peers that keep to the format and break the rules: they end their session, and cost this
//! side no more memory than was agreed.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;
use vmgang_engine::{Hold, SourceEvent, SourceSession, Transport};
use vmgang_wire::payload::Encoder;
use vmgang_wire::{
    Compression, Data, FRAME_CREDIT_BYTES_MIN, Frame, FrameHeader, HEADER_BYTES, Hello,
    MemberHello, Purpose, RETURN_CREDIT_BYTES, Welcome,
};

use crate::pair::{JOB, Pair, event};

const KEY: [u8; 32] = [4; 32];

/// Reads one frame and passes it on.
pub async fn read<T>(stream: &mut TcpStream, look: impl FnOnce(Frame<'_>) -> T) -> T {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.unwrap();
    let header = FrameHeader::decode(&header).unwrap();
    let mut body = vec![0; header.body_len as usize];
    stream.read_exact(&mut body).await.unwrap();
    look(Frame::decode(&header, &body).unwrap())
}

/// The other side may hang up in the middle; that is for the test to notice.
pub async fn write(stream: &mut TcpStream, frame: &Frame<'_>) -> bool {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    stream.write_all(&bytes).await.is_ok()
}

/// Of bytes of the return path of channel 1 and member 0, from that position on.
fn digest(key: &[u8; 32], bytes: &[u8], position: usize) -> [u8; 16] {
    let mut secret = [0; 192];
    blake3::Hasher::new_derive_key(vmgang_wire::FRAME_DIGEST_CONTEXT)
        .update(key)
        .finalize_xof()
        .fill(&mut secret);
    let digest = twox_hash::XxHash3_128::oneshot_with_secret(&secret, bytes);
    let mut digest = digest.unwrap().to_le_bytes();
    digest[0] ^= 1;
    for (byte, position) in digest[6..].iter_mut().zip(position.to_le_bytes()) {
        *byte ^= position;
    }
    digest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_returns_more_than_its_credit_ends_the_session() {
    let pair = Pair::new(Transport::Plain, None, 1).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut options = pair.options(1, Transport::Plain);
    options.peer.port = listener.local_addr().unwrap().port();
    options.hold = Hold::Anything;
    let peer = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let key = read(&mut stream, |frame| match frame {
            Frame::Hello(hello) => hello.integrity_key,
            other => panic!("{other:?}"),
        })
        .await;
        let welcome = Welcome {
            window_budget_bytes: 1 << 20,
            channel_credit_bytes: 8 << 20,
            contents: 0,
            stage: false,
            announced: 0,
            more_connections: None,
        };
        write(&mut stream, &Frame::Welcome(welcome)).await;
        read(&mut stream, |frame| {
            assert!(matches!(frame, Frame::Open { channel: 1, .. }))
        })
        .await;
        // An ACK, which is withheld, and everything behind it with it.
        let bytes = [&[0, 7, 0, 0][..], &[0; 65_532]].concat();
        let mut sent = 0;
        while sent <= 4 * RETURN_CREDIT_BYTES {
            let digest = digest(&key, &bytes, sent);
            let frame = Frame::Return {
                channel: 1,
                digest,
                bytes: &bytes,
            };
            if !write(&mut stream, &frame).await {
                break;
            }
            sent += bytes.len();
        }
        // Stays connected: only the source can end this.
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let (session, mut events) = SourceSession::connect(options).await.unwrap();
    let _qemu = pair.source_qemu(&session, 0).await;
    let failed = event(&mut events, |e| {
        matches!(e, SourceEvent::SessionFailed { .. })
    })
    .await;
    let SourceEvent::SessionFailed { error } = failed else {
        unreachable!()
    };
    assert!(error.contains("more return path"), "{error}");
    drop(session);
    peer.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_sends_more_than_its_credit_ends_the_session() {
    overrun(256 * 1024, 2).await;
}

/// Each frame that waits takes memory, however few bytes are in it.
#[tokio::test(flavor = "multi_thread")]
async fn small_frames_take_credit_for_their_memory() {
    overrun(1, 6).await;
}

/// Sends frames of so many stream bytes, for so many times the credit, to a QEMU that never reads.
async fn overrun(frame_bytes: usize, times: usize) {
    let pair = Pair::new(Transport::Plain, None, 1 << 20).await;
    let mut stream = TcpStream::connect(("127.0.0.1", pair.port)).await.unwrap();
    let hello = Hello {
        job: JOB,
        integrity_key: KEY,
        features: 0,
        purpose: Purpose::Migrate { stage: None },
        page_key_id: 0,
        window_budget_bytes: 1 << 20,
        source_host: "a".to_owned(),
        gang: "web".to_owned(),
        members: vec![MemberHello {
            uuid: Uuid::from_u128(1),
            memory_bytes: 1 << 20,
            fixed_owner: None,
            name: "g".to_owned(),
        }],
    };
    write(&mut stream, &Frame::Hello(hello)).await;
    let credit = read(&mut stream, |frame| match frame {
        Frame::Welcome(welcome) => welcome.channel_credit_bytes as usize,
        other => panic!("{other:?}"),
    })
    .await;
    // A QEMU that connects and never reads.
    let _qemu = pair.destination_qemu(0);
    write(
        &mut stream,
        &Frame::Open {
            channel: 1,
            member: 0,
        },
    )
    .await;
    let bytes = vec![9; frame_bytes];
    let mut encoder = Encoder::default();
    encoder.opaque(&bytes);
    let mut payload = Vec::new();
    encoder.finish(&mut payload);
    let charge = bytes.len().max(FRAME_CREDIT_BYTES_MIN);
    for sequence in 0..(times * credit / charge) as u64 {
        let data = Data {
            sequence,
            stream_len: bytes.len() as u32,
            digest: digest(&KEY, &bytes, 0),
            compression: Compression::None,
            payload: &payload,
        };
        if !write(&mut stream, &Frame::Data { channel: 1, data }).await {
            break;
        }
    }
    let refused = async {
        loop {
            let text = read(&mut stream, |frame| match frame {
                Frame::Refuse { text, .. } => Some(text),
                Frame::Credit { .. } | Frame::Alive => None,
                other => panic!("{other:?}"),
            });
            if let Some(text) = text.await {
                return text;
            }
        }
    };
    let text = tokio::time::timeout(crate::pair::SOON, refused)
        .await
        .unwrap();
    assert!(text.contains("more than it was granted"), "{text}");
}
