//! The source half of a session: one job's members on their way to one peer.
//!
//! Owns: the handshake, the listening sockets of the members, routing of what the peer
//! sends, and the life of all of it: when the session ends, every channel is closed, which
//! QEMU answers by going on at the source.
//! Must not: decide about switchover; [`SourceSession::release`] is called from outside.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::timeout;
use vmgang_dedup::{DigestKey, PageDigest, slots_in};
use vmgang_wire::{
    CHANNELS_MAX, Direction, FEATURE_CONNECTIONS, Frame, MEMBERS_MAX, RETURN_CREDIT_BYTES,
};

use crate::ambient::AmbientSocket;
use crate::buffers::Buffers;
use crate::channel_source::{Channel, ChannelPort, ReturnEvent};
use crate::chunk::Chunks;
use crate::compression::{Budget, Rung};
use crate::connection::{
    BandwidthCap, FrameQueue, FrameReader, HeavySide, frame_queue, write_frames,
};
use crate::counters::Live;
use crate::encode::Common;
use crate::frame_digest::{FrameDigest, of_return};
use crate::gate::{CHUNK_BYTES, Gate};
use crate::greeting::{Greeted, WELCOME_TIMEOUT, greet, not_offered};
use crate::ladder::{Ladder, LinkWatch};
use crate::lanes::{Lanes, REASON, open_further, watch_further, why};
use crate::network::{Network, QemuListener};
use crate::offering::Offering;
use crate::order::SessionOrder;
use crate::pool::Pool;
use crate::runtime_dir::{JobDir, Side, Sockets};
use crate::seal::Sealer;
pub use crate::source_api::{Hold, SourceError, SourceEvent, SourceOptions};
use crate::{MemberOutcome, Remains, SessionCounters, StagedContents, Techniques, Workers, Zstd};

const GOODBYE_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes that may wait for the link. More would hide from QEMU how fast it is, and make
/// the last pass of a stopped guest queue behind everybody else's.
pub(crate) const BACKLOG_BYTES: usize = 2 * 1024 * 1024;
/// In post-copy, when guests wait for pages behind it: a few milliseconds of a link of 1 Gbit/s. No
/// chunk is larger.
const POST_COPY_BACKLOG_BYTES: usize = 512 * 1024;
/// More than that where many workers build at the same time, but never more than this.
const BACKLOG_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What the tasks of a session share.
pub(crate) struct Shared {
    pub(crate) common: Common,
    pub(crate) chunks: Chunks,
    pub(crate) workers: Workers,
    pub(crate) live: Arc<Live>,
    pub(crate) ladder: Arc<Ladder>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) queue: FrameQueue,
    pub(crate) backlog: Arc<Semaphore>,
    /// The same for pages that guests wait for.
    pub(crate) requested_backlog: Arc<Semaphore>,
    /// The first post-copy makes the backlog small, to its end.
    post_copy: AtomicBool,
    backlog_bytes: usize,
    offering: Offering,
    members: usize,
    /// Members that have sent every page once.
    first_passes: AtomicUsize,
    channels: Mutex<HashMap<u32, ChannelPort>>,
    open_channels: AtomicUsize,
    next_channel: AtomicU32,
    channel_credit_bytes: u32,
    outcomes: Mutex<HashMap<u16, oneshot::Sender<Option<MemberOutcome>>>>,
    events: mpsc::UnboundedSender<SourceEvent>,
    closing: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn order(&self) -> MutexGuard<'_, SessionOrder> {
        self.offering.order()
    }

    /// A member has sent every page once.
    pub(crate) fn first_pass_done(&self, member: usize) {
        self.gate.first_pass_done(member);
        // Not if its migration had to begin anew.
        let first = self.live.first_pass_done(member);
        if first && self.first_passes.fetch_add(1, Relaxed) + 1 == self.members {
            self.order().clear_expectations();
        }
        self.report(SourceEvent::FirstPassDone { member });
    }

    /// A guest runs at the destination and fetches its memory from here: what waits for the link
    /// must not be much any more.
    pub(crate) fn post_copy_begins(&self) {
        if self.post_copy.swap(true, Relaxed) {
            return;
        }
        let surplus = self.backlog_bytes.saturating_sub(POST_COPY_BACKLOG_BYTES) as u32;
        let backlog = self.backlog.clone();
        tokio::spawn(async move {
            if let Ok(permits) = backlog.acquire_many_owned(surplus).await {
                permits.forget();
            }
        });
    }

    pub(crate) fn report(&self, event: SourceEvent) {
        // Nobody listening any more is nobody's trouble.
        let _ = self.events.send(event);
    }

    /// Announces a new channel; ids reach the peer in order.
    pub(crate) fn open_channel(
        &self,
        member: usize,
    ) -> (u32, ChannelPort, mpsc::UnboundedReceiver<ReturnEvent>) {
        let (returns, receiver) = mpsc::unbounded_channel();
        let port = ChannelPort {
            member,
            credit: Arc::new(Semaphore::new(self.channel_credit_bytes as usize)),
            outstanding: Arc::new(AtomicU64::new(0)),
            return_position: Arc::default(),
            return_outstanding: Arc::new(AtomicU64::new(0)),
            returns,
        };
        let mut channels = lock(&self.channels);
        let channel = self.next_channel.fetch_add(1, Relaxed) + 1;
        channels.insert(channel, port.clone());
        self.open_channels.store(channels.len(), Relaxed);
        self.queue.send(&Frame::Open {
            channel,
            member: member as u16,
        });
        (channel, port, receiver)
    }

    pub(crate) fn close_channel(&self, channel: u32) {
        let mut channels = lock(&self.channels);
        channels.remove(&channel);
        self.open_channels.store(channels.len(), Relaxed);
    }

    /// Whether the channels keep all processors busy, each with one chunk at a time.
    pub(crate) fn has_many_channels(&self) -> bool {
        self.open_channels.load(Relaxed) >= self.workers.threads()
    }
}

