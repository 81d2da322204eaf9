//! Time of what is done for each page at the source, and of applying a delta at the
//! destination. Throughput is bytes of pages.
//!
//! Run with `cargo bench -p vmgang-dedup`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vmgang_dedup::{
    BlockHasher, BlockSize, DedupMap, DigestKey, HashSimilarityDetector, Member, PAGE_BYTES, Page,
    PageDigest, PageHistory, PageWindow, SimilarityParameters, SimilarityTable, Slot, SubPageTable,
    Verdict, delta, uniform_byte,
};

const KEY: DigestKey = DigestKey([7; 32]);
/// Contents in the tables: a window of 1 GiB, far more than the caches hold.
const SLOTS: u32 = 1 << 18;
/// Pages read in turn, so that not the same one is always in the first cache.
const PAGES: usize = 64;

/// A simple generator, so that runs are comparable.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn page(&mut self) -> Page {
        let mut page = [0; PAGE_BYTES];
        for word in page.as_chunks_mut::<8>().0 {
            *word = self.next().to_le_bytes();
        }
        page
    }

    fn pages(&mut self) -> Vec<Page> {
        (0..PAGES).map(|_| self.page()).collect()
    }

    fn digest(&mut self) -> PageDigest {
        let value = u128::from(self.next()) | (u128::from(self.next()) << 64);
        PageDigest(value.to_le_bytes())
    }
}

/// Calls `work` with the pages in turn.
fn each_page(c: &mut Criterion, name: &str, pages: &[Page], mut work: impl FnMut(usize, &Page)) {
    let mut group = c.benchmark_group("page");
    group.throughput(Throughput::Bytes(PAGE_BYTES as u64));
    let mut at = 0;
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            at = (at + 1) % pages.len();
            work(at, black_box(&pages[at]));
        });
    });
    group.finish();
}

fn identity(c: &mut Criterion) {
    let mut random = Random(1);
    let pages = random.pages();
    each_page(c, "uniform/no", &pages, |_, page| {
        black_box(uniform_byte(page));
    });
    each_page(
        c,
        "uniform/yes",
        &vec![[5; PAGE_BYTES]; PAGES],
        |_, page| {
            black_box(uniform_byte(page));
        },
    );
    each_page(c, "digest", &pages, |_, page| {
        black_box(PageDigest::of(&KEY, page));
    });
}

/// Digests of a chunk of pages as they lie in a stream, so many in one call.
fn digests(c: &mut Criterion) {
    const RECORD_BYTES: usize = 8 + PAGE_BYTES;
    let mut stream = Vec::new();
    for page in Random(7).pages() {
        stream.extend_from_slice(&[0; 8]);
        stream.extend_from_slice(&page);
    }
    let pages: Vec<&Page> = stream
        .chunks_exact(RECORD_BYTES)
        .filter_map(|record| record.last_chunk())
        .collect();
    let mut out = Vec::with_capacity(PAGES);
    let mut group = c.benchmark_group("digests");
    group.throughput(Throughput::Bytes((PAGES * PAGE_BYTES) as u64));
    group.bench_function("one by one", |bencher| {
        bencher.iter(|| {
            out.clear();
            for page in black_box(&pages) {
                out.push(PageDigest::of(&KEY, page));
            }
            black_box(&out);
        });
    });
    for batch in [4, 8, 16, 32, 64] {
        group.bench_function(format!("{batch} in a call"), |bencher| {
            bencher.iter(|| {
                out.clear();
                for pages in black_box(&pages).chunks(batch) {
                    PageDigest::of_many(&KEY, pages, &mut out);
                }
                black_box(&out);
            });
        });
    }
    group.finish();
}

/// Look-ups over a full map, one random content after the other.
fn map(c: &mut Criterion) {
    let mut random = Random(2);
    let digests: Vec<_> = (0..SLOTS).map(|_| random.digest()).collect();
    let mut full = DedupMap::new(SLOTS);
    for digest in &digests {
        full.judge(*digest, Member(0));
    }
    let mut group = c.benchmark_group("map");
    group.throughput(Throughput::Elements(1));
    group.bench_function("hit", |bencher| {
        bencher.iter(|| {
            let digest = digests[random.next() as usize % digests.len()];
            black_box(full.judge(digest, Member(1)))
        });
    });
    group.bench_function("miss and replace", |bencher| {
        bencher.iter(|| black_box(full.judge(random.digest(), Member(1))));
    });
    group.finish();
}

/// Pages of which `bytes` bytes in `runs` runs differ from those given.
fn changed(random: &mut Random, pages: &[Page], runs: usize, bytes: usize) -> Vec<Page> {
    let mut changed = pages.to_vec();
    for page in &mut changed {
        for _ in 0..runs {
            let len = bytes / runs;
            let at = random.next() as usize % (PAGE_BYTES - len);
            for byte in &mut page[at..at + len] {
                *byte = !*byte;
            }
        }
    }
    changed
}

