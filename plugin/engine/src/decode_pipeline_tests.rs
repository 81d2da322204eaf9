//! Frames in flight: order, bounds, and what becomes of those behind one that fails.

use std::num::NonZeroUsize;
use std::sync::mpsc as blocking;

use futures_util::FutureExt;
use vmgang_wire::payload::{Content, Encoder, Place};
use vmgang_wire::{Compression, Data, Frame, FrameHeader, HEADER_BYTES};

use super::*;
use crate::compression::{FrameCompressor, Rung};
use crate::frame_digest::FrameDigest;

const KEY: DigestKey = DigestKey([3; 32]);

fn workers(threads: usize) -> Workers {
    Workers::new(NonZeroUsize::new(threads).unwrap()).unwrap()
}

fn pipeline(workers: Workers) -> (DecodePipeline, mpsc::UnboundedReceiver<String>) {
    let (failures, failed) = mpsc::unbounded_channel();
    let buffers = Buffers::default();
    let pipeline = DecodePipeline::new(&KEY, 1 << 20, None, workers, buffers, failures).unwrap();
    (pipeline, failed)
}

/// A frame of one page that is in slot 0 by then: the one that goes there if `defines`. Every
/// other one is compressed on its own.
fn piece(sequence: u64, page: &[u8; 4096], defines: bool, digest_of: &[u8]) -> Piece {
    piece_of(sequence, page, defines, digest_of, sequence % 2 == 1)
}

fn piece_of(
    sequence: u64,
    page: &[u8; 4096],
    defines: bool,
    digest_of: &[u8],
    packs: bool,
) -> Piece {
    let content = if defines {
        Content::Define { slot: 0, page }
    } else {
        Content::Reference { slot: 0, group: 0 }
    };
    let mut encoder = Encoder::default();
    encoder.page(Place::Body, content);
    let (mut payload, mut packed) = (Vec::new(), Vec::new());
    encoder.finish(&mut payload);
    let mut compression = Compression::None;
    if packs {
        let mut frames = FrameCompressor::new().unwrap();
        compression = frames.compress(Rung::Frame, &payload, &mut packed).unwrap();
        payload = packed;
    }
    let data = Data {
        sequence,
        stream_len: 4096,
        digest: FrameDigest::new(&KEY).of(digest_of),
        compression,
        payload: &payload,
    };
    let mut bytes = Vec::new();
    Frame::Data { channel: 1, data }.encode(&mut bytes);
    let header = FrameHeader::decode(bytes.first_chunk().unwrap()).unwrap();
    Piece::read(&header, bytes.split_off(HEADER_BYTES))
        .unwrap()
        .1
}

fn page(number: u64) -> [u8; 4096] {
    [(number % 251) as u8; 4096]
}

#[tokio::test(flavor = "multi_thread")]
async fn turns_are_in_session_order_on_any_number_of_workers() {
    for threads in [1, 2, 8] {
        let (pipeline, mut failed) = pipeline(workers(threads));
        let mut promises = Vec::new();
        // Pairs: a page goes into the slot, and is read from there before the next one does.
        for sequence in 0..400 {
            let page = page(sequence / 2);
            let piece = piece(sequence, &page, sequence % 2 == 0, &page);
            promises.push((page, pipeline.decode(piece).await));
        }
        for (page, promised) in promises {
            assert!(promised.await.unwrap().bytes() == page);
        }
        pipeline.drained().await;
        assert!(failed.try_recv().is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_do_not_verify_are_never_handed_out() {
    let (pipeline, mut failed) = pipeline(workers(2));
    let promised = pipeline.decode(piece(0, &page(1), true, &page(2))).await;
    assert!(promised.await.is_err());
    assert!(failed.recv().await.unwrap().contains("digest"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_decoded_behind_a_frame_that_failed() {
    let (pipeline, mut failed) = pipeline(workers(2));
    let good = page(1);
    // Sequence 5 comes where 0 is due.
    let wrong = pipeline.decode(piece(5, &good, true, &good)).await;
    let behind = pipeline.decode(piece(0, &good, true, &good)).await;
    assert!(failed.recv().await.unwrap().contains("frame 5 came"));
    assert!(wrong.await.is_err());
    pipeline.close().await;
    assert!(behind.await.is_err());
}

/// Keeps one worker busy until the sender is dropped.
fn block(workers: &Workers) -> blocking::Sender<()> {
    let (go, wait) = blocking::channel();
    drop(workers.run(move || wait.recv()));
    go
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_in_flight_are_bounded() {
    let workers = workers(1);
    let go = block(&workers);
    let (pipeline, _failed) = pipeline(workers);
    let page = page(1);
    let mut promises = Vec::new();
    let mut sequence = 0;
    while let Some(promised) = {
        let piece = piece_of(sequence, &page, true, &page, true);
        pipeline.decode(piece).now_or_never()
    } {
        promises.push(promised);
        sequence += 1;
    }
    assert_eq!(promises.len(), IN_FLIGHT_FRAMES);
    drop(go);
    pipeline.drained().await;
    for promised in promises {
        assert!(promised.await.unwrap().bytes() == page);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_waits_for_what_is_at_work_and_drops_the_rest() {
    let workers = workers(1);
    let go = block(&workers);
    let (pipeline, _failed) = pipeline(workers);
    let page = page(1);
    let piece = piece_of(0, &page, true, &page, true);
    let promised = pipeline.decode(piece).await;
    assert!(pipeline.close().now_or_never().is_none(), "a job is queued");
    drop(go);
    pipeline.close().await;
    assert!(promised.await.is_err(), "it was given up");
    assert_eq!(pipeline.in_flight.available_permits(), IN_FLIGHT_BYTES);
}
