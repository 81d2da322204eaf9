//! The destination half of a session: one admitted job arriving.
//!
//! Owns: the window (through the decoder), the connections to the destination QEMUs, and
//! their flow control. Must not: let one slow QEMU stop the reader: what waits for it is
//! bounded by the credit it was granted.

use std::collections::HashMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use vmgang_dedup::DigestKey;
use vmgang_wire::{Direction, Frame, Hello, RETURN_CREDIT_BYTES, RefuseCode, Welcome};

use crate::buffers::Buffers;
use crate::connection::{FrameQueue, FrameReader, ReadError, frame_queue, write_frames};
use crate::decode::Decoder;
use crate::destination::{Admission, DestinationHost};
use crate::encode::frame_digest;
use crate::offer::{Offer, SocketOwner};
use crate::runtime_dir::{JobDir, Side};

/// Stream bytes a channel may have under way: enough for a fast link, and little enough
/// that QEMU's own estimate of the link stays honest.
const CHANNEL_CREDIT_BYTES: u32 = 8 * 1024 * 1024;
/// Delivered bytes are credited back in steps of at least this, or when nothing waits.
const CREDIT_STEP_BYTES: u32 = 512 * 1024;
/// How often a source may ask how a member ended: each costs a call of libvirt.
const OUTCOME_REQUESTS_MAX: u8 = 4;
/// Most return path bytes in one frame.
const RETURN_BYTES: usize = 64 * 1024;

/// An admitted job.
pub(crate) struct Job {
    pub hello: Hello,
    pub admission: Admission,
    pub host: Arc<dyn DestinationHost>,
    pub runtime_dir: PathBuf,
}

struct SessionEnded {
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
    job: Job,
    mut reader: FrameReader<impl AsyncRead + Unpin>,
    writer: impl AsyncWrite + Unpin + Send + 'static,
) -> Result<(), String> {
    let _ended = SessionEnded {
        host: job.host.clone(),
        job: job.hello.job,
    };
    let (queue, queued) = frame_queue();
    let mut writing = JoinSet::new();
    writing.spawn(write_frames(writer, queued, None));
    let result = match Session::start(&job, queue.clone()) {
        Ok(mut session) => {
            queue.send(&Frame::Welcome(Welcome {
                features: 0,
                window_budget_bytes: job.admission.window_budget_bytes,
                channel_credit_bytes: CHANNEL_CREDIT_BYTES,
            }));
            tracing::info!(
                job = %job.hello.job, gang = %job.hello.gang, source = %job.hello.source_host,
                members = job.hello.members.len(), "gang is arriving"
            );
            let result = tokio::select! {
                result = session.receive(&mut reader) => result,
                written = writing.join_next() => Err(match written {
                    Some(Ok(Err(error))) => format!("writing to the source failed: {error}"),
                    _ => "writing to the source ended".to_owned(),
                }),
            };
            // Hangs up on every QEMU that is still connected: libvirt cleans up there.
            session.tasks.shutdown().await;
            result
        }
        Err(error) => Err(error),
    };
    if let Err(text) = &result {
        queue.send(&Frame::Refuse {
            code: RefuseCode::Protocol,
            text: text.clone(),
        });
    }
    drop(queue);
    // Whatever is queued leaves, if the source takes it soon.
    let flush = async { while writing.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), flush).await;
    result
}

enum StreamEvent {
    Bytes(Vec<u8>),
    Finish,
}

struct Channel {
    stream: mpsc::UnboundedSender<StreamEvent>,
    /// Stream bytes received and not yet credited back.
    outstanding: Arc<AtomicU64>,
    return_credit: Arc<Semaphore>,
    return_outstanding: Arc<AtomicU64>,
    finished: bool,
}

struct Session<'a> {
    job: &'a Job,
    key: DigestKey,
    queue: FrameQueue,
    decoder: Decoder,
    buffers: Buffers,
    sockets: JobDir,
    owners: Vec<SocketOwner>,
    /// How often the source has asked how each member ended.
    outcome_requests: Vec<u8>,
    channels: HashMap<u32, Channel>,
    last_channel: u32,
    tasks: JoinSet<()>,
}

