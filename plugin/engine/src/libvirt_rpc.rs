//! libvirt's own RPC over connections between peers: both ends of a relay.
//!
//! Owns: a connection from LIBVIRT and CONNECTED to its end, and the bytes in between, both ways, each
//! with its own end. Must not: read those bytes, decide who may connect, or keep anything of a session.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{
    AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf,
    copy_bidirectional_with_sizes,
};
use tokio::time::timeout;
use vmgang_wire::Frame;

use crate::connection::{FrameReader, ReadError};
use crate::counters::Live;
use crate::greeting::{WELCOME_TIMEOUT, open, unanswered};
use crate::network::{Connection, Network};
use crate::source::SourceError;
use crate::{PeerAddress, Transport};

/// Connections to its libvirt that a host carries at once, for all peers together. A migration takes
/// one for each member and one for the job.
pub const LIBVIRT_CONNECTIONS_MAX: usize = 128;
/// Bytes on their way in each direction of a connection.
const RELAY_BYTES: usize = 64 * 1024;
/// libvirtd accepts at once, or not at all.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(5);

type Reader = BufReader<ReadHalf<Box<dyn Connection>>>;
type Writer = WriteHalf<Box<dyn Connection>>;

/// A connection to the libvirt of a peer's host. Dropping it ends it.
pub struct LibvirtConnection {
    reader: Reader,
    writer: Writer,
}

impl LibvirtConnection {
    /// Connects to the peer and has it connect to its libvirt.
    pub async fn open(
        network: &dyn Network,
        peer: &PeerAddress,
        transport: &Transport,
    ) -> Result<Self, SourceError> {
        let what = "connecting to its libvirt";
        let (reader, writer) = open_onward(network, peer, transport, Frame::Libvirt, what).await?;
        Ok(Self { reader, writer })
    }

    /// Carries bytes between the peer's libvirt and whoever speaks to it here, until both directions
    /// have ended or one has broken.
    pub async fn relay(self, local: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<()> {
        relay(&mut tokio::io::join(self.reader, self.writer), local).await
    }
}

/// A connection to a peer that goes on as something else than frames after this one, `what` that is.
pub(crate) async fn open_onward(
    network: &dyn Network,
    peer: &PeerAddress,
    transport: &Transport,
    request: Frame<'_>,
    what: &str,
) -> Result<(Reader, Writer), SourceError> {
    let connection = open(network, peer, transport, &Live::new(0)).await?;
    let (reader, mut writer) = tokio::io::split(connection);
    let mut reader = FrameReader::new(reader);
    let mut bytes = Vec::new();
    request.encode(&mut bytes);
    let unreachable = |error| SourceError::Unreachable {
        peer: peer.clone(),
        error,
    };
    let answered = timeout(WELCOME_TIMEOUT, async {
        writer.write_all(&bytes).await.map_err(unreachable)?;
        writer.flush().await.map_err(unreachable)?;
        match reader.next().await {
            Ok(Frame::Connected) => Ok(()),
            // A vmgangd that does not know that frame says nothing.
            Err(ReadError::Closed) => Err(SourceError::Protocol {
                peer: peer.clone(),
                reason: format!(
                    "it hung up instead of {what}; its version may be too old for that, or its log says more"
                ),
            }),
            other => Err(unanswered(other, peer, transport)),
        }
    });
    answered.await.map_err(|_| {
        let silent = format!("no answer, instead of {what}");
        unreachable(io::Error::new(io::ErrorKind::TimedOut, silent))
    })??;
    Ok((reader.into_rest(), writer))
}

/// Connects to the first of these sockets that takes the connection.
pub(crate) async fn connect_local(
    network: &dyn Network,
    sockets: &[PathBuf],
) -> Result<Box<dyn Connection>, String> {
    let mut tried = Vec::new();
    for socket in sockets {
        let error = match timeout(LOCAL_TIMEOUT, network.connect_libvirt(socket)).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        tried.push(format!("{}: {error}", socket.display()));
    }
    Err(format!(
        "it cannot reach its libvirt ({}); start libvirtd or virtqemud there, or set libvirt_sockets in its vmgang.toml",
        tried.join("; ")
    ))
}

/// The destination's end, after it was decided that the peer may: answers CONNECTED and relays.
pub(crate) async fn serve(
    reader: FrameReader<impl AsyncRead + Unpin>,
    writer: &mut (impl AsyncWrite + Unpin),
    mut libvirt: Box<dyn Connection>,
) {
    let mut bytes = Vec::new();
    Frame::Connected.encode(&mut bytes);
    let relayed = async {
        writer.write_all(&bytes).await?;
        writer.flush().await?;
        relay(
            &mut tokio::io::join(reader.into_rest(), writer),
            &mut libvirt,
        )
        .await
    };
    if let Err(error) = relayed.await {
        tracing::debug!(%error, "a connection to libvirt broke");
    }
}

/// One direction that has ended in order leaves the other one open; one that breaks breaks both.
async fn relay(
    peer: &mut (impl AsyncRead + AsyncWrite + Unpin),
    local: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<()> {
    copy_bidirectional_with_sizes(peer, local, RELAY_BYTES, RELAY_BYTES)
        .await
        .map(drop)
}
