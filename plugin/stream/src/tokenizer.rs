//! The tokenizer: a push parser over the bytes one QEMU writes on one connection.
//!
//! Owns: the parse state of one connection, bounded in size whatever the input.
//! Must not: fail. What it does not understand becomes [`Token::Opaque`]; what it cannot
//! follow at all turns the rest of the connection opaque.

use crate::multifd::{self, Packet};
use crate::rebuild::{ADDRESS_BYTES, PAGE_RECORD_BYTES, ZERO_RECORD_BYTES};
use crate::record::{self, be16, be32, be64, counted_string};
use crate::{PAGE_BYTES, Page, Progress, Token, zero_run};

/// Shorter runs of addresses stay as they are.
const ADDRESSES_MIN: usize = 4;

/// No single unit of the format is longer: a command carries up to 64 KiB, an XBZRLE or
/// compressed page likewise, plus headers.
const UNIT_BYTES_MAX: usize = 128 * 1024;

const FOOTER_BYTES: usize = 5;
const FOOTER_AND_TAG_BYTES: usize = FOOTER_BYTES + 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing read yet.
    FileHeader,
    /// Between sections.
    Sections,
    /// In the list of RAM blocks; `left` bytes of guest RAM are not listed yet.
    BlockList { left: u64 },
    /// After a block of the list: an optional be64 page size may follow.
    BlockPageSize { left: u64 },
    /// In a RAM section, between records.
    Records,
    /// After a RAM section: its footer.
    Footer,
    /// In a section of unknown length: looking for its footer.
    Resync { section: u32 },
    /// In a stream inside the stream, which post-copy begins with; `left` bytes of it are to come.
    Package { left: u32 },
    /// Before a packet of multifd.
    Packet,
    /// In its list of addresses, `left` of which are to come, before `pages` or else `bytes`.
    Addresses { left: u32, pages: u32, bytes: u32 },
    /// In the pages of a packet.
    PacketPages { left: u32 },
    /// In what a packet has instead of pages.
    PacketBytes { left: u32 },
    /// Not parsed any more.
    Opaque,
}

/// What a connection of QEMU is for, by how it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConnectionKind {
    /// Not known yet, or none of these.
    #[default]
    Unknown,
    /// The migration stream.
    Main,
    /// Pages beside it, in packets.
    Multifd,
    /// Requested pages beside it, in post-copy: bare records.
    Preempt,
}

/// Which RAM section is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RamSection {
    Start,
    Part,
    End,
}

