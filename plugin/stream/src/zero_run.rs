//! Runs of zero records: one fill byte, each record one page further than the one before it.
//!
//! Owns: finding where a run ends, many records at a time: a guest's untouched memory is
//! millions of these nine-byte records.
//! Must not: take a record for a part of a run that it does not continue to the last bit.

use crate::PAGE_BYTES;
use crate::rebuild::{self, ZERO_RECORD_BYTES};
use crate::record::be64;

/// So many pages from a multiple of it on, addresses differ in four bits, all in one byte.
const GROUP: usize = 16;
const GROUP_BYTES: usize = GROUP * ZERO_RECORD_BYTES;
const GROUP_PAGES_BYTES: u64 = (GROUP * PAGE_BYTES) as u64;
/// The byte of a record in which one group's addresses differ from the next one's.
const GROUP_NUMBER_BYTE: usize = 5;

/// What to add to the bytes of a group for the bytes of the next one, if nothing is carried.
const TO_NEXT_GROUP: [u8; GROUP_BYTES] = {
    let mut add = [0; GROUP_BYTES];
    let mut at = GROUP_NUMBER_BYTE;
    while at < GROUP_BYTES {
        add[at] = 1;
        at += ZERO_RECORD_BYTES;
    }
    add
};

/// How many whole records at the start of `buf` go on with a run whose last record was that
/// of `address`. The end of the address space ends a run.
pub(crate) fn following(buf: &[u8], address: u64, fill: u8) -> usize {
    let pages_left = (u64::MAX - address) / PAGE_BYTES as u64;
    let records = (buf.len() / ZERO_RECORD_BYTES).min(pages_left.try_into().unwrap_or(usize::MAX));
    let mut rest = &buf[..records * ZERO_RECORD_BYTES];
    let mut next = address.wrapping_add(PAGE_BYTES as u64);
    while !rest.is_empty() {
        let grouped = if next.is_multiple_of(GROUP_PAGES_BYTES) {
            groups(rest, next, fill) * GROUP
        } else {
            0
        };
        let more = if grouped > 0 {
            grouped
        } else if be64(rest, 0) == Some(rebuild::zero_word(next)) && rest.get(8) == Some(&fill) {
            1
        } else {
            break;
        };
        rest = rest.get(more * ZERO_RECORD_BYTES..).unwrap_or(&[]);
        next = next.wrapping_add((more * PAGE_BYTES) as u64);
    }
    records - rest.len() / ZERO_RECORD_BYTES
}

/// How many whole groups at the start of `buf` are a run from `address` on, which a group
/// begins with; none beyond where the group number carries into another byte.
fn groups(buf: &[u8], address: u64, fill: u8) -> usize {
    let uncarried = 256 - (address / GROUP_PAGES_BYTES % 256) as usize;
    let groups = buf.as_chunks::<GROUP_BYTES>().0;
    let groups = groups.get(..uncarried).unwrap_or(groups);
    let mut expected = group(address, fill);
    for (number, found) in groups.iter().enumerate() {
        // Straight over all bytes: the compiler makes vector instructions of it.
        let mut differs = 0;
        for at in 0..GROUP_BYTES {
            differs |= found[at] ^ expected[at];
            expected[at] = expected[at].wrapping_add(TO_NEXT_GROUP[at]);
        }
        if differs != 0 {
            return number;
        }
    }
    groups.len()
}

/// The bytes of the group that begins at `address`.
fn group(address: u64, fill: u8) -> [u8; GROUP_BYTES] {
    let mut bytes = [fill; GROUP_BYTES];
    let records = bytes.as_chunks_mut::<ZERO_RECORD_BYTES>().0;
    for (number, record) in records.iter_mut().enumerate() {
        let word = rebuild::zero_word(address.wrapping_add((number * PAGE_BYTES) as u64));
        record[..8].copy_from_slice(&word.to_be_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records from `address` on.
    fn records(address: u64, fill: u8, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for number in 0..count {
            let address = address.wrapping_add((number * PAGE_BYTES) as u64);
            rebuild::zero_record(&mut bytes, address, fill);
        }
        bytes
    }

    /// A guest chooses which pages are zero, and QEMU begins each pass where it likes.
    #[test]
    fn a_run_does_not_go_on_where_only_the_byte_that_is_counted_up_does() {
        let carry = (256 * GROUP * PAGE_BYTES) as u64;
        for start in [0, carry, 7 * carry] {
            let mut bytes = records(start, 0, 256 * GROUP);
            bytes.extend_from_slice(&records(start, 0, 256 * GROUP));
            let followed = following(&bytes[ZERO_RECORD_BYTES..], start, 0);
            assert_eq!(followed, 256 * GROUP - 1);
        }
    }

    const STARTS: [u64; 5] = [
        0,
        0xf000,
        0x7f_8000,
        0xffff_ffe0_3000,
        0x00ff_ffff_fff8_0000,
    ];

    #[test]
    fn a_run_is_followed_to_its_end_wherever_it_starts() {
        for start in STARTS {
            // Long enough to carry out of the byte that is counted up.
            for count in [1, 2, 15, 16, 17, 40, 5000] {
                let mut bytes = records(start, 7, count);
                let followed = |bytes: &[u8]| following(&bytes[ZERO_RECORD_BYTES..], start, 7);
                assert_eq!(followed(&bytes), count - 1);
                // A torn record is not one, and a page record ends the run.
                bytes.extend_from_slice(&records(start, 7, count + 1)[count * 9..][..8]);
                assert_eq!(followed(&bytes), count - 1);
                bytes.truncate(count * ZERO_RECORD_BYTES);
                rebuild::page_record(&mut bytes, start + (count << 12) as u64, &[7; PAGE_BYTES]);
                assert_eq!(followed(&bytes), count - 1);
            }
        }
    }

    #[test]
    fn a_change_of_any_bit_ends_the_run_there() {
        for start in STARTS {
            let bytes = records(start, 0xa5, 600);
            for at in (9..bytes.len()).step_by(7).chain(9..9 + 3 * GROUP_BYTES) {
                for bit in [0, 3, 4, 7] {
                    let mut bytes = bytes.clone();
                    bytes[at] ^= 1 << bit;
                    assert_eq!(following(&bytes[9..], start, 0xa5), at / 9 - 1);
                }
            }
        }
    }

    #[test]
    fn the_end_of_the_address_space_ends_a_run() {
        let last = !0xfff;
        for before in [0, 1, 16, 20] {
            let start = last - (before << 12);
            let bytes = records(start, 0, 64);
            assert_eq!(following(&bytes[9..], start, 0), before as usize);
        }
    }
}
