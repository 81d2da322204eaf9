//! A peer connection as frames: an ordered queue out, a bounded reader in.
//!
//! Owns: the order of outgoing frames, keep-alive in both directions, the bandwidth cap.
//! Must not: know what frames mean; what it times is for `ladder`, which does.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use vmgang_wire::{Frame, FrameHeader, HEADER_BYTES, WireError};

use crate::ladder::LinkWatch;
use crate::seal::{Sealer, Unsealed};

/// Something is sent at least this often.
const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// A peer that sent nothing for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// A frame that holds a share of the backlog until it is written.
#[derive(Debug)]
pub(crate) struct HeavyFrame {
    pub frame: Unsealed,
    pub backlog: OwnedSemaphorePermit,
}

enum Outgoing {
    Frame(Vec<u8>),
    Promised(oneshot::Receiver<HeavyFrame>),
}

/// Where frames are queued, in the order they will be written.
#[derive(Debug, Clone)]
pub(crate) struct FrameQueue {
    sender: mpsc::UnboundedSender<Outgoing>,
}

/// The other end of a [`FrameQueue`].
pub(crate) struct QueuedFrames {
    receiver: mpsc::UnboundedReceiver<Outgoing>,
}

/// A queue. It is unbounded in frames; what bounds it is the protocol: heavy frames need a
/// backlog permit, and light ones only answer what was received.
pub(crate) fn frame_queue() -> (FrameQueue, QueuedFrames) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (FrameQueue { sender }, QueuedFrames { receiver })
}

impl FrameQueue {
    /// Queues a light frame. A closed queue means the session has ended, which every user
    /// of it learns in its own way.
    pub(crate) fn send(&self, frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let _ = self.sender.send(Outgoing::Frame(bytes));
    }

    /// Reserves the next place in the order for a frame that is still being built.
    pub(crate) fn promise(&self) -> oneshot::Sender<HeavyFrame> {
        let (promise, promised) = oneshot::channel();
        let _ = self.sender.send(Outgoing::Promised(promised));
        promise
    }
}

/// Bytes per second that may be written; 0 is no cap.
#[derive(Debug, Clone, Default)]
pub(crate) struct BandwidthCap(Arc<AtomicU64>);

impl BandwidthCap {
    pub(crate) fn set(&self, bytes_per_s: Option<u64>) {
        self.0.store(bytes_per_s.unwrap_or(0), Relaxed);
    }

    fn time_for(&self, bytes: usize) -> Duration {
        match self.0.load(Relaxed) {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(bytes as f64 / rate as f64),
        }
    }
}

/// What a side that sends heavy frames needs besides.
pub(crate) struct HeavySide {
    pub sealer: Sealer,
    pub watch: LinkWatch,
    pub cap: BandwidthCap,
}

/// Writes queued frames until the queue is dropped (returns `Ok`) or something breaks.
pub(crate) async fn write_frames(
    mut writer: impl AsyncWrite + Unpin,
    mut queue: QueuedFrames,
    mut heavy: Option<HeavySide>,
) -> io::Result<()> {
    let mut free_at = Instant::now();
    loop {
        let begun = Instant::now();
        let next = match queue.receiver.try_recv() {
            Ok(next) => next,
            Err(mpsc::error::TryRecvError::Disconnected) => break,
            Err(mpsc::error::TryRecvError::Empty) => {
                writer.flush().await?;
                match timeout(ALIVE_EVERY, queue.receiver.recv()).await {
                    Ok(Some(next)) => next,
                    Ok(None) => break,
                    Err(_) => {
                        let mut bytes = Vec::new();
                        Frame::Alive.encode(&mut bytes);
                        Outgoing::Frame(bytes)
                    }
                }
            }
        };
        match next {
            Outgoing::Frame(bytes) => writer.write_all(&bytes).await?,
            Outgoing::Promised(promised) => {
                let (Ok(frame), Some(side)) = (promised.await, &mut heavy) else {
                    // Its place in the order cannot be filled by anything else.
                    return Err(io::Error::other("a frame of this session was lost"));
                };
                let HeavyFrame { frame, mut backlog } = frame;
                let ready = Instant::now();
                let bytes = working(|| side.sealer.seal(frame))?;
                // The backlog is bytes on the wire: give back what the stream has saved.
                if let Some(surplus) = backlog.num_permits().checked_sub(bytes.len()) {
                    drop(backlog.split(surplus));
                }
                let sealed = Instant::now();
                // Not with a time that has come: the timer rounds up to a millisecond.
                if free_at > sealed {
                    sleep_until(free_at).await;
                }
                free_at = free_at.max(Instant::now()) + side.cap.time_for(bytes.len());
                writer.write_all(&bytes).await?;
                drop(backlog);
                side.sealer.written(bytes);
                let (waited, sealing) = (ready - begun, sealed - ready);
                let ladder = side.sealer.ladder();
                side.watch.frame(ladder, waited, sealing, sealed.elapsed());
            }
        }
    }
    writer.flush().await?;
    writer.shutdown().await
}

