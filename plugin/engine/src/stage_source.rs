//! Contents on their way to a destination before any guest migrates.
//!
//! Owns: the session with the peer, the order of what is in its window, and the frames that fill it.
//! Must not: read guests. Who does gives it copies, which are hashed here: what is staged is what
//! was hashed, whatever the guest has written since.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::io::AsyncRead;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use vmgang_dedup::{Content, HashSimilarityDetector, PAGE_BYTES, Page, PageDigest, slots_in};
use vmgang_wire::payload::{self, Encoder, Place};
use vmgang_wire::{Compression, DATA_OVERHEAD_BYTES, Frame, TakenStage};

use crate::buffers::Buffers;
use crate::compression::{Budget, FrameCompressor, Rung};
use crate::connection::{
    BandwidthCap, FrameQueue, FrameReader, HeavyFrame, HeavySide, frame_queue, write_frames,
};
use crate::counters::Live;
use crate::frame_digest::FrameDigest;
use crate::greeting::{Greeted, greet, not_offered};
use crate::ladder::{Ladder, LinkWatch};
use crate::network::Network;
use crate::offering::Offering;
use crate::order::{Identity, SessionOrder};
use crate::pool::Pool;
use crate::seal::{Sealer, Unsealed};
use crate::source::{BACKLOG_BYTES, SourceError, session_key};
use crate::{Offer, PageKey, PeerAddress, Techniques, Transport, Workers, Zstd};

/// Pages that go into one frame.
pub const STAGE_PAGES_MAX: usize = 64;

/// What a stage needs to start.
#[derive(Debug)]
pub struct StageOptions {
    pub peer: PeerAddress,
    pub transport: Transport,
    /// Its job is the stage's id.
    pub offer: Offer,
    /// How long the destination keeps it at most.
    pub seconds: u32,
    pub techniques: Techniques,
    pub workers: Workers,
    /// Where the connection comes from.
    pub network: Arc<dyn Network>,
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// What has been staged so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StagePages {
    /// Contents that were sent.
    pub sent: u64,
    /// Contents that the destination had.
    pub found: u64,
    /// Bytes the two daemons exchanged, both directions, TLS included.
    pub wire_bytes: u64,
}

/// What was staged, for a migration to begin with. The destination keeps it as long as this is
/// there.
pub struct StagedContents {
    id: uuid::Uuid,
    frames: u64,
    /// Of the session, the zstd stream's part included.
    pub(crate) window_budget_bytes: u64,
    order: SessionOrder,
    /// Its end would be the end of the stage.
    _session: Session,
}

impl std::fmt::Debug for StagedContents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StagedContents")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl StagedContents {
    pub(crate) fn to_wire(&self) -> TakenStage {
        TakenStage {
            id: self.id,
            frames: self.frames,
        }
    }

    pub(crate) fn into_order(self) -> SessionOrder {
        self.order
    }
}

