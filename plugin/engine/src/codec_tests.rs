//! Both halves of the codec together, without I/O: invariants 1, 3 and 5.

use std::sync::Arc;

use proptest::prelude::*;
use vmgang_dedup::{DigestKey, Member, slots_in};
use vmgang_stream::Tokenizer;
use vmgang_stream::synthetic::StreamBuilder;
use vmgang_wire::payload::{Cost, Costs};
use vmgang_wire::{Frame, FrameHeader, HEADER_BYTES};

use super::{DecodeError, Decoder};
use crate::buffers::Buffers;
use crate::chunk::Chunk;
use crate::compression::{Budget, Rung};
use crate::counters::{GROUP_CROSS_VM, Live};
use crate::encode::{ChannelEncoder, Common, Plan};
use crate::frame_digest::{FrameDigest, of_channel};
use crate::ladder::{Ladder, Worth};
use crate::order::SessionOrder;
use crate::pool::Pool;
use crate::scanned::Scanned;
use crate::seal::Sealer;
use crate::{Techniques, Zstd};

const WORTH: Worth = Worth {
    delta_max: 2048,
    scarce: false,
};
const KEY: DigestKey = DigestKey([5; 32]);

type Page = [u8; 4096];

/// Unrelated pages; of the first thirty, five are near-copies and five are made of halves.
fn page(seed: u8) -> Page {
    match seed {
        20..25 => {
            let mut page = page(seed - 20);
            page[usize::from(seed) * 100] ^= 0xff;
            page[4000..4008].copy_from_slice(&u64::from(seed).to_le_bytes());
            page
        }
        25..30 => {
            let mut halves = page(seed - 25);
            halves[2048..].copy_from_slice(&page(seed - 24)[2048..]);
            halves
        }
        _ => unrelated(seed),
    }
}

fn unrelated(seed: u8) -> Page {
    let mut state = u64::from(seed) + 1;
    let mut page = [0; 4096];
    for byte in &mut page {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    page
}

fn stream(pages: &[Option<u8>], dirty: &[(usize, u8)]) -> Vec<u8> {
    let first: Vec<_> = pages.iter().map(|seed| seed.map(page)).collect();
    let dirty: Vec<_> = dirty
        .iter()
        .map(|(i, seed)| (i % first.len(), page(*seed)))
        .collect();
    StreamBuilder::migration(&first, &dirty)
}

fn data(frame: &[u8]) -> Frame<'_> {
    let header = FrameHeader::decode(frame.first_chunk::<HEADER_BYTES>().unwrap()).unwrap();
    let mut read = Frame::decode(&header, &frame[HEADER_BYTES..]).unwrap();
    if let Frame::Data { channel, data } = &mut read {
        data.digest = of_bytes(data.digest, *channel);
    }
    read
}

/// Of the digest of a channel: each member here has one, in their order from 1.
fn of_bytes(digest: [u8; 16], channel: u32) -> [u8; 16] {
    of_channel(digest, channel, channel as usize - 1)
}

fn decoder(budget: u64) -> Decoder {
    Decoder::new(&KEY, budget, Buffers::default()).unwrap()
}

fn decode(decoder: &mut Decoder, frame: &[u8]) -> Result<Vec<u8>, DecodeError> {
    match data(frame) {
        Frame::Data { data, .. } => decoder.decode(&data),
        other => panic!("{other:?}"),
    }
}

