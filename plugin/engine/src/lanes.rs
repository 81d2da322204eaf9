//! The connections of a source session side by side: which one takes which frame.
//!
//! The first connection has the order of all frames; where a DATA frame takes another one, it has an
//! ELSEWHERE. The bandwidth cap and the backlog are one for all connections.
//!
//! Must not: change the order of frames, or seal two at the same time.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use vmgang_wire::{Frame, Join, MoreConnections};

use crate::buffers::Buffers;
use crate::connection::{
    FrameQueue, FrameReader, HeavySide, Outgoing, QueuedFrames, ReadError, SealedFrame,
    frame_queue, write_frames,
};
use crate::counters::Live;
use crate::greeting::open;
use crate::network::Connection;
use crate::peer::UNSENT_BYTES_MAX;
use crate::source::{SourceError, SourceOptions};

/// What waits for a connection is bounded by the backlog; a lane that has more than this is left
/// alone as long as it has.
const LANE_BYTES: usize = UNSENT_BYTES_MAX as usize;
/// The first connection is silent meanwhile, which the destination endures for 20 s.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// The destination ends all connections at once. The first one has the reason, and so long to tell.
pub(crate) const REASON: Duration = Duration::from_millis(200);

/// A connection, and what waits to be written to it.
struct Lane {
    /// Its number; 0 is the session's first.
    connection: u8,
    queue: FrameQueue,
    unsent: Arc<AtomicUsize>,
}

/// All connections of a session.
pub(crate) struct Lanes {
    /// The first one is the session's first.
    lanes: Vec<Lane>,
    /// A frame was written somewhere.
    room: Arc<Notify>,
    buffers: Buffers,
}

/// What a lane has to write.
pub(crate) struct Load {
    unsent: Arc<AtomicUsize>,
    room: Arc<Notify>,
    buffers: Buffers,
}

impl Load {
    /// The frame has left.
    pub(crate) fn written(self, frame: SealedFrame) {
        self.unsent.fetch_sub(frame.parts.len(), Relaxed);
        frame.parts.recycle(&self.buffers);
        self.room.notify_one();
    }
}

impl Lanes {
    pub(crate) fn new(buffers: Buffers) -> Self {
        Self {
            lanes: Vec::new(),
            room: Arc::default(),
            buffers,
        }
    }

    /// Adds a connection. What writes to it ends in `ends`, with why it ended.
    pub(crate) fn add(
        &mut self,
        connection: u8,
        writer: impl AsyncWrite + Send + Unpin + 'static,
        ends: &mut JoinSet<String>,
    ) {
        let (queue, queued) = frame_queue();
        self.lanes.push(Lane {
            connection,
            queue,
            unsent: Arc::default(),
        });
        ends.spawn(async move { why(write_frames(writer, queued, None).await) });
    }

    /// Seals queued frames in order and spreads them, until the queue is dropped or something
    /// breaks.
    pub(crate) async fn spread(
        self,
        mut queue: QueuedFrames,
        mut heavy: HeavySide,
    ) -> io::Result<()> {
        let Some(first) = self.lanes.first() else {
            return Err(io::Error::other("a session without a connection"));
        };
        let mut turn = 0;
        loop {
            let begun = Instant::now();
            match queue.next().await {
                Some(Outgoing::Frame(bytes)) => first.queue.send_encoded(bytes),
                Some(Outgoing::Promised(promised)) => {
                    let frame = heavy.seal(begun, promised).await?;
                    let lane = self.least_loaded(turn).await;
                    turn = usize::from(lane.connection) + 1;
                    heavy.left(&frame);
                    if lane.connection > 0 {
                        first.queue.send(&Frame::Elsewhere {
                            connection: lane.connection,
                        });
                    }
                    self.load(lane, frame);
                }
                Some(Outgoing::Sealed(..)) => {
                    return Err(io::Error::other("a frame was sealed twice"));
                }
                None => return Ok(()),
            }
        }
    }

