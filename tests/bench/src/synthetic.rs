//! Streams made up for one purpose each, where a recorded one would not tell.
//!
//! Must not: depend on anything but its arguments, so that runs can be compared.

use std::fmt;

use clap::ValueEnum;
use vmgang_stream::synthetic::StreamBuilder;
use vmgang_stream::{PAGE_BYTES, Page};

/// What a synthetic guest's memory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Every page is random and there is once: nothing can be saved.
    Unique,
    /// A third of the pages are of their own, like memory of programs, and compress to about a
    /// half; two thirds are copies of one of these, from this member or another one, with up to
    /// 64 bytes changed. Then some pages are sent again with such changes.
    NearCopies,
    /// Something for every technique: zero and uniform pages, pages all members have, pages that
    /// repeat, near-copies, shared blocks in pages of their own, text, random pages; some again.
    Mixed,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Unique => "unique",
            Kind::NearCopies => "near-copies",
            Kind::Mixed => "mixed",
        })
    }
}

/// Pages QEMU sends in one section.
const SECTION_PAGES: usize = 100;
/// Sent again in the last pass: one page of so many.
const DIRTY_SHARE: usize = 16;
/// Near-copies across members are of one of so many of the first member's own pages.
const COMMON_PAGES: u64 = 512;
const CHANGED_BYTES_MAX: u64 = 64;

/// xorshift64*: fast, and good enough to be incompressible.
struct Random(u64);