/// Sends `streams` as members of one gang, taking turns in chunks of the given sizes;
/// returns the frames in order (with their member) and the summed costs.
fn encode(
    streams: &[Vec<u8>],
    budget: u64,
    techniques: Techniques,
    turns: &[(usize, bool)],
) -> Vec<(usize, Vec<u8>, Costs)> {
    let budget = Budget::of(budget);
    let mut order = SessionOrder::new(slots_in(budget.page_window_bytes), &techniques, false);
    let rung = match (techniques.zstd, budget.window_log) {
        (Zstd::Off, _) => Rung::None,
        (Zstd::Fixed(rung), Some(_)) => rung,
        (Zstd::Fixed(rung), None) => Sealer::rung_without_stream(rung),
        (Zstd::Adaptive, _) => Rung::Frame,
    };
    let buffers = Buffers::default();
    let live = Arc::new(Live::new(streams.len()));
    let ladder = Arc::new(Ladder::new(rung, false, 1));
    let mut sealer = Sealer::new(budget.window_log, ladder, live, buffers.clone()).unwrap();
    let mut members: Vec<_> = streams
        .iter()
        .enumerate()
        .map(|(i, stream)| {
            let common = Common {
                key: KEY,
                scanned: Scanned::default(),
                digest: FrameDigest::new(&KEY),
                techniques,
                buffers: buffers.clone(),
                compressors: Pool::default(),
                sharing: Default::default(),
            };
            let encoder = ChannelEncoder::new(i as u32 + 1, Member(i as u16), common);
            (encoder, Tokenizer::new(), &stream[..], 0)
        })
        .collect();
    let mut frames = Vec::new();
    let mut turns = turns.iter().cycle();
    while members.iter().any(|(_, _, rest, _)| !rest.is_empty()) {
        for (i, (encoder, tokenizer, rest, unread)) in members.iter_mut().enumerate() {
            let (size, flush) = *turns.next().unwrap();
            *unread = (*unread + size).min(rest.len());
            let last = *unread == rest.len();
            let mut chunk = Chunk::default();
            chunk.bytes.extend_from_slice(&rest[..*unread]);
            let covered = chunk.tokenise(tokenizer, flush || last);
            if covered == 0 {
                continue;
            }
            chunk.bytes.truncate(covered);
            // Now and again as if the processor were scarce.
            encoder.identify(&mut chunk, size.is_multiple_of(7));
            let ordered = encoder.order(&mut chunk, &mut order);
            let plan = encoder.plan(&chunk, rung);
            let frame = encoder.build(&mut chunk, ordered, plan, WORTH);
            *rest = &rest[covered..];
            *unread -= covered;
            let costs = frame.costs;
            frames.push((i, sealer.seal(frame).unwrap().joined(), costs));
        }
    }
    frames
}

