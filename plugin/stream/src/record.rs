//! Constants and field readers of the stream format (QEMU `migration/savevm.h`, `ram.h`).
//!
//! Must not: keep state. Every reader returns `None` when bytes are missing, never panics.

/// Section tags (`migration/savevm.h`).
pub const TAG_EOF: u8 = 0x00;
pub const TAG_SECTION_START: u8 = 0x01;
pub const TAG_SECTION_PART: u8 = 0x02;
pub const TAG_SECTION_END: u8 = 0x03;
pub const TAG_SECTION_FULL: u8 = 0x04;
pub const TAG_SUBSECTION: u8 = 0x05;
pub const TAG_VMDESCRIPTION: u8 = 0x06;
pub const TAG_CONFIGURATION: u8 = 0x07;
pub const TAG_COMMAND: u8 = 0x08;
pub const TAG_FOOTER: u8 = 0x7e;

/// Commands (`migration/savevm.c`, `enum qemu_vm_cmd`).
pub const COMMAND_PACKAGED: u16 = 7;
pub const COMMAND_SWITCHOVER_START: u16 = 11;

/// RAM record flags, in the low 12 bits of the record word (`migration/ram.h`).
pub const FLAGS_MASK: u64 = 0xfff;
pub const FLAG_ZERO: u64 = 0x02;
pub const FLAG_MEM_SIZE: u64 = 0x04;
pub const FLAG_PAGE: u64 = 0x08;
pub const FLAG_EOS: u64 = 0x10;
pub const FLAG_CONTINUE: u64 = 0x20;
pub const FLAG_XBZRLE: u64 = 0x40;
pub const FLAG_COMPRESS_PAGE: u64 = 0x100;
pub const FLAG_MULTIFD_FLUSH: u64 = 0x200;

pub const ZERO_CONTINUE: u64 = FLAG_ZERO | FLAG_CONTINUE;
pub const PAGE_CONTINUE: u64 = FLAG_PAGE | FLAG_CONTINUE;

/// File header: "QEVM" and version 3.
pub const FILE_HEADER: [u8; 8] = *b"QEVM\x00\x00\x00\x03";

pub fn be16(buf: &[u8], at: usize) -> Option<u16> {
    let bytes = buf.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

pub fn be32(buf: &[u8], at: usize) -> Option<u32> {
    let bytes = buf.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

pub fn be64(buf: &[u8], at: usize) -> Option<u64> {
    let bytes = buf.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

/// A string with a one-byte length: the bytes, and where the next field starts.
pub fn counted_string(buf: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let len = usize::from(*buf.get(at)?);
    let start = at.checked_add(1)?;
    let end = start.checked_add(len)?;
    Some((buf.get(start..end)?, end))
}
