//! A peer connection as frames: an ordered queue out, a bounded reader in.
//!
//! Owns: the order of outgoing frames, keep-alive in both directions, the bandwidth cap.
//! Must not: know what frames mean; what it times is for `ladder`, which does.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use vmgang_wire::{Frame, FrameHeader, HEADER_BYTES, WireError};

use crate::ladder::{FrameWay, LinkWatch};
use crate::lanes::Load;
use crate::processors::Processors;
use crate::seal::{Sealed, Sealer, Unsealed};

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

/// What is queued.
pub(crate) enum Outgoing {
    Frame(Vec<u8>),
    Promised(oneshot::Receiver<HeavyFrame>),
    /// Sealed before it was queued here.
    Sealed(SealedFrame, Load),
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

impl QueuedFrames {
    /// The next frame in the order; `None` when the queue was dropped.
    pub(crate) async fn next(&mut self) -> Option<Outgoing> {
        self.receiver.recv().await
    }
}

impl FrameQueue {
    /// Queues a light frame. A closed queue means the session has ended, which every user
    /// of it learns in its own way.
    pub(crate) fn send(&self, frame: &Frame<'_>) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.send_encoded(bytes);
    }

    /// Queues a light frame that is encoded already.
    pub(crate) fn send_encoded(&self, bytes: Vec<u8>) {
        let _ = self.sender.send(Outgoing::Frame(bytes));
    }

    /// Queues a frame that was sealed, for a writer that seals none. The load is dropped when it is
    /// written.
    pub(crate) fn send_sealed(&self, frame: SealedFrame, load: Load) {
        let _ = self.sender.send(Outgoing::Sealed(frame, load));
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
    processors: Processors,
    /// When the cap allows the next frame.
    free_at: Instant,
}

impl HeavySide {
    pub(crate) fn new(
        sealer: Sealer,
        watch: LinkWatch,
        cap: BandwidthCap,
        processors: Processors,
    ) -> Self {
        Self {
            sealer,
            watch,
            cap,
            processors,
            free_at: Instant::now(),
        }
    }
}

/// A heavy frame as it is sent. It holds its share of the backlog until it is dropped.
pub(crate) struct SealedFrame {
    pub parts: Sealed,
    way: FrameWay,
    sealed: Instant,
    _backlog: OwnedSemaphorePermit,
}

impl HeavySide {
    /// Seals the next frame of the session as soon as it is there and the cap allows it. `begun`
    /// is when waiting for it began.
    pub(crate) async fn seal(
        &mut self,
        begun: Instant,
        promised: oneshot::Receiver<HeavyFrame>,
    ) -> io::Result<SealedFrame> {
        // Its place in the order cannot be filled by anything else.
        let lost = |_| io::Error::other("a frame of this session was lost");
        let HeavyFrame { frame, mut backlog } = promised.await.map_err(lost)?;
        let ready = Instant::now();
        let (stream_bytes, payload_bytes) = (frame.stream_len as usize, frame.raw_len);
        let parts = match self.sealer.compresses(&frame) {
            true => working(|| self.sealer.seal(frame))?,
            false => self.sealer.seal(frame)?,
        };
        // The backlog is bytes on the wire: give back what the stream has saved.
        if let Some(surplus) = backlog.num_permits().checked_sub(parts.len()) {
            drop(backlog.split(surplus));
        }
        let sealed = Instant::now();
        // Not with a time that has come: the timer rounds up to a millisecond.
        if self.free_at > sealed {
            sleep_until(self.free_at).await;
        }
        self.free_at = self.free_at.max(Instant::now()) + self.cap.time_for(parts.len());
        Ok(SealedFrame {
            way: FrameWay {
                waited: ready - begun,
                sealed: sealed - ready,
                written: Duration::ZERO,
                stream_bytes,
                payload_bytes,
                wire_bytes: parts.len(),
            },
            parts,
            sealed,
            _backlog: backlog,
        })
    }

