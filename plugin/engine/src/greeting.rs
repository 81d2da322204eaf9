//! The source's end of the handshake, for migrations and for stages.
//!
//! Must not: know what the session is for.

use std::io;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;
use vmgang_dedup::PageDigest;
use vmgang_wire::{Frame, Hello, RefuseCode, STREAM_BYTES_MAX, Welcome, WireError};

use crate::compression::window_slots;
use crate::connection::{FrameReader, ReadError};
use crate::counters::Live;
use crate::network::{Connection, Network};
use crate::peer::{self, Counted};
use crate::source::SourceError;
use crate::tls_refusal::{End, explain};
use crate::{PeerAddress, Transport};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The destination asks its libvirt before it answers.
pub(crate) const WELCOME_TIMEOUT: Duration = Duration::from_secs(20);

/// A session that the destination has accepted.
pub(crate) struct Greeted {
    pub reader: FrameReader<ReadHalf<Box<dyn Connection>>>,
    pub writer: WriteHalf<Box<dyn Connection>>,
    pub welcome: Welcome,
    /// Contents in the first slots of the window.
    pub announced: Vec<PageDigest>,
}

/// Connects, and sends HELLO.
pub(crate) async fn greet(
    network: &dyn Network,
    peer: &PeerAddress,
    transport: &Transport,
    hello: Hello,
    live: &Live,
) -> Result<Greeted, SourceError> {
    let offered_bytes = hello.window_budget_bytes;
    let connection = open(network, peer, transport, live).await?;
    let (reader, mut writer) = tokio::io::split(connection);
    let mut reader = FrameReader::new(reader);
    let mut bytes = Vec::new();
    Frame::Hello(hello).encode(&mut bytes);
    let unreachable = |error| SourceError::Unreachable {
        peer: peer.clone(),
        error,
    };
    let welcome = timeout(WELCOME_TIMEOUT, async {
        writer.write_all(&bytes).await.map_err(unreachable)?;
        writer.flush().await.map_err(unreachable)?;
        let welcome = welcome(&mut reader, peer, transport).await?;
        let announced = announced(&mut reader, peer, &welcome).await?;
        Ok((welcome, announced))
    });
    let (welcome, announced) = welcome.await.map_err(|_| {
        unreachable(io::Error::new(
            io::ErrorKind::TimedOut,
            "no answer to the handshake",
        ))
    })??;
    if welcome.window_budget_bytes > offered_bytes
        || (welcome.channel_credit_bytes as usize) < STREAM_BYTES_MAX
    {
        return Err(not_offered(peer));
    }
    Ok(Greeted {
        reader,
        writer,
        welcome,
        announced,
    })
}

/// Reads what the destination tells of its window.
async fn announced(
    reader: &mut FrameReader<impl AsyncRead + Unpin>,
    peer: &PeerAddress,
    welcome: &Welcome,
) -> Result<Vec<PageDigest>, SourceError> {
    let count = welcome.announced as usize;
    if count == 0 {
        return Ok(Vec::new());
    }
    if welcome.stage || count > window_slots(welcome.window_budget_bytes) as usize {
        return Err(not_offered(peer));
    }
    let protocol = |reason: String| SourceError::Protocol {
        peer: peer.clone(),
        reason,
    };
    let mut digests = Vec::new();
    while digests.len() < count {
        match reader.next().await {
            Ok(Frame::Announce(announce)) => {
                digests.extend(announce.digests.into_iter().map(PageDigest));
            }
            Ok(Frame::Alive) => {}
            Ok(Frame::Refuse { text, .. }) => return Err(protocol(text)),
            Ok(_) => {
                return Err(protocol(
                    "it tells too few contents of its window".to_owned(),
                ));
            }
            Err(error) => return Err(broken(peer, error)),
        }
    }
    match digests.len() == count {
        true => Ok(digests),
        false => Err(protocol(
            "it tells too many contents of its window".to_owned(),
        )),
    }
}