/// An open session. Dropping it closes everything at once; the peer cleans up as well.
pub struct SourceSession {
    shared: Arc<Shared>,
    cap: BandwidthCap,
    sockets: Sockets,
    task: JoinHandle<()>,
    abort: AbortOnDrop,
    contents_there: u64,
    has_stage: bool,
}

/// How a session was left.
#[derive(Debug, Default)]
pub struct SessionEnd {
    pub counters: SessionCounters,
    /// Contents that this host has of it, if its techniques needed them.
    pub remains: Option<Remains>,
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl std::fmt::Debug for SourceSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceSession").finish_non_exhaustive()
    }
}

impl SourceSession {
    /// Connects to the peer, agrees on the job, and listens for the members' QEMUs.
    pub async fn connect(
        options: SourceOptions,
    ) -> Result<(Self, mpsc::UnboundedReceiver<SourceEvent>), SourceError> {
        Self::open(options, None).await
    }

    /// The same; `given` are sockets that are there already, one for each member.
    pub(crate) async fn open(
        mut options: SourceOptions,
        given: Option<Vec<AmbientSocket>>,
    ) -> Result<(Self, mpsc::UnboundedReceiver<SourceEvent>), SourceError> {
        let members = options.offer.members.len();
        let sockets = given.as_ref().map_or(options.socket_owners.len(), Vec::len);
        if members != sockets || !(1..=MEMBERS_MAX).contains(&members) {
            return Err(SourceError::Members { members });
        }
        let live = Arc::new(Live::new(members));
        let key = session_key(&*options.network);
        let page_key = options.transport.page_key();
        let several = options.connections.get() > 1;
        let stage = options.stage.take();
        let purpose = match given {
            Some(_) => vmgang_wire::Purpose::Ambient,
            None => vmgang_wire::Purpose::Migrate {
                stage: stage.as_ref().map(StagedContents::to_wire),
            },
        };
        if let Some(stage) = &stage {
            // The window is there already: it can be neither larger nor smaller.
            options.offer.window_budget_bytes = stage.window_budget_bytes;
        }
        let mut offer = options.offer.to_hello(key.0, purpose, page_key.id());
        if several {
            offer.features |= FEATURE_CONNECTIONS;
        }
        let Greeted {
            mut reader,
            writer,
            welcome,
            announced,
        } = greet(
            &*options.network,
            &options.peer,
            &options.transport,
            offer,
            &live,
        )
        .await?;
        let takes_stage = stage.as_ref().map(|stage| stage.window_budget_bytes);
        if (welcome.more_connections.is_some() && !several)
            || (welcome.stage && takes_stage != Some(welcome.window_budget_bytes))
        {
            return Err(not_offered(&options.peer));
        }
        let further = match &welcome.more_connections {
            Some(more) => open_further(&options, &live, more).await,
            None => Vec::new(),
        };

        let workers = options.workers.threads();
        let budget = Budget::of(welcome.window_budget_bytes);
        let (rung, lowest, highest) = match options.techniques.zstd {
            Zstd::Off => (Rung::None, Rung::None, Rung::None),
            Zstd::Adaptive => (Rung::Frame, Rung::None, Rung::Hard),
            Zstd::Fixed(rung) => (rung, rung, rung),
        };
        let possible = |rung| match budget.window_log {
            Some(_) => rung,
            None => Sealer::rung_without_stream(rung),
        };
        let ladder = Arc::new(Ladder::new(
            possible(rung),
            options.techniques.zstd == Zstd::Adaptive,
            workers,
        ));
        let buffers = Buffers::default();
        let cap = BandwidthCap::default();
        cap.set(options.bandwidth_bytes_per_s);
        let (queue, queued) = frame_queue();
        let sealer = Sealer::new(
            budget.window_log,
            ladder.clone(),
            live.clone(),
            buffers.clone(),
        )
        .map_err(SourceError::Compression)?;
        let watch = LinkWatch::new(possible(lowest), possible(highest));
        let heavy = HeavySide::new(sealer, watch, cap.clone(), options.workers.processors());

        let (sockets, listeners) = match given {
            Some(given) => {
                let (paths, listeners) = given.into_iter().map(AmbientSocket::into_parts).unzip();
                (Sockets::Elsewhere(paths), listeners)
            }
            None => listen(&options)?,
        };
        // They end with the session task, and the session with the first of them that ends.
        let mut ends = JoinSet::new();
        if further.is_empty() {
            ends.spawn(async move { why(write_frames(writer, queued, Some(heavy)).await) });
        } else {
            let mut lanes = Lanes::new(buffers.clone());
            lanes.add(0, writer, &mut ends);
            for (connection, (reader, writer)) in further {
                lanes.add(connection, writer, &mut ends);
                ends.spawn(watch_further(reader));
            }
            ends.spawn(async move { why(lanes.spread(queued, heavy).await) });
        }
        let (events, events_receiver) = mpsc::unbounded_channel();
        let scanned = options.scanned.with_key(&page_key);
        let staged = stage.filter(|_| welcome.stage).map(|stage| {
            let mut order = stage.into_order();
            order.begin(scanned.snapshots());
            order
        });
        let has_stage = staged.is_some();
        let mut order = staged.unwrap_or_else(|| {
            let slots = slots_in(budget.page_window_bytes);
            SessionOrder::new(slots, &options.techniques, options.keep_contents)
        });
        order.adopt(&announced);
        if let Some(census) = scanned.census() {
            order.expect(census);
        }
        let backlog_bytes = ((workers + 2) * CHUNK_BYTES).clamp(BACKLOG_BYTES, BACKLOG_BYTES_MAX);
        let shared = Arc::new(Shared {
            common: Common {
                digest: FrameDigest::new(&key),
                key: page_key.digest_key().clone(),
                scanned,
                techniques: options.techniques,
                buffers,
                compressors: Pool::default(),
                sharing: live.sharing.clone(),
            },
            chunks: Chunks::default(),
            workers: options.workers,
            live,
            ladder,
            gate: Arc::new(Gate::new(members, options.hold)),
            offering: Offering::new(order, queue.clone()),
            queue,
            first_passes: AtomicUsize::new(0),
            members,
            backlog: Arc::new(Semaphore::new(backlog_bytes)),
            requested_backlog: Arc::new(Semaphore::new(BACKLOG_BYTES)),
            post_copy: AtomicBool::new(false),
            backlog_bytes,
            channels: Mutex::new(HashMap::new()),
            open_channels: AtomicUsize::new(0),
            next_channel: AtomicU32::new(0),
            channel_credit_bytes: welcome.channel_credit_bytes,
            outcomes: Mutex::new(HashMap::new()),
            events,
            closing: AtomicBool::new(false),
        });
        let mut accepting = JoinSet::new();
        for (member, listener) in listeners.into_iter().enumerate() {
            accepting.spawn(accept(shared.clone(), member, listener));
        }
        let session = shared.clone();
        let task = tokio::spawn(async move {
            let mut receiving = std::pin::pin!(receive(&session, &mut reader));
            let error = tokio::select! {
                biased;
                error = &mut receiving => error,
                Some(ended) = ends.join_next() => {
                    let ended = ended.unwrap_or_else(|error| error.to_string());
                    // A peer that hangs up says why, if it can.
                    timeout(REASON, receiving).await.unwrap_or(ended)
                }
            };
            // Closes every channel and listener: QEMU goes on at the source.
            accepting.shutdown().await;
            session.backlog.close();
            session.requested_backlog.close();
            session.offering.close();
            lock(&session.channels).clear();
            lock(&session.outcomes).clear();
            if !session.closing.load(Relaxed) {
                session.report(SourceEvent::SessionFailed { error });
            }
        });
        Ok((
            Self {
                shared,
                cap,
                sockets,
                abort: AbortOnDrop(task.abort_handle()),
                task,
                contents_there: welcome.contents,
                has_stage,
            },
            events_receiver,
        ))
    }

