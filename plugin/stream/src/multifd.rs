//! Packets of a multifd channel: what their headers say.
//!
//! Must not: keep state, or trust a field: a header that cannot be is none.
//!
//! Format: QEMU 10.0 `migration/multifd.h`, be32 and be64. All packets but those of device state have
//! a header of 1344 bytes, where pages have 4 KiB.

use crate::PAGE_BYTES;
use crate::record::{be32, be64};

/// How a channel begins: magic and version.
pub const START: [u8; 8] = [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1];
/// The message a channel begins with.
pub const START_BYTES: usize = 64;
/// A header up to the list of addresses.
pub const FIELDS_BYTES: usize = 320;
/// Addresses in the list, used or not.
pub const ADDRESSES: u32 = 128;
const DEVICE_HEADER_BYTES: usize = 276;

const FLAG_COMPRESSION: u32 = 0x3e;
const FLAG_DEVICE_STATE: u32 = 0x40;

/// What follows the fields of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packet {
    /// The list of addresses, then so many pages as they are, or so many bytes of whatever.
    Pages {
        normal: u32,
        zero: u32,
        as_they_are: bool,
        bytes: u32,
    },
    /// So many bytes.
    Device { bytes: u32 },
}

impl Packet {
    /// Reads the fields of a header: the packet, and how many bytes its fields take. `None` if more
    /// bytes are needed, an error if this is no header.
    pub fn read(buf: &[u8]) -> Option<Result<(Packet, usize), ()>> {
        let known = buf.len().min(START.len());
        if buf[..known] != START[..known] {
            return Some(Err(()));
        }
        let flags = be32(buf, 8)?;
        if flags & FLAG_DEVICE_STATE != 0 {
            buf.get(..DEVICE_HEADER_BYTES)?;
            let bytes = be32(buf, DEVICE_HEADER_BYTES - 4)?;
            return Some(Ok((Packet::Device { bytes }, DEVICE_HEADER_BYTES)));
        }
        buf.get(..FIELDS_BYTES)?;
        let (allocated, normal, bytes) = (be32(buf, 12)?, be32(buf, 16)?, be32(buf, 20)?);
        // Without pages nothing follows; QEMU before 9.0 leaves the size of the packet before there.
        let bytes = if normal == 0 { 0 } else { bytes };
        let zero = be32(buf, 32)?;
        let listed = normal.checked_add(zero);
        if allocated > ADDRESSES || listed.is_none_or(|listed| listed > allocated) {
            return Some(Err(()));
        }
        let packet = Packet::Pages {
            normal,
            zero,
            as_they_are: flags & FLAG_COMPRESSION == 0 && bytes == normal * PAGE_BYTES as u32,
            bytes,
        };
        Some(Ok((packet, FIELDS_BYTES)))
    }
}

/// How many of the next `most` addresses, one at least, are each one page further than the one
/// before; they are page-aligned then. `None` without a whole address.
pub fn rising(buf: &[u8], most: u32) -> Option<(u64, usize)> {
    let first = be64(buf, 0)?;
    if first % PAGE_BYTES as u64 != 0 {
        return Some((first, 1));
    }
    let follows = |number: &usize| {
        let expected = first.checked_add((number * PAGE_BYTES) as u64);
        expected.is_some() && be64(buf, number * 8) == expected
    };
    let count = (1..most as usize).take_while(follows).count() + 1;
    Some((first, count))
}
