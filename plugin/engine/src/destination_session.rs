//! The destination half of a session: one admitted job arriving.
//!
//! Owns: the decoding pipeline, the channels and their flow control.
//! Must not: let one slow QEMU stop the reader: what waits for it is bounded by the credit it was
//! granted.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use vmgang_dedup::{DigestKey, PageDigest, PageWindow, WindowError};
use vmgang_wire::{
    Announce, CONNECTIONS_MAX, Direction, FEATURE_CONNECTIONS, FRAME_CREDIT_BYTES_MIN, Frame,
    FrameHeader, Hello, Kind, MoreConnections, OFFER_CONTENTS_MAX, Purpose, RETURN_CREDIT_BYTES,
    RefuseCode, Welcome,
};

use crate::PageKey;
use crate::ambient::ambient_socket;
use crate::answers::{Answering, Answers, Recall, announce};
use crate::buffers::Buffers;
use crate::compression::window_slots;
use crate::connection::{FrameQueue, FrameReader, ReadError, frame_queue, write_frames};
use crate::decode::Piece;
use crate::decode_pipeline::DecodePipeline;
use crate::delivery::{Pump, StreamEvent};
use crate::destination::{Admission, DestinationHost};
use crate::frame_digest::FrameDigest;
use crate::join::{FurtherConnections, Grants, JOIN_TIMEOUT};
use crate::network::{Network, QemuConnection};
use crate::offer::{Offer, SocketOwner};
use crate::runtime_dir::{JobDir, Side, Sockets};
use crate::workers::Workers;

/// Stream bytes a channel may have under way: enough for a fast link, and little enough
/// that QEMU's own estimate of the link stays honest.
const CHANNEL_CREDIT_BYTES: u32 = 8 * 1024 * 1024;
/// The reader of all channels waits for the answer, which is at hand where libvirt's hook is installed.
const ANNOUNCED_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a source may ask how a member ended: each costs a call of libvirt.
const OUTCOME_REQUESTS_MAX: u8 = 4;

/// An admitted job.
pub(crate) struct Job {
    pub page_key: PageKey,
    pub hello: Hello,
    pub admission: Admission,
    /// What was staged for it.
    pub window: Option<PageWindow>,
    pub host: Arc<dyn DestinationHost>,
    pub runtime_dir: PathBuf,
    pub workers: Workers,
    pub network: Arc<dyn Network>,
    /// Where its further connections come in.
    pub grants: Grants,
    pub certificate_names: Vec<String>,
}

impl Job {
    /// Where offered contents are looked for, if digests mean the same on both sides.
    pub(crate) fn recall(&self) -> Option<Arc<dyn Recall>> {
        let same_key = self.hello.page_key_id == self.page_key.id();
        self.admission.recall.clone().filter(|_| same_key)
    }

    /// What is told when its session ends.
    pub(crate) fn ended(&self) -> SessionEnded {
        SessionEnded {
            host: self.host.clone(),
            job: self.hello.job,
        }
    }
}

/// Tells the host when it is dropped.
pub(crate) struct SessionEnded {
    host: Arc<dyn DestinationHost>,
    job: uuid::Uuid,
}

impl Drop for SessionEnded {
    fn drop(&mut self) {
        self.host.session_ended(self.job);
    }
}