    /// The URI for libvirt's `migrate_uri`: valid on both hosts, listening here already.
    pub fn migrate_uri(&self, member: usize) -> String {
        format!("unix://{}", self.sockets.socket(member).display())
    }

    /// Lets every member switch over: the commit point of a job.
    pub fn release(&self) {
        self.shared.gate.release_all();
    }

    /// Lets one member switch over.
    pub fn release_member(&self, member: usize) {
        self.shared.gate.release(member);
    }

    /// The member's migration has failed and begins anew: it is held as before.
    pub fn restart_member(&self, member: usize) {
        self.shared.gate.restart(member);
    }

    /// Nobody connects to the member's socket any more; a connection there is already stays.
    pub fn close_socket(&self, member: usize) {
        // It may be gone; that is what is wanted.
        let _ = std::fs::remove_file(self.sockets.socket(member));
    }

    /// Connections of QEMUs that are open.
    pub(crate) fn open_channels(&self) -> usize {
        self.shared.open_channels.load(Relaxed)
    }

    /// Caps what is written to the peer.
    pub fn set_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.cap.set(bytes_per_s);
    }

    /// What has been moved and saved so far.
    pub fn counters(&self) -> SessionCounters {
        self.shared.live.snapshot()
    }

    /// Whether it began with what was staged.
    pub fn has_stage(&self) -> bool {
        self.has_stage
    }

    /// Whether the destination may have contents without being sent them.
    pub fn may_find_contents(&self) -> bool {
        self.contents_there > 0
    }

    /// What offers contents, also while others use the session.
    pub fn offers(&self) -> Offers {
        Offers(self.shared.clone())
    }

    /// Asks the destination's libvirt how a member's migration ended.
    pub async fn member_outcome(
        &self,
        member: usize,
    ) -> Result<Option<MemberOutcome>, SourceError> {
        let (answer, answered) = oneshot::channel();
        lock(&self.shared.outcomes).insert(member as u16, answer);
        self.shared.queue.send(&Frame::OutcomeRequest {
            member: member as u16,
        });
        match timeout(WELCOME_TIMEOUT, answered).await {
            Ok(Ok(outcome)) => Ok(outcome),
            _ => Err(SourceError::Ended),
        }
    }

    /// Says goodbye to the peer, and returns the final counters once it has hung up.
    pub async fn close(mut self) -> SessionEnd {
        self.shared.closing.store(true, Relaxed);
        self.shared.queue.send(&Frame::Goodbye);
        let _ = timeout(GOODBYE_TIMEOUT, &mut self.task).await;
        drop(self.abort);
        let order = std::mem::replace(
            &mut *self.shared.order(),
            SessionOrder::new(0, &Techniques::NONE, false),
        );
        SessionEnd {
            counters: self.shared.live.snapshot(),
            remains: order.into_remains(),
        }
    }
}