enum Unit<'a> {
    /// The unit is not complete in this buffer.
    Incomplete,
    /// `len` bytes that stay as they are.
    Skip(usize),
    /// A zero record with CONTINUE.
    Zero { address: u64, fill: u8 },
    /// Rising addresses in the list of a packet.
    Addresses { address: u64, count: usize },
    /// A page record with CONTINUE.
    Page { address: u64, body: &'a Page },
    /// `header` opaque bytes, then a page.
    HeaderAndBody(usize, &'a Page),
}

/// Cuts one connection's stream into tokens.
///
/// Call [`push`](Self::push) with what is unread so far; it calls `sink` for each token, in
/// order, and returns how many bytes those tokens cover. Push the rest again together with
/// more bytes, or with `flush` when the source has gone quiet: then everything is taken.
#[derive(Debug)]
pub struct Tokenizer {
    kind: ConnectionKind,
    state: State,
    ram_id: Option<u32>,
    ram_section: RamSection,
    /// Bytes handed out already that are still needed: the start of a unit (after a flush),
    /// or where a footer may begin.
    torn: Vec<u8>,
    progress: Progress,
}

impl Default for Tokenizer {
    fn default() -> Self {
        Self::new()
    }
}

impl Tokenizer {
    /// A tokenizer for a fresh connection.
    pub fn new() -> Self {
        Self {
            kind: ConnectionKind::Unknown,
            state: State::FileHeader,
            ram_id: None,
            ram_section: RamSection::Start,
            torn: Vec::new(),
            progress: Progress::default(),
        }
    }

    /// What the stream has told about the migration so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// What the connection is for.
    pub fn kind(&self) -> ConnectionKind {
        self.kind
    }

    /// Whether nothing on this connection is understood any more (or ever was).
    pub fn is_opaque(&self) -> bool {
        self.state == State::Opaque
    }

    /// Tokenises `buf`; returns how many of its bytes were covered by tokens.
    /// With `flush` that is all of them.
    pub fn push<'a>(
        &mut self,
        buf: &'a [u8],
        flush: bool,
        mut sink: impl FnMut(Token<'a>),
    ) -> usize {
        let mut at = self.finish_torn_unit(buf);
        // Opaque bytes not handed out yet start here: neighbours become one token.
        let mut opaque_from = 0;
        let emit_opaque = |from: usize, to: usize, sink: &mut dyn FnMut(Token<'a>)| {
            if from < to {
                sink(Token::Opaque(&buf[from..to]));
            }
        };
        while at < buf.len() {
            if self.state == State::Opaque {
                at = buf.len();
                break;
            }
            if let State::Resync { section } = self.state {
                at += self.resync(&buf[at..], section, flush);
                if matches!(self.state, State::Resync { .. }) {
                    break;
                }
                continue;
            }
            match self.unit(&buf[at..]) {
                Unit::Incomplete => {
                    if buf.len() - at > UNIT_BYTES_MAX {
                        self.state = State::Opaque;
                        continue;
                    }
                    if flush {
                        self.torn.extend_from_slice(&buf[at..]);
                        at = buf.len();
                    }
                    break;
                }
                Unit::Skip(len) => at += len,
                Unit::Zero { address, fill } => {
                    emit_opaque(opaque_from, at, &mut sink);
                    at += ZERO_RECORD_BYTES;
                    let more = zero_run::following(&buf[at..], address, fill);
                    self.progress.more_zeros(address, more);
                    sink(Token::Zeros {
                        address,
                        fill,
                        count: 1 + more,
                    });
                    at += more * ZERO_RECORD_BYTES;
                    opaque_from = at;
                }
                Unit::Addresses { address, count } => {
                    emit_opaque(opaque_from, at, &mut sink);
                    sink(Token::Addresses { address, count });
                    at += count * ADDRESS_BYTES;
                    opaque_from = at;
                }
                Unit::Page { address, body } => {
                    emit_opaque(opaque_from, at, &mut sink);
                    sink(Token::Page { address, body });
                    at += PAGE_RECORD_BYTES;
                    opaque_from = at;
                }
                Unit::HeaderAndBody(header, body) => {
                    emit_opaque(opaque_from, at + header, &mut sink);
                    sink(Token::Body(body));
                    at += header + PAGE_BYTES;
                    opaque_from = at;
                }
            }
        }
        emit_opaque(opaque_from, at, &mut sink);
        at
    }

    /// Completes a unit whose first bytes went out opaque: the rest of it is opaque too.
    /// Returns how many bytes of `buf` that took.
    fn finish_torn_unit(&mut self, buf: &[u8]) -> usize {
        if self.torn.is_empty() || matches!(self.state, State::Resync { .. }) {
            return 0;
        }
        let mut torn = std::mem::take(&mut self.torn);
        // Bytes of `torn` that are out already.
        let mut out = torn.len();
        let take = buf.len().min(UNIT_BYTES_MAX.saturating_sub(out));
        torn.extend_from_slice(&buf[..take]);
        let mut unit = &torn[..];
        loop {
            let unit_len = match self.unit(unit) {
                Unit::Incomplete if take < buf.len() => {
                    self.state = State::Opaque;
                    return buf.len();
                }
                Unit::Incomplete => {
                    self.torn = unit.to_vec();
                    return buf.len();
                }
                Unit::Skip(len) => len,
                Unit::Zero { .. } => ZERO_RECORD_BYTES,
                Unit::Addresses { count, .. } => count * ADDRESS_BYTES,
                Unit::Page { .. } => PAGE_RECORD_BYTES,
                Unit::HeaderAndBody(header, _) => header + PAGE_BYTES,
            };
            match unit_len.checked_sub(out) {
                Some(rest) => return rest,
                // A unit that only looked ahead: what is out belongs to the next one.
                None => {
                    unit = &unit[unit_len..];
                    out -= unit_len;
                }
            }
        }
    }

    /// Looks for the end of a section of unknown length. Returns how many bytes of `buf` it
    /// may take, having moved on to the next section if it was found.
    fn resync(&mut self, buf: &[u8], section: u32, flush: bool) -> usize {
        // A footer may begin in bytes that are out already.
        let out = self.torn.len();
        let mut seam = std::mem::take(&mut self.torn);
        seam.extend_from_slice(&buf[..buf.len().min(FOOTER_AND_TAG_BYTES)]);
        let found = find_footer(&seam, section)
            .and_then(|end| end.checked_sub(out))
            .or_else(|| find_footer(buf, section));
        if let Some(end) = found {
            self.state = State::Sections;
            return end;
        }
        let keep = if flush {
            0
        } else {
            FOOTER_BYTES.min(buf.len())
        };
        let taken = buf.len() - keep;
        seam.truncate(out);
        seam.extend_from_slice(&buf[..taken]);
        seam.drain(..seam.len().saturating_sub(FOOTER_BYTES));
        self.torn = seam;
        taken
    }

    /// Reads one unit at the start of `buf` and moves the state, or changes nothing and
    /// says it is incomplete.
    fn unit<'a>(&mut self, buf: &'a [u8]) -> Unit<'a> {
        let unit = match self.state {
            State::FileHeader => self.file_header(buf),
            State::Sections => self.section(buf),
            State::BlockList { left } => self.block_list(buf, left),
            State::BlockPageSize { left } => self.block_page_size(buf, left),
            State::Records => self.record(buf),
            State::Footer => self.footer(buf),
            State::Package { left } => self.package(buf, left),
            State::Packet => self.packet(buf),
            State::Addresses { left, pages, bytes } => self.addresses(buf, left, pages, bytes),
            State::PacketPages { left } => self.packet_page(buf, left),
            State::PacketBytes { left } => self.packet_bytes(buf, left),
            State::Resync { .. } | State::Opaque => Some(Unit::Skip(buf.len())),
        };
        unit.unwrap_or(Unit::Incomplete)
    }

    fn give_up<'a>(&mut self) -> Option<Unit<'a>> {
        self.state = State::Opaque;
        Some(Unit::Skip(0))
    }

    fn file_header<'a>(&mut self, buf: &'a [u8]) -> Option<Unit<'a>> {
        let begins = |with: &[u8]| buf.starts_with(&with[..buf.len().min(with.len())]);
        if begins(&record::FILE_HEADER) {
            buf.get(..record::FILE_HEADER.len())?;
            self.kind = ConnectionKind::Main;
            self.progress.begins();
            self.state = State::Sections;
            return Some(Unit::Skip(record::FILE_HEADER.len()));
        }
        if begins(&multifd::START) {
            buf.get(..multifd::START_BYTES)?;
            self.kind = ConnectionKind::Multifd;
            self.state = State::Packet;
            return Some(Unit::Skip(multifd::START_BYTES));
        }
        self.bare_records(buf)
    }

    /// A connection that begins with a page of a named block has nothing but such records.
    fn bare_records<'a>(&mut self, buf: &'a [u8]) -> Option<Unit<'a>> {
        let flags = be64(buf, 0)? & record::FLAGS_MASK;
        if flags != record::FLAG_PAGE && flags != record::FLAG_ZERO {
            return self.give_up();
        }
        let (name, _) = counted_string(buf, 8)?;
        if name.is_empty() || !name.iter().all(u8::is_ascii_graphic) {
            return self.give_up();
        }
        self.kind = ConnectionKind::Preempt;
        self.state = State::Records;
        Some(Unit::Skip(0))
    }

    fn section<'a>(&mut self, buf: &'a [u8]) -> Option<Unit<'a>> {
        match *buf.first()? {
            record::TAG_CONFIGURATION => {
                let len = usize::try_from(be32(buf, 1)?).ok()?;
                if len > 256 {
                    return self.give_up();
                }
                buf.get(..5 + len)?;
                Some(Unit::Skip(5 + len))
            }
            record::TAG_COMMAND => self.command(buf),
            tag @ (record::TAG_SECTION_START | record::TAG_SECTION_FULL) => {
                let id = be32(buf, 1)?;
                let (name, next) = counted_string(buf, 5)?;
                buf.get(next..next + 8)?;
                if tag == record::TAG_SECTION_START && name == b"ram" {
                    self.ram_id = Some(id);
                    self.ram_section = RamSection::Start;
                    self.progress.section_begins();
                    self.state = State::Records;
                } else {
                    self.progress.other_unit();
                    self.state = State::Resync { section: id };
                }
                Some(Unit::Skip(next + 8))
            }
            tag @ (record::TAG_SECTION_PART | record::TAG_SECTION_END) => {
                let id = be32(buf, 1)?;
                if Some(id) == self.ram_id {
                    self.progress.section_begins();
                    self.ram_section = if tag == record::TAG_SECTION_END {
                        self.progress.ram_end_begins();
                        RamSection::End
                    } else {
                        RamSection::Part
                    };
                    self.state = State::Records;
                } else {
                    self.progress.other_unit();
                    self.state = State::Resync { section: id };
                }
                Some(Unit::Skip(5))
            }
            // A configuration subsection, the end, the description: nothing to find after.
            record::TAG_SUBSECTION | record::TAG_EOF | record::TAG_VMDESCRIPTION => self.give_up(),
            _ => self.give_up(),
        }
    }

    fn command<'a>(&mut self, buf: &'a [u8]) -> Option<Unit<'a>> {
        let command = be16(buf, 1)?;
        let len = 5 + usize::from(be16(buf, 3)?);
        buf.get(..len)?;
        self.progress.other_unit();
        match command {
            record::COMMAND_SWITCHOVER_START => self.progress.switchover_starts(),
            // Post-copy begins: device state in a nested stream, then pages in no order.
            record::COMMAND_PACKAGED => {
                self.progress.switchover_starts();
                self.progress.package_begins();
                self.state = match be32(buf, 5) {
                    Some(left) if len == 9 => State::Package { left },
                    _ => State::Opaque,
                };
            }
            _ => {}
        }
        Some(Unit::Skip(len))
    }

    fn package<'a>(&mut self, buf: &'a [u8], left: u32) -> Option<Unit<'a>> {
        let (take, left) = part(buf, left);
        self.state = match left {
            0 => State::Sections,
            left => State::Package { left },
        };
        Some(Unit::Skip(take))
    }

    fn packet<'a>(&mut self, buf: &'a [u8]) -> Option<Unit<'a>> {
        let Ok((packet, fields)) = Packet::read(buf)? else {
            return self.give_up();
        };
        self.state = match packet {
            Packet::Device { bytes } => packet_body(0, bytes),
            Packet::Pages {
                normal,
                zero,
                as_they_are,
                bytes,
            } => {
                self.progress.packet(normal, zero);
                State::Addresses {
                    left: multifd::ADDRESSES,
                    pages: if as_they_are { normal } else { 0 },
                    bytes,
                }
            }
        };
        Some(Unit::Skip(fields))
    }

    fn addresses<'a>(
        &mut self,
        buf: &'a [u8],
        left: u32,
        pages: u32,
        bytes: u32,
    ) -> Option<Unit<'a>> {
        let (address, count) = multifd::rising(buf, left)?;
        self.state = match left.saturating_sub(count as u32) {
            0 => packet_body(pages, bytes),
            left => State::Addresses { left, pages, bytes },
        };
        Some(if count < ADDRESSES_MIN {
            Unit::Skip(count * ADDRESS_BYTES)
        } else {
            Unit::Addresses { address, count }
        })
    }

    fn packet_page<'a>(&mut self, buf: &'a [u8], left: u32) -> Option<Unit<'a>> {
        let body: &Page = buf.first_chunk()?;
        self.state = packet_body(left - 1, 0);
        Some(Unit::HeaderAndBody(0, body))
    }

    fn packet_bytes<'a>(&mut self, buf: &'a [u8], left: u32) -> Option<Unit<'a>> {
        let (take, left) = part(buf, left);
        self.state = packet_body(0, left);
        Some(Unit::Skip(take))
    }

    fn block_list<'a>(&mut self, buf: &'a [u8], left: u64) -> Option<Unit<'a>> {
        let (name, next) = counted_string(buf, 0)?;
        let used = be64(buf, next)?;
        if name.is_empty() || used > left {
            return self.give_up();
        }
        self.progress.declare_block(name);
        self.state = State::BlockPageSize { left: left - used };
        Some(Unit::Skip(next + 8))
    }

    fn block_page_size<'a>(&mut self, buf: &'a [u8], left: u64) -> Option<Unit<'a>> {
        // With post-copy advised, a block of huge pages is followed by its page size, which
        // nothing announces: a name never has length 0, a record never has no flags.
        let has_page_size = if left > 0 {
            *buf.first()? == 0
        } else {
            be64(buf, 0)? & record::FLAGS_MASK == 0
        };
        if has_page_size {
            buf.get(..8)?;
        }
        self.state = if left > 0 {
            State::BlockList { left }
        } else {
            State::Records
        };
        Some(Unit::Skip(if has_page_size { 8 } else { 0 }))
    }

    fn record<'a>(&mut self, buf: &'a [u8]) -> Option<Unit<'a>> {
        let word = be64(buf, 0)?;
        let address = word & !record::FLAGS_MASK;
        match word & record::FLAGS_MASK {
            record::PAGE_CONTINUE => {
                let body: &Page = buf.get(8..8 + PAGE_BYTES)?.try_into().ok()?;
                self.progress.page(address);
                Some(Unit::Page { address, body })
            }
            record::ZERO_CONTINUE => {
                let fill = *buf.get(8)?;
                self.progress.zero(address);
                Some(Unit::Zero { address, fill })
            }
            record::FLAG_PAGE => {
                let (name, next) = counted_string(buf, 8)?;
                let body: &Page = buf.get(next..next + PAGE_BYTES)?.try_into().ok()?;
                self.progress.block(name);
                self.progress.page(address);
                Some(Unit::HeaderAndBody(next, body))
            }
            record::FLAG_ZERO => {
                let (name, next) = counted_string(buf, 8)?;
                buf.get(next)?;
                self.progress.block(name);
                self.progress.zero(address);
                Some(Unit::Skip(next + 1))
            }
            record::FLAG_EOS if self.kind == ConnectionKind::Preempt => {
                self.state = State::Opaque;
                Some(Unit::Skip(8))
            }
            record::FLAG_EOS => {
                self.progress
                    .section_ends(self.ram_section == RamSection::Part);
                self.state = State::Footer;
                Some(Unit::Skip(8))
            }
            record::FLAG_MULTIFD_FLUSH => {
                self.progress
                    .multifd_flush(self.ram_section == RamSection::Part);
                Some(Unit::Skip(8))
            }
            record::FLAG_MEM_SIZE => {
                self.progress.declare_total(address);
                self.state = if address > 0 {
                    State::BlockList { left: address }
                } else {
                    State::Records
                };
                Some(Unit::Skip(8))
            }
            flags => self.old_compression(buf, address, flags),
        }
    }

    /// XBZRLE deltas and the compressed pages of QEMU before 9.1: known length, opaque body.
    fn old_compression<'a>(&mut self, buf: &'a [u8], address: u64, flags: u64) -> Option<Unit<'a>> {
        let named = flags & record::FLAG_CONTINUE == 0;
        let (name, next) = if named {
            let (name, next) = counted_string(buf, 8)?;
            (Some(name), next)
        } else {
            (None, 8)
        };
        let len = match flags & !record::FLAG_CONTINUE {
            record::FLAG_XBZRLE => 3 + usize::from(be16(buf, next + 1)?),
            record::FLAG_COMPRESS_PAGE => 4 + usize::try_from(be32(buf, next)?).ok()?,
            _ => return self.give_up(),
        };
        if len > UNIT_BYTES_MAX / 2 {
            return self.give_up();
        }
        buf.get(..next + len)?;
        if let Some(name) = name {
            self.progress.block(name);
        }
        self.progress.page(address);
        Some(Unit::Skip(next + len))
    }

    fn footer<'a>(&mut self, buf: &'a [u8]) -> Option<Unit<'a>> {
        if *buf.first()? != record::TAG_FOOTER {
            // Very old machine types send no footer.
            return self.after_ram_section(0);
        }
        if Some(be32(buf, 1)?) != self.ram_id {
            return self.give_up();
        }
        self.after_ram_section(5)
    }

    fn after_ram_section<'a>(&mut self, footer: usize) -> Option<Unit<'a>> {
        self.state = if self.ram_section == RamSection::End {
            self.progress.ram_end_done();
            // Device state: sections without a length, nothing left to find.
            State::Opaque
        } else {
            State::Sections
        };
        Some(Unit::Skip(footer))
    }
}

