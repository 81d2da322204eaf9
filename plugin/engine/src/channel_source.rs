//! One connection that a source QEMU (or libvirtd for it) opened to us.
//!
//! Owns: reading the stream, having it encoded, and writing the return path back.
//! Must not: hold more than a chunk of stream beyond what the peer granted credit for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;
use vmgang_dedup::Member;
use vmgang_stream::ReturnPath;
use vmgang_wire::{Direction, Frame};

use crate::connection::HeavyFrame;
use crate::encode::ChannelEncoder;
use crate::gate::{
    ACK_HEAD_START, CHUNK_BYTES, HELD_IDLE_BYTES, HELD_PAUSE, StoppedGuest, is_idle,
};
use crate::source::{Shared, SourceEvent};

/// Room for a chunk and for the longest unit the tokenizer may leave behind.
const BUFFER_BYTES: usize = CHUNK_BYTES + 192 * 1024;
/// A smaller read waits a moment for company.
const SMALL_READ_BYTES: usize = 64 * 1024;
/// That moment.
const COMPANY: Duration = Duration::from_millis(1);
/// After so long without a byte, the start of a record that is not complete is sent on.
const QUIET: Duration = Duration::from_millis(5);

/// A held stream that is not understood counts as idle when no more than this came at once.
const UNREADABLE_IDLE_BYTES: usize = 4096;

/// What arrives for a channel from the peer.
#[derive(Debug)]
pub(crate) enum ReturnEvent {
    Bytes(Vec<u8>),
    Finished,
    Reset(String),
}

/// What the session keeps of an open channel.
#[derive(Debug, Clone)]
pub(crate) struct ChannelPort {
    /// Stream bytes the peer will take.
    pub credit: Arc<Semaphore>,
    /// Stream bytes sent and not yet credited back.
    pub outstanding: Arc<AtomicU64>,
    /// Return path bytes received and not yet credited back.
    pub return_outstanding: Arc<AtomicU64>,
    pub returns: mpsc::UnboundedSender<ReturnEvent>,
}

/// Why a channel ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    #[error("reading the migration stream failed: {0}")]
    Read(io::Error),
    #[error("writing the return path failed: {0}")]
    Write(io::Error),
    #[error("the destination gave up the connection: {0}")]
    Peer(String),
    #[error("the peer session has ended")]
    Session,
    #[error("setting up compression failed: {0}")]
    Encoder(io::Error),
    #[error("the source QEMU ended its stream before the guest was stopped")]
    CutShort,
    #[error("the destination QEMU hung up before the guest was stopped")]
    DestinationQuit,
}

/// One accepted connection, announced to the peer.
pub(crate) struct Channel {
    id: u32,
    member: usize,
    /// The member's first connection, which carries the migration stream itself.
    main: bool,
    port: ChannelPort,
    returns: mpsc::UnboundedReceiver<ReturnEvent>,
}

/// What the two directions of a channel know of each other.
#[derive(Debug, Default)]
struct Shape {
    /// The stream was read to its end.
    stream_ended: watch::Sender<bool>,
    /// The guest is stopped, or the stream is not understood and cannot tell.
    may_end: AtomicBool,
}

impl Channel {
    /// Takes the next channel id and tells the peer.
    pub(crate) fn open(shared: &Shared, member: usize, main: bool) -> Self {
        let (id, port, returns) = shared.open_channel(member);
        shared.report(SourceEvent::ChannelOpened { member });
        Self {
            id,
            member,
            main,
            port,
            returns,
        }
    }

    /// Serves the connection to its end and reports how it ended.
    pub(crate) async fn serve(mut self, shared: Arc<Shared>, connection: UnixStream) {
        let (reader, writer) = connection.into_split();
        let shape = Shape::default();
        let (_, unused) = mpsc::unbounded_channel();
        let returns = std::mem::replace(&mut self.returns, unused);
        let result = tokio::try_join!(
            self.send_stream(&shared, reader, &shape),
            self.write_returns(&shared, returns, writer, &shape),
        );
        shared.close_channel(self.id);
        let member = self.member;
        match result {
            Ok(_) => shared.report(SourceEvent::StreamEnded { member }),
            Err(error) => {
                let error = error.to_string();
                shared.queue.send(&Frame::Reset {
                    channel: self.id,
                    text: error.clone(),
                });
                shared.report(SourceEvent::MemberFailed { member, error });
            }
        }
    }