/// A session's offers of contents.
pub struct Offers(Arc<Shared>);

impl Offers {
    /// Offers contents to the destination, in this order, which takes those it has into its window.
    /// Returns how many these were, when it has answered.
    pub async fn offer(self, digests: Vec<PageDigest>) -> usize {
        self.0.offering.offer_all(&digests).await
    }
}

/// Makes the job's sockets and listens at them.
fn listen(options: &SourceOptions) -> Result<(Sockets, Vec<Box<dyn QemuListener>>), SourceError> {
    let owners = &options.socket_owners;
    let directory = JobDir::create(
        &options.runtime_dir,
        options.offer.job,
        owners,
        Side::Source,
    );
    let sockets = Sockets::OfJob(directory.map_err(|error| SourceError::Sockets {
        path: options.runtime_dir.clone(),
        error,
    })?);
    let listeners = owners.iter().enumerate().map(|(member, owner)| {
        let path = sockets.socket(member);
        let listener = options.network.listen(&path, *owner);
        listener.map_err(|error| SourceError::Sockets { path, error })
    });
    let listeners = listeners.collect::<Result<_, _>>()?;
    Ok((sockets, listeners))
}

/// 32 bytes nobody else can guess.
pub(crate) fn session_key(network: &dyn Network) -> DigestKey {
    let mut key = [0; 32];
    for half in key.chunks_exact_mut(16) {
        half.copy_from_slice(&network.secret());
    }
    DigestKey(key)
}

