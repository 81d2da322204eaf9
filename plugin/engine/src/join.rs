//! Further connections of sessions, as they come in.
//!
//! Owns: the tokens that were granted, and each further connection from its JOIN to its end.
//! Must not: order frames: the session takes each where its first connection says so.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use uuid::Uuid;
use vmgang_wire::{Frame, FrameHeader, Join, Kind, MoreConnections};

use crate::buffers::Buffers;
use crate::connection::{FrameReader, ReadError, frame_queue, write_frames};

/// A connection that has not joined after so long will not.
pub(crate) const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// Frames of a connection that wait for their turn, besides the one that is being read.
const WAITING_FRAMES: usize = 1;

/// A frame as it was read.
type ReadFrame = (FrameHeader, Vec<u8>);

/// What all sessions of a listener have granted; clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Grants(Arc<Mutex<HashMap<[u8; 16], Grant>>>);

struct Grant {
    job: Uuid,
    certificate_names: Vec<String>,
    /// What has not joined yet, by number less one.
    missing: Vec<Option<Joined>>,
}

/// Leave to join one session. Dropping it takes it back.
pub(crate) struct Granted {
    grants: Grants,
    token: [u8; 16],
}

impl Drop for Granted {
    fn drop(&mut self) {
        self.grants.lock().remove(&self.token);
    }
}

impl Grants {
    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 16], Grant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `connections` less one join, if they come from the same peer and show the token. What goes wrong with
    /// one of them is told to `failures`.
    pub(crate) fn grant(
        &self,
        job: Uuid,
        certificate_names: &[String],
        (connections, token): (u8, [u8; 16]),
        buffers: &Buffers,
        failures: &mpsc::UnboundedSender<String>,
    ) -> (Granted, MoreConnections, FurtherConnections) {
        let (missing, further) = (1..connections)
            .map(|_| {
                let (frames, arriving) = mpsc::channel(WAITING_FRAMES);
                let has_joined = Arc::new(AtomicBool::new(false));
                let joined = Joined {
                    frames,
                    has_joined: has_joined.clone(),
                    failures: failures.clone(),
                    buffers: buffers.clone(),
                };
                (Some(joined), (has_joined, arriving))
            })
            .unzip();
        let grant = Grant {
            job,
            certificate_names: certificate_names.to_vec(),
            missing,
        };
        self.lock().insert(token, grant);
        let granted = Granted {
            grants: self.clone(),
            token,
        };
        let more = MoreConnections { connections, token };
        (granted, more, FurtherConnections(further))
    }

    /// Whether a connection may join. The error is why not.
    pub(crate) fn join(
        &self,
        join: &Join,
        certificate_names: &[String],
    ) -> Result<Joined, &'static str> {
        let mut grants = self.lock();
        let grant = grants
            .get_mut(&join.token)
            .filter(|grant| grant.job == join.job)
            .ok_or("no session of that job takes further connections with that token now")?;
        if grant.certificate_names != certificate_names {
            return Err("the session's first connection came from another peer");
        }
        let joined = usize::from(join.connection)
            .checked_sub(1)
            .and_then(|index| grant.missing.get_mut(index))
            .ok_or("the session was not granted so many connections")?
            .take()
            .ok_or("that connection has joined already")?;
        joined.has_joined.store(true, Relaxed);
        Ok(joined)
    }
}

/// A connection that has joined.
pub(crate) struct Joined {
    frames: mpsc::Sender<ReadFrame>,
    has_joined: Arc<AtomicBool>,
    failures: mpsc::UnboundedSender<String>,
    buffers: Buffers,
}

impl Joined {
    /// Reads for the session until that ends (`Ok`), or the connection does.
    pub(crate) async fn serve(
        self,
        mut reader: FrameReader<impl AsyncRead + Unpin>,
        writer: impl AsyncWrite + Unpin,
    ) -> Result<(), String> {
        let (queue, queued) = frame_queue();
        // The answer to JOIN.
        queue.send(&Frame::Alive);
        let error = tokio::select! {
            biased;
            () = self.frames.closed() => return Ok(()),
            error = self.read(&mut reader) => error,
            written = write_frames(writer, queued, None) => match written {
                Err(error) => format!("writing to the source failed: {error}"),
                Ok(()) => "writing to the source ended".to_owned(),
            },
        };
        // Before the session can find that no frame comes any more.
        let _ = self.failures.send(error.clone());
        Err(error)
    }

    async fn read(&self, reader: &mut FrameReader<impl AsyncRead + Unpin>) -> String {
        loop {
            match reader.read().await {
                Ok(header) if header.kind == Kind::Data => {
                    let body = reader.swap_body(self.buffers.take());
                    // Without a session to take it, `serve` is about to end.
                    let _ = self.frames.send((header, body)).await;
                }
                Ok(header) if header.kind == Kind::Alive => {}
                Ok(_) => {
                    return "the source sent a frame that has no place on a further connection"
                        .to_owned();
                }
                Err(ReadError::Closed) => {
                    return "the source hung up one of its connections in the middle of the job"
                        .to_owned();
                }
                Err(error) => return error.to_string(),
            }
        }
    }
}

/// The session's end of its further connections, by number less one. Dropping it ends them.
#[derive(Default)]
pub(crate) struct FurtherConnections(Vec<(Arc<AtomicBool>, mpsc::Receiver<ReadFrame>)>);

impl FurtherConnections {
    /// The next frame of a connection.
    pub(crate) async fn next(&mut self, connection: u8) -> Result<ReadFrame, String> {
        let further = usize::from(connection)
            .checked_sub(1)
            .and_then(|index| self.0.get_mut(index))
            .filter(|(has_joined, _)| has_joined.load(Relaxed));
        let Some((_, frames)) = further else {
            return Err("the source sent a frame over a connection that has not joined".to_owned());
        };
        frames
            .recv()
            .await
            .ok_or_else(|| "a further connection of the source has ended".to_owned())
    }
}
