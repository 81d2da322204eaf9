//! Real pages of Debian guests through both halves of the engine, with every choice of techniques:
//! every byte arrives, each technique counts what it saves, and all savings add up to what was not
//! sent.

use std::collections::BTreeMap;
use std::path::PathBuf;

use vmgang_bench::ablation::plan::{Class, Plan, Row};
use vmgang_bench::replay::{Measurement, Settings, run};
use vmgang_bench::streams::{MemberStream, StreamSet};
use vmgang_stream::synthetic::StreamBuilder;
use vmgang_stream::{PAGE_BYTES, Page};

/// Pages that all guests had; the pairs after them are a page before and after a write.
const COMMON: usize = 132;
const PAIRS: usize = 48;
const MEMBERS: usize = 3;

fn real_pages() -> Vec<Page> {
    let packed = include_bytes!("../../corpus/pages/debian.zst");
    let bytes = zstd::decode_all(&packed[..]).expect("zstd");
    let pages = bytes.chunks_exact(PAGE_BYTES);
    pages.map(|page| page.try_into().expect("a page")).collect()
}

/// Every member has the common pages, at places of its own, what was before the writes and a share
/// of the rest; then come zero pages and a uniform one, and in the last pass what was written.
fn stream(pages: &[Page], member: usize) -> Vec<u8> {
    let (common, rest) = pages.split_at(COMMON);
    let (pairs, own) = rest.split_at(2 * PAIRS);
    let mut first: Vec<&Page> = common.iter().collect();
    first.rotate_left(member * 7);
    let pairs_at = first.len();
    first.extend(pairs.iter().step_by(2));
    first.extend(own.iter().skip(member).step_by(MEMBERS));
    let uniform = [0xa5; PAGE_BYTES];
    first.push(&uniform);
    let zeros = 40;
    let mut builder = StreamBuilder::new(((first.len() + zeros) * PAGE_BYTES) as u64);
    let address = |index: usize| (index * PAGE_BYTES) as u64;
    builder.begin_part();
    for (index, page) in first.iter().enumerate() {
        builder.page(address(index), page);
    }
    for index in first.len()..first.len() + zeros {
        builder.zero(address(index));
    }
    builder.end_ram_section().switchover_start().begin_end();
    for (place, page) in pairs.iter().skip(1).step_by(2).enumerate() {
        builder.page(address(pairs_at + place), page);
    }
    builder.end_ram_section().raw(&[0x04]).raw(&[0x55; 3000]);
    builder.bytes().to_vec()
}

fn set() -> StreamSet {
    let pages = real_pages();
    assert_eq!(pages.len(), 288);
    StreamSet {
        title: "real pages".to_owned(),
        members: (0..MEMBERS)
            .map(|member| MemberStream {
                name: format!("g{member}"),
                memory_bytes: 8 << 20,
                bytes: stream(&pages, member),
            })
            .collect(),
        dir: None,
    }
}

fn rows() -> Vec<Row> {
    let plan = Plan {
        links: Vec::new(),
        repetitions: 1,
        every_row: true,
    };
    let mut rows = plan.rows("real pages");
    rows.retain(|row| row.class != Class::Relay);
    rows
}

fn saved(measurement: &Measurement) -> BTreeMap<&str, i64> {
    let counters = measurement.counters.as_ref().expect("vmgang counts");
    let saved = counters.saved.iter();
    saved.map(|(name, bytes)| (name.as_str(), *bytes)).collect()
}

#[test]
fn every_technique_keeps_every_byte_of_real_pages_and_counts_what_it_saves() {
    let set = set();
    // Once with room for everything, once with room for next to nothing.
    for window_bytes in [64 << 20, 64 << 10] {
        let settings = Settings {
            window_bytes,
            tls: false,
            workers: 2,
            connections: std::num::NonZeroUsize::MIN,
            program: PathBuf::from(env!("CARGO_BIN_EXE_replay")),
        };
        let mut wire = BTreeMap::new();
        for row in rows() {
            // Fails if a byte differs.
            let measured = run(&set, &row.contender(), None, &settings).expect("byte-exact");
            let saved = saved(&measured);
            assert_eq!(
                saved.values().sum::<i64>(),
                measured.stream_bytes as i64 - measured.wire_bytes as i64,
                "{row:?}"
            );
            if window_bytes == 64 << 20 {
                check_row(&row, &saved);
            }
            wire.insert(row.title.clone(), measured.wire_bytes);
        }
        assert!(wire["dedup and zstd"] < wire["none"], "{wire:?}");
        assert!(wire["all but zstd"] < wire["none"], "{wire:?}");
        // These pages all fit into zstd's own window, so dedup before it changes little; how hard
        // zstd compresses is measured, not given.
        for with_dedup in ["default", "all", "dedup and zstd"] {
            assert!(wire[with_dedup] * 20 < wire["zstd"] * 21, "{wire:?}");
        }
        if window_bytes == 64 << 20 {
            // Without zstd each technique shows for itself.
            for more in ["delta", "similar", "sub-page"] {
                let with = format!("page, rehash, {more}");
                assert!(wire[&with] < wire["page, rehash"], "{more}: {wire:?}");
            }
            assert!(wire["page, rehash"] < wire["page"], "{wire:?}");
            assert!(wire["page"] < wire["none"], "{wire:?}");
            assert!(wire["all but zstd"] < wire["page, rehash"], "{wire:?}");
        }
    }
}

/// What is on saves what only it can save; what is off saves nothing.
fn check_row(row: &Row, saved: &BTreeMap<&str, i64>) {
    let techniques: Vec<&str> = row.techniques.split(',').collect();
    let on = |name: &str| {
        techniques
            .iter()
            .any(|technique| *technique == "all" || technique.starts_with(name))
    };
    // All members have the common pages: two of three times they were there.
    let cross_vm_least = ((MEMBERS - 1) * COMMON * PAGE_BYTES / 2) as i64;
    for (name, works, least) in [
        ("uniform", on("uniform"), 4000 * MEMBERS as i64),
        ("cross_vm", on("page"), cross_vm_least),
        ("compression", on("zstd"), 10_000),
    ] {
        match works {
            true => assert!(saved[name] >= least, "{row:?}: {saved:?}"),
            // Headers in a row are sent as a range, which counts as compression.
            false if name == "compression" => assert!(saved[name] < least, "{row:?}: {saved:?}"),
            false => assert_eq!(saved[name], 0, "{row:?}: {saved:?}"),
        }
    }
    if on("delta") && row.title == "page, rehash, delta" {
        // Half of the pairs differ in a few bytes.
        assert!(saved["delta"] > 20 * 3000, "{row:?}: {saved:?}");
    }
    if !on("delta") && !on("similar") {
        assert_eq!(saved["delta"], 0, "{row:?}: {saved:?}");
    }
    if !on("sub-page") {
        assert_eq!(saved["sub_page"], 0, "{row:?}: {saved:?}");
    }
}