impl<'a> Session<'a> {
    fn start(job: &'a Job, queue: FrameQueue) -> Result<Self, String> {
        let key = DigestKey(job.hello.integrity_key);
        let owners: Vec<_> = Offer::from_hello(&job.hello)
            .members
            .iter()
            .map(|member| member.fixed_owner.unwrap_or(job.admission.socket_owner))
            .collect();
        let sockets = JobDir::create(&job.runtime_dir, job.hello.job, &owners, Side::Destination)
            .map_err(|error| {
            format!(
                "the destination cannot make {} for the migration sockets: {error}",
                job.runtime_dir.display()
            )
        })?;
        let buffers = Buffers::default();
        let budget = job.admission.window_budget_bytes;
        let decoder = Decoder::new(key.clone(), budget, buffers.clone())
            .map_err(|error| format!("the destination cannot set up decompression: {error}"))?;
        Ok(Self {
            job,
            key,
            queue,
            decoder,
            buffers,
            sockets,
            outcome_requests: vec![0; owners.len()],
            owners,
            channels: HashMap::new(),
            last_channel: 0,
            tasks: JoinSet::new(),
        })
    }

    async fn receive(
        &mut self,
        reader: &mut FrameReader<impl AsyncRead + Unpin>,
    ) -> Result<(), String> {
        loop {
            while self.tasks.try_join_next().is_some() {}
            match reader.next().await {
                Ok(Frame::Goodbye) => return Ok(()),
                Ok(frame) => self.handle(frame).await?,
                Err(ReadError::Closed) => {
                    return Err("the source hung up in the middle of the job".to_owned());
                }
                Err(error) => return Err(error.to_string()),
            }
        }
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
            Frame::Data { channel, data } => {
                let Some(open) = self.channels.get(&channel).filter(|open| !open.finished) else {
                    return Err(format!(
                        "the source sent data for channel {channel}, not open"
                    ));
                };
                let outstanding = open
                    .outstanding
                    .fetch_add(u64::from(data.stream_len), Relaxed);
                if outstanding + u64::from(data.stream_len) > u64::from(CHANNEL_CREDIT_BYTES) {
                    return Err("the source sent more than it was granted".to_owned());
                }
                // Also for a channel whose QEMU is gone: the windows must stay equal.
                let decoder = &mut self.decoder;
                let bytes = tokio::task::block_in_place(|| decoder.decode(&data))
                    .map_err(|error| error.to_string())?;
                let _ = open.stream.send(StreamEvent::Bytes(bytes));
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
                    // Closing the queue without a Finish breaks the connection to QEMU.
                    open.stream = mpsc::unbounded_channel().0;
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
                self.tasks.spawn(async move {
                    let outcome = tokio::task::spawn_blocking(move || host.outcome(uuid)).await;
                    queue.send(&Frame::Outcome {
                        member,
                        outcome: outcome.ok().flatten().map(Into::into),
                    });
                });
            }
            Frame::Alive => {}
            Frame::Refuse { text, .. } => return Err(text),
            Frame::Hello(_)
            | Frame::Welcome(_)
            | Frame::Return { .. }
            | Frame::Credit { .. }
            | Frame::Outcome { .. }
            | Frame::Goodbye => {
                return Err("the source sent a frame that has no place here".to_owned());
            }
        }
        Ok(())
    }

    /// Connects to the member's QEMU. One after the other: QEMU tells its connections apart
    /// by the order in which they come.
    async fn open(&mut self, channel: u32, member: usize) {
        let (stream, events) = mpsc::unbounded_channel();
        let open = Channel {
            stream,
            outstanding: Arc::new(AtomicU64::new(0)),
            return_credit: Arc::new(Semaphore::new(RETURN_CREDIT_BYTES)),
            return_outstanding: Arc::new(AtomicU64::new(0)),
            finished: false,
        };
        match connect(&self.sockets.socket(member), self.owners[member]).await {
            Ok(connection) => {
                let pump = Pump {
                    channel,
                    key: self.key.clone(),
                    queue: self.queue.clone(),
                    buffers: self.buffers.clone(),
                    outstanding: open.outstanding.clone(),
                    return_credit: open.return_credit.clone(),
                    return_outstanding: open.return_outstanding.clone(),
                };
                self.tasks.spawn(pump.run(connection, events));
            }
            Err(error) => self.queue.send(&Frame::Reset {
                channel,
                text: format!("the destination QEMU does not listen: {error}"),
            }),
        }
        self.channels.insert(channel, open);
    }
}

