//! What every item of a role's data must contain: a pure function of the guest's seed, the item's
//! number and its generation, so that any item can be checked at any time.
//!
//! Items differ in size and in how well they compress, as the values of a cache do; or all are
//! those of redis-benchmark.

/// A new generation changes a few fields three times out of four; every fourth rewrites the item.
const GENERATIONS_PER_EPOCH: u32 = 4;
/// Fields of eight bytes that a generation changes.
const FIELDS: u64 = 4;

/// Where items come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// Text, tokens and binary data of the guest's own.
    Mixed,
    /// What redis-benchmark sets: the same printable bytes, as good as random, under every key.
    /// Here each begins with its number and its generation, so that it can be checked.
    Benchmark,
}

/// What the items of one guest are made of.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    pub seed: u64,
    pub values: Values,
    /// The size of the smallest item; the others are up to 16 times as large, if they are mixed.
    pub bytes_min: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Records of words and numbers.
    Text,
    /// Records with long random tokens in hexadecimal.
    Tokens,
    /// What is compressed or encrypted already.
    Binary,
}

impl Content {
    /// The average size of an item.
    pub fn bytes_mean(self) -> usize {
        if self.values == Values::Benchmark {
            return self.bytes_min;
        }
        // 75 % of 1 to 4, 20 % of 2 to 8, 5 % of 4 to 16 times the smallest.
        self.bytes_min * (75 * 5 + 20 * 10 + 5 * 20) / 200
    }

    fn kind_and_size(self, item: usize) -> (Kind, usize) {
        let number = mix(self.seed, item as u64, 0);
        let (kind, factor) = match number % 20 {
            0..15 => (Kind::Text, 1),
            15..19 => (Kind::Tokens, 2),
            _ => (Kind::Binary, 4),
        };
        let smallest = self.bytes_min * factor;
        (kind, smallest + (number >> 32) as usize % (smallest * 3))
    }

    /// Writes what the item must contain into `out`, in place of what is there.
    pub fn write(self, item: usize, generation: u32, out: &mut Vec<u8>) {
        if self.values == Values::Benchmark {
            return self.write_benchmark(item, generation, out);
        }
        let (kind, size) = self.kind_and_size(item);
        let epoch = u64::from(generation / GENERATIONS_PER_EPOCH);
        let mut random = Random::new(mix(self.seed, item as u64, 1 + epoch));
        out.clear();
        while out.len() < size {
            let bits = random.next();
            match kind {
                Kind::Binary => out.extend_from_slice(&bits.to_le_bytes()),
                Kind::Tokens => {
                    out.extend_from_slice(WORDS[bits as usize & 15]);
                    for part in [random.next(), random.next(), random.next()] {
                        out.extend_from_slice(&hexadecimal(part));
                    }
                }
                Kind::Text => {
                    for place in 0..4 {
                        out.extend_from_slice(WORDS[(bits >> (place * 4)) as usize & 15]);
                    }
                    out.extend_from_slice(&hexadecimal(bits)[..8]);
                }
            }
        }
        out.truncate(size);
        if !generation.is_multiple_of(GENERATIONS_PER_EPOCH) {
            let mut random = Random::new(mix(self.seed, item as u64, !u64::from(generation)));
            for _ in 0..FIELDS {
                let position = random.next() as usize % (size - 8);
                out[position..position + 8].copy_from_slice(&hexadecimal(random.next())[..8]);
            }
        }
    }
}

impl Content {
    /// The generator is the one of redis-benchmark's `-d`, with its seed.
    fn write_benchmark(self, item: usize, generation: u32, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(format!("{item:010} {generation:010} ").as_bytes());
        let mut state = 1234_u32;
        while out.len() < self.bytes_min {
            state = state.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            out.push(b'0' + (state >> 16 & 63) as u8);
        }
    }
}

/// Good enough to be incompressible, cheap under emulation.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        // State zero would stay zero for ever.
        Random(seed.max(1))
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

fn hexadecimal(number: u64) -> [u8; 16] {
    std::array::from_fn(|place| b"0123456789abcdef"[(number >> (place * 4)) as usize & 15])
}

const WORDS: [&[u8]; 16] = [
    b"{\"session\":\"",
    b"\",\"user\":",
    b",\"name\":\"anonymous\"",
    b",\"last-seen\":",
    b",\"roles\":[\"reader\",\"writer\"]",
    b",\"language\":\"en-GB\"",
    b",\"address\":\"10.20.30.40\"",
    b",\"basket\":[",
    b"{\"article\":",
    b",\"count\":1,\"price\":",
    b"],\"total\":",
    b",\"currency\":\"EUR\"}",
    b",\"agent\":\"Mozilla/5.0 (X11; Linux x86_64)\"",
    b",\"referrer\":\"https://example.org/\"",
    b",\"expires\":\"2031-01-01T00:00:00Z\"",
    b",\"flags\":0,\"note\":null}",
];

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT: Content = Content {
        seed: 5,
        values: Values::Mixed,
        bytes_min: 1024,
    };

    fn item(item: usize, generation: u32) -> Vec<u8> {
        let mut out = b"left over".to_vec();
        CONTENT.write(item, generation, &mut out);
        out
    }

    #[test]
    fn the_same_orders_give_the_same_content() {
        assert_eq!(item(9, 3), item(9, 3));
        assert_ne!(item(9, 3), item(10, 3));
        assert_ne!(item(9, 3), item(9, 4));
        let other = Content { seed: 6, ..CONTENT };
        let mut out = Vec::new();
        other.write(9, 3, &mut out);
        assert_ne!(out, item(9, 3));
    }

    #[test]
    fn most_generations_change_little_and_none_the_size() {
        for number in 0..50 {
            let (first, second, rewritten) = (item(number, 4), item(number, 5), item(number, 8));
            assert_eq!((first.len(), first.len()), (second.len(), rewritten.len()));
            let changed =
                |one: &[u8], other: &[u8]| one.iter().zip(other).filter(|(a, b)| a != b).count();
            assert!(changed(&first, &second) <= 32);
            assert!(changed(&first, &rewritten) > 32);
        }
    }

    #[test]
    fn values_of_the_benchmark_differ_in_number_and_generation_only() {
        let content = Content {
            values: Values::Benchmark,
            ..CONTENT
        };
        let value = |item, generation| {
            let mut out = b"left over".to_vec();
            content.write(item, generation, &mut out);
            out
        };
        let (first, other, newer) = (value(9, 0), value(10, 0), value(9, 1));
        assert!(first != other && first != newer && value(9, 0) == first);
        for value in [&first, &other, &newer] {
            assert_eq!(value.len(), content.bytes_mean());
            assert_eq!(value[22..], first[22..]);
        }
        assert!(first.iter().all(|byte| (b' '..=b'o').contains(byte)));
    }

    #[test]
    fn the_average_size_is_what_is_said() {
        let bytes: usize = (0..4000).map(|number| item(number, 0).len()).sum();
        let mean = bytes / 4000;
        assert!(
            mean.abs_diff(CONTENT.bytes_mean()) < CONTENT.bytes_mean() / 10,
            "{mean}"
        );
    }
}