fn techniques() -> impl Strategy<Value = Techniques> {
    let zstd = prop_oneof![
        Just(Zstd::Off),
        prop::sample::select(&Rung::ALL[..]).prop_map(Zstd::Fixed),
    ];
    let flags = any::<[bool; 6]>();
    (flags, zstd).prop_map(
        |([uniform, page, rehash, delta, similar, sub_page], zstd)| Techniques {
            uniform,
            page,
            rehash,
            delta,
            similar: Techniques::ALL.similar.filter(|_| similar),
            sub_page: Techniques::ALL.sub_page.filter(|_| sub_page),
            zstd,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_gang_comes_out_byte_exact_under_any_budget(
        gang in prop::collection::vec(
            (
                prop::collection::vec(prop::option::of(0u8..30), 1..120),
                prop::collection::vec((0usize..120, 0u8..30), 0..10),
                prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            ),
            1..4,
        ),
        // With and without room for the session's zstd stream.
        budget_pages in prop_oneof![0u64..40, 2047u64..2060],
        techniques in techniques(),
        turns in prop::collection::vec((1usize..60_000, any::<bool>()), 1..8),
    ) {
        let streams: Vec<_> = gang
            .iter()
            .map(|(pages, dirty, edits)| {
                let mut bytes = stream(pages, dirty);
                for (index, byte) in edits {
                    let at = index.index(bytes.len());
                    bytes[at] = *byte;
                }
                bytes
            })
            .collect();
        let budget = budget_pages * 4096;
        let frames = encode(&streams, budget, techniques, &turns);
        let mut decoder = decoder(budget);
        let mut out = vec![Vec::new(); streams.len()];
        for (member, frame, _) in &frames {
            out[*member].extend(decode(&mut decoder, frame).unwrap());
        }
        prop_assert!(out == streams);
    }

    #[test]
    fn a_mutated_frame_is_an_error_or_the_same_bytes(
        at in any::<prop::sample::Index>(),
        flip in 1u8..=255,
    ) {
        let streams = [stream(&[Some(1), None, Some(2), Some(1), Some(3)], &[(2, 9)])];
        let frames = encode(&streams, 1 << 20, Techniques::ALL, &[(1 << 20, false)]);
        let mut frame = frames[0].1.clone();
        // The payload and the fields of the DATA body; the header is `wire`'s business.
        let at = HEADER_BYTES + at.index(frame.len() - HEADER_BYTES);
        frame[at] ^= flip;
        let header = FrameHeader::decode(frame.first_chunk::<HEADER_BYTES>().unwrap()).unwrap();
        if let Ok(Frame::Data { channel, mut data }) = Frame::decode(&header, &frame[HEADER_BYTES..]) {
            data.digest = of_bytes(data.digest, channel);
            let mut decoder = decoder(1 << 20);
            if let Ok(bytes) = decoder.decode(&data) {
                prop_assert!(streams[0].starts_with(&bytes));
            }
        }
    }
}

#[test]
fn a_clone_costs_next_to_nothing_and_counts_as_cross_vm() {
    let pages: Vec<_> = (0..250u8).map(Some).collect();
    let streams = [stream(&pages, &[]), stream(&pages, &[])];
    let frames = encode(&streams, 1 << 30, Techniques::ALL, &[(1 << 20, false)]);
    let of = |member| {
        frames
            .iter()
            .filter(move |(m, ..)| *m == member)
            .map(|(_, frame, _)| frame.len())
            .sum()
    };
    let (first, second): (usize, usize) = (of(0), of(1));
    assert!(second * 50 < first, "{second} of {first}");
    let cross: u64 = frames
        .iter()
        .map(|(.., costs)| costs.reference[1].stream)
        .sum();
    let intra: u64 = frames
        .iter()
        .map(|(.., costs)| costs.reference[0].stream)
        .sum();
    assert!(cross >= 247 * 4096, "{cross}");
    assert_eq!(intra, 0);
}

fn sum(frames: &[(usize, Vec<u8>, Costs)], of: impl Fn(&Costs) -> Cost) -> Cost {
    frames
        .iter()
        .map(|(.., costs)| of(costs))
        .fold(Cost::default(), |sum, cost| Cost {
            stream: sum.stream + cost.stream,
            payload: sum.payload + cost.payload,
        })
}

#[test]
fn each_technique_saves_what_it_is_for_and_is_counted() {
    let only = |list: &str| list.parse::<Techniques>().unwrap();
    let send = |pages: &[Option<u8>], dirty: &[(usize, u8)], techniques| {
        let streams = [stream(pages, dirty)];
        let frames = encode(&streams, 1 << 20, techniques, &[(9000, false)]);
        let mut decoder = decoder(1 << 20);
        let out: Vec<u8> = frames
            .iter()
            .flat_map(|(_, frame, _)| decode(&mut decoder, frame).unwrap())
            .collect();
        assert!(out == streams[0]);
        frames
    };
    let originals: Vec<_> = (0..6).map(Some).collect();
    let copies: Vec<_> = (0..6).chain(20..25).map(Some).collect();
    let halves: Vec<_> = (0..6).chain(25..30).map(Some).collect();
    let dirtied: Vec<_> = (0..5).map(|page| (page, page as u8 + 20)).collect();
    let record = 4096 + 8;

    let delta = sum(
        &send(&originals, &dirtied, only("page,rehash,delta")),
        |c| c.delta,
    );
    // The first record of a round names its block: where its page is, is not known.
    assert_eq!(delta.stream, 4 * record);
    assert!(delta.payload < 4 * 40, "{delta:?}");
    let delta = sum(&send(&originals, &dirtied, only("page,delta")), |c| c.delta);
    assert_eq!(delta.stream, 0, "dirtied pages are not hashed again");

    let similar = sum(&send(&copies, &[], only("page,similar=4:1:1")), |c| c.delta);
    assert_eq!(similar.stream, 5 * record);
    assert!(similar.payload < 5 * 40, "{similar:?}");

    for (list, blocks) in [("512", 8), ("1024", 4), ("2048", 2)] {
        let techniques = only(&format!("page,sub-page={list}"));
        let half = sum(&send(&halves, &[], techniques), |c| c.sub_page);
        assert_eq!(half.stream, 5 * record, "{list}");
        assert!(half.payload < 5 * blocks * 12, "{list}: {half:?}");
    }
}

#[test]
fn a_repeated_page_of_one_vm_counts_as_intra_vm() {
    let streams = [stream(&[Some(1); 50], &[])];
    let frames = encode(&streams, 1 << 30, Techniques::ALL, &[(1 << 20, false)]);
    let intra: u64 = frames
        .iter()
        .map(|(.., costs)| costs.reference[0].stream)
        .sum();
    assert!(intra >= 49 * 4096);
}

#[test]
fn incompressible_input_costs_less_than_a_thousandth_more() {
    let pages: Vec<_> = (0..250u8).map(Some).collect();
    let streams = [stream(&pages, &[])];
    let frames = encode(&streams, 0, Techniques::ALL, &[(256 << 10, false)]);
    let wire: usize = frames.iter().map(|(_, frame, _)| frame.len()).sum();
    assert!(
        wire * 1000 < streams[0].len() * 1001,
        "{wire} of {}",
        streams[0].len()
    );
}

#[test]
fn a_replayed_or_skipped_frame_is_refused() {
    let streams = [stream(&[Some(1), Some(2)], &[])];
    let frames = encode(&streams, 1 << 20, Techniques::ALL, &[(5000, true)]);
    let mut decoder = decoder(1 << 20);
    decode(&mut decoder, &frames[0].1).unwrap();
    let again = decode(&mut decoder, &frames[0].1);
    assert!(matches!(
        again,
        Err(DecodeError::Sequence {
            expected: 1,
            got: 0
        })
    ));
}

#[test]
fn a_wrong_digest_delivers_nothing() {
    let streams = [stream(&[Some(1)], &[])];
    let frames = encode(&streams, 1 << 20, Techniques::NONE, &[(1 << 20, true)]);
    let mut frame = frames[0].1.clone();
    let last = frame.len() - 1;
    frame[last] ^= 1;
    let mut decoder = decoder(1 << 20);
    assert!(matches!(
        decode(&mut decoder, &frame),
        Err(DecodeError::Digest)
    ));
}

/// A few bytes that claim billions of zero records must not fill memory.
#[test]
fn a_decompression_bomb_stops_at_the_announced_length() {
    let mut payload = vmgang_wire::payload::Encoder::default();
    for i in 0..1_000_000u64 {
        payload.zero(i << 12, 0);
    }
    let mut bytes = Vec::new();
    payload.finish(&mut bytes);
    let data = vmgang_wire::Data {
        sequence: 0,
        stream_len: 900,
        digest: [0; 16],
        compression: vmgang_wire::Compression::None,
        payload: &bytes,
    };
    let mut decoder = decoder(1 << 20);
    assert!(matches!(
        decoder.decode(&data),
        Err(DecodeError::StreamLength { announced: 900 })
    ));
    let data = vmgang_wire::Data {
        sequence: 1,
        compression: vmgang_wire::Compression::Frame { raw_len: u32::MAX },
        ..data
    };
    assert!(decoder.decode(&data).is_err());
}

/// Memory goes round: once warm, a chunk of pages takes none for each of them.
#[test]
fn a_page_takes_no_allocation_once_buffers_are_warm() {
    let buffers = Buffers::default();
    let common = Common {
        key: KEY,
        scanned: Scanned::default(),
        digest: FrameDigest::new(&KEY),
        techniques: Techniques::ALL,
        buffers: buffers.clone(),
        compressors: Pool::default(),
        sharing: Default::default(),
    };
    let encoder = ChannelEncoder::new(1, Member(0), common);
    let budget = Budget::of(64 << 20);
    let mut order = SessionOrder::new(slots_in(budget.page_window_bytes), &Techniques::ALL, false);
    let mut decoder = decoder(64 << 20);
    let ladder = Arc::new(Ladder::new(Rung::Frame, false, 1));
    let live = Arc::new(Live::new(1));
    let mut sealer = Sealer::new(None, ladder, live, buffers).unwrap();
    let mut tokenizer = Tokenizer::new();
    let mut chunk = Chunk::default();
    let mut builder = StreamBuilder::new(1 << 20);
    let pages = 60u64;
    let mut once = |builder: &mut StreamBuilder, round: u64| {
        let before = builder.bytes().len();
        builder.begin_part();
        for index in 0..pages {
            // Like the page before it but for a few bytes, or a new one.
            let mut page = page((index % 40) as u8);
            page[9..17].copy_from_slice(&(round * pages + index).to_le_bytes());
            builder.page(index * 4096, &page);
        }
        builder.end_ram_section();
        let from = if round == 0 { 0 } else { before };
        let stream = &builder.bytes()[from..];
        let (mut encoding, mut decoding) = (0, 0);
        chunk.bytes.clear();
        chunk.bytes.extend_from_slice(stream);
        let frame = {
            let mut frame = None;
            encoding += allocation_counter::measure(|| {
                chunk.tokenise(&mut tokenizer, true);
                encoder.identify(&mut chunk, false);
                let ordered = encoder.order(&mut chunk, &mut order);
                let plan = encoder.plan(&chunk, Rung::Frame);
                let built = encoder.build(&mut chunk, ordered, plan, WORTH);
                frame = Some(sealer.seal(built).unwrap());
            })
            .count_total;
            frame.unwrap().joined()
        };
        let mut out = Vec::new();
        decoding += allocation_counter::measure(|| {
            out = decode(&mut decoder, &frame).unwrap();
        })
        .count_total;
        assert!(out == stream);
        (encoding, decoding)
    };
    (0..20).for_each(|round| {
        once(&mut builder, round);
    });
    let (encoding, decoding) = once(&mut builder, 20);
    assert!(
        encoding < pages / 4 && decoding < pages / 4,
        "{encoding} {decoding}"
    );
}

/// The source's copy of a slot must not outlive its content, even if that comes back: a delta to
/// it would be one to something that the peer has not.
#[test]
fn a_slot_that_was_filled_without_a_copy_is_no_base() {
    let techniques: Techniques = "uniform,page,rehash,delta".parse().unwrap();
    let common = Common {
        key: KEY,
        scanned: Scanned::default(),
        digest: FrameDigest::new(&KEY),
        techniques,
        buffers: Buffers::default(),
        compressors: Pool::default(),
        sharing: Default::default(),
    };
    let encoder = ChannelEncoder::new(1, Member(0), common);
    let mut order = SessionOrder::new(1, &techniques, false);
    let ladder = Arc::new(Ladder::new(Rung::None, false, 1));
    let live = Arc::new(Live::new(1));
    let mut sealer = Sealer::new(None, ladder, live, Buffers::default()).unwrap();
    let mut decoder = decoder(4096);
    let mut tokenizer = Tokenizer::new();
    let mut builder = StreamBuilder::new(1 << 20);
    let near = |at: usize| {
        let mut near = page(1);
        near[at] ^= 1;
        near
    };
    let contents = [[5; 4096], page(1), near(7), page(1), near(9)];
    let mut deltas = 0;
    for (content, remembered, scarce) in [
        (1, true, false),
        (2, false, false),
        (3, false, true),
        (4, true, false),
    ] {
        let from = if content == 1 {
            0
        } else {
            builder.bytes().len()
        };
        builder.begin_part();
        if remembered {
            // The first record of a section names its block: where its page is is not known.
            builder.page(9 * 4096, &contents[0]);
        }
        builder.page(4096, &contents[content]).end_ram_section();
        let stream = builder.bytes()[from..].to_vec();
        let mut chunk = Chunk::default();
        chunk.bytes.extend_from_slice(&stream);
        assert_eq!(chunk.tokenise(&mut tokenizer, true), stream.len());
        encoder.identify(&mut chunk, scarce);
        let ordered = encoder.order(&mut chunk, &mut order);
        let plan = encoder.plan(&chunk, Rung::None);
        let built = encoder.build(&mut chunk, ordered, plan, WORTH);
        deltas += built.costs.delta.stream;
        let frame = sealer.seal(built).unwrap().joined();
        assert!(decode(&mut decoder, &frame).unwrap() == stream);
    }
    assert_eq!(deltas, 0);
}

/// What is not made smaller is not copied either: its pages are kept where they lie, and serve as well.
#[test]
fn unique_pages_pass_through_and_are_kept() {
    let techniques: Techniques = "uniform,page,rehash".parse().unwrap();
    let common = Common {
        key: KEY,
        scanned: Scanned::default(),
        digest: FrameDigest::new(&KEY),
        techniques,
        buffers: Buffers::default(),
        compressors: Pool::default(),
        sharing: Default::default(),
    };
    let mut order = SessionOrder::new(64, &techniques, false);
    let ladder = Arc::new(Ladder::new(Rung::None, false, 1));
    let live = Arc::new(Live::new(2));
    let mut sealer = Sealer::new(None, ladder, live, Buffers::default()).unwrap();
    let mut decoder = decoder(64 * 4096);
    let mut builder = StreamBuilder::new(1 << 20);
    builder.begin_part();
    for number in 0..20 {
        builder.page(u64::from(number) * 8192, &page(number + 1));
    }
    builder.end_ram_section();
    let stream = builder.bytes();
    let mut plans = Vec::new();
    for member in 0..2 {
        let encoder = ChannelEncoder::new(member + 1, Member(member as u16), common.clone());
        let mut chunk = Chunk::default();
        chunk.bytes.extend_from_slice(stream);
        assert_eq!(chunk.tokenise(&mut Tokenizer::new(), true), stream.len());
        encoder.identify(&mut chunk, false);
        let ordered = encoder.order(&mut chunk, &mut order);
        let plan = encoder.plan(&chunk, Rung::None);
        plans.push(plan);
        let built = encoder.build(&mut chunk, ordered, plan, WORTH);
        assert_eq!(built.costs.total().stream, stream.len() as u64);
        let references = built.costs.reference[GROUP_CROSS_VM].stream;
        assert_eq!(references > 0, member == 1);
        let sealed = sealer.seal(built).unwrap();
        assert_eq!(sealed.tail.is_empty(), member == 1);
        assert!(decode(&mut decoder, &sealed.joined()).unwrap() == stream);
    }
    assert_eq!(plans, [Plan::Pass, Plan::Plain]);
}

/// Hashing is switched off for a stream in which nothing is found, but for samples, and comes back
/// when these are found. Every byte comes back all the time.
#[test]
fn a_stream_of_samples_is_exact_and_finds_its_way_back() {
    let techniques = Techniques::DEFAULT;
    let common = Common {
        key: KEY,
        scanned: Scanned::default(),
        digest: FrameDigest::new(&KEY),
        techniques,
        buffers: Buffers::default(),
        compressors: Pool::default(),
        sharing: Default::default(),
    };
    let mut order = SessionOrder::new(slots_in(64 << 20), &techniques, false);
    let ladder = Arc::new(Ladder::new(Rung::None, false, 1));
    let live = Arc::new(Live::new(2));
    let mut sealer = Sealer::new(None, ladder, live, Buffers::default()).unwrap();
    let mut decoder = Decoder::new(&KEY, 73 << 20, Buffers::default()).unwrap();
    let random = |number: u64| {
        let mut page = [0; 4096];
        blake3::Hasher::new()
            .update(&number.to_le_bytes())
            .finalize_xof()
            .fill(&mut page);
        page
    };
    let scarce = Worth {
        scarce: true,
        ..WORTH
    };
    // Sends 64 pages from that number on; returns how many were hashed, and stream bytes referred to.
    let mut send = |encoder: &ChannelEncoder, qemu: &mut (StreamBuilder, Tokenizer), from: u64| {
        let (builder, tokenizer) = qemu;
        let begin = match builder.bytes().len() {
            0..100_000 => 0,
            written => written,
        };
        builder.begin_part();
        for number in from..from + 64 {
            builder.page(number * 4096, &random(number));
        }
        builder.end_ram_section();
        let stream = &builder.bytes()[begin..];
        let mut chunk = Chunk::default();
        chunk.bytes.extend_from_slice(stream);
        assert_eq!(chunk.tokenise(tokenizer, true), stream.len());
        encoder.identify(&mut chunk, true);
        let hashed = chunk.identities.len();
        let ordered = encoder.order(&mut chunk, &mut order);
        let plan = encoder.plan(&chunk, Rung::None);
        let built = encoder.build(&mut chunk, ordered, plan, scarce);
        let referred = built.costs.reference[GROUP_CROSS_VM].stream;
        let frame = sealer.seal(built).unwrap().joined();
        assert!(decode(&mut decoder, &frame).unwrap() == stream);
        (hashed, referred)
    };
    let [first, second] =
        [0, 1].map(|member| ChannelEncoder::new(member + 1, Member(member as u16), common.clone()));
    let [mut one, mut other] = [(); 2].map(|()| (StreamBuilder::new(1 << 30), Tokenizer::new()));
    let mut hashed = Vec::new();
    for round in 0..100 {
        hashed.push(send(&first, &mut one, round * 64).0);
    }
    assert_eq!(hashed[0], 64);
    let lately: usize = hashed[60..].iter().sum();
    assert!((40..400).contains(&lately), "{lately} of {}", 40 * 64);
    // The other one has the same from the start, and says so to the first.
    let mut referred = 0;
    for round in 0..20 {
        referred += send(&second, &mut other, round * 64).1;
    }
    assert!(referred > 1000 * 4096, "{referred}");
    let back: usize = (100..110)
        .map(|round| send(&first, &mut one, round * 64).0)
        .sum();
    assert!(back > 300, "{back} of 640");
}