/// What comes next in a packet, behind its addresses.
fn packet_body(pages: u32, bytes: u32) -> State {
    match (pages, bytes) {
        (0, 0) => State::Packet,
        (0, left) => State::PacketBytes { left },
        (left, _) => State::PacketPages { left },
    }
}

/// How many of the bytes belong to something of which so many are left, and how many are left then.
fn part(buf: &[u8], left: u32) -> (usize, u32) {
    let take = u32::try_from(buf.len()).unwrap_or(u32::MAX).min(left);
    (take as usize, left - take)
}

/// Where the bytes after the footer of `section` start, if a plausible one is in `buf`:
/// the footer followed by a tag that may follow a section.
fn find_footer(buf: &[u8], section: u32) -> Option<usize> {
    let id = section.to_be_bytes();
    let footer = [record::TAG_FOOTER, id[0], id[1], id[2], id[3]];
    let mut from = 0;
    while let Some(found) = buf[from..].windows(5).position(|w| w == footer) {
        let end = from + found + 5;
        match *buf.get(end)? {
            record::TAG_SECTION_START
            | record::TAG_SECTION_PART
            | record::TAG_SECTION_END
            | record::TAG_SECTION_FULL
            | record::TAG_COMMAND => return Some(end),
            _ => from += found + 1,
        }
    }
    None
}
