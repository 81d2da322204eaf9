//! Decoding on the worker threads: what must be in session order one after the other,
//! everything else side by side.
//!
//! Each frame is one job: it is unpacked, waits for its turn at the window, and is verified. Who
//! finishes at the window passes the turn on before it verifies, so that the next frame goes on
//! while this one, still in the cache, is hashed.
//!
//! Owns: the order of turns, and the bound on what is read ahead of them.
//! Must not: hand out bytes that are not verified, or decode anything after a frame that failed.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use vmgang_dedup::{DigestKey, PageWindow};

use crate::answers::Found;
use crate::buffers::Buffers;
use crate::compression::FrameDecompressor;
use crate::decode::{DecodeError, Decoder, Piece, StreamBytes};
use crate::pool::Pool;
use crate::workers::Workers;

/// Bytes that frames may take between being read and being verified.
const IN_FLIGHT_BYTES: usize = 8 * 1024 * 1024;
/// And how many frames at most.
const IN_FLIGHT_FRAMES: usize = 32;

/// The frames of one session that are being decoded. Dropping it stops after the frame at hand.
pub(crate) struct DecodePipeline {
    shared: Arc<Shared>,
    in_flight: Arc<Semaphore>,
    failures: mpsc::UnboundedSender<String>,
}

struct Shared {
    turns: Mutex<Turns>,
    workers: Workers,
    buffers: Buffers,
    /// Contexts that no worker uses now.
    spare: Pool<FrameDecompressor>,
}

/// What moves in session order.
struct Turns {
    /// Not there while a worker has it, and never again after a failure.
    decoder: Option<Decoder>,
    /// Frames in session order, from the one that is next; not there until unpacked.
    waiting: Waiting,
    /// Number of the first one that waits.
    first: u64,
    /// Contents for slots that no frame refers to yet: they go in between two frames.
    found: VecDeque<(Found, oneshot::Sender<()>)>,
    closed: bool,
}

/// What whoever has the decoder does with it.
enum Turn {
    Frame(Piece, Ticket),
    Found(Found, oneshot::Sender<()>),
}

type Waiting = VecDeque<Option<(Piece, Ticket)>>;

/// What a frame owes, and what it holds on to until then.
struct Ticket {
    promise: Option<oneshot::Sender<StreamBytes>>,
    failures: mpsc::UnboundedSender<String>,
    _in_flight: OwnedSemaphorePermit,
}

impl Ticket {
    fn deliver(mut self, bytes: StreamBytes) {
        if let Some(promise) = self.promise.take() {
            // Nobody waits for bytes of a QEMU that is gone.
            let _ = promise.send(bytes);
        }
    }

    fn fail(mut self, error: &DecodeError) {
        self.promise = None;
        let _ = self.failures.send(error.to_string());
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.promise.is_some() {
            let lost = "a frame was lost while it was decoded; see the log of this daemon";
            let _ = self.failures.send(lost.to_owned());
        }
    }
}

impl DecodePipeline {
    /// What is told to `failures` ends the session. The window is empty unless one is given, of
    /// the same budget.
    pub(crate) fn new(
        key: &DigestKey,
        window_budget_bytes: u64,
        window: Option<PageWindow>,
        workers: Workers,
        buffers: Buffers,
        failures: mpsc::UnboundedSender<String>,
    ) -> io::Result<Self> {
        let mut decoder = Decoder::new(key, window_budget_bytes, buffers.clone())?;
        if let Some(window) = window {
            decoder.set_window(window);
        }
        Ok(Self {
            shared: Arc::new(Shared {
                turns: Mutex::new(Turns {
                    decoder: Some(decoder),
                    waiting: VecDeque::new(),
                    first: 0,
                    found: VecDeque::new(),
                    closed: false,
                }),
                workers,
                buffers,
                spare: Pool::default(),
            }),
            in_flight: Arc::new(Semaphore::new(IN_FLIGHT_BYTES)),
            failures,
        })
    }

    pub(crate) fn workers(&self) -> &Workers {
        &self.shared.workers
    }

    /// Takes the session's next frame, once there is room for it. Its stream bytes come through
    /// the promise, verified; if they never come, a failure was reported.
    pub(crate) async fn decode(&self, piece: Piece) -> oneshot::Receiver<StreamBytes> {
        let (promise, promised) = oneshot::channel();
        let bytes = piece
            .memory_bytes()
            .clamp(IN_FLIGHT_BYTES / IN_FLIGHT_FRAMES, IN_FLIGHT_BYTES);
        let room = self.in_flight.clone().acquire_many_owned(bytes as u32);
        let Ok(in_flight) = room.await else {
            return promised;
        };
        let ticket = Ticket {
            promise: Some(promise),
            failures: self.failures.clone(),
            _in_flight: in_flight,
        };
        let number = self.shared.turns().place();
        if piece.is_unpacked() {
            // Copying and comparing takes no longer than handing it over.
            self.shared.turns().ready(number, piece, ticket);
            self.shared.take_turn();
            return promised;
        }
        let shared = self.shared.clone();
        // What comes of it goes through the promise.
        self.shared
            .workers
            .start(move || shared.unpack(number, piece, ticket));
        promised
    }

