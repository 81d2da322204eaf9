//! Speed of the tokeniser on one core, over streams as QEMU writes them. Throughput is bytes
//! of the stream.
//!
//! Run with `cargo bench -p vmgang-stream`. With `STREAM` set to a recorded stream, or to a
//! directory of them (`make record`), those are tokenised as well.

use std::hint::black_box;
use std::path::PathBuf;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vmgang_stream::synthetic::StreamBuilder;
use vmgang_stream::{PAGE_BYTES, Token, Tokenizer};

/// What a channel reads at a time.
const CHUNK_BYTES: usize = 256 << 10;
const PAGES: u64 = 16_384;

/// A stream of `PAGES` pages of which `zero_percent` are zero, in sections of so many pages.
fn stream(zero_percent: u64, section: u64) -> Vec<u8> {
    let mut builder = StreamBuilder::new(PAGES * PAGE_BYTES as u64);
    for number in 0..PAGES {
        if number % section == 0 {
            builder.begin_part();
        }
        let address = number * PAGE_BYTES as u64;
        if number * 37 % 100 < zero_percent {
            builder.zero(address);
        } else {
            builder.page(address, &[number as u8; PAGE_BYTES]);
        }
        if number % section == section - 1 || number + 1 == PAGES {
            builder.end_ram_section();
        }
    }
    builder.bytes().to_vec()
}

/// Tokenises a stream in chunks, as a channel does; the rest of a chunk is pushed again.
fn tokenise(stream: &[u8]) -> usize {
    let mut tokenizer = Tokenizer::new();
    let mut tokens = 0;
    let mut at = 0;
    while at < stream.len() {
        let end = stream.len().min(at + CHUNK_BYTES);
        let covered = tokenizer.push(&stream[at..end], end == stream.len(), |token| {
            tokens += usize::from(!matches!(black_box(token), Token::Opaque(_)));
        });
        at += covered;
    }
    tokens
}

fn tokenizer(c: &mut Criterion) {
    let mut group = c.benchmark_group("tokenizer");
    let mixes = [(0, 100), (50, 100), (99, 100), (100, 100), (100, PAGES)];
    for (zero_percent, section) in mixes {
        let stream = stream(zero_percent, section);
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_with_input(
            BenchmarkId::new(
                format!("sections of {section}"),
                format!("{zero_percent}% zero"),
            ),
            &stream,
            |bencher, stream| bencher.iter(|| tokenise(black_box(stream))),
        );
    }
    group.finish();
}

/// The streams that `STREAM` names.
fn recorded_streams() -> Vec<PathBuf> {
    let Some(path) = std::env::var_os("STREAM").map(PathBuf::from) else {
        return Vec::new();
    };
    if !path.is_dir() {
        return vec![path];
    }
    let mut files: Vec<_> = std::fs::read_dir(&path)
        .expect("STREAM can be listed")
        .map(|entry| entry.expect("STREAM can be listed").path())
        .filter(|file| {
            file.extension()
                .is_some_and(|extension| extension == "stream")
        })
        .collect();
    files.sort();
    files
}

fn recorded(c: &mut Criterion) {
    let mut group = c.benchmark_group("recorded");
    group.sample_size(20);
    for path in recorded_streams() {
        let stream = std::fs::read(&path).expect("a recorded stream can be read");
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_with_input(BenchmarkId::from_parameter(name), &stream, |b, stream| {
            b.iter(|| tokenise(black_box(stream)));
        });
    }
    group.finish();
}

criterion_group!(benches, tokenizer, recorded);
criterion_main!(benches);