    async fn send_stream(
        &self,
        shared: &Arc<Shared>,
        reader: OwnedReadHalf,
        shape: &Shape,
    ) -> Result<(), ChannelError> {
        let member = self.member;
        let mut encoder = ChannelEncoder::new(
            self.id,
            Member(member as u16),
            shared.key.clone(),
            shared.techniques,
            shared.buffers.clone(),
        )
        .map_err(ChannelError::Encoder)?;
        let mut watch = MainStream {
            main: self.main,
            first_pass_done: false,
            unreadable: false,
            stopped: None,
        };
        let mut released = shared.gate.released(member);
        let mut buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        let mut filled = 0;
        let mut last_read = CHUNK_BYTES;
        loop {
            let mut limit = CHUNK_BYTES;
            let mut urgent = watch.stopped.is_some();
            if !urgent {
                shared.gate.give_way().await;
                if shared.gate.holds(member) {
                    urgent = watch.first_pass_done;
                    if watch.trickles(&encoder, filled, last_read) {
                        limit = HELD_IDLE_BYTES;
                        let release = released.wait_for(|released| *released);
                        if timeout(HELD_PAUSE, release).await.is_ok() {
                            tokio::time::sleep(ACK_HEAD_START).await;
                            limit = CHUNK_BYTES;
                        }
                    }
                }
            }
            let end = (filled + limit).min(buffer.len());
            let begun = Instant::now();
            let fill = fill(&reader, &mut buffer[..end], filled, urgent)
                .await
                .map_err(ChannelError::Read)?;
            let read = Instant::now();
            let flush = match fill {
                Fill::Bytes(bytes) => {
                    filled += bytes;
                    last_read = bytes;
                    false
                }
                Fill::Quiet | Fill::End => true,
            };
            let covered = tokio::task::block_in_place(|| encoder.chunk(&buffer[..filled], flush));
            let hashed = read.elapsed();
            // Before the bytes wait for their turn: a stopped guest must not queue.
            watch.look(shared, member, &encoder, shape);
            if covered > 0 {
                let bytes = &buffer[..covered];
                let built = send_chunk(shared, &self.port, &mut encoder, bytes).await?;
                shared.ladder.channel(read - begun, hashed + built);
                buffer.copy_within(covered..filled, 0);
                filled -= covered;
            }
            if matches!(fill, Fill::End) && filled == 0 {
                if self.main && !shape.may_end.load(Relaxed) {
                    return Err(ChannelError::CutShort);
                }
                shared.queue.send(&Frame::Finish { channel: self.id });
                shape.stream_ended.send_replace(true);
                return Ok(());
            }
        }
    }
}

/// What a member's main stream has shown so far.
struct MainStream {
    main: bool,
    first_pass_done: bool,
    unreadable: bool,
    stopped: Option<StoppedGuest>,
}

impl MainStream {
    /// Reports what the last chunk has shown.
    fn look(&mut self, shared: &Shared, member: usize, encoder: &ChannelEncoder, shape: &Shape) {
        let progress = encoder.progress();
        if progress.first_pass_done() && !self.first_pass_done {
            self.first_pass_done = true;
            shared.live.first_pass_done(member);
            shared.report(SourceEvent::FirstPassDone { member });
        }
        if progress.guest_stopped() && self.stopped.is_none() {
            self.stopped = Some(shared.gate.guest_stopped());
            shape.may_end.store(true, Relaxed);
            shared.live.guest_stopped(member);
            shared.report(SourceEvent::GuestStopped {
                member,
                at: Instant::now(),
            });
        }
        if self.main && encoder.is_opaque() && !self.first_pass_done && !self.unreadable {
            self.unreadable = true;
            shape.may_end.store(true, Relaxed);
            shared.report(SourceEvent::Unreadable { member });
        }
    }

    /// Whether a held QEMU makes nothing but empty passes now, as far as can be told.
    fn trickles(&self, encoder: &ChannelEncoder, unread: usize, last_read: usize) -> bool {
        if self.unreadable {
            return last_read < UNREADABLE_IDLE_BYTES;
        }
        self.first_pass_done && is_idle(encoder.progress(), unread)
    }
}

