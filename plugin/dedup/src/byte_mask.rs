//! Which bytes of two blocks differ, as a mask with one bit for each byte.
//!
//! Owns: the fastest way the processor is sure to have.
//! Must not: do anything else with the blocks.

/// Bytes of a block: as many as a mask has bits.
pub(crate) const BLOCK_BYTES: usize = 64;

/// Which bytes differ, the first one in the lowest bit.
#[cfg(target_arch = "x86_64")]
pub(crate) fn difference(a: &[u8; BLOCK_BYTES], b: &[u8; BLOCK_BYTES]) -> u64 {
    // SAFETY: SSE2 is part of x86-64; the function needs nothing else.
    unsafe { sse2_difference(a, b) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
fn sse2_difference(a: &[u8; BLOCK_BYTES], b: &[u8; BLOCK_BYTES]) -> u64 {
    use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x};
    let vector = |bytes: &[u8; 16]| {
        let value = u128::from_le_bytes(*bytes);
        _mm_set_epi64x((value >> 64) as i64, value as i64)
    };
    let (a, _) = a.as_chunks::<16>();
    let (b, _) = b.as_chunks::<16>();
    let mut equal = 0;
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        let same = _mm_movemask_epi8(_mm_cmpeq_epi8(vector(a), vector(b)));
        equal |= u64::from(same as u16) << (16 * index);
    }
    !equal
}

/// Which bytes differ, the first one in the lowest bit.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn difference(a: &[u8; BLOCK_BYTES], b: &[u8; BLOCK_BYTES]) -> u64 {
    portable_difference(a, b)
}

#[cfg(any(test, not(target_arch = "x86_64")))]
fn portable_difference(a: &[u8; BLOCK_BYTES], b: &[u8; BLOCK_BYTES]) -> u64 {
    let (a, _) = a.as_chunks::<8>();
    let (b, _) = b.as_chunks::<8>();
    let mut differs = 0;
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        let mut word = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if word == 0 {
            continue;
        }
        // Fold each byte into its lowest bit, then gather these eight bits.
        word |= (word >> 4) & 0x0f0f_0f0f_0f0f_0f0f;
        word |= (word >> 2) & 0x3f3f_3f3f_3f3f_3f3f;
        word |= (word >> 1) & 0x7f7f_7f7f_7f7f_7f7f;
        word &= 0x0101_0101_0101_0101;
        differs |= (word.wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * index);
    }
    differs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_compare_agree() {
        let mut state = 7u64;
        for density in [0u64, 1, 30, 63, 64] {
            for _ in 0..200 {
                let mut a = [0u8; BLOCK_BYTES];
                let mut b = [0u8; BLOCK_BYTES];
                let mut expected = 0;
                for index in 0..BLOCK_BYTES {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    a[index] = (state >> 40) as u8;
                    b[index] = a[index];
                    if (state >> 50) % 64 < density {
                        b[index] ^= 1 << (state >> 60 & 7);
                        expected |= 1 << index;
                    }
                }
                assert_eq!(difference(&a, &b), expected);
                assert_eq!(portable_difference(&a, &b), expected);
            }
        }
    }
}