/// Lets other tasks of this thread go on elsewhere during work of a millisecond.
fn working<T>(work: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer sent nothing for {} seconds", SILENCE_MAX.as_secs())]
    Silent,
    #[error(transparent)]
    Io(io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Reads frames, into one buffer that grows to the largest allowed body at most.
pub(crate) struct FrameReader<R> {
    reader: R,
    body: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self {
            reader,
            body: Vec::new(),
        }
    }

    /// The next frame. Not cancel-safe: drop the reader with the future.
    pub(crate) async fn next(&mut self) -> Result<Frame<'_>, ReadError> {
        let header = timeout(SILENCE_MAX, self.fill())
            .await
            .map_err(|_| ReadError::Silent)??;
        Ok(Frame::decode(&header, &self.body)?)
    }

    async fn fill(&mut self) -> Result<FrameHeader, ReadError> {
        let mut header = [0; HEADER_BYTES];
        self.reader.read_exact(&mut header).await.map_err(closed)?;
        let header = FrameHeader::decode(&header)?;
        // The length was checked against the kind's maximum.
        self.body.clear();
        self.body.resize(header.body_len as usize, 0);
        self.reader
            .read_exact(&mut self.body)
            .await
            .map_err(closed)?;
        Ok(header)
    }
}

fn closed(error: io::Error) -> ReadError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        ReadError::Closed
    } else {
        ReadError::Io(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffers::Buffers;
    use crate::compression::Rung;
    use crate::counters::Live;
    use crate::ladder::Ladder;
    use vmgang_wire::Compression;
    use vmgang_wire::payload::Costs;

    fn heavy(cap: BandwidthCap) -> Option<HeavySide> {
        let ladder = Arc::new(Ladder::new(Rung::None));
        let live = Arc::new(Live::new(1));
        let sealer = Sealer::new(None, ladder, live, Buffers::default()).unwrap();
        let watch = LinkWatch::new(Rung::None, Rung::None);
        Some(HeavySide { sealer, watch, cap })
    }

    fn frame(len: usize) -> Unsealed {
        Unsealed {
            channel: 1,
            member: 0,
            sequence: 0,
            stream_len: 1,
            digest: [0; 16],
            buffer: vec![7; len],
            compression: Compression::None,
            costs: Costs::default(),
            literal_bytes: 0,
            raw_len: len,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_cap_holds_on_average_and_can_be_lifted() {
        let (mut near, far) = tokio::io::duplex(1 << 22);
        let (queue, queued) = frame_queue();
        let cap = BandwidthCap::default();
        cap.set(Some(100_000));
        let writing = tokio::spawn(write_frames(far, queued, heavy(cap.clone())));
        let backlog = Arc::new(tokio::sync::Semaphore::new(10));
        let send = || {
            let backlog = backlog.clone().try_acquire_owned().unwrap();
            let frame = frame(50_000);
            queue.promise().send(HeavyFrame { frame, backlog }).unwrap();
        };
        let start = Instant::now();
        let mut received = vec![0; 200_000];
        (0..4).for_each(|_| send());
        near.read_exact(&mut received).await.unwrap();
        // The first leaves at once, each of the others half a second after the one before.
        let capped = start.elapsed();
        assert!(capped >= Duration::from_millis(1500), "{capped:?}");
        assert!(capped < Duration::from_millis(1600), "{capped:?}");
        cap.set(None);
        send();
        near.read_exact(&mut received[..50_000]).await.unwrap();
        let lifted = Instant::now();
        send();
        near.read_exact(&mut received[..50_000]).await.unwrap();
        assert!(lifted.elapsed() < Duration::from_millis(10));
        drop(queue);
        writing.await.unwrap().unwrap();
    }
}
