//! The plain relay that vmgang is compared with: bytes from socket to socket, one TCP connection a
//! member, nothing looked at.
//!
//! Must not: be slower than it has to be; it is the yardstick.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;

/// As much as vmgang reads at a time.
const BUFFER_BYTES: usize = 256 * 1024;
/// Each connection begins with the member's number.
const GREETING_BYTES: u64 = 2;

/// Takes one connection from each member's QEMU; returns the bytes exchanged.
pub async fn source(listeners: Vec<UnixListener>, peer_port: u16) -> Result<u64> {
    let mut relays = JoinSet::new();
    for (member, listener) in listeners.into_iter().enumerate() {
        relays.spawn(async move {
            let (mut qemu, _) = listener.accept().await?;
            let mut peer = TcpStream::connect(("127.0.0.1", peer_port)).await?;
            peer.set_nodelay(true)?;
            peer.write_u16(member as u16).await?;
            copy(&mut qemu, &mut peer).await
        });
    }
    sum(relays).await
}

/// Takes one connection for each member and passes it to its QEMU.
pub async fn destination(listener: TcpListener, sockets: Vec<PathBuf>) -> Result<u64> {
    let mut relays = JoinSet::new();
    for _ in 0..sockets.len() {
        let (mut peer, _) = listener.accept().await?;
        peer.set_nodelay(true)?;
        let member = peer.read_u16().await?;
        let socket = sockets
            .get(usize::from(member))
            .with_context(|| format!("there is no member {member}"))?
            .clone();
        relays.spawn(async move {
            let mut qemu = UnixStream::connect(socket).await?;
            copy(&mut peer, &mut qemu).await
        });
    }
    sum(relays).await
}

async fn copy(
    from: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    to: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
) -> Result<u64> {
    let (there, back) = copy_bidirectional_with_sizes(from, to, BUFFER_BYTES, 4096).await?;
    Ok(there + back + GREETING_BYTES)
}

async fn sum(mut relays: JoinSet<Result<u64>>) -> Result<u64> {
    let mut bytes = 0;
    while let Some(relay) = relays.join_next().await {
        bytes += relay??;
    }
    Ok(bytes)
}
