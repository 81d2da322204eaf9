//! One direction of a simulated connection: bytes that take their time, and what goes wrong with
//! them.
//!
//! Owns: order, delay, back-pressure, and faults at given bytes. Must not: know what the bytes mean.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::random::Random;

/// How a direction is when nothing goes wrong.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Bytes under way at most.
    pub capacity: usize,
    /// In milliseconds, for each write one in between; never overtaking within the direction.
    pub delay_ms: (u64, u64),
    /// 0 is no limit.
    pub bytes_per_ms: u64,
}

impl Shape {
    /// A unix socket.
    pub const fn local(capacity: usize) -> Shape {
        Shape {
            capacity,
            delay_ms: (0, 0),
            bytes_per_ms: 0,
        }
    }
}

/// What goes wrong at one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// One bit of it is another one.
    Flip(u8),
    /// The connection is reset there; what is under way is lost.
    Cut,
    /// This direction ends there, as if in order; what is written later is refused.
    Truncate,
    /// Nothing from there on arrives for so many milliseconds; `None` for ever.
    Stall(Option<u64>),
}

/// Where something goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub at: u64,
    pub trouble: Trouble,
}

#[derive(Debug)]
struct State {
    shape: Shape,
    random: Random,
    faults: Vec<Fault>,
    chunks: VecDeque<(Instant, Vec<u8>)>,
    under_way: usize,
    written: u64,
    /// The next byte cannot arrive before.
    free_at: Instant,
    stalled: bool,
    /// No more is written.
    ended: bool,
    truncated: bool,
    reader_gone: bool,
    reset: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()]
            .into_iter()
            .flatten()
        {
            waker.wake();
        }
    }

    fn reset(&mut self) {
        self.reset = true;
        self.chunks.clear();
        self.wake();
    }

    /// Bytes that can be written before the next fault.
    fn next_fault(&mut self) -> Option<Fault> {
        self.faults.sort_by_key(|fault| fault.at);
        self.faults.first().copied()
    }
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Both directions of a connection, for those who break it.
#[derive(Debug, Clone)]
pub struct Link(Shared, Shared);

impl Link {
    /// Bytes written so far, to the far end and back.
    pub fn written(&self) -> (u64, u64) {
        (lock(&self.0).written, lock(&self.1).written)
    }

    /// Both ends learn that it is gone; what is under way is lost.
    pub fn reset(&self) {
        lock(&self.0).reset();
        lock(&self.1).reset();
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct End {
    pub reader: ReadEnd,
    pub writer: WriteEnd,
}

#[derive(Debug)]
pub struct ReadEnd {
    state: Shared,
    sleep: Option<Pin<Box<Sleep>>>,
}

#[derive(Debug)]
pub struct WriteEnd {
    state: Shared,
    other: Shared,
}

/// Makes a connection; each direction with its shape and faults: first from the first end to the
/// second.
pub fn connection(directions: [(Shape, Vec<Fault>); 2], random: &mut Random) -> (End, End, Link) {
    let [there, back] = directions.map(|(shape, faults)| {
        Arc::new(Mutex::new(State {
            shape,
            random: random.fork(),
            faults,
            chunks: VecDeque::new(),
            under_way: 0,
            written: 0,
            free_at: Instant::now(),
            stalled: false,
            ended: false,
            truncated: false,
            reader_gone: false,
            reset: false,
            reader: None,
            writer: None,
        }))
    });
    let end = |read: &Shared, write: &Shared| End {
        reader: ReadEnd {
            state: read.clone(),
            sleep: None,
        },
        writer: WriteEnd {
            state: write.clone(),
            other: read.clone(),
        },
    };
    let (near, far) = (end(&back, &there), end(&there, &back));
    (near, far, Link(there, back))
}

impl Drop for ReadEnd {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.reader_gone = true;
        state.chunks.clear();
        state.wake();
    }
}

impl Drop for WriteEnd {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.ended = true;
        state.wake();
    }
}

impl AsyncRead for ReadEnd {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let mut state = lock(&this.state);
        loop {
            if state.reset {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            let Some((due, _)) = state.chunks.front() else {
                if state.ended || state.truncated {
                    return Poll::Ready(Ok(()));
                }
                state.reader = Some(cx.waker().clone());
                return Poll::Pending;
            };
            let due = *due;
            if due > Instant::now() {
                let sleep = this
                    .sleep
                    .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
                if sleep.deadline() != due {
                    sleep.as_mut().reset(due);
                }
                state.reader = Some(cx.waker().clone());
                if sleep.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                continue;
            }
            let Some((_, chunk)) = state.chunks.front_mut() else {
                continue;
            };
            let take = chunk.len().min(buf.remaining());
            buf.put_slice(&chunk[..take]);
            chunk.drain(..take);
            if chunk.is_empty() {
                state.chunks.pop_front();
            }
            state.under_way -= take;
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
            return Poll::Ready(Ok(()));
        }
    }
}

impl AsyncWrite for WriteEnd {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = lock(&self.state);
        loop {
            if state.reset || state.reader_gone || state.truncated {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let Some(fault) = state.next_fault().filter(|fault| fault.at <= state.written) else {
                break;
            };
            match fault.trouble {
                // Dealt with when the byte is written.
                Trouble::Flip(_) => break,
                Trouble::Cut => {
                    state.reset();
                    drop(state);
                    lock(&self.other).reset();
                    return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
                }
                Trouble::Truncate => {
                    state.truncated = true;
                    state.wake();
                }
                Trouble::Stall(ms) => {
                    let time = Duration::from_millis(ms.unwrap_or(1 << 34));
                    state.free_at = state.free_at.max(Instant::now() + time);
                    state.stalled |= ms.is_none();
                    state.faults.remove(0);
                }
            }
        }
        let room = state.shape.capacity.saturating_sub(state.under_way);
        if room == 0 && !buf.is_empty() {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let mut take = buf.len().min(room);
        let mut flip = None;
        if let Some(fault) = state.next_fault() {
            // Two may be at one byte.
            let before = fault.at.saturating_sub(state.written) as usize;
            match fault.trouble {
                Trouble::Flip(bit) if before < take => {
                    flip = Some((before, bit));
                    take = before + 1;
                    state.faults.remove(0);
                }
                Trouble::Flip(_) => {}
                _ => take = take.min(before),
            }
        }
        let mut chunk = buf[..take].to_vec();
        if let Some((byte, bit)) = flip {
            chunk[byte] ^= 1 << (bit % 8);
        }
        let (least, most) = state.shape.delay_ms;
        let delay = state.random.between(least, most);
        let due = (Instant::now() + Duration::from_millis(delay)).max(state.free_at);
        let rate = state.shape.bytes_per_ms;
        let time = (take as u64 * 1000).checked_div(rate).unwrap_or(0);
        state.free_at = due + Duration::from_micros(time);
        let due = state.free_at;
        state.written += take as u64;
        state.under_way += take;
        if take > 0 {
            state.chunks.push_back((due, chunk));
        }
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(take))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = lock(&self.state);
        // What says farewell after a stall that never ends is not heard either.
        state.ended = !state.stalled;
        state.wake();
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for End {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for End {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}