/// Serves the job until the source says goodbye (`Ok`) or something ends it.
pub(crate) async fn run(
    mut job: Job,
    mut reader: FrameReader<impl AsyncRead + Unpin>,
    writer: impl AsyncWrite + Unpin + Send + 'static,
) -> Result<(), String> {
    let _ended = job.ended();
    let slots = window_slots(job.admission.window_budget_bytes);
    let staged = job.window.take().filter(|window| window.slots() == slots);
    let has_stage = staged.is_some();
    let (window, announced) = match staged {
        Some(window) => (Some(window), Vec::new()),
        None => likely(&job, slots).await,
    };
    let (queue, queued) = frame_queue();
    let mut writing = JoinSet::new();
    writing.spawn(write_frames(writer, queued, None));
    let (failures, mut failed) = mpsc::unbounded_channel();
    // The further connections are kept to the end: it must not come before the reason for it.
    let (result, _further) = match Session::start(&job, window, queue.clone(), &failures) {
        Ok((mut session, welcome)) => {
            queue.send(&Frame::Welcome(Welcome {
                stage: has_stage,
                announced: announced.len() as u32,
                ..welcome
            }));
            for some in announced.chunks(OFFER_CONTENTS_MAX) {
                let digests = some.iter().map(|digest| digest.0).collect();
                queue.send(&Frame::Announce(Announce { digests }));
            }
            drop(announced);
            tracing::info!(
                job = %job.hello.job, gang = %job.hello.gang, source = %job.hello.source_host,
                members = job.hello.members.len(), "gang is arriving"
            );
            let mut result = tokio::select! {
                biased;
                Some(failure) = failed.recv() => Err(failure),
                result = session.receive(&mut reader) => result,
                written = writing.join_next() => Err(match written {
                    Some(Ok(Err(error))) => format!("writing to the source failed: {error}"),
                    _ => "writing to the source ended".to_owned(),
                }),
            };
            if let (Ok(()), Ok(failure)) = (&result, failed.try_recv()) {
                result = Err(failure);
            }
            // Hangs up on every QEMU that is still connected: libvirt cleans up there.
            session.tasks.shutdown().await;
            let Session {
                pipeline,
                further,
                sockets,
                ..
            } = session;
            drop(sockets);
            // Before the window is taken down, which takes its time.
            refuse(&queue, &result);
            pipeline.close().await;
            (result, further)
        }
        Err(error) => {
            let result = Err(error);
            refuse(&queue, &result);
            (result, FurtherConnections::default())
        }
    };
    drop(queue);
    // Whatever is queued leaves, if the source takes it soon.
    let flush = async { while writing.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_secs(2), flush).await;
    result
}

pub(crate) fn refuse(queue: &FrameQueue, result: &Result<(), String>) {
    if let Err(text) = result {
        queue.send(&Frame::Refuse {
            code: RefuseCode::Protocol,
            text: text.clone(),
        });
    }
}

struct Channel {
    member: usize,
    stream: mpsc::UnboundedSender<StreamEvent>,
    /// Credit taken and not yet given back.
    outstanding: Arc<AtomicU64>,
    return_credit: Arc<Semaphore>,
    return_outstanding: Arc<AtomicU64>,
    finished: bool,
    /// What serves it; `None` without a connection to QEMU.
    pump: Option<AbortHandle>,
}

struct Session<'a> {
    job: &'a Job,
    digest: FrameDigest,
    queue: FrameQueue,
    pipeline: Arc<DecodePipeline>,
    answers: Answers,
    further: FurtherConnections,
    buffers: Buffers,
    sockets: Sockets,
    owners: Vec<SocketOwner>,
    /// Members that libvirt has announced.
    announced: Vec<bool>,
    /// How often the source has asked how each member ended.
    outcome_requests: Vec<u8>,
    channels: HashMap<u32, Channel>,
    last_channel: u32,
    tasks: JoinSet<()>,
}

/// A window with what will surely be asked for, and what that is; nothing if there is none.
async fn likely(job: &Job, slots: u32) -> (Option<PageWindow>, Vec<PageDigest>) {
    let Some(recall) = job.recall() else {
        return (None, Vec::new());
    };
    let key = job.page_key.digest_key().clone();
    let work = move || {
        let mut window = PageWindow::new(slots);
        let announced = announce(&*recall, &key, &mut window)?;
        Ok::<_, WindowError>((window, announced))
    };
    match job.workers.blocking(work).await {
        Ok(Ok((window, announced))) if !announced.is_empty() => (Some(window), announced),
        _ => (None, Vec::new()),
    }
}

