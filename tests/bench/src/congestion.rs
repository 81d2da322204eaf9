//! Somebody else's traffic on the link: datagrams at a fixed rate from one host to the other, which
//! nothing slows down.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use serde::{Deserialize, Serialize};
use vmgang_lab::Lab;

/// Of one datagram, without headers.
const PAYLOAD: usize = 1400;
/// Ethernet, IP and UDP headers, as interface counters have them.
const HEADERS: u64 = 14 + 20 + 8;
/// More than the link's queue holds: what does not fit there is lost, and nobody waits for it.
const SOCKET_BUFFER: usize = 16 << 20;
const TICK: Duration = Duration::from_millis(2);

/// What became of the traffic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Delivered {
    pub sent_bytes: u64,
    /// As the link's counters have them.
    pub received_bytes: u64,
}

impl Delivered {
    pub fn share(&self) -> f64 {
        self.received_bytes as f64 / self.sent_bytes as f64
    }
}

/// Traffic from host a to host b, until it is dropped.
#[derive(Debug)]
pub struct Congestion {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Congestion {
    pub fn start(lab: &Lab, bits_per_second: u64) -> Result<Congestion> {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let (from, to) = (a.udp_socket()?, b.udp_socket()?);
        from.connect((b.address(), to.local_addr()?.port()))?;
        set_socket_send_buffer_size_force(&from, SOCKET_BUFFER)?;
        set_socket_recv_buffer_size_force(&to, SOCKET_BUFFER)?;
        from.set_nonblocking(true)?;
        to.set_read_timeout(Some(Duration::from_millis(100)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let sending = {
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            std::thread::spawn(move || send(&from, bits_per_second, &stop, &sent))
        };
        let receiving = {
            let (stop, received) = (Arc::clone(&stop), Arc::clone(&received));
            std::thread::spawn(move || receive(&to, &stop, &received))
        };
        Ok(Congestion {
            stop,
            sent,
            received,
            threads: vec![sending, receiving],
        })
    }

    /// Since it started.
    pub fn so_far(&self) -> Delivered {
        Delivered {
            sent_bytes: self.sent.load(Ordering::Relaxed),
            received_bytes: self.received.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Congestion {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It has nothing to tell.
            let _ = thread.join();
        }
    }
}

fn send(socket: &UdpSocket, bits_per_second: u64, stop: &AtomicBool, sent: &AtomicU64) {
    let datagram = [0x5a; PAYLOAD];
    let bytes_per_second = bits_per_second as f64 / 8.0;
    let start = Instant::now();
    let mut total = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_secs_f64() * bytes_per_second) as u64;
        while total < due {
            // A full queue is a lost datagram like any other.
            let _ = socket.send(&datagram);
            total += PAYLOAD as u64 + HEADERS;
            sent.store(total, Ordering::Relaxed);
        }
        std::thread::sleep(TICK);
    }
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, received: &AtomicU64) {
    let mut buffer = [0; PAYLOAD];
    while !stop.load(Ordering::Relaxed) {
        // Nothing for a while is no end.
        if let Ok(length) = socket.recv(&mut buffer) {
            received.fetch_add(length as u64 + HEADERS, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_counted() {
        let (from, to) = (
            UdpSocket::bind("127.0.0.1:0").expect("a socket"),
            UdpSocket::bind("127.0.0.1:0").expect("a socket"),
        );
        from.connect(to.local_addr().expect("its address"))
            .expect("an address");
        let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| send(&from, 800_000, &stop, &sent));
            while sent.load(Ordering::Relaxed) < 20_000 {
                std::thread::sleep(TICK);
            }
            stop.store(true, Ordering::Relaxed);
        });
        // 100 kB/s: never more than was due, whatever else the machine does.
        let due = start.elapsed().as_secs_f64() * 100_000.0;
        let total = sent.load(Ordering::Relaxed) as f64;
        assert!(total <= due + (PAYLOAD as f64 + HEADERS as f64), "{total}");
        let mut buffer = [0; 2000];
        assert_eq!(to.recv(&mut buffer).expect("a datagram"), PAYLOAD);
    }
}