/// Why the handshake was not read to its end: a peer that is gone has broken no rule.
fn broken(peer: &PeerAddress, error: ReadError) -> SourceError {
    let peer = peer.clone();
    match error {
        ReadError::Io(error) => SourceError::Unreachable { peer, error },
        error @ (ReadError::Closed | ReadError::Silent) => SourceError::Unreachable {
            peer,
            error: io::Error::other(format!("{error} before it had answered the handshake")),
        },
        ReadError::Wire(error) => SourceError::Protocol {
            peer,
            reason: error.to_string(),
        },
    }
}

pub(crate) fn not_offered(peer: &PeerAddress) -> SourceError {
    SourceError::Protocol {
        peer: peer.clone(),
        reason: "it grants what was not offered".to_owned(),
    }
}

pub(crate) async fn open(
    network: &dyn Network,
    peer: &PeerAddress,
    transport: &Transport,
    live: &Live,
) -> Result<Box<dyn Connection>, SourceError> {
    let unreachable = |error| SourceError::Unreachable {
        peer: peer.clone(),
        error,
    };
    let stream = timeout(CONNECT_TIMEOUT, network.connect(peer))
        .await
        .map_err(|_| unreachable(io::Error::new(io::ErrorKind::TimedOut, "no answer")))?
        .map_err(unreachable)?;
    let stream = Counted::new(stream, live.wire_bytes.clone());
    let Transport::Tls(identity) = transport else {
        return Ok(Box::new(stream));
    };
    let tls_error = |error: String| SourceError::Tls {
        peer: peer.clone(),
        error,
    };
    let name = ServerName::try_from(peer.host.clone())
        .map_err(|_| tls_error(format!("`{}` is not a host name", peer.host)))?;
    let connector = tokio_rustls::TlsConnector::from(identity.client.clone());
    let stream = peer::read_ahead(stream);
    let stream = timeout(CONNECT_TIMEOUT, connector.connect(name, stream))
        .await
        .map_err(|_| tls_error("no answer to the TLS handshake".to_owned()))?
        .map_err(|error| tls_error(explain(&error, End::Source, &identity.files)))?;
    Ok(Box::new(stream))
}

async fn welcome(
    reader: &mut FrameReader<impl AsyncRead + Unpin>,
    peer: &PeerAddress,
    transport: &Transport,
) -> Result<Welcome, SourceError> {
    loop {
        return match reader.next().await {
            Ok(Frame::Welcome(welcome)) => Ok(welcome),
            Ok(Frame::Alive) => continue,
            other => Err(unanswered(other, peer, transport)),
        };
    }
}

/// Why the first frame of a connection was not answered as it should be, but with this.
pub(crate) fn unanswered(
    answer: Result<Frame<'_>, ReadError>,
    peer: &PeerAddress,
    transport: &Transport,
) -> SourceError {
    let peer = peer.clone();
    let mismatch = |peer, theirs: String| SourceError::VersionMismatch {
        peer,
        theirs,
        ours: vmgang_wire::VERSION,
    };
    match answer {
        Ok(Frame::Refuse {
            code: RefuseCode::Version,
            text,
        }) => mismatch(peer, text),
        Ok(Frame::Refuse { text, .. }) => SourceError::Refused { peer, reason: text },
        Ok(_) => SourceError::Protocol {
            peer,
            reason: "it answers the handshake with another frame".to_owned(),
        },
        Err(ReadError::Wire(WireError::Version { theirs })) => mismatch(peer, theirs.to_string()),
        Err(ReadError::Io(error)) => match transport {
            // With TLS 1.3 a refused client certificate shows in the first read.
            Transport::Tls(identity) if error.kind() == io::ErrorKind::InvalidData => {
                SourceError::Tls {
                    peer,
                    error: explain(&error, End::Source, &identity.files),
                }
            }
            _ => SourceError::Unreachable { peer, error },
        },
        Err(error) => broken(&peer, error),
    }
}