/// The tasks of a stage's session; they end with it.
struct Session {
    task: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A stage that is being filled, or kept. Dropping it frees it at the destination.
pub struct StageSession {
    id: uuid::Uuid,
    page_key: PageKey,
    window_budget_bytes: u64,
    contents_there: u64,
    offering: Arc<Offering>,
    queue: FrameQueue,
    backlog: Arc<Semaphore>,
    ladder: Arc<Ladder>,
    live: Arc<Live>,
    builder: Arc<Builder>,
    workers: Workers,
    cap: BandwidthCap,
    frames: AtomicU64,
    sent: AtomicU64,
    found: AtomicU64,
    ended: watch::Receiver<Option<String>>,
    session: Session,
}

impl std::fmt::Debug for StageSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageSession")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl StageSession {
    /// Connects to the peer and agrees on the stage.
    pub async fn connect(options: StageOptions) -> Result<Self, SourceError> {
        let live = Arc::new(Live::new(0));
        let key = session_key(&*options.network);
        let page_key = options.transport.page_key();
        let purpose = vmgang_wire::Purpose::Stage {
            seconds: options.seconds.max(1),
        };
        let hello = options.offer.to_hello(key.0, purpose, page_key.id());
        let Greeted {
            mut reader,
            writer,
            welcome,
            ..
        } = greet(
            &*options.network,
            &options.peer,
            &options.transport,
            hello,
            &live,
        )
        .await?;
        if welcome.more_connections.is_some() || welcome.stage || welcome.announced > 0 {
            return Err(not_offered(&options.peer));
        }
        let budget = Budget::of(welcome.window_budget_bytes);
        let (rung, lowest, highest) = match options.techniques.zstd {
            Zstd::Off => (Rung::None, Rung::None, Rung::None),
            Zstd::Adaptive => (Rung::Frame, Rung::Frame, Rung::Hard),
            Zstd::Fixed(rung) => (rung, rung, rung),
        };
        let possible = |rung| match budget.window_log {
            Some(_) => rung,
            None => Sealer::rung_without_stream(rung),
        };
        let ladder = Arc::new(Ladder::new(
            possible(rung),
            options.techniques.zstd == Zstd::Adaptive,
            options.workers.threads(),
        ));
        let buffers = Buffers::default();
        let cap = BandwidthCap::default();
        cap.set(options.bandwidth_bytes_per_s);
        let (queue, queued) = frame_queue();
        let (log, ladders, counts) = (budget.window_log, ladder.clone(), live.clone());
        let sealer =
            Sealer::new(log, ladders, counts, buffers.clone()).map_err(SourceError::Compression)?;
        let watch = LinkWatch::new(possible(lowest), possible(highest));
        let heavy = HeavySide::new(sealer, watch, cap.clone(), options.workers.processors());
        let slots = slots_in(budget.page_window_bytes);
        let order = SessionOrder::new(slots, &options.techniques, true);
        let offering = Arc::new(Offering::new(order, queue.clone()));
        let backlog = Arc::new(Semaphore::new(BACKLOG_BYTES));

        let (ends, ended) = watch::channel(None);
        let (answers, waiting) = (offering.clone(), backlog.clone());
        let task = tokio::spawn(async move {
            let mut writing = JoinSet::new();
            writing.spawn(write_frames(writer, queued, Some(heavy)));
            let error = tokio::select! {
                biased;
                error = receive(&answers, &mut reader) => error,
                written = writing.join_next() => match written {
                    Some(Ok(Err(error))) => error.to_string(),
                    _ => "writing to the peer ended".to_owned(),
                },
            };
            answers.close();
            waiting.close();
            ends.send_replace(Some(error));
        });
        Ok(Self {
            id: options.offer.job,
            window_budget_bytes: welcome.window_budget_bytes,
            contents_there: welcome.contents,
            offering,
            queue,
            backlog,
            ladder,
            live,
            builder: Arc::new(Builder {
                digest: FrameDigest::new(&key),
                detector: options
                    .techniques
                    .similar
                    .map(|of| HashSimilarityDetector::new(page_key.digest_key(), of)),
                buffers,
                compressors: Pool::default(),
                page_key: page_key.clone(),
            }),
            page_key,
            workers: options.workers,
            cap,
            frames: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            found: AtomicU64::new(0),
            ended,
            session: Session { task },
        })
    }

    /// What digests must be made with.
    pub fn page_key(&self) -> &PageKey {
        &self.page_key
    }

    /// Bytes of pages that it has room for.
    pub fn room_bytes(&self) -> u64 {
        Budget::of(self.window_budget_bytes).page_window_bytes
    }

    /// Whether the destination may have contents without being sent them.
    pub fn may_find_contents(&self) -> bool {
        self.contents_there > 0
    }

    /// Caps what is written to the peer.
    pub fn set_bandwidth(&self, bytes_per_s: Option<u64>) {
        self.cap.set(bytes_per_s);
    }

    /// Whether a content is staged already.
    pub fn has(&self, digest: &PageDigest) -> bool {
        self.offering.order().has(digest)
    }

    /// Offers contents, in this order; the destination takes those it has into the stage.
    pub async fn offer(&self, digests: &[PageDigest]) -> usize {
        let found = self.offering.offer_all(digests).await;
        self.found.fetch_add(found as u64, Relaxed);
        found
    }

    /// Says what the stage is to have: these contents with how often each will be asked for. What
    /// else it has makes room first.
    pub fn want(&self, contents: &[Content]) {
        self.offering.order().want(contents);
    }

    /// Stages at most [`STAGE_PAGES_MAX`] pages, copies that nobody writes to, if each is still what
    /// it was taken for. Returns how many of them were new and found room, once they are on their
    /// way.
    pub async fn send(
        &self,
        pages: Vec<u8>,
        digests: Vec<PageDigest>,
    ) -> Result<usize, SourceError> {
        let ended = |_| SourceError::Ended;
        let bytes = pages.len().min(STAGE_PAGES_MAX * PAGE_BYTES);
        let backlog = self.backlog.clone();
        let backlog = backlog
            .acquire_many_owned(bytes as u32)
            .await
            .map_err(|_| SourceError::Ended)?;
        let builder = self.builder.clone();
        let identify = move || {
            let identities = builder.identify(&pages);
            (pages, identities)
        };
        let (pages, identities) = self.workers.run(identify).await.map_err(ended)?;
        let mut kept = Kept::default();
        let promise = {
            let mut order = self.offering.order();
            let pages = whole_pages(&pages).zip(&identities).zip(&digests);
            for ((page, identity), wanted) in pages {
                if identity.digest == *wanted
                    && let Some(slot) = order.stage(identity, page)
                {
                    let slot = slot.0;
                    kept.payload
                        .page(Place::Body, payload::Content::Define { slot, page });
                    kept.pages.extend_from_slice(page);
                }
            }
            if kept.pages.is_empty() {
                return Ok(0);
            }
            kept.sequence = order.next_sequence();
            self.frames.fetch_add(1, Relaxed);
            self.queue.promise()
        };
        // From here on the frame must be sent.
        let count = kept.pages.len() / PAGE_BYTES;
        let (builder, rung) = (self.builder.clone(), self.ladder.rung());
        self.workers.start(move || {
            let frame = builder.build(kept, rung);
            let _ = promise.send(HeavyFrame { frame, backlog });
        });
        self.sent.fetch_add(count as u64, Relaxed);
        Ok(count)
    }