fn deltas(c: &mut Criterion) {
    let mut random = Random(3);
    let bases = random.pages();
    let unrelated = random.pages();
    let targets = [
        ("equal", bases.clone()),
        ("one byte", changed(&mut random, &bases, 1, 1)),
        ("8 counters", changed(&mut random, &bases, 8, 64)),
        ("half", changed(&mut random, &bases, 16, PAGE_BYTES / 2)),
        ("unrelated", unrelated),
    ];
    let limit = PAGE_BYTES * 3 / 4;
    let mut out = Vec::with_capacity(PAGE_BYTES);
    let mut page = [0; PAGE_BYTES];
    for (name, targets) in &targets {
        each_page(c, &format!("delta encode/{name}"), targets, |at, target| {
            out.clear();
            black_box(delta::encode(target, &bases[at], limit, &mut out));
        });
    }
    for (name, targets) in &targets[..4] {
        let deltas: Vec<_> = targets
            .iter()
            .zip(&bases)
            .map(|(target, base)| {
                let mut delta = Vec::new();
                delta::encode(target, base, PAGE_BYTES, &mut delta);
                delta
            })
            .collect();
        each_page(c, &format!("delta apply/{name}"), &bases, |at, base| {
            let applied = delta::apply(base, &deltas[at], &mut page);
            black_box(applied.is_ok());
        });
    }
}

fn similarity(c: &mut Criterion) {
    let mut random = Random(4);
    for (name, parameters) in [
        ("1,1,1", SimilarityParameters::HPDC_2011),
        ("2,1,1", SimilarityParameters::DIFFERENCE_ENGINE),
    ] {
        let detector = HashSimilarityDetector::new(&KEY, parameters);
        let mut table = SimilarityTable::new(SLOTS, parameters);
        let mut map = DedupMap::new(SLOTS);
        let mut page = random.page();
        let mut known = Vec::new();
        for _ in 0..SLOTS {
            for at in detector.positions() {
                page[at..at + 8].copy_from_slice(&random.next().to_le_bytes());
            }
            let digest = random.digest();
            let signatures = detector.signatures(&page);
            if let Verdict::Define { slot } = map.judge(digest, Member(0)) {
                table.insert(&signatures, slot, digest.tag());
            }
            known.push(signatures);
        }
        let pages = random.pages();
        each_page(
            c,
            &format!("similarity signature/{name}"),
            &pages,
            |_, page| {
                black_box(detector.signatures(page));
            },
        );
        each_page(c, &format!("similarity hit/{name}"), &pages, |_, _| {
            let signatures = &known[random.next() as usize % known.len()];
            black_box(table.candidates(signatures, &map).next());
        });
        each_page(c, &format!("similarity insert/{name}"), &pages, |_, _| {
            let at = random.next() as usize % known.len();
            let tag = PageDigest([at as u8; 16]).tag();
            table.insert(&known[at], Slot(at as u32), tag);
        });
    }
}

fn sub_pages(c: &mut Criterion) {
    // Window contents are real here, so fewer of them.
    const SLOTS: u32 = 1 << 15;
    let mut random = Random(5);
    for size in [BlockSize::B512, BlockSize::B1024, BlockSize::B2048] {
        let hasher = BlockHasher::new(&KEY, size);
        let mut table = SubPageTable::new(SLOTS, size);
        let mut map = DedupMap::new(SLOTS);
        let mut window = PageWindow::new(SLOTS);
        let mut last = Vec::new();
        for _ in 0..SLOTS {
            let page = random.page();
            let digest = random.digest();
            if let Verdict::Define { slot } = map.judge(digest, Member(0)) {
                window.define(slot, &page).expect("within the budget");
                table.insert(&hasher.hashes(&page), slot, digest.tag());
            }
            last.push(page);
            if last.len() > PAGES {
                last.swap_remove(0);
            }
        }
        let name = size.bytes();
        let unknown = random.pages();
        each_page(c, &format!("sub-page hash/{name}"), &unknown, |_, page| {
            black_box(hasher.hashes(page));
        });
        for (what, mut pages) in [("half", last), ("miss", unknown)] {
            for page in &mut pages {
                page[..PAGE_BYTES / 2].fill(3);
            }
            let hashes: Vec<_> = pages.iter().map(|page| hasher.hashes(page)).collect();
            each_page(
                c,
                &format!("sub-page find {what}/{name}"),
                &pages,
                |at, page| {
                    black_box(table.find(&hashes[at], page, &map, &window));
                },
            );
        }
    }
}

fn history(c: &mut Criterion) {
    let mut random = Random(6);
    let mut map = DedupMap::new(SLOTS);
    let mut history = PageHistory::new(u64::from(SLOTS));
    for page_number in 0..u64::from(SLOTS) {
        let digest = random.digest();
        if let Verdict::Define { slot } = map.judge(digest, Member(0)) {
            history.record(Member(0), page_number, slot, digest.tag());
        }
    }
    let mut group = c.benchmark_group("history");
    group.throughput(Throughput::Elements(1));
    group.bench_function("find", |bencher| {
        bencher.iter(|| {
            let page_number = random.next() % u64::from(SLOTS);
            black_box(history.find(Member(0), page_number, &map))
        });
    });
    group.finish();
}

criterion_group!(
    benches, identity, digests, map, deltas, similarity, sub_pages, history
);
criterion_main!(benches);