    /// Takes note that a frame found its way.
    pub(crate) fn left(&mut self, frame: &SealedFrame) {
        let way = FrameWay {
            written: frame.sealed.elapsed(),
            ..frame.way
        };
        let spare = || self.processors.spare_percent();
        self.watch.frame(self.sealer.ladder(), &way, spare);
    }
}

/// Writes queued frames until the queue is dropped (returns `Ok`) or something breaks.
pub(crate) async fn write_frames(
    mut writer: impl AsyncWrite + Unpin,
    mut queue: QueuedFrames,
    mut heavy: Option<HeavySide>,
) -> io::Result<()> {
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
        match (next, &mut heavy) {
            (Outgoing::Frame(bytes), _) => writer.write_all(&bytes).await?,
            (Outgoing::Promised(promised), Some(side)) => {
                let frame = side.seal(begun, promised).await?;
                write_parts(&mut writer, &frame.parts).await?;
                side.left(&frame);
                side.sealer.written(frame.parts);
            }
            (Outgoing::Promised(_), None) => {
                return Err(io::Error::other("a frame has nobody here to seal it"));
            }
            (Outgoing::Sealed(frame, load), _) => {
                write_parts(&mut writer, &frame.parts).await?;
                load.written(frame);
            }
        }
    }
    writer.flush().await?;
    writer.shutdown().await
}

/// Writes both parts of a frame, at once where the connection can.
async fn write_parts(writer: &mut (impl AsyncWrite + Unpin), frame: &Sealed) -> io::Result<()> {
    if frame.tail.is_empty() {
        return writer.write_all(&frame.head).await;
    }
    let mut parts = [IoSlice::new(&frame.head), IoSlice::new(&frame.tail)];
    let mut left = &mut parts[..];
    while !left.is_empty() {
        match writer.write_vectored(left).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => IoSlice::advance_slices(&mut left, written),
        }
    }
    Ok(())
}

/// Lets other tasks of this thread go on elsewhere during work of a millisecond. Too dear for
/// anything shorter: it hands the thread's tasks to another one.
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

/// Bytes that are read from a connection at once for small frames. Large bodies are read past
/// them.
pub(crate) const READ_BYTES: usize = 32 * 1024;

/// Reads frames, each into a buffer that grows to the largest allowed body at most.
pub(crate) struct FrameReader<R> {
    reader: BufReader<R>,
    body: Vec<u8>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self {
            reader: BufReader::with_capacity(READ_BYTES, reader),
            body: Vec::new(),
        }
    }

    /// The connection after the frames: what was read ahead comes first.
    pub(crate) fn into_rest(self) -> BufReader<R> {
        self.reader
    }

    /// The next frame. Not cancel-safe: drop the reader with the future.
    pub(crate) async fn next(&mut self) -> Result<Frame<'_>, ReadError> {
        let header = self.read().await?;
        Ok(self.frame(&header)?)
    }

    /// The header of the next frame, and its body into this reader. Not cancel-safe.
    pub(crate) async fn read(&mut self) -> Result<FrameHeader, ReadError> {
        timeout(SILENCE_MAX, self.fill())
            .await
            .map_err(|_| ReadError::Silent)?
    }

    /// The frame that was read last.
    pub(crate) fn frame(&self, header: &FrameHeader) -> Result<Frame<'_>, WireError> {
        Frame::decode(header, &self.body)
    }

    /// Takes the body that was read last, and leaves a buffer for the next one.
    pub(crate) fn swap_body(&mut self, empty: Vec<u8>) -> Vec<u8> {
        std::mem::replace(&mut self.body, empty)
    }

    /// Waits for a first byte of the next frame. Cancel-safe, as opposed to reading it.
    pub(crate) async fn ready(&mut self) -> Result<(), ReadError> {
        let bytes = timeout(SILENCE_MAX, self.reader.fill_buf())
            .await
            .map_err(|_| ReadError::Silent)?
            .map_err(closed)?;
        match bytes.is_empty() {
            true => Err(ReadError::Closed),
            false => Ok(()),
        }
    }

    async fn fill(&mut self) -> Result<FrameHeader, ReadError> {
        let mut header = [0; HEADER_BYTES];
        self.reader.read_exact(&mut header).await.map_err(closed)?;
        let header = FrameHeader::decode(&header)?;
        // The length was checked against the kind's maximum.
        let len = header.body_len as usize;
        self.body.clear();
        self.body.reserve(len);
        let mut rest = (&mut self.reader).take(len as u64);
        while self.body.len() < len {
            if rest.read_buf(&mut self.body).await.map_err(closed)? == 0 {
                return Err(ReadError::Closed);
            }
        }
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
        let ladder = Arc::new(Ladder::new(Rung::None, false, 1));
        let live = Arc::new(Live::new(1));
        let sealer = Sealer::new(None, ladder, live, Buffers::default()).unwrap();
        let watch = LinkWatch::new(Rung::None, Rung::None);
        Some(HeavySide::new(sealer, watch, cap, Processors::unknown()))
    }

    fn frame(len: usize) -> Unsealed {
        Unsealed {
            channel: 1,
            member: 0,
            sequence: 0,
            stream_len: 1,
            digest: [0; 16],
            buffer: vec![7; len],
            tail: Vec::new(),
            compression: Compression::None,
            stream: None,
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
