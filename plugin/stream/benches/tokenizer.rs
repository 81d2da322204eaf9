//! Speed of the tokeniser on one core, over streams as QEMU writes them. Throughput is bytes
//! of the stream.
//!
//! Run with `cargo bench -p vmgang-stream`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vmgang_stream::synthetic::StreamBuilder;
use vmgang_stream::{PAGE_BYTES, Token, Tokenizer};

/// What a channel reads at a time.
const CHUNK_BYTES: usize = 256 << 10;
const PAGES: u64 = 16_384;

/// A stream of `PAGES` pages of which `zero_percent` are zero, in sections of 100 pages.
fn stream(zero_percent: u64) -> Vec<u8> {
    let mut builder = StreamBuilder::new(PAGES * PAGE_BYTES as u64);
    for number in 0..PAGES {
        if number % 100 == 0 {
            builder.begin_part();
        }
        let address = number * PAGE_BYTES as u64;
        if number * 37 % 100 < zero_percent {
            builder.zero(address);
        } else {
            builder.page(address, &[number as u8; PAGE_BYTES]);
        }
        if number % 100 == 99 || number + 1 == PAGES {
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
    for zero_percent in [0, 50, 99, 100] {
        let stream = stream(zero_percent);
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_with_input(
            BenchmarkId::new("zero percent", zero_percent),
            &stream,
            |bencher, stream| bencher.iter(|| tokenise(black_box(stream))),
        );
    }
    group.finish();
}

criterion_group!(benches, tokenizer);
criterion_main!(benches);