/// Accepts a member's connections and serves each until it ends.
async fn accept(shared: Arc<Shared>, member: usize, mut listener: Box<dyn QemuListener>) {
    let mut channels = JoinSet::new();
    loop {
        while channels.try_join_next().is_some() {}
        let connection = match listener.accept().await {
            Ok(connection) => connection,
            Err(error) => {
                tracing::warn!(member, %error, "accepting a migration connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if shared.next_channel.load(Relaxed) >= CHANNELS_MAX {
            tracing::warn!(member, "refused a connection: too many in this session");
            continue;
        }
        while channels.try_join_next().is_some() {}
        // Opened here, not in the task: QEMU tells its connections apart by their order. With all
        // of them gone, a migration begins anew.
        let main = channels.is_empty();
        let channel = Channel::open(&shared, member, main);
        channels.spawn(channel.serve(shared.clone(), connection));
    }
}

/// Routes what the peer sends; returns why that ended.
async fn receive(shared: &Shared, reader: &mut FrameReader<impl AsyncRead + Unpin>) -> String {
    loop {
        let frame = match reader.next().await {
            Ok(frame) => frame,
            Err(error) => return error.to_string(),
        };
        if let Err(error) = route(shared, frame) {
            return error;
        }
    }
}

fn route(shared: &Shared, frame: Frame<'_>) -> Result<(), String> {
    let port = |channel: u32| lock(&shared.channels).get(&channel).cloned();
    match frame {
        Frame::Credit {
            channel,
            direction: Direction::Stream,
            bytes,
        } => {
            let Some(port) = port(channel) else {
                return Ok(());
            };
            let granted = u64::from(bytes);
            let outstanding = &port.outstanding;
            if outstanding
                .fetch_update(Relaxed, Relaxed, |bytes| bytes.checked_sub(granted))
                .is_err()
            {
                return Err("the peer credits more than it was sent".to_owned());
            }
            port.credit.add_permits(bytes as usize);
        }
        Frame::Return {
            channel,
            digest,
            bytes,
        } => {
            if let Some(port) = port(channel) {
                let right = shared.common.digest.of(bytes);
                let position = port.return_position.load(Relaxed);
                if of_return(right, channel, port.member, position) != digest {
                    return Err("the digest of a return path does not match".to_owned());
                }
                let len = bytes.len() as u64;
                port.return_position.fetch_add(len, Relaxed);
                let before = port.return_outstanding.fetch_add(len, Relaxed);
                if before + len > RETURN_CREDIT_BYTES as u64 {
                    return Err("the peer sent more return path than it was granted".to_owned());
                }
                let _ = port.returns.send(ReturnEvent::Bytes(bytes.to_vec()));
            }
        }
        Frame::Finish { channel } => {
            if let Some(port) = port(channel) {
                let _ = port.returns.send(ReturnEvent::Finished);
            }
        }
        Frame::Reset { channel, text } => {
            if let Some(port) = port(channel) {
                let _ = port.returns.send(ReturnEvent::Reset(text));
            }
        }
        Frame::Outcome { member, outcome } => {
            if let Some(answer) = lock(&shared.outcomes).remove(&member) {
                let _ = answer.send(outcome.map(MemberOutcome::from));
            }
        }
        Frame::Have(have) => shared.offering.answered(&have)?,
        Frame::Alive => {}
        Frame::Refuse { text, .. } => return Err(text),
        Frame::Stage(_)
        | Frame::Offer(_)
        | Frame::Announce(_)
        | Frame::Hello(_)
        | Frame::Welcome(_)
        | Frame::Open { .. }
        | Frame::Data { .. }
        | Frame::Credit { .. }
        | Frame::OutcomeRequest { .. }
        | Frame::Goodbye
        | Frame::Join(_)
        | Frame::Elsewhere { .. }
        | Frame::Libvirt
        | Frame::Connected
        | Frame::Control => {
            return Err("the peer sent a frame that only a source sends".to_owned());
        }
    }
    Ok(())
}