/// Returns how long building took.
async fn send_chunk(
    shared: &Arc<Shared>,
    port: &ChannelPort,
    encoder: &mut ChannelEncoder,
    bytes: &[u8],
) -> Result<Duration, ChannelError> {
    let permits = bytes.len() as u32;
    let session_ended = |_| ChannelError::Session;
    port.credit
        .acquire_many(permits)
        .await
        .map_err(session_ended)?
        .forget();
    let mut backlog = shared
        .backlog
        .clone()
        .acquire_many_owned(permits)
        .await
        .map_err(session_ended)?;
    port.outstanding.fetch_add(bytes.len() as u64, Relaxed);
    // From here to the fulfilled promise nothing waits and nothing fails: a place in the
    // session's order that stays empty would end the session.
    let begun = Instant::now();
    tokio::task::block_in_place(|| {
        let (ordered, promise) = {
            let mut order = shared.order();
            (encoder.order(bytes, &mut order), shared.queue.promise())
        };
        let frame = encoder.build(bytes, ordered, shared.ladder.rung());
        // The backlog is bytes on the wire: give back what encoding saved.
        if let Some(surplus) = (permits as usize).checked_sub(frame.buffer.len()) {
            drop(backlog.split(surplus));
        }
        let _ = promise.send(HeavyFrame { frame, backlog });
    });
    Ok(begun.elapsed())
}

enum Fill {
    Bytes(usize),
    /// Nothing came for a while, and a torn record waits.
    Quiet,
    End,
}

/// Reads into `buffer[filled..]` what is there, waiting for something to be.
async fn fill(
    reader: &OwnedReadHalf,
    buffer: &mut [u8],
    filled: usize,
    urgent: bool,
) -> io::Result<Fill> {
    let mut read = 0;
    loop {
        if filled + read == buffer.len() {
            return Ok(Fill::Bytes(read));
        }
        match reader.try_read(&mut buffer[filled + read..]) {
            Ok(0) if read == 0 => return Ok(Fill::End),
            // The end is read again, on its own.
            Ok(0) => return Ok(Fill::Bytes(read)),
            Ok(bytes) => read += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if read >= SMALL_READ_BYTES || (urgent && read > 0) {
                    return Ok(Fill::Bytes(read));
                }
                let patience = match (read > 0, filled > 0) {
                    (true, _) => Some(COMPANY),
                    (false, true) => Some(QUIET),
                    (false, false) => None,
                };
                match patience {
                    None => reader.readable().await?,
                    Some(patience) => match timeout(patience, reader.readable()).await {
                        Ok(readable) => readable?,
                        Err(_) if read > 0 => return Ok(Fill::Bytes(read)),
                        Err(_) => return Ok(Fill::Quiet),
                    },
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Channel {
    async fn write_returns(
        &self,
        shared: &Arc<Shared>,
        mut returns: mpsc::UnboundedReceiver<ReturnEvent>,
        mut writer: OwnedWriteHalf,
        shape: &Shape,
    ) -> Result<(), ChannelError> {
        let (channel, member) = (self.id, self.member);
        let mut released = shared.gate.released(member);
        let mut path = ReturnPath::new(!*released.borrow());
        let mut waiting: Vec<u8> = Vec::new();
        let mut finished = false;
        loop {
            if *released.borrow() {
                path.release();
            }
            let passable = path.passable(&waiting);
            if path.ack_withheld() && shared.gate.withhold_ack(member) {
                shared.report(SourceEvent::AckWithheld { member });
            }
            if passable > 0 {
                match writer.write_all(&waiting[..passable]).await {
                    Ok(()) => {}
                    // QEMU has written all it had and left without reading the rest.
                    Err(_) if *shape.stream_ended.borrow() => {}
                    Err(error) => return Err(ChannelError::Write(error)),
                }
                waiting.drain(..passable);
                self.port
                    .return_outstanding
                    .fetch_sub(passable as u64, Relaxed);
                shared.queue.send(&Frame::Credit {
                    channel,
                    direction: Direction::Return,
                    bytes: passable as u32,
                });
            }
            if finished {
                if self.main && !shape.may_end.load(Relaxed) {
                    return Err(ChannelError::DestinationQuit);
                }
                // What is still withheld stays so: its destination is gone.
                let _ = writer.shutdown().await;
                break;
            }
            tokio::select! {
                event = returns.recv() => match event {
                    Some(ReturnEvent::Bytes(bytes)) => waiting.extend_from_slice(&bytes),
                    Some(ReturnEvent::Finished) => finished = true,
                    Some(ReturnEvent::Reset(text)) => return Err(ChannelError::Peer(text)),
                    None => return Err(ChannelError::Session),
                },
                // The sender lives in `shared`; the top of the loop looks what changed.
                _ = released.changed() => {}
            }
        }
        // A destination that has hung up may still find out that it cannot take the stream.
        let mut ended = shape.stream_ended.subscribe();
        loop {
            tokio::select! {
                event = returns.recv() => match event {
                    Some(ReturnEvent::Reset(text)) => return Err(ChannelError::Peer(text)),
                    Some(_) => {}
                    None => return Err(ChannelError::Session),
                },
                _ = ended.wait_for(|ended| *ended) => return Ok(()),
            }
        }
    }
}