pub(crate) fn start_pipeline(
    job: &Job,
    staged: Option<PageWindow>,
    buffers: &Buffers,
    failures: &mpsc::UnboundedSender<String>,
) -> Result<Arc<DecodePipeline>, String> {
    let pipeline = DecodePipeline::new(
        &DigestKey(job.hello.integrity_key),
        job.admission.window_budget_bytes,
        staged,
        job.workers.clone(),
        buffers.clone(),
        failures.clone(),
    );
    let failed = |error| format!("the destination cannot set up decompression: {error}");
    Ok(Arc::new(pipeline.map_err(failed)?))
}

/// Answers OFFERs; what goes wrong ends the session.
pub(crate) async fn fails(answering: Answering, failures: mpsc::UnboundedSender<String>) {
    if let Err(error) = answering.run().await {
        let _ = failures.send(error);
    }
}

/// Makes directories for the members' sockets; of an ambient session they are there already.
fn sockets(job: &Job, owners: &[SocketOwner]) -> Result<Sockets, String> {
    let Hello { gang, members, .. } = &job.hello;
    if job.hello.purpose == Purpose::Ambient {
        let paths = members.iter().map(|member| {
            ambient_socket(&job.runtime_dir, gang, &member.name)
                .ok_or_else(|| format!("the domain {:?} cannot have a socket", member.name))
        });
        return Ok(Sockets::Elsewhere(paths.collect::<Result<_, _>>()?));
    }
    let made = JobDir::create(&job.runtime_dir, job.hello.job, owners, Side::Destination);
    made.map(Sockets::OfJob).map_err(|error| {
        format!(
            "the destination cannot make {} for the migration sockets: {error}",
            job.runtime_dir.display()
        )
    })
}

impl<'a> Session<'a> {
    /// Also returns what the source is granted.
    fn start(
        job: &'a Job,
        staged: Option<PageWindow>,
        queue: FrameQueue,
        failures: &mpsc::UnboundedSender<String>,
    ) -> Result<(Self, Welcome), String> {
        let key = DigestKey(job.hello.integrity_key);
        // That directory is one user's, whatever a peer says.
        let ambient = job.hello.purpose == Purpose::Ambient;
        let owners: Vec<_> = Offer::from_hello(&job.hello)
            .members
            .iter()
            .map(|member| member.fixed_owner.filter(|_| !ambient))
            .map(|fixed| fixed.unwrap_or(job.admission.socket_owner))
            .collect();
        let sockets = sockets(job, &owners)?;
        let buffers = Buffers::default();
        let budget = job.admission.window_budget_bytes;
        let pipeline = start_pipeline(job, staged, &buffers, failures)?;
        let recall = job.recall();
        let contents = recall.as_ref().map_or(0, |recall| recall.contents());
        let (answers, answering) = Answers::new(
            recall,
            job.page_key.digest_key().clone(),
            pipeline.clone(),
            queue.clone(),
            Box::new(|_| {}),
        );
        let mut session = Self {
            job,
            digest: FrameDigest::new(&key),
            queue,
            pipeline,
            answers,
            further: FurtherConnections::default(),
            buffers,
            sockets,
            announced: vec![false; owners.len()],
            outcome_requests: vec![0; owners.len()],
            owners,
            channels: HashMap::new(),
            last_channel: 0,
            tasks: JoinSet::new(),
        };
        let failures = failures.clone();
        session.tasks.spawn(fails(answering, failures.clone()));
        let failures = &failures;
        let welcome = Welcome {
            window_budget_bytes: budget,
            channel_credit_bytes: CHANNEL_CREDIT_BYTES,
            contents,
            stage: false,
            announced: 0,
            more_connections: session.grant_connections(failures),
        };
        Ok((session, welcome))
    }

    /// Lets the source open further connections, if both sides want that.
    fn grant_connections(
        &mut self,
        failures: &mpsc::UnboundedSender<String>,
    ) -> Option<MoreConnections> {
        let Job {
            hello, admission, ..
        } = self.job;
        let connections = u8::try_from(admission.connections.get())
            .map_or(CONNECTIONS_MAX, |n| n.min(CONNECTIONS_MAX));
        if hello.features & FEATURE_CONNECTIONS == 0 || connections < 2 {
            return None;
        }
        let (granted, more, further) = self.job.grants.grant(
            hello.job,
            &self.job.certificate_names,
            (connections, self.job.network.secret()),
            &self.buffers,
            failures,
        );
        self.further = further;
        // Ends with the session, if that is sooner.
        self.tasks.spawn(async move {
            tokio::time::sleep(JOIN_TIMEOUT).await;
            drop(granted);
        });
        Some(more)
    }