    /// The connection with the least to write, as soon as one has room; of several the first from this
    /// place on.
    async fn least_loaded(&self, place: usize) -> &Lane {
        loop {
            let load = |lane: &&Lane| lane.unsent.load(Relaxed);
            let (before, from) = self.lanes.split_at(place % self.lanes.len().max(1));
            if let Some(least) = from.iter().chain(before).min_by_key(load)
                && load(&least) < LANE_BYTES
            {
                return least;
            }
            self.room.notified().await;
        }
    }

    fn load(&self, lane: &Lane, frame: SealedFrame) {
        lane.unsent.fetch_add(frame.parts.len(), Relaxed);
        let load = Load {
            unsent: lane.unsent.clone(),
            room: self.room.clone(),
            buffers: self.buffers.clone(),
        };
        lane.queue.send_sealed(frame, load);
    }
}

pub(crate) type Further = (
    FrameReader<ReadHalf<Box<dyn Connection>>>,
    WriteHalf<Box<dyn Connection>>,
);

/// Opens the further connections of a session: as many as are wanted here and granted there, less
/// those that fail. One connection would do. Each comes with its number.
pub(crate) async fn open_further(
    options: &SourceOptions,
    live: &Live,
    more: &MoreConnections,
) -> Vec<(u8, Further)> {
    let connections = usize::from(more.connections).min(options.connections.get()) as u8;
    let joined = join_all((1..connections).map(|connection| {
        let join = Join {
            job: options.offer.job,
            token: more.token,
            connection,
        };
        async move {
            match timeout(JOIN_TIMEOUT, join_session(options, live, join)).await {
                Ok(Ok(further)) => Some((connection, further)),
                Ok(Err(error)) => {
                    tracing::warn!(%error, connection, "going on without a further connection");
                    None
                }
                Err(_) => {
                    let peer = &options.peer;
                    tracing::warn!(
                        connection,
                        "going on without a further connection: {peer} does not answer there"
                    );
                    None
                }
            }
        }
    }))
    .await;
    joined.into_iter().flatten().collect()
}

async fn join_session(
    options: &SourceOptions,
    live: &Live,
    join: Join,
) -> Result<Further, SourceError> {
    let peer = || options.peer.clone();
    let connection = open(&*options.network, &options.peer, &options.transport, live).await?;
    let (reader, mut writer) = tokio::io::split(connection);
    let mut bytes = Vec::new();
    Frame::Join(join).encode(&mut bytes);
    let unreachable = |error| SourceError::Unreachable {
        peer: peer(),
        error,
    };
    writer.write_all(&bytes).await.map_err(unreachable)?;
    writer.flush().await.map_err(unreachable)?;
    let mut reader = FrameReader::new(reader);
    let reason = match reader.next().await {
        Ok(Frame::Alive) => return Ok((reader, writer)),
        Ok(Frame::Refuse { text, .. }) => {
            return Err(SourceError::Refused {
                peer: peer(),
                reason: text,
            });
        }
        Ok(_) => "it answers JOIN with another frame".to_owned(),
        Err(error) => format!("on a further connection: {error}"),
    };
    Err(SourceError::Protocol {
        peer: peer(),
        reason,
    })
}

/// Why writing ended.
pub(crate) fn why(written: io::Result<()>) -> String {
    match written {
        Ok(()) => "this side closed the connection".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// Reads from a further connection, on which only a sign of life comes; returns why that ended.
pub(crate) async fn watch_further(mut reader: FrameReader<impl AsyncRead + Unpin>) -> String {
    loop {
        let error = match reader.next().await {
            Ok(Frame::Alive) => continue,
            Ok(Frame::Refuse { text, .. }) => return text,
            Ok(_) => {
                return "the peer sent a frame that has no place on a further connection"
                    .to_owned();
            }
            Err(ReadError::Closed) => "the peer closed one of the connections".to_owned(),
            Err(error) => error.to_string(),
        };
        tokio::time::sleep(REASON).await;
        return error;
    }
}