    /// Puts contents into their slots, and waits until they are there.
    pub(crate) async fn fill(&self, found: Found) -> Result<(), String> {
        let (done, filled) = oneshot::channel();
        self.shared.turns().found.push_back((found, done));
        self.shared.take_turn();
        let failed = |_| "the session ends before contents found here are in its window".to_owned();
        filled.await.map_err(failed)
    }

    /// Takes the window from a session that is over, once every frame so far is verified.
    pub(crate) async fn take_window(&self) -> Option<PageWindow> {
        self.drained().await;
        let decoder = self.shared.turns().decoder.take();
        decoder.map(Decoder::into_window)
    }

    /// Waits until every frame so far is verified, or a failure was reported.
    pub(crate) async fn drained(&self) {
        let _ = self.in_flight.acquire_many(IN_FLIGHT_BYTES as u32).await;
    }

    /// Gives up the frames that wait, and waits for those that workers are at.
    pub(crate) async fn close(&self) {
        let dropped = self.shared.close();
        // A window of many gigabytes is not taken down in a moment.
        let _ = self.shared.workers.blocking(move || drop(dropped)).await;
        self.drained().await;
    }
}

impl Drop for DecodePipeline {
    fn drop(&mut self) {
        drop(self.shared.close());
    }
}

impl Shared {
    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is not needed any more.
    fn close(&self) -> (Option<Decoder>, Waiting) {
        let mut turns = self.turns();
        turns.closed = true;
        turns.found.clear();
        (turns.decoder.take(), std::mem::take(&mut turns.waiting))
    }

    fn unpack(self: &Arc<Self>, number: u64, mut piece: Piece, ticket: Ticket) {
        let spare = self.spare.take();
        let unpacked = spare
            .map_or_else(FrameDecompressor::new, Ok)
            .map_err(DecodeError::Memory)
            .and_then(|mut frames| {
                let unpacked = piece.unpack(&mut frames, &self.buffers);
                self.spare.give(frames);
                unpacked
            });
        match unpacked {
            Ok(()) => {
                self.turns().ready(number, piece, ticket);
                self.take_turn();
            }
            // Its turn never comes, nor that of any frame behind it.
            Err(error) => ticket.fail(&error),
        }
    }

    /// Takes the next frame through the window, if it is there and nobody else is at it.
    fn take_turn(self: &Arc<Self>) {
        // Not in the match, which would hold the lock to its end.
        let turn = self.turns().take();
        let (mut decoder, piece, ticket) = match turn {
            None => return,
            Some((decoder, Turn::Frame(piece, ticket))) => (decoder, piece, ticket),
            Some((mut decoder, Turn::Found(found, done))) => {
                let filled = decoder.fill(&found);
                // What could not be filled is not told to be there, and the session ends.
                self.give_back(decoder);
                if filled.is_ok() {
                    let _ = done.send(());
                }
                return;
            }
        };
        let rebuilt = decoder.rebuild(piece);
        match rebuilt {
            Ok(unverified) => {
                self.give_back(decoder);
                match unverified.verify() {
                    Ok(bytes) => ticket.deliver(bytes),
                    Err(error) => ticket.fail(&error),
                }
            }
            // The decoder goes as well: its window may differ from the source's from here on.
            Err(error) => ticket.fail(&error),
        }
    }
    /// Passes the turn on.
    fn give_back(self: &Arc<Self>, decoder: Decoder) {
        // One that is not taken back is taken down without the lock.
        let given_back = self.turns().give_back(decoder);
        let next = given_back.unwrap_or_default();
        if next {
            let shared = self.clone();
            self.workers.start(move || shared.take_turn());
        }
    }
}

impl Turns {
    /// A place in the order for a frame that is not unpacked yet.
    fn place(&mut self) -> u64 {
        self.waiting.push_back(None);
        self.first + self.waiting.len() as u64 - 1
    }

    fn ready(&mut self, number: u64, piece: Piece, ticket: Ticket) {
        let index = (number - self.first) as usize;
        if let Some(place) = self.waiting.get_mut(index) {
            *place = Some((piece, ticket));
        }
    }

    fn take(&mut self) -> Option<(Decoder, Turn)> {
        if self.decoder.is_some()
            && let Some((found, done)) = self.found.pop_front()
        {
            return Some((self.decoder.take()?, Turn::Found(found, done)));
        }
        let next = self.waiting.front_mut()?;
        if self.decoder.is_none() || next.is_none() {
            return None;
        }
        let (decoder, (piece, ticket)) = self.decoder.take().zip(next.take())?;
        self.waiting.pop_front();
        self.first += 1;
        Some((decoder, Turn::Frame(piece, ticket)))
    }

    /// Whether the next turn can be taken already. After the end it is not taken back.
    fn give_back(&mut self, decoder: Decoder) -> Result<bool, Box<Decoder>> {
        if self.closed {
            return Err(Box::new(decoder));
        }
        self.decoder = Some(decoder);
        Ok(!self.found.is_empty() || matches!(self.waiting.front(), Some(Some(_))))
    }
}

#[cfg(test)]
#[path = "decode_pipeline_tests.rs"]
mod tests;