    async fn receive(
        &mut self,
        reader: &mut FrameReader<impl AsyncRead + Unpin>,
    ) -> Result<(), String> {
        loop {
            while self.tasks.try_join_next().is_some() {}
            let header = match reader.read().await {
                Ok(header) => header,
                Err(ReadError::Closed) => {
                    return Err("the source hung up in the middle of the job".to_owned());
                }
                Err(error) => return Err(error.to_string()),
            };
            if header.kind == Kind::Data {
                let body = reader.swap_body(self.buffers.take());
                self.data(&header, body).await?;
                continue;
            }
            match reader.frame(&header).map_err(|error| error.to_string())? {
                Frame::Goodbye => {
                    self.pipeline.drained().await;
                    return Ok(());
                }
                Frame::Elsewhere { connection } => {
                    let (header, body) = self.further.next(connection).await?;
                    self.data(&header, body).await?;
                }
                frame => self.handle(frame).await?,
            }
        }
    }

    async fn data(&mut self, header: &FrameHeader, body: Vec<u8>) -> Result<(), String> {
        let (channel, mut piece) = Piece::read(header, body).map_err(|error| error.to_string())?;
        let Some(open) = self.channels.get(&channel).filter(|open| !open.finished) else {
            return Err(format!(
                "the source sent data for channel {channel}, not open"
            ));
        };
        piece.belongs_to(channel, open.member);
        let charge = u64::from(piece.stream_len()).max(FRAME_CREDIT_BYTES_MIN as u64);
        let outstanding = open.outstanding.fetch_add(charge, Relaxed);
        if outstanding + charge > u64::from(CHANNEL_CREDIT_BYTES) {
            return Err("the source sent more than it was granted".to_owned());
        }
        // Also for a channel whose QEMU is gone: the windows must stay equal.
        let promised = self.pipeline.decode(piece).await;
        let _ = open.stream.send(StreamEvent::Bytes(promised));
        Ok(())
    }

    async fn handle(&mut self, frame: Frame<'_>) -> Result<(), String> {
        match frame {
            Frame::Open { channel, member } => {
                if Some(channel) != self.last_channel.checked_add(1)
                    || usize::from(member) >= self.job.hello.members.len()
                {
                    return Err("the source opened a channel out of order".to_owned());
                }
                self.last_channel = channel;
                self.open(channel, usize::from(member)).await;
            }
            Frame::Credit {
                channel,
                direction: Direction::Return,
                bytes,
            } => {
                let Some(open) = self.channels.get(&channel) else {
                    return Err("the source credits a channel that is not open".to_owned());
                };
                let granted = u64::from(bytes);
                if open
                    .return_outstanding
                    .fetch_update(Relaxed, Relaxed, |bytes| bytes.checked_sub(granted))
                    .is_err()
                {
                    return Err("the source credits more than it was sent".to_owned());
                }
                open.return_credit.add_permits(bytes as usize);
            }
            Frame::Finish { channel } => {
                if let Some(open) = self.channels.get_mut(&channel) {
                    open.finished = true;
                    let _ = open.stream.send(StreamEvent::Finish);
                }
            }
            Frame::Reset { channel, text } => {
                tracing::info!(channel, %text, "the source gave up a connection");
                if let Some(open) = self.channels.get_mut(&channel) {
                    open.finished = true;
                    open.stream = mpsc::unbounded_channel().0;
                    // At once, whatever it waits for: that closes the connection to QEMU.
                    if let Some(pump) = open.pump.take() {
                        pump.abort();
                    }
                }
            }
            Frame::OutcomeRequest { member } => {
                let Some(offered) = self.job.hello.members.get(usize::from(member)) else {
                    return Err("the source asks about a member there is not".to_owned());
                };
                let asked = &mut self.outcome_requests[usize::from(member)];
                *asked += 1;
                if *asked > OUTCOME_REQUESTS_MAX {
                    return Err("the source asks about a member again and again".to_owned());
                }
                let (host, uuid, queue) = (self.job.host.clone(), offered.uuid, self.queue.clone());
                let workers = self.job.workers.clone();
                self.tasks.spawn(async move {
                    let outcome = workers.blocking(move || host.outcome(uuid)).await;
                    queue.send(&Frame::Outcome {
                        member,
                        outcome: outcome.ok().flatten().map(Into::into),
                    });
                });
            }
            Frame::Offer(offer) => self.answers.offer(offer)?,
            Frame::Alive => {}
            Frame::Refuse { text, .. } => return Err(text),
            Frame::Stage(_)
            | Frame::Have(_)
            | Frame::Announce(_)
            | Frame::Hello(_)
            | Frame::Welcome(_)
            | Frame::Data { .. }
            | Frame::Return { .. }
            | Frame::Credit { .. }
            | Frame::Outcome { .. }
            | Frame::Goodbye
            | Frame::Join(_)
            | Frame::Elsewhere { .. }
            | Frame::Control
            | Frame::Libvirt
            | Frame::Connected => {
                return Err("the source sent a frame that has no place here".to_owned());
            }
        }
        Ok(())
    }