/// Connects to what listens there, if it is a socket of that user. The directory is QEMU's:
/// a guest that has broken out could put a link to another socket into it.
async fn connect(socket: &Path, owner: SocketOwner) -> std::io::Result<UnixStream> {
    if !std::fs::symlink_metadata(socket)?.file_type().is_socket() {
        return Err(std::io::Error::other(
            "there is something else in its place",
        ));
    }
    let connection = UnixStream::connect(socket).await?;
    match connection.peer_cred()?.uid() {
        uid if uid == owner.uid || uid == 0 => Ok(connection),
        uid => Err(std::io::Error::other(format!(
            "user {uid} listens in its place"
        ))),
    }
}

/// Moves bytes between one channel and its QEMU.
struct Pump {
    channel: u32,
    key: DigestKey,
    queue: FrameQueue,
    buffers: Buffers,
    outstanding: Arc<AtomicU64>,
    return_credit: Arc<Semaphore>,
    return_outstanding: Arc<AtomicU64>,
}

impl Pump {
    async fn run(self, connection: UnixStream, events: mpsc::UnboundedReceiver<StreamEvent>) {
        let (reader, writer) = connection.into_split();
        let result = tokio::try_join!(self.write_stream(events, writer), self.read_return(reader));
        if let Err(error) = result {
            self.queue.send(&Frame::Reset {
                channel: self.channel,
                text: format!("the destination QEMU hung up: {error}"),
            });
        }
    }

    async fn write_stream(
        &self,
        mut events: mpsc::UnboundedReceiver<StreamEvent>,
        mut writer: OwnedWriteHalf,
    ) -> std::io::Result<()> {
        let mut delivered = 0u32;
        while let Some(event) = events.recv().await {
            match event {
                StreamEvent::Bytes(bytes) => {
                    writer.write_all(&bytes).await?;
                    delivered += bytes.len() as u32;
                    self.buffers.give(bytes);
                    if delivered >= CREDIT_STEP_BYTES || events.is_empty() {
                        self.outstanding.fetch_sub(u64::from(delivered), Relaxed);
                        self.queue.send(&Frame::Credit {
                            channel: self.channel,
                            direction: Direction::Stream,
                            bytes: delivered,
                        });
                        delivered = 0;
                    }
                }
                StreamEvent::Finish => return writer.shutdown().await,
            }
        }
        Err(std::io::Error::other("the source gave up"))
    }

    async fn read_return(&self, mut reader: OwnedReadHalf) -> std::io::Result<()> {
        let mut buffer = vec![0; RETURN_BYTES];
        loop {
            let bytes = match reader.read(&mut buffer).await? {
                0 => break,
                len => &buffer[..len],
            };
            match self.return_credit.acquire_many(bytes.len() as u32).await {
                Ok(permit) => permit.forget(),
                Err(_) => break,
            }
            self.return_outstanding
                .fetch_add(bytes.len() as u64, Relaxed);
            self.queue.send(&Frame::Return {
                channel: self.channel,
                digest: frame_digest(&self.key, bytes),
                bytes,
            });
        }
        self.queue.send(&Frame::Finish {
            channel: self.channel,
        });
        Ok(())
    }
}
