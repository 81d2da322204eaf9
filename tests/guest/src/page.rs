//! What every page of the guest's memory must contain: a pure function of its kind, the seeds,
//! its index and its generation, so that any page can be checked at any time.
//!
//! Owns content only. No memory is mapped here, nothing is read from the machine.

/// 64-bit words in one page.
pub const WORDS: usize = 512;
/// Bytes in one page.
pub const PAGE_BYTES: usize = WORDS * 8;

/// One page of 4096 bytes, as the words it is generated in.
pub type Page = [u64; WORDS];

/// At most this many words (8 bytes each) differ between two `similar` pages, and between two
/// generations of a page inside one epoch.
const PATCH_WORDS: u64 = 8;
/// Every fourth generation rewrites the whole page; those between change a few words only, as
/// most writes of real programs do.
const GENERATIONS_PER_EPOCH: u32 = 4;
/// How many distinct contents the `repeat` pages of one guest have.
const REPEAT_CONTENTS: u64 = 64;

/// What sort of content a page has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All bytes zero, in every generation.
    Zero,
    /// One repeated byte that is not zero.
    Uniform,
    /// The same incompressible content in every guest of the group.
    Same,
    /// `Same`, with up to 64 bytes of this guest's own.
    Similar,
    /// One of a few incompressible contents that recur inside this guest.
    Repeat,
    /// Incompressible content that exists nowhere else.
    Unique,
    /// Text-like content that exists nowhere else.
    Compressible,
    /// The same text-like content in every guest of the group, as programs and libraries are.
    SameText,
}

impl Kind {
    /// Every kind with the name it has in a recipe.
    pub const NAMES: [(&'static str, Kind); 8] = [
        ("zero", Kind::Zero),
        ("uniform", Kind::Uniform),
        ("same", Kind::Same),
        ("similar", Kind::Similar),
        ("repeat", Kind::Repeat),
        ("unique", Kind::Unique),
        ("compressible", Kind::Compressible),
        ("sametext", Kind::SameText),
    ];

    pub fn from_name(name: &str) -> Option<Kind> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, kind)| *kind)
    }

    pub fn name(self) -> &'static str {
        Self::NAMES
            .iter()
            .find(|(_, kind)| *kind == self)
            .map_or("unknown", |(name, _)| name)
    }
}

/// What makes one guest's contents its own, and what it shares with its group.
#[derive(Clone, Copy, Debug)]
pub struct Seeds {
    pub group: u64,
    pub guest: u64,
}

/// Writes what the page must contain into `out`.
pub fn write(kind: Kind, seeds: Seeds, index: u64, generation: u32, out: &mut Page) {
    let epoch = u64::from(generation / GENERATIONS_PER_EPOCH);
    match kind {
        Kind::Zero => {
            out.fill(0);
            return;
        }
        Kind::Uniform => {
            let byte = 1 + mix(seeds.group, index, u64::from(generation)) % 255;
            out.fill(byte * 0x0101_0101_0101_0101);
            return;
        }
        Kind::Same => noise(mix(seeds.group, index, epoch), out),
        Kind::Similar => {
            noise(mix(seeds.group, index, epoch), out);
            patch(mix(seeds.guest, index, u64::from(generation)), out);
            return;
        }
        Kind::Repeat => noise(mix(seeds.guest, !(index % REPEAT_CONTENTS), epoch), out),
        Kind::Unique => noise(mix(seeds.guest, index, epoch), out),
        Kind::Compressible => text(mix(seeds.guest, index, epoch), out),
        Kind::SameText => text(mix(seeds.group, index, epoch), out),
    }
    if !generation.is_multiple_of(GENERATIONS_PER_EPOCH) {
        let seed = match kind {
            Kind::Same | Kind::SameText => seeds.group,
            _ => seeds.guest,
        };
        patch(mix(seed, !index, u64::from(generation)), out);
    }
}