    /// Connects to the member's QEMU. One after the other: QEMU tells its connections apart
    /// by the order in which they come.
    async fn open(&mut self, channel: u32, member: usize) {
        let (stream, events) = mpsc::unbounded_channel();
        let mut open = Channel {
            member,
            stream,
            outstanding: Arc::new(AtomicU64::new(0)),
            return_credit: Arc::new(Semaphore::new(RETURN_CREDIT_BYTES)),
            return_outstanding: Arc::new(AtomicU64::new(0)),
            finished: false,
            pump: None,
        };
        match self.connect(member).await {
            Ok(connection) => {
                let pump = Pump {
                    channel,
                    member,
                    digest: self.digest.clone(),
                    queue: self.queue.clone(),
                    buffers: self.buffers.clone(),
                    outstanding: open.outstanding.clone(),
                    return_credit: open.return_credit.clone(),
                    return_outstanding: open.return_outstanding.clone(),
                };
                open.pump = Some(self.tasks.spawn(pump.run(connection, events)));
            }
            Err(text) => self.queue.send(&Frame::Reset { channel, text }),
        }
        self.channels.insert(channel, open);
    }

    /// A connection to the member's QEMU, or why there is none. What listens is only believed to be its
    /// QEMU if libvirt has announced the member: the sockets' directory is QEMU's user's, and other
    /// guests may run as that user.
    async fn connect(&mut self, member: usize) -> Result<QemuConnection, String> {
        // In an ambient session it may have come and gone since it was asked.
        if !self.announced[member] || self.job.hello.purpose == Purpose::Ambient {
            let (host, uuid) = (self.job.host.clone(), self.job.hello.members[member].uuid);
            let ambient = self.job.hello.purpose == Purpose::Ambient;
            let name = self.job.hello.members[member].name.clone();
            let asked = self.job.workers.blocking(move || match ambient {
                true => host.announced_by_name(uuid, &name),
                false => host.announced(uuid),
            });
            let announced = match tokio::time::timeout(ANNOUNCED_TIMEOUT, asked).await {
                Ok(Ok(announced)) => announced,
                Ok(Err(_)) => Err("its daemon failed while asking".to_owned()),
                Err(_) => Err("libvirt there does not answer".to_owned()),
            };
            announced.map_err(|why| format!("the destination does not take it in: {why}"))?;
            self.announced[member] = true;
        }
        let socket = self.sockets.socket(member);
        let connecting = self.job.network.connect_qemu(&socket, self.owners[member]);
        connecting
            .await
            .map_err(|error| format!("the destination QEMU does not listen: {error}"))
    }
}
