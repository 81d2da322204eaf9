//! A connection over which one vmgangd asks something of another: what goes over it after CONTROL and
//! CONNECTED is the service's business.
//!
//! Must not: read what is said, or decide who may say it.

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use vmgang_wire::Frame;

use crate::connection::FrameReader;
use crate::libvirt_rpc::open_onward;
use crate::network::{Connection, Network, Pending};
use crate::source::SourceError;
use crate::{PeerAddress, Transport};

/// Such connections that a host serves at once, for all peers together.
pub(crate) const CONTROL_CONNECTIONS_MAX: usize = 16;

/// Serves a peer that may ask, to the end of its connection.
pub type ServeControl = Box<dyn FnOnce(Box<dyn Connection>) -> Pending<'static, ()> + Send>;

/// Connects to a peer that is to be asked something. The error says why it does not listen.
pub async fn connect_control(
    network: &dyn Network,
    peer: &PeerAddress,
    transport: &Transport,
) -> Result<Box<dyn Connection>, SourceError> {
    let what = "taking a request";
    let (reader, writer) = open_onward(network, peer, transport, Frame::Control, what).await?;
    Ok(Box::new(tokio::io::join(reader, writer)))
}

/// The other end, after it was decided that the peer may ask.
pub(crate) async fn serve(
    reader: FrameReader<impl AsyncRead + Unpin + Send + 'static>,
    mut writer: impl AsyncWrite + Unpin + Send + 'static,
    serve: ServeControl,
) {
    let mut bytes = Vec::new();
    Frame::Connected.encode(&mut bytes);
    let answered = async {
        writer.write_all(&bytes).await?;
        writer.flush().await?;
        serve(Box::new(tokio::io::join(reader.into_rest(), writer))).await
    };
    if let Err(error) = answered.await {
        tracing::debug!(%error, "a peer's request broke off");
    }
}
