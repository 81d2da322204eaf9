//! Both ends of each compression together, and what hostile payloads may not do.

use proptest::prelude::*;
use vmgang_wire::Compression;

use super::*;

/// Bytes that compress, and are found again further on.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            b'a' + ((state >> 60) as u8)
        })
        .collect()
}

fn pieces() -> impl Strategy<Value = Vec<(Rung, Vec<u8>)>> {
    let rung = prop::sample::select(&Rung::ALL[1..]);
    let bytes = (any::<u64>(), 1usize..40_000).prop_map(|(seed, len)| text(seed % 5, len));
    prop::collection::vec((rung, bytes), 1..12)
}

fn compress(pieces: &[(Rung, Vec<u8>)], window_log: u32) -> Vec<(Compression, Vec<u8>)> {
    let mut frames = FrameCompressor::new().unwrap();
    let mut stream = StreamCompressor::new(window_log).unwrap();
    pieces
        .iter()
        .map(|(rung, raw)| {
            let mut out = vec![7];
            let compression = if rung.streams() {
                stream.compress(*rung, raw, &mut out).unwrap()
            } else {
                frames.compress(*rung, raw, &mut out).unwrap()
            };
            assert_eq!(out.remove(0), 7, "what is there already stays");
            (compression, out)
        })
        .collect()
}

/// Both decompressors, as a session has them.
struct Decompressor(FrameDecompressor, StreamDecompressor);

impl Decompressor {
    fn new(window_log: Option<u32>) -> io::Result<Self> {
        Ok(Self(
            FrameDecompressor::new()?,
            StreamDecompressor::new(window_log)?,
        ))
    }

    fn decompress(
        &mut self,
        compression: Compression,
        payload: &[u8],
        raw: &mut Vec<u8>,
    ) -> Result<(), DecompressError> {
        match compression {
            Compression::None => panic!("not compressed"),
            Compression::Frame { raw_len } => self.0.decompress(raw_len, payload, raw),
            Compression::Stream { raw_len } => self.1.decompress(false, raw_len, payload, raw),
            Compression::NewStream { raw_len } => self.1.decompress(true, raw_len, payload, raw),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn payloads_come_back_whatever_the_rungs(pieces in pieces()) {
        let mut decompressor = Decompressor::new(Some(20)).unwrap();
        let mut raw = Vec::new();
        for ((_, piece), (compression, out)) in pieces.iter().zip(compress(&pieces, 20)) {
            decompressor.decompress(compression, &out, &mut raw).unwrap();
            prop_assert!(raw == *piece);
        }
    }

    #[test]
    fn a_mutated_payload_is_an_error_or_of_the_length_it_says(
        pieces in pieces(),
        at in any::<prop::sample::Index>(),
        flip in 1u8..=255,
    ) {
        let mut decompressor = Decompressor::new(Some(20)).unwrap();
        let mut raw = Vec::new();
        for (index, (compression, mut out)) in compress(&pieces, 20).into_iter().enumerate() {
            let at = at.index(out.len());
            out[at] ^= flip;
            if decompressor.decompress(compression, &out, &mut raw).is_err() {
                break;
            }
            prop_assert_eq!(raw.len(), pieces[index].1.len());
        }
    }
}

#[test]
fn the_stream_finds_again_what_went_before_and_frames_do_not() {
    let piece = text(3, 200_000);
    let sizes = |rung| {
        let pieces = vec![(rung, piece.clone()), (rung, piece.clone())];
        let out = compress(&pieces, 20);
        (out[0].1.len(), out[1].1.len())
    };
    let (first, second) = sizes(Rung::Long);
    assert!(second * 50 < first, "{first} and then {second}");
    let (first, second) = sizes(Rung::Frame);
    assert_eq!(first, second);
}

#[test]
fn a_stream_must_begin_and_stay_in_its_window() {
    let mut raw = Vec::new();
    let compressed = compress(
        &[(Rung::Long, text(1, 5000)), (Rung::Long, text(1, 500))],
        22,
    );
    let mut none = Decompressor::new(None).unwrap();
    let (first, second) = (&compressed[0], &compressed[1]);
    assert!(matches!(
        none.decompress(first.0, &first.1, &mut raw),
        Err(DecompressError::NoStream)
    ));
    let mut late = Decompressor::new(Some(22)).unwrap();
    assert!(matches!(
        late.decompress(second.0, &second.1, &mut raw),
        Err(DecompressError::NoStream)
    ));
    // A window beyond what was agreed is refused before memory is taken.
    let mut small = Decompressor::new(Some(20)).unwrap();
    assert!(matches!(
        small.decompress(first.0, &first.1, &mut raw),
        Err(DecompressError::Zstd(_))
    ));
}

#[test]
fn the_budget_is_never_exceeded() {
    for budget in [
        0,
        1,
        4095,
        1 << 20,
        (8 << 20) - 1,
        8 << 20,
        1 << 30,
        64 << 30,
        u64::MAX,
    ] {
        let split = Budget::of(budget);
        let stream = split.window_log.map_or(0, |log| 1u64 << log);
        assert_eq!(split.page_window_bytes + stream, budget);
        assert!(stream <= budget / 8 && stream <= 128 << 20, "{budget}");
    }
    assert_eq!(Budget::of((8 << 20) - 1).window_log, None);
    assert_eq!(Budget::of(8 << 20).window_log, Some(20));
}

#[test]
fn random_memory_is_soon_left_alone_and_tried_again() {
    let mut patience = Patience::default();
    let mut tried = 0;
    for _ in 0..1000 {
        if patience.tries(1000) {
            tried += 1;
            patience.learn(1000, 999);
        }
    }
    assert!((30..60).contains(&tried), "{tried} of 1000");
    while !patience.tries(1000) {}
    patience.learn(1000, 500);
    assert!((0..100).all(|_| patience.tries(1000)), "it shrinks again");
}
