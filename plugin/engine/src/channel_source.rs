//! One connection that a source QEMU (or libvirtd for it) opened to us.
//!
//! Owns: reading the stream, having it encoded, and writing the return path back. The steps of
//! a chunk: read and cut (here, in order), identified (by a worker), ordered (here, in order),
//! built (by a worker); the session's writer has the last one.
//! Must not: hold more than a few chunks of stream beyond what the peer granted credit for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::BufMut;
use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use vmgang_dedup::Member;
use vmgang_stream::{ConnectionKind, PAGE_BYTES, ReturnPath, Tokenizer};
use vmgang_wire::{Direction, FRAME_CREDIT_BYTES_MIN, Frame};

use crate::chunk::Chunk;
use crate::connection::HeavyFrame;
use crate::encode::{ChannelEncoder, Plan};
use crate::gate::{
    ACK_HEAD_START, CHUNK_BYTES, HELD_IDLE_BYTES, HELD_PAUSE, StoppedGuest, UnderWay, is_idle,
};
use crate::network::QemuConnection;
use crate::passes::{Passes, Seen};
use crate::source::{Shared, SourceEvent};

/// Room for a chunk and for the longest unit the tokenizer may leave behind.
const BUFFER_BYTES: usize = CHUNK_BYTES + 192 * 1024;
/// Chunks of a channel that are on their way at once, besides one for each worker: one is being
/// read, one waits for its place in the session.
const AHEAD: usize = 2;
/// And never more than this: QEMU takes what was read for sent.
const IN_FLIGHT_MAX: usize = 8;
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
    pub member: usize,
    /// Stream bytes the peer will take.
    pub credit: Arc<Semaphore>,
    /// Credit taken and not yet given back.
    pub outstanding: Arc<AtomicU64>,
    /// Return path bytes received.
    pub return_position: Arc<AtomicU64>,
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
    /// If it is that.
    _under_way: Option<UnderWay>,
    port: ChannelPort,
    returns: mpsc::UnboundedReceiver<ReturnEvent>,
}

/// What the two directions of a channel know of each other.
#[derive(Debug, Default)]
struct Shape {
    /// The stream was read to its end.
    stream_ended: watch::Sender<bool>,
    /// The guest is stopped: these bytes have right of way.
    stopped: watch::Sender<bool>,
    /// It is, or the stream is not understood and cannot tell.
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
            _under_way: main.then(|| shared.gate.begin(member)),
            port,
            returns,
        }
    }

    /// Serves the connection to its end and reports how it ended.
    pub(crate) async fn serve(mut self, shared: Arc<Shared>, (reader, writer): QemuConnection) {
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

    /// Reads, and has it encoded, until the stream has ended.
    async fn send_stream(
        &self,
        shared: &Arc<Shared>,
        reader: impl AsyncRead + Unpin,
        shape: &Shape,
    ) -> Result<(), ChannelError> {
        let encoder = Arc::new(ChannelEncoder::new(
            self.id,
            Member(self.member as u16),
            shared.common.clone(),
        ));
        let (identified, unordered) = mpsc::unbounded_channel();
        tokio::try_join!(
            self.read_stream(shared, reader, shape, &encoder, identified),
            order_chunks(shared, self.member, &self.port, shape, &encoder, unordered),
        )?;
        if self.main && !shape.may_end.load(Relaxed) {
            return Err(ChannelError::CutShort);
        }
        shared.queue.send(&Frame::Finish { channel: self.id });
        shape.stream_ended.send_replace(true);
        Ok(())
    }

    /// Reads chunks and hands them to the workers to be identified.
    async fn read_stream(
        &self,
        shared: &Arc<Shared>,
        mut reader: impl AsyncRead + Unpin,
        shape: &Shape,
        encoder: &Arc<ChannelEncoder>,
        identified: mpsc::UnboundedSender<oneshot::Receiver<InFlight>>,
    ) -> Result<(), ChannelError> {
        let member = self.member;
        let mut tokenizer = Tokenizer::new();
        let mut watch = StreamWatch {
            main: self.main,
            passes: Passes::default(),
            pages: 0,
            rested_after: 0,
            first_pass_done: false,
            unreadable: false,
            gone: false,
            stopped: None,
        };
        let mut released = shared.gate.released(member);
        let chunks = (shared.workers.threads() + AHEAD).min(IN_FLIGHT_MAX);
        let in_flight = Arc::new(Semaphore::new(chunks));
        let mut place = in_place(&in_flight).await?;
        let mut chunk = shared.chunks.take(BUFFER_BYTES);
        let mut last_read = CHUNK_BYTES;
        loop {
            let mut limit = CHUNK_BYTES;
            // A guest waits for each page that it has requested.
            let requested = tokenizer.kind() == ConnectionKind::Preempt;
            let mut urgent = requested || shared.gate.is_stopped(member);
            if !urgent {
                shared.gate.give_way(member).await;
                if watch.must_wait(shared, member, &tokenizer) {
                    shared.gate.until_held_or_released(member).await;
                }
                if shared.gate.holds(member) {
                    urgent = watch.first_pass_done;
                    let trickles = self.main
                        && watch.trickles(shared, member, &tokenizer, chunk.bytes.len(), last_read);
                    let rests = self.main && !trickles && watch.rests(&tokenizer);
                    if trickles {
                        limit = HELD_IDLE_BYTES;
                    }
                    if trickles || rests {
                        let release = released.wait_for(|released| *released);
                        if timeout(HELD_PAUSE, release).await.is_ok() {
                            tokio::time::sleep(ACK_HEAD_START).await;
                            limit = CHUNK_BYTES;
                        }
                    }
                }
            }
            let limit = limit.min(BUFFER_BYTES - chunk.bytes.len());
            let fill = fill(&mut reader, &mut chunk.bytes, limit, urgent)
                .await
                .map_err(ChannelError::Read)?;
            let flush = match fill {
                Fill::Bytes(bytes) => {
                    last_read = bytes;
                    false
                }
                Fill::Quiet | Fill::End => true,
            };
            let covered = chunk.tokenise(&mut tokenizer, flush);
            // Before the bytes wait for their turn: a stopped guest must not queue.
            watch.look(shared, member, &tokenizer, shape);
            if covered > 0 {
                let mut next = shared.chunks.take(BUFFER_BYTES);
                next.bytes.extend_from_slice(&chunk.bytes[covered..]);
                chunk.bytes.truncate(covered);
                let full = std::mem::replace(&mut chunk, next);
                let full = InFlight {
                    chunk: full,
                    requested,
                    _place: place,
                };
                let _ = identified.send(identify(shared, encoder, full));
                place = in_place(&in_flight).await?;
            }
            if matches!(fill, Fill::End) && chunk.bytes.is_empty() {
                shared.chunks.give(chunk);
                return Ok(());
            }
        }
    }
}

