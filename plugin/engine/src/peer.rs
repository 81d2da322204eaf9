//! Names of peers, and the TCP connection to one: options set, bytes counted.
//!
//! Must not: know frames or sessions.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::TcpKeepalive;
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;

/// The port vmgangd listens on.
pub const DEFAULT_PORT: u16 = 16520;

/// Where a peer listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerAddress {
    /// Host name, or address without brackets.
    pub host: String,
    pub port: u16,
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A peer address that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a peer address; write HOST, HOST:PORT or [ADDRESS]:PORT")]
pub struct BadPeerAddress(String);

impl FromStr for PeerAddress {
    type Err = BadPeerAddress;

    /// `HOST`, `HOST:PORT`, `[ADDRESS]` or `[ADDRESS]:PORT`; the port defaults to 16520.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadPeerAddress(text.to_owned());
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or_else(bad)?;
            match rest {
                "" => (host, None),
                rest => (host, Some(rest.strip_prefix(':').ok_or_else(bad)?)),
            }
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        let port = match port {
            Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or_else(bad)?,
            None => DEFAULT_PORT,
        };
        if host.is_empty() || host.contains(['/', '@', ' ']) {
            return Err(bad());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

/// Who a connected peer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerName {
    pub address: SocketAddr,
    /// Common name and DNS names of its certificate; empty without TLS.
    pub certificate_names: Vec<String>,
}

/// Unsent bytes the kernel may hold for us. More would only delay the frames of a guest
/// that has just been stopped, and hide from QEMU how fast the link really is.
pub(crate) const UNSENT_BYTES_MAX: u32 = 256 * 1024;
/// A peer that acknowledges nothing for so long is gone.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// A peer that nothing is sent to, and that answers the kernel no more, is gone as well.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(10))
    .with_interval(Duration::from_secs(5));

/// Sets the options every peer connection has.
pub(crate) fn configure(stream: &TcpStream) -> io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(UNSENT_BYTES_MAX)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    // Relayed connections have no ALIVE.
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    Ok(())
}

/// Bytes that TLS gets from the socket at once. By itself it asks for 4 KiB each time.
const TLS_READ_BYTES: usize = 64 * 1024;

/// What TLS is put on.
pub(crate) fn read_ahead<S: AsyncRead>(stream: S) -> BufReader<S> {
    BufReader::with_capacity(TLS_READ_BYTES, stream)
}

/// A stream that counts the bytes of both directions.
#[derive(Debug)]
pub(crate) struct Counted<S> {
    inner: S,
    bytes: Arc<AtomicU64>,
}

impl<S> Counted<S> {
    pub(crate) fn new(inner: S, bytes: Arc<AtomicU64>) -> Self {
        Self { inner, bytes }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(cx, buf);
        self.bytes
            .fetch_add((buf.filled().len() - before) as u64, Relaxed);
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(written)) = result {
            self.bytes.fetch_add(written as u64, Relaxed);
        }
        result
    }

    /// TLS has one try to send why it breaks off, which may be the second of two pieces.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, parts);
        if let Poll::Ready(Ok(written)) = result {
            self.bytes.fetch_add(written as u64, Relaxed);
        }
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn several_pieces_leave_at_once_and_are_counted() {
        use tokio::io::AsyncWriteExt;
        let (near, _far) = tokio::io::duplex(64);
        let bytes = Arc::new(AtomicU64::new(0));
        let mut counted = Counted::new(near, bytes.clone());
        assert!(counted.is_write_vectored());
        let pieces = [IoSlice::new(b"why"), IoSlice::new(b" not")];
        assert_eq!(counted.write_vectored(&pieces).await.unwrap(), 7);
        assert_eq!(bytes.load(Relaxed), 7);
    }

    #[test]
    fn addresses_read() {
        for (text, host, port) in [
            ("b", "b", DEFAULT_PORT),
            ("b.example:17", "b.example", 17),
            ("[fe80::1]", "fe80::1", DEFAULT_PORT),
            ("[fe80::1]:17", "fe80::1", 17),
        ] {
            let address: PeerAddress = text.parse().unwrap();
            assert_eq!((address.host.as_str(), address.port), (host, port));
            assert_eq!(address.to_string().parse(), Ok(address));
        }
        for text in [
            "", ":5", "b:", "b:0", "b:70000", "[b", "[b]x", "a/b", "fe80::1",
        ] {
            assert!(text.parse::<PeerAddress>().is_err(), "{text}");
        }
    }
}
