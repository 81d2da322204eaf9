//! A link of a given rate between the halves: a TCP relay with a token bucket for each direction,
//! shared by all connections.
//!
//! Not the session's own bandwidth cap: with that the engine would know the rate, and it has to
//! find out by how fast its socket is drained. The rate counts payload; TCP and IP headers are not
//! modelled, and neither are delay or loss. The sockets' buffers are small, as on a real link
//! of short delay, so that what waits does so in the engine and is felt there.
//! Must not: reorder or hold back anything beyond its rate.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, SockRef, Socket, Type};

/// Kept small: see above. The kernel doubles it.
const SOCKET_BUFFER_BYTES: usize = 256 * 1024;
const CHUNK_BYTES: usize = 64 * 1024;
/// What may pass at once after a pause.
const BURST_BYTES: f64 = 256.0 * 1024.0;
/// The same in time, for rates at which a sleep is longer than that.
const BURST_SECONDS: f64 = 0.002;

/// A running link; dropping it stops new connections.
#[derive(Debug)]
pub struct Link {
    port: u16,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    there: Bucket,
    back: Bucket,
    stop: AtomicBool,
}

/// One direction.
#[derive(Debug)]
struct Bucket {
    bytes_per_second: f64,
    /// When everything taken so far has left.
    drained_at: Mutex<Instant>,
    bytes: AtomicU64,
}

impl Bucket {
    fn new(bits_per_second: u64) -> Self {
        Self {
            bytes_per_second: bits_per_second as f64 / 8.0,
            drained_at: Mutex::new(Instant::now()),
            bytes: AtomicU64::new(0),
        }
    }

    /// Waits until `bytes` more may pass.
    fn take(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Relaxed);
        let seconds = bytes as f64 / self.bytes_per_second;
        let burst = (BURST_BYTES / self.bytes_per_second).max(BURST_SECONDS);
        let now = Instant::now();
        let wait = {
            let mut drained_at = self
                .drained_at
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *drained_at = (*drained_at).max(now) + Duration::from_secs_f64(seconds);
            drained_at.saturating_duration_since(now)
        };
        std::thread::sleep(wait.saturating_sub(Duration::from_secs_f64(burst)));
    }
}

impl Link {
    /// A link to a port on loopback.
    pub fn start(to_port: u16, bits_per_second: u64) -> Result<Self> {
        // Set before listening, the buffer size is what accepted connections begin with.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
        socket.listen(64)?;
        let listener = TcpListener::from(socket);
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            there: Bucket::new(bits_per_second),
            back: Bucket::new(bits_per_second),
            stop: AtomicBool::new(false),
        });
        let accepting = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("link".to_owned())
                .spawn(move || accept(&listener, to_port, &shared))
                .context("cannot start the link")?
        };
        Ok(Self {
            port,
            shared,
            accepting: Some(accepting),
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Bytes carried so far, both directions.
    pub fn bytes(&self) -> u64 {
        self.shared.there.bytes.load(Relaxed) + self.shared.back.bytes.load(Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn accept(listener: &TcpListener, to_port: u16, shared: &Arc<Shared>) {
    let look_again = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    while !shared.stop.load(Relaxed) {
        let mut waiting = [PollFd::new(listener, PollFlags::IN)];
        if !poll(&mut waiting, Some(&look_again)).is_ok_and(|ready| ready > 0) {
            continue;
        }
        // A connection that fails here closes, which both halves notice.
        let _ = listener
            .accept()
            .and_then(|(near, _)| connect(near, to_port, shared));
    }
}

fn connect(near: TcpStream, to_port: u16, shared: &Arc<Shared>) -> std::io::Result<()> {
    let far = TcpStream::connect((Ipv4Addr::LOCALHOST, to_port))?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
        SockRef::from(stream).set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    }
    let (near_out, far_in) = (near.try_clone()?, far.try_clone()?);
    let (there, back) = (shared.clone(), shared.clone());
    std::thread::Builder::new()
        .name("link-there".to_owned())
        .spawn(move || carry(near, far, &there.there))?;
    std::thread::Builder::new()
        .name("link-back".to_owned())
        .spawn(move || carry(far_in, near_out, &back.back))?;
    Ok(())
}

fn carry(mut from: TcpStream, mut to: TcpStream, bucket: &Bucket) {
    let mut buffer = vec![0; CHUNK_BYTES];
    // The end and an error of either side both end this direction; the halves see which it was.
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        bucket.take(len);
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_at_its_rate_over_all_connections_together() {
        let far = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("listens");
        let port = far.local_addr().expect("an address").port();
        // 8 MB/s: 2 MB on each of two connections are half a second, less a burst.
        let link = Link::start(port, 64_000_000).expect("a link");
        let start = Instant::now();
        let sinks: Vec<_> = (0..2)
            .map(|_| {
                let mut near =
                    TcpStream::connect((Ipv4Addr::LOCALHOST, link.port())).expect("connects");
                let (mut end, _) = far.accept().expect("accepts");
                std::thread::spawn(move || {
                    near.write_all(&vec![7; 2_000_000]).expect("writes");
                });
                std::thread::spawn(move || {
                    let mut bytes = Vec::new();
                    end.read_to_end(&mut bytes).expect("reads");
                    bytes
                })
            })
            .collect();
        for sink in sinks {
            assert!(sink.join().expect("no panic") == vec![7; 2_000_000]);
        }
        let seconds = start.elapsed().as_secs_f64();
        assert!((0.40..1.5).contains(&seconds), "{seconds}");
        assert_eq!(link.bytes(), 4_000_000);
    }
}
