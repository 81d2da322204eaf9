//! Verified bytes on their way to a destination QEMU, and its return path on its way back.
//!
//! Owns: the connection to the QEMU, delivery in the channel's order, and the credit for it.
//! Must not: deliver what is not verified: the promises it is given hold verified bytes only.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, oneshot};
use vmgang_wire::{Direction, FRAME_CREDIT_BYTES_MIN, Frame};

use crate::buffers::Buffers;
use crate::connection::FrameQueue;
use crate::decode::StreamBytes;
use crate::frame_digest::{FrameDigest, of_return};
use crate::network::QemuConnection;

/// Delivered bytes are credited back in steps of this. So much less than what a channel is granted
/// that a source never waits for the rest of a step.
const CREDIT_STEP_BYTES: u32 = 512 * 1024;
/// Most return path bytes in one frame.
const RETURN_BYTES: usize = 64 * 1024;

/// What is to be done with a channel's stream, in order.
pub(crate) enum StreamEvent {
    /// Verified bytes, once there are.
    Bytes(oneshot::Receiver<StreamBytes>),
    Finish,
}

/// Moves bytes between one channel and its QEMU.
pub(crate) struct Pump {
    pub channel: u32,
    pub member: usize,
    pub digest: FrameDigest,
    pub queue: FrameQueue,
    pub buffers: Buffers,
    /// Credit taken and not yet given back.
    pub outstanding: Arc<AtomicU64>,
    pub return_credit: Arc<Semaphore>,
    pub return_outstanding: Arc<AtomicU64>,
}

impl Pump {
    pub(crate) async fn run(
        self,
        (reader, writer): QemuConnection,
        events: mpsc::UnboundedReceiver<StreamEvent>,
    ) {
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
        mut writer: impl AsyncWrite + Unpin,
    ) -> std::io::Result<()> {
        let mut delivered = 0u32;
        while let Some(event) = events.recv().await {
            match event {
                StreamEvent::Bytes(promised) => {
                    let Ok(bytes) = promised.await else {
                        // The session is about to end, and says why itself.
                        return std::future::pending().await;
                    };
                    writer.write_all(bytes.bytes()).await?;
                    delivered += bytes.bytes().len().max(FRAME_CREDIT_BYTES_MIN) as u32;
                    self.buffers.give(bytes.into_buffer());
                    if delivered >= CREDIT_STEP_BYTES {
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

    async fn read_return(&self, mut reader: impl AsyncRead + Unpin) -> std::io::Result<()> {
        let mut buffer = vec![0; RETURN_BYTES];
        let mut position = 0;
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
                digest: of_return(self.digest.of(bytes), self.channel, self.member, position),
                bytes,
            });
            position += bytes.len() as u64;
        }
        self.queue.send(&Frame::Finish {
            channel: self.channel,
        });
        Ok(())
    }
}