impl Random {
    /// Different seeds that are near each other give unrelated numbers.
    fn new(seed: u64) -> Self {
        let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self(mixed ^ (mixed >> 31) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// The whole migration stream of one member.
pub fn stream(kind: Kind, member: usize, memory_bytes: u64) -> Vec<u8> {
    let pages = (memory_bytes as usize / PAGE_BYTES).max(1);
    let mut builder = StreamBuilder::new((pages * PAGE_BYTES) as u64);
    for from in (0..pages).step_by(SECTION_PAGES) {
        builder.begin_part();
        for index in from..pages.min(from + SECTION_PAGES) {
            put(&mut builder, index, content(kind, member, index));
        }
        builder.end_ram_section();
    }
    builder
        .begin_part()
        .end_ram_section()
        .switchover_start()
        .begin_end();
    for index in (0..pages).step_by(DIRTY_SHARE) {
        put(&mut builder, index, dirtied(kind, member, index));
    }
    builder.end_ram_section();
    // A section of device state, which the tokeniser does not look into.
    builder.raw(&[0x04]).raw(&[0x55; 5000]);
    builder.bytes().to_vec()
}

fn put(builder: &mut StreamBuilder, index: usize, content: Option<Page>) {
    let address = (index * PAGE_BYTES) as u64;
    match content {
        Some(page) => builder.page(address, &page),
        None => builder.zero(address),
    };
}

/// A page of the first pass; `None` is a zero page.
fn content(kind: Kind, member: usize, index: usize) -> Option<Page> {
    let own = own_seed(member, index);
    match kind {
        Kind::Unique => Some(random(own)),
        Kind::NearCopies if index.is_multiple_of(3) => Some(base(member, index)),
        Kind::NearCopies => Some(near_copy(member, index, own)),
        Kind::Mixed => match index % 16 {
            0..=4 => None,
            5 => Some([own as u8 | 1; PAGE_BYTES]),
            6..=8 => Some(program(index as u64)),
            // The same in this member now and again.
            9 => Some(program(own_seed(member, index % 512))),
            // Near-copies of a page that all members have.
            10 | 11 => Some(change(program((index - index % 16 + 6) as u64), own)),
            12 => Some(with_shared_block(own)),
            13 | 14 => Some(program(own)),
            _ => Some(random(own)),
        },
    }
}

/// The same page in the last pass.
fn dirtied(kind: Kind, member: usize, index: usize) -> Option<Page> {
    // Beyond every index, so that it is no other page's seed.
    let seed = own_seed(member, index) | 1 << 63;
    match content(kind, member, index) {
        Some(page) if kind != Kind::Unique => Some(change(page, seed)),
        _ => Some(random(seed)),
    }
}

fn own_seed(member: usize, index: usize) -> u64 {
    ((member as u64 + 1) << 40) | index as u64
}

/// A page of a program that the member alone has.
fn base(member: usize, index: usize) -> Page {
    program(own_seed(member, index))
}

fn near_copy(member: usize, index: usize, seed: u64) -> Page {
    let mut random = Random::new(seed);
    // Of something sent before: this member's, or now and again one of the first member's.
    let group = random.below(index as u64 / 3 + 1);
    change(
        match random.below(4) {
            0 => base(0, 3 * (group % COMMON_PAGES) as usize),
            _ => base(member, 3 * group as usize),
        },
        seed,
    )
}

/// Up to 64 bytes changed, in runs of up to 8: counters and pointers.
fn change(mut page: Page, seed: u64) -> Page {
    let mut random = Random::new(seed ^ 0xc4a6);
    let mut left = 1 + random.below(CHANGED_BYTES_MAX);
    while left > 0 {
        let run = left.min(1 + random.below(8));
        let at = random.below((PAGE_BYTES / 8) as u64) as usize * 8;
        for byte in &mut page[at..at + run as usize] {
            *byte = byte.wrapping_add(1 + (random.next() >> 57) as u8);
        }
        left -= run;
    }
    page
}

/// Random bytes.
fn random(seed: u64) -> Page {
    let mut random = Random::new(seed);
    let mut page = [0; PAGE_BYTES];
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    page
}

/// What programs leave in memory: small numbers, pointers into one area, words. zstd makes about
/// half of it.
fn program(seed: u64) -> Page {
    const WORDS: [&[u8; 8]; 8] = [
        b"connect ",
        b"request ",
        b"\0\0\0\0\0\0\0\0",
        b"value = ",
        b"session ",
        b"GET /idx",
        b"\x01\0\0\0\0\0\0\0",
        b"error : ",
    ];
    let mut random = Random::new(seed);
    let area = random.next() & 0x7fff_ff00_0000;
    let mut page = [0; PAGE_BYTES];
    for word in page.chunks_exact_mut(8) {
        let dice = random.next();
        let value = match dice % 4 {
            0 => area + (dice >> 8 & 0xff_fff8),
            1 => dice >> 48,
            2 => u64::from_le_bytes(*WORDS[(dice >> 8) as usize % WORDS.len()]),
            _ => dice >> 8,
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// A page of its own but for one half, which is one of few and at its own place.
fn with_shared_block(seed: u64) -> Page {
    let mut page = random(seed);
    let block = random(1_000_000 + seed % 64);
    let at = (seed as usize / 64 % 2) * (PAGE_BYTES / 2);
    page[at..at + PAGE_BYTES / 2].copy_from_slice(&block[..PAGE_BYTES / 2]);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(a: &Page, b: &Page) -> usize {
        a.iter().zip(b).filter(|(a, b)| a != b).count()
    }

    #[test]
    fn two_thirds_of_near_copies_differ_from_an_earlier_page_in_up_to_64_bytes() {
        for member in [0, 2] {
            for index in (0..3000).filter(|index| index % 3 != 0).step_by(37) {
                let page = content(Kind::NearCopies, member, index).expect("a page");
                let earlier = (0..=index / 3)
                    .flat_map(|group| [base(member, 3 * group), base(0, 3 * group)])
                    .map(|base| difference(&base, &page))
                    .min();
                let nearest = earlier.expect("there is one");
                assert!((1..=64).contains(&nearest), "page {index}: {nearest}");
            }
        }
    }

    #[test]
    fn unique_pages_are_unique_over_all_members() {
        let mut seen = std::collections::HashSet::new();
        for member in 0..3 {
            for index in 0..500 {
                assert!(seen.insert(content(Kind::Unique, member, index)));
                assert!(seen.insert(dirtied(Kind::Unique, member, index)));
            }
        }
    }
}