/// The byte offset at which two pages first differ.
pub fn first_difference(expected: &Page, found: &Page) -> Option<usize> {
    if expected == found {
        return None;
    }
    expected
        .iter()
        .zip(found)
        .position(|(a, b)| a != b)
        .map(|word| {
            let bits = expected[word] ^ found[word];
            word * 8 + bits.trailing_zeros() as usize / 8
        })
}

/// A small, fast generator; good enough to be incompressible, cheap under emulation.
pub struct Xorshift(u64);

impl Xorshift {
    pub fn new(seed: u64) -> Xorshift {
        // State zero would stay zero for ever.
        Xorshift(if seed == 0 {
            0x9e37_79b9_7f4a_7c15
        } else {
            seed
        })
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Three numbers into one well-spread one (the finaliser of splitmix64).
pub fn mix(a: u64, b: u64, c: u64) -> u64 {
    let mut value = a
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(b.wrapping_mul(0xd1b5_4a32_d192_ed03))
        .wrapping_add(c.wrapping_mul(0x8cb9_2ba7_2f3d_8dd7))
        .wrapping_add(0x2545_f491_4f6c_dd1d);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn noise(seed: u64, out: &mut Page) {
    let mut random = Xorshift::new(seed);
    for word in out.iter_mut() {
        *word = random.next();
    }
}

fn patch(seed: u64, out: &mut Page) {
    let mut random = Xorshift::new(seed);
    for _ in 0..PATCH_WORDS {
        let position = random.next() as usize % WORDS;
        out[position] ^= random.next();
    }
}

/// Words of eight letters, with a number of eight digits in every fourth place.
fn text(seed: u64, out: &mut Page) {
    let mut random = Xorshift::new(seed);
    for chunk in out.chunks_exact_mut(4) {
        let bits = random.next();
        for (place, word) in chunk.iter_mut().take(3).enumerate() {
            *word = VOCABULARY[(bits >> (place * 5)) as usize & 31];
        }
        chunk[3] = hex_digits((bits >> 32) as u32);
    }
}

/// The eight hexadecimal digits of a number, one per byte.
fn hex_digits(number: u32) -> u64 {
    let mut nibbles = u64::from(number);
    nibbles = (nibbles | (nibbles << 16)) & 0x0000_ffff_0000_ffff;
    nibbles = (nibbles | (nibbles << 8)) & 0x00ff_00ff_00ff_00ff;
    nibbles = (nibbles | (nibbles << 4)) & 0x0f0f_0f0f_0f0f_0f0f;
    // Digits above nine move on to the letters.
    let letters = ((nibbles + 0x0606_0606_0606_0606) >> 4) & 0x0101_0101_0101_0101;
    nibbles + 0x3030_3030_3030_3030 + letters * 0x27
}

const VOCABULARY: [u64; 32] = {
    let words: [&[u8; 8]; 32] = [
        b"session ",
        b"request ",
        b"GET /api",
        b"accepted",
        b"closing ",
        b"user-id=",
        b"timeout ",
        b"\nstatus=",
        b"session=",
        b"handler ",
        b"retrying",
        b"payload ",
        b"192.168.",
        b"content ",
        b"-length ",
        b"keep-ali",
        b"\nerror: ",
        b"warning ",
        b"message ",
        b"worker-1",
        b"worker-2",
        b"worker-3",
        b"database",
        b"SELECT *",
        b" FROM t ",
        b"WHERE id",
        b"        ",
        b"commit; ",
        b"rollback",
        b"\n\t\t     ",
        b"elapsed ",
        b"bytes=  ",
    ];
    let mut out = [0; 32];
    let mut i = 0;
    while i < 32 {
        out[i] = u64::from_le_bytes(*words[i]);
        i += 1;
    }
    out
};

#[cfg(test)]
mod tests {
    use super::*;

    const A: Seeds = Seeds { group: 7, guest: 1 };
    const B: Seeds = Seeds { group: 7, guest: 2 };

    fn page(kind: Kind, seeds: Seeds, index: u64, generation: u32) -> Page {
        let mut out = [0xdead; WORDS];
        write(kind, seeds, index, generation, &mut out);
        out
    }

    fn differing_bytes(a: &Page, b: &Page) -> usize {
        a.iter()
            .zip(b)
            .flat_map(|(a, b)| a.to_le_bytes().into_iter().zip(b.to_le_bytes()))
            .filter(|(a, b)| a != b)
            .count()
    }

    #[test]
    fn every_kind_is_a_pure_function() {
        for (_, kind) in Kind::NAMES {
            for generation in 0..9 {
                let once = page(kind, A, 5, generation);
                assert_eq!(first_difference(&once, &page(kind, A, 5, generation)), None);
            }
        }
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found_where_it_is() {
        for (_, kind) in Kind::NAMES {
            let good = page(kind, A, 3, 2);
            for offset in [0, 1, 7, 8, 2047, 4088, 4095] {
                let mut bad = good;
                bad[offset / 8] ^= 1 << (offset % 8 * 8);
                assert_eq!(first_difference(&good, &bad), Some(offset), "{kind:?}");
            }
        }
    }

    #[test]
    fn a_page_of_an_older_generation_is_found() {
        for (_, kind) in Kind::NAMES {
            if kind == Kind::Zero {
                continue;
            }
            for generation in 0..12 {
                let old = page(kind, A, 11, generation);
                let new = page(kind, A, 11, generation + 1);
                assert!(first_difference(&new, &old).is_some(), "{kind:?}");
            }
        }
    }

    #[test]
    fn a_page_of_a_neighbour_is_found() {
        for kind in [
            Kind::Same,
            Kind::Similar,
            Kind::Repeat,
            Kind::Unique,
            Kind::Compressible,
        ] {
            assert!(first_difference(&page(kind, A, 4, 0), &page(kind, A, 5, 0)).is_some());
        }
    }

    #[test]
    fn kinds_share_between_guests_what_their_names_promise() {
        assert_eq!(page(Kind::Same, A, 9, 5), page(Kind::Same, B, 9, 5));
        assert_eq!(page(Kind::SameText, A, 9, 5), page(Kind::SameText, B, 9, 5));
        assert_eq!(page(Kind::Uniform, A, 9, 0), page(Kind::Uniform, B, 9, 0));
        let similar = differing_bytes(&page(Kind::Similar, A, 9, 0), &page(Kind::Similar, B, 9, 0));
        assert!((1..=128).contains(&similar), "{similar} bytes differ");
        for kind in [Kind::Unique, Kind::Compressible, Kind::Repeat] {
            assert!(differing_bytes(&page(kind, A, 9, 0), &page(kind, B, 9, 0)) > 500);
        }
        assert_eq!(page(Kind::Repeat, A, 1, 0), page(Kind::Repeat, A, 65, 0));
    }

    #[test]
    fn generations_inside_an_epoch_change_little() {
        for kind in [Kind::Same, Kind::Unique, Kind::Compressible] {
            let small = differing_bytes(&page(kind, A, 9, 0), &page(kind, A, 9, 1));
            assert!((1..=64).contains(&small));
            assert!(differing_bytes(&page(kind, A, 9, 3), &page(kind, A, 9, 4)) > 500);
        }
    }

    #[test]
    fn uniform_is_never_zero_and_compressible_is_text() {
        for index in 0..2000 {
            let uniform = page(Kind::Uniform, A, index, 0);
            assert_ne!(uniform[0], 0);
            assert!(uniform.iter().all(|word| *word == uniform[0]));
        }
        let text = page(Kind::Compressible, A, 1, 0);
        assert!(
            text.iter()
                .flat_map(|word| word.to_le_bytes())
                .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
        );
        assert_eq!(&hex_digits(0x0123_cdef).to_le_bytes(), b"fedc3210");
    }
}