/// A chunk, and its place among those of its channel that are on their way.
struct InFlight {
    chunk: Chunk,
    /// Guests wait for its pages.
    requested: bool,
    _place: OwnedSemaphorePermit,
}

async fn in_place(in_flight: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, ChannelError> {
    let place = in_flight.clone().acquire_owned().await;
    place.map_err(|_| ChannelError::Session)
}

fn identify(
    shared: &Arc<Shared>,
    encoder: &Arc<ChannelEncoder>,
    mut full: InFlight,
) -> oneshot::Receiver<InFlight> {
    let (ladder, encoder) = (shared.ladder.clone(), encoder.clone());
    let work = move || {
        let begun = Instant::now();
        encoder.identify(&mut full.chunk, ladder.scarce());
        ladder.worked(begun.elapsed());
        full
    };
    // Handing it over takes as long as a good part of the work.
    if shared.has_many_channels() {
        let (done, identified) = oneshot::channel();
        let _ = done.send(work());
        return identified;
    }
    shared.workers.run(work)
}

/// What a member's stream has shown so far.
struct StreamWatch {
    main: bool,
    passes: Passes,
    /// If it is not the main one.
    pages: u64,
    /// Passes that had ended when it was last rested.
    rested_after: u64,
    first_pass_done: bool,
    unreadable: bool,
    /// Its guest has stopped here.
    gone: bool,
    /// For as long as it does not run anywhere.
    stopped: Option<StoppedGuest>,
}

/// A member that is to be held and has no acknowledgement to hold it by is not read from behind so
/// much of its first pass, in 16ths.
const HELD_IN_FIRST_PASS: u64 = 15;
/// What a held member that has converged sends in a pass: as much takes no time once it is let go.
const SMALL_PASS_PAGES: u64 = 64;

impl StreamWatch {
    /// Reports what the last chunk has shown.
    fn look(&mut self, shared: &Shared, member: usize, tokenizer: &Tokenizer, shape: &Shape) {
        let progress = tokenizer.progress();
        if !self.main {
            self.look_beside(shared, member, tokenizer, shape);
            return;
        }
        let beside = shared.gate.pages_beside(member);
        match self.passes.look(progress, beside, Instant::now()) {
            Seen::FirstPass { pages, of } => shared.gate.first_pass(member, pages, of),
            Seen::Passed { sent_bytes, took } => shared.report(SourceEvent::PassDone {
                member,
                sent_bytes,
                took,
            }),
            Seen::Nothing => {}
        }
        if progress.first_pass_done() && !self.first_pass_done {
            self.first_pass_done = true;
            shared.first_pass_done(member);
        }
        if progress.guest_stopped() && !self.gone {
            self.gone = true;
            self.stopped = Some(shared.gate.guest_stopped(member));
            shape.stopped.send_replace(true);
            shape.may_end.store(true, Relaxed);
            shared.live.guest_stopped(member);
            shared.report(SourceEvent::GuestStopped {
                member,
                at: Instant::now().into_std(),
            });
        }
        if progress.post_copy() && self.stopped.take().is_some() {
            // The guest runs again, elsewhere.
            shared.post_copy_begins();
        }
        // Without flushes of its own, QEMU before 8.1 does not tell where passes end.
        let no_passes = beside > 0 && !progress.multifd();
        let lost = tokenizer.is_opaque() || no_passes;
        if lost && !self.gone && !self.unreadable {
            self.unreadable = true;
            shape.may_end.store(true, Relaxed);
            shared.report(SourceEvent::Unreadable { member });
        }
    }

    /// Counts the pages of a connection that is not the main one.
    fn look_beside(
        &mut self,
        shared: &Shared,
        member: usize,
        tokenizer: &Tokenizer,
        shape: &Shape,
    ) {
        let progress = tokenizer.progress();
        let pages = progress.zero_records() + progress.page_records();
        let more = pages - std::mem::replace(&mut self.pages, pages);
        // Requested pages are of no pass.
        if more > 0 && tokenizer.kind() != ConnectionKind::Preempt {
            shared.gate.add_pages_beside(member, more);
        }
        if shared.gate.is_stopped(member) {
            shape
                .stopped
                .send_if_modified(|stopped| !std::mem::replace(stopped, true));
        }
    }

    /// Whether reading on could let the member switch over although it is to be held: its
    /// destination has sent no acknowledgement that could be withheld.
    fn must_wait(&mut self, shared: &Shared, member: usize, tokenizer: &Tokenizer) -> bool {
        let progress = tokenizer.progress();
        let pages = progress.zero_records() + progress.page_records();
        let sent = (pages + shared.gate.pages_beside(member)) * PAGE_BYTES as u64;
        let near_end =
            progress.total_bytes() > 0 && sent >= progress.total_bytes() / 16 * HELD_IN_FIRST_PASS;
        let waits = self.main
            && !self.first_pass_done
            && !self.unreadable
            && near_end
            && shared.gate.wants_hold(member);
        if waits {
            shared.report(SourceEvent::HeldInFirstPass { member });
        }
        waits
    }

    /// Whether a held QEMU has ended another pass, a small one: several of them are read together, which
    /// costs a fraction.
    fn rests(&mut self, tokenizer: &Tokenizer) -> bool {
        let progress = tokenizer.progress();
        let ended = std::mem::replace(&mut self.rested_after, progress.passes());
        self.first_pass_done
            && !self.unreadable
            && !progress.multifd()
            && ended != progress.passes()
            && progress.last_pass_pages() <= SMALL_PASS_PAGES
    }

    /// Whether a held QEMU makes nothing but empty passes now, as far as can be told; or, with pages on
    /// other connections, which flow at any time, small ones: a guest that dirties a page now and
    /// then is to have no thousands of passes, either.
    fn trickles(
        &self,
        shared: &Shared,
        member: usize,
        tokenizer: &Tokenizer,
        unread: usize,
        last_read: usize,
    ) -> bool {
        if self.unreadable {
            return last_read < UNREADABLE_IDLE_BYTES;
        }
        let beside = shared.gate.pages_beside(member);
        self.first_pass_done
            && is_idle(tokenizer.progress(), unread)
            && self.passes.since(beside) <= SMALL_PASS_PAGES
    }
}

/// Gives identified chunks their places in the session, one after the other, and has their
/// frames built.
async fn order_chunks(
    shared: &Arc<Shared>,
    member: usize,
    port: &ChannelPort,
    shape: &Shape,
    encoder: &Arc<ChannelEncoder>,
    mut unordered: mpsc::UnboundedReceiver<oneshot::Receiver<InFlight>>,
) -> Result<(), ChannelError> {
    while let Some(identified) = unordered.recv().await {
        // A worker panicked, or the session's threads are gone.
        let mut full = identified.await.map_err(|_| ChannelError::Session)?;
        // Chunks that were read before another guest stopped come after it all the same, until
        // this one's has stopped, too: two that gave way to each other would both wait.
        let mut stopped = shape.stopped.subscribe();
        if !*stopped.borrow() && !full.requested {
            tokio::select! {
                biased;
                () = shared.gate.give_way(member) => {}
                _ = stopped.wait_for(|stopped| *stopped) => {}
            }
        }
        let bytes = full.chunk.bytes.len();
        let permits = bytes as u32;
        let contended = || shared.backlog.available_permits() < bytes;
        shared.gate.pace(member, contended).await;
        let charge = bytes.max(FRAME_CREDIT_BYTES_MIN);
        let session_ended = |_| ChannelError::Session;
        port.credit
            .acquire_many(charge as u32)
            .await
            .map_err(session_ended)?
            .forget();
        let backlog = match full.requested {
            true => &shared.requested_backlog,
            false => &shared.backlog,
        };
        let mut backlog = backlog
            .clone()
            .acquire_many_owned(permits)
            .await
            .map_err(session_ended)?;
        port.outstanding.fetch_add(charge as u64, Relaxed);
        // From here to the fulfilled promise nothing waits and nothing fails: a place in the
        // session's order that stays empty would end the session.
        let (ordered, promise) = {
            let mut order = shared.order();
            let ordered = encoder.order(&mut full.chunk, &mut order);
            (ordered, shared.queue.promise())
        };
        let (ladder, encoder) = (shared.ladder.clone(), encoder.clone());
        let chunks = shared.chunks.clone();
        let plan = encoder.plan(&full.chunk, ladder.rung());
        let work = move || {
            let begun = Instant::now();
            let frame = encoder.build(&mut full.chunk, ordered, plan, ladder.worth());
            // The backlog is bytes on the wire: give back what encoding saved.
            if let Some(surplus) = bytes.checked_sub(frame.wire_len()) {
                drop(backlog.split(surplus));
            }
            let _ = promise.send(HeavyFrame { frame, backlog });
            ladder.worked(begun.elapsed());
            chunks.give(full.chunk);
        };
        match plan {
            Plan::Pass => work(),
            Plan::Plain | Plan::Stream(_) if shared.has_many_channels() => work(),
            _ => shared.workers.start(work),
        }
    }
    Ok(())
}

enum Fill {
    Bytes(usize),
    /// Nothing came for a while, and a torn record waits.
    Quiet,
    End,
}

/// Appends what is there to `bytes`, at most `limit`, waiting for something to be.
async fn fill(
    reader: &mut (impl AsyncRead + Unpin),
    bytes: &mut Vec<u8>,
    limit: usize,
    urgent: bool,
) -> io::Result<Fill> {
    let before = bytes.len();
    loop {
        let read = bytes.len() - before;
        if read == limit {
            return Ok(Fill::Bytes(read));
        }
        let mut room = (&mut *bytes).limit(limit - read);
        let more = reader.read_buf(&mut room);
        let more = if read >= SMALL_READ_BYTES || (urgent && read > 0) {
            more.now_or_never()
        } else {
            match (read > 0, before > 0) {
                (true, _) => timeout(COMPANY, more).await.ok(),
                (false, true) => timeout(QUIET, more).await.ok(),
                (false, false) => Some(more.await),
            }
        };
        match more {
            Some(Ok(0)) if read == 0 => return Ok(Fill::End),
            // The end is read again, on its own.
            Some(Ok(0)) => return Ok(Fill::Bytes(read)),
            Some(Ok(_)) => {}
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Some(Err(error)) => return Err(error),
            None if read > 0 => return Ok(Fill::Bytes(read)),
            None => return Ok(Fill::Quiet),
        }
    }
}

impl Channel {
    async fn write_returns(
        &self,
        shared: &Arc<Shared>,
        mut returns: mpsc::UnboundedReceiver<ReturnEvent>,
        mut writer: impl AsyncWrite + Unpin,
        shape: &Shape,
    ) -> Result<(), ChannelError> {
        let (channel, member) = (self.id, self.member);
        let mut released = shared.gate.released(member);
        let mut path = ReturnPath::new(!*released.borrow());
        let mut waiting: Vec<u8> = Vec::new();
        let (mut finished, mut arrived) = (false, false);
        loop {
            if *released.borrow() {
                path.release();
            }
            let passable = path.passable(&waiting);
            if path.ack_withheld() && shared.gate.withhold_ack(member) {
                shared.report(SourceEvent::AckWithheld { member });
            }
            if path.arrived() && !std::mem::replace(&mut arrived, true) {
                // Before QEMU knows, and libvirt has it run there.
                shared.report(SourceEvent::Arrived { member });
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
                biased;
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
                biased;
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
