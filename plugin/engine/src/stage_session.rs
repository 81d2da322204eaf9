//! A stage that another host fills here: contents for a migration that may come.
//!
//! Owns: the window until a migration takes it, and its end: when the source hangs up, when its
//! time is over, or when it was taken.
//! Must not: have channels, sockets or guests.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use vmgang_dedup::{PAGE_BYTES, PageWindow};
use vmgang_wire::{Frame, Kind, STREAM_BYTES_MAX, Welcome};

use crate::answers::Answers;
use crate::buffers::Buffers;
use crate::connection::{FrameReader, ReadError, frame_queue, write_frames};
use crate::decode::Piece;
use crate::decode_pipeline::DecodePipeline;
use crate::destination_session::{Job, fails, refuse, start_pipeline};
use crate::stages::{Holding, Take};

/// The source ends it itself; this much later it has had its time.
const GRACE: Duration = Duration::from_secs(10);
/// What is queued leaves, if the source takes it soon.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the source's side of a stage ended in order.
enum End {
    Goodbye,
    Taken(oneshot::Sender<PageWindow>),
}

/// Serves the stage until it is taken or the source says goodbye (`Ok`), or something ends it.
pub(crate) async fn run(
    job: Job,
    seconds: u32,
    (holding, takes): (Holding, mpsc::Receiver<Take>),
    mut reader: FrameReader<impl AsyncRead + Unpin>,
    writer: impl AsyncWrite + Unpin + Send + 'static,
) -> Result<(), String> {
    let ended = job.ended();
    let (queue, queued) = frame_queue();
    let mut tasks = JoinSet::new();
    let mut writing = JoinSet::new();
    writing.spawn(write_frames(writer, queued, None));
    let (failures, mut failed) = mpsc::unbounded_channel();
    let buffers = Buffers::default();
    let pipeline = match start_pipeline(&job, None, &buffers, &failures) {
        Ok(pipeline) => pipeline,
        Err(error) => {
            let result = Err(error);
            refuse(&queue, &result);
            drop(queue);
            flush(writing).await;
            return result;
        }
    };
    let recall = job.recall();
    let contents = recall.as_ref().map_or(0, |recall| recall.contents());
    let (host, id) = (job.host.clone(), job.hello.job);
    let (answers, answering) = Answers::new(
        recall,
        job.page_key.digest_key().clone(),
        pipeline.clone(),
        queue.clone(),
        Box::new(move |found| host.staged(id, found as u64, found as u64)),
    );
    tasks.spawn(fails(answering, failures));
    queue.send(&Frame::Welcome(Welcome {
        window_budget_bytes: job.admission.window_budget_bytes,
        channel_credit_bytes: STREAM_BYTES_MAX as u32,
        contents,
        stage: false,
        announced: 0,
        more_connections: None,
    }));
    tracing::info!(
        job = %job.hello.job, gang = %job.hello.gang, source = %job.hello.source_host,
        contents, seconds, "contents are being staged here"
    );
    let deadline = Instant::now() + Duration::from_secs(u64::from(seconds)) + GRACE;
    let stage = Stage {
        job: &job,
        pipeline: &pipeline,
        answers: &answers,
        buffers: &buffers,
    };
    let result = tokio::select! {
        biased;
        Some(failure) = failed.recv() => Err(failure),
        result = stage.receive(&mut reader, takes) => result,
        written = writing.join_next() => Err(match written {
            Some(Ok(Err(error))) => format!("writing to the source failed: {error}"),
            _ => "writing to the source ended".to_owned(),
        }),
        () = tokio::time::sleep_until(deadline) => {
            Err("the time for which the source wanted this stage is over".to_owned())
        }
    };
    // Nobody else can take it now.
    drop(holding);
    tasks.shutdown().await;
    let result = match result {
        Ok(End::Taken(answer)) => {
            let window = pipeline.take_window().await;
            // What was promised for it is promised to the migration by now.
            drop(ended);
            if let Some(window) = window {
                let _ = answer.send(window);
            }
            Ok(())
        }
        Ok(End::Goodbye) => Ok(()),
        Err(error) => Err(error),
    };
    refuse(&queue, &result);
    drop(queue);
    pipeline.close().await;
    flush(writing).await;
    result
}

async fn flush(mut writing: JoinSet<std::io::Result<()>>) {
    let all = async { while writing.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FLUSH_TIMEOUT, all).await;
}

struct Stage<'a> {
    job: &'a Job,
    pipeline: &'a Arc<DecodePipeline>,
    answers: &'a Answers,
    buffers: &'a Buffers,
}

impl Stage<'_> {
    async fn receive(
        &self,
        reader: &mut FrameReader<impl AsyncRead + Unpin>,
        mut takes: mpsc::Receiver<Take>,
    ) -> Result<End, String> {
        let mut frames = 0;
        let mut wanted: Option<Take> = None;
        loop {
            if wanted.as_ref().is_some_and(|take| take.frames <= frames)
                && let Some(take) = wanted.take()
            {
                // The source has sent no more than that, or the two have lost each other.
                let exact = take.frames == frames;
                return match exact {
                    true => Ok(End::Taken(take.answer)),
                    false => Err("the source took a stage that it had sent more into".to_owned()),
                };
            }
            let header = tokio::select! {
                biased;
                header = reader.ready() => header,
                Some(take) = takes.recv(), if wanted.is_none() => {
                    wanted = Some(take);
                    continue;
                }
            };
            match header {
                Ok(()) => {}
                Err(error) => return Err(said(error)),
            }
            let header = reader.read().await.map_err(said)?;
            if header.kind == Kind::Stage {
                let body = reader.swap_body(self.buffers.take());
                let (_, piece) = Piece::read(&header, body).map_err(|error| error.to_string())?;
                let pages = piece.stream_len() as usize / PAGE_BYTES;
                // Nobody waits for its bytes: that they are what they should be is enough.
                drop(self.pipeline.decode(piece).await);
                frames += 1;
                self.job.host.staged(self.job.hello.job, pages as u64, 0);
                continue;
            }
            match reader.frame(&header).map_err(|error| error.to_string())? {
                Frame::Offer(offer) => self.answers.offer(offer)?,
                Frame::Goodbye => return Ok(End::Goodbye),
                Frame::Alive => {}
                Frame::Refuse { text, .. } => return Err(text),
                _ => return Err("the source sent a frame that has no place in a stage".to_owned()),
            }
        }
    }
}

fn said(error: ReadError) -> String {
    match error {
        ReadError::Closed => "the source hung up, its stage is dropped".to_owned(),
        error => error.to_string(),
    }
}