    /// What has been staged so far.
    pub fn counters(&self) -> StagePages {
        StagePages {
            sent: self.sent.load(Relaxed),
            found: self.found.load(Relaxed),
            wire_bytes: self.live.wire_bytes.load(Relaxed),
        }
    }

    /// Why the session has ended, if it has.
    pub fn ended(&self) -> Option<String> {
        self.ended.borrow().clone()
    }

    /// Waits for its end.
    pub fn watch_end(&self) -> watch::Receiver<Option<String>> {
        self.ended.clone()
    }

    /// Gives what was staged to a migration. Nothing more can be sent.
    pub fn into_contents(self) -> StagedContents {
        let nothing = SessionOrder::new(0, &Techniques::NONE, false);
        StagedContents {
            id: self.id,
            frames: self.frames.load(Relaxed),
            window_budget_bytes: self.window_budget_bytes,
            order: std::mem::replace(&mut *self.offering.order(), nothing),
            _session: self.session,
        }
    }
}

/// Takes answers; returns why the session ended.
async fn receive(offering: &Offering, reader: &mut FrameReader<impl AsyncRead + Unpin>) -> String {
    loop {
        match reader.next().await {
            Ok(Frame::Have(have)) => {
                if let Err(error) = offering.answered(&have) {
                    return error;
                }
            }
            Ok(Frame::Alive) => {}
            Ok(Frame::Refuse { text, .. }) => return text,
            Ok(_) => return "the peer sent a frame that has no place in a stage".to_owned(),
            Err(error) => return error.to_string(),
        }
    }
}

fn whole_pages(bytes: &[u8]) -> impl Iterator<Item = &Page> {
    let pages = bytes.chunks_exact(PAGE_BYTES);
    pages.filter_map(<[u8]>::first_chunk).take(STAGE_PAGES_MAX)
}

/// Pages that have their slots, and the place of their frame in the session.
#[derive(Default)]
struct Kept {
    sequence: u64,
    pages: Vec<u8>,
    payload: Encoder,
}

/// What makes frames of pages.
struct Builder {
    digest: FrameDigest,
    detector: Option<HashSimilarityDetector>,
    buffers: Buffers,
    compressors: Pool<FrameCompressor>,
    page_key: PageKey,
}

impl Builder {
    fn identify(&self, pages: &[u8]) -> Vec<Identity> {
        let pages: Vec<&Page> = whole_pages(pages).collect();
        let mut digests = Vec::with_capacity(pages.len());
        PageDigest::of_many(self.page_key.digest_key(), &pages, &mut digests);
        let identity = |(page, digest): (&&Page, &PageDigest)| Identity {
            digest: *digest,
            was: None,
            signatures: self.detector.as_ref().map(|of| of.signatures(page)),
            blocks: None,
            near: true,
        };
        pages.iter().zip(&digests).map(identity).collect()
    }

    fn build(&self, mut kept: Kept, rung: Rung) -> Unsealed {
        let mut buffer = self.buffers.take();
        buffer.resize(DATA_OVERHEAD_BYTES, 0);
        let costs = kept.payload.finish(&mut buffer);
        let raw_len = buffer.len() - DATA_OVERHEAD_BYTES;
        let mut compression = Compression::None;
        if rung.frames() {
            compression = self.compress(&mut buffer, rung).unwrap_or(compression);
        }
        Unsealed {
            channel: 0,
            member: usize::MAX,
            sequence: kept.sequence,
            stream_len: kept.pages.len() as u32,
            digest: self.digest.of(&kept.pages),
            buffer,
            tail: Vec::new(),
            compression,
            stream: Some(rung).filter(|rung| rung.streams()),
            costs,
            literal_bytes: 0,
            raw_len,
        }
    }

    /// Compresses the payload in `buffer` if that makes it shorter.
    fn compress(&self, buffer: &mut Vec<u8>, rung: Rung) -> Option<Compression> {
        let zstd = self.compressors.take();
        let mut zstd = zstd.map_or_else(FrameCompressor::new, Ok).ok()?;
        let mut out = self.buffers.take();
        out.resize(DATA_OVERHEAD_BYTES, 0);
        let raw = buffer.get(DATA_OVERHEAD_BYTES..)?;
        // Also what zstd fails at goes as it is.
        let compression = zstd.compress(rung, raw, &mut out).ok()?;
        self.compressors.give(zstd);
        if out.len() >= buffer.len() {
            self.buffers.give(out);
            return None;
        }
        self.buffers.give(std::mem::replace(buffer, out));
        Some(compression)
    }
}
