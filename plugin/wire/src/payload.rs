//! The payload of a DATA frame: operations that rebuild a piece of stream, and the literal
//! bytes they need.
//!
//! Owns: the encoding, with runs collapsed ([`Encoder`]), its decoding ([`Operations`]),
//! and exact counts of what each kind of operation cost.
//! Must not: look up or keep pages, or know what a digest is.
//!
//! A payload is: varint length of the operations, the operations, the literals.
//! An operation is: u8 kind, [varint page address / 4096], varint count, [varint slot].

use crate::WireError;
use crate::cursor::{Reader, put_varint};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of the stream that a page record's header takes.
pub const PAGE_HEADER_BYTES: usize = 8;
/// Bytes of the stream that a zero record takes.
pub const ZERO_RECORD_BYTES: usize = 9;

const KIND_OPAQUE: u8 = 0;
const KIND_ZERO: u8 = 1;
const KIND_LITERAL: u8 = 2;
const KIND_DEFINE: u8 = 3;
const KIND_REFERENCE: u8 = 4;
const KIND_UNIFORM: u8 = 5;
const KIND_MASK: u8 = 0x0f;
/// The address is not the one after the last operation's: it follows.
const EXPLICIT_ADDRESS: u8 = 0x10;
/// The record header was in the opaque bytes before: only the page itself.
const BODY_ONLY: u8 = 0x20;

/// Where a page record's header comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A record with CONTINUE at this page-aligned address: 8 header bytes and the page.
    Record { address: u64 },
    /// The header went before as opaque bytes: the page only.
    Body,
}

/// What a page's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// The page follows.
    Literal(&'a [u8; PAGE_BYTES]),
    /// The page follows and goes into a window slot.
    Define {
        slot: u32,
        page: &'a [u8; PAGE_BYTES],
    },
    /// The page is in a window slot. `group` is any number of the encoder's caller: runs
    /// do not cross groups, so that costs can be counted per group. It is not sent.
    Reference { slot: u32, group: usize },
    /// One repeated byte.
    Uniform { fill: u8 },
}

/// Payload bytes spent, by what they were spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Stream bytes that the operations stand for.
    pub stream: u64,
    /// Payload bytes of operations and literals.
    pub payload: u64,
}

/// Costs of one payload by kind of operation; together they cover it exactly, but for the
/// one length field in front.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Costs {
    /// Opaque bytes, and pages sent in full.
    pub literal: Cost,
    pub zero: Cost,
    pub uniform: Cost,
    /// References, by the caller's group (0 or 1).
    pub reference: [Cost; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    kind: u8,
    /// Page number of the first record; `None`: body only.
    first: Option<u64>,
    count: u64,
    slot: u32,
    fill: u8,
    group: usize,
}

/// Builds payloads, reusing its buffers.
#[derive(Debug, Default)]
pub struct Encoder {
    operations: Vec<u8>,
    literals: Vec<u8>,
    run: Option<Run>,
    next_page: u64,
    next_slot: u32,
    costs: Costs,
}

impl Encoder {
    /// Starts a new payload.
    pub fn clear(&mut self) {
        self.operations.clear();
        self.literals.clear();
        self.run = None;
        self.next_page = 0;
        self.next_slot = 0;
        self.costs = Costs::default();
    }

    /// Bytes passed on as they are.
    pub fn opaque(&mut self, bytes: &[u8]) {
        self.close_run();
        if bytes.is_empty() {
            return;
        }
        let before = self.operations.len();
        self.operations.push(KIND_OPAQUE);
        put_varint(&mut self.operations, bytes.len() as u64);
        self.literals.extend_from_slice(bytes);
        self.costs.literal.stream += bytes.len() as u64;
        self.costs.literal.payload += (self.operations.len() - before) as u64 + bytes.len() as u64;
    }

    /// A zero record with CONTINUE.
    pub fn zero(&mut self, address: u64, fill: u8) {
        self.extend(KIND_ZERO, Some(address / PAGE_BYTES as u64), 0, fill, 0);
    }

    /// A page.
    pub fn page(&mut self, place: Place, content: Content<'_>) {
        let page_number = match place {
            Place::Record { address } => Some(address / PAGE_BYTES as u64),
            Place::Body => None,
        };
        match content {
            Content::Literal(page) => {
                self.extend(KIND_LITERAL, page_number, 0, 0, 0);
                self.literals.extend_from_slice(page);
            }
            Content::Define { slot, page } => {
                self.extend(KIND_DEFINE, page_number, slot, 0, 0);
                self.literals.extend_from_slice(page);
            }
            Content::Reference { slot, group } => {
                self.extend(KIND_REFERENCE, page_number, slot, 0, group);
            }
            Content::Uniform { fill } => self.extend(KIND_UNIFORM, page_number, 0, fill, 0),
        }
    }

    fn extend(&mut self, kind: u8, page: Option<u64>, slot: u32, fill: u8, group: usize) {
        if let Some(run) = &mut self.run {
            let page_follows = match (run.first, page) {
                (Some(first), Some(page)) => first.checked_add(run.count) == Some(page),
                (None, None) => true,
                _ => false,
            };
            let slot_follows = match kind {
                KIND_DEFINE | KIND_REFERENCE => u64::from(run.slot) + run.count == u64::from(slot),
                _ => true,
            };
            if run.kind == kind
                && run.fill == fill
                && run.group == group
                && page_follows
                && slot_follows
            {
                run.count += 1;
                return;
            }
        }
        self.close_run();
        self.run = Some(Run {
            kind,
            first: page,
            count: 1,
            slot,
            fill,
            group,
        });
    }

    fn close_run(&mut self) {
        let Some(run) = self.run.take() else { return };
        let out = &mut self.operations;
        let before = out.len();
        let mut kind = run.kind;
        match run.first {
            None => kind |= BODY_ONLY,
            Some(first) if first != self.next_page => kind |= EXPLICIT_ADDRESS,
            Some(_) => {}
        }
        out.push(kind);
        if kind & EXPLICIT_ADDRESS != 0 {
            put_varint(out, run.first.unwrap_or(0));
        }
        put_varint(out, run.count);
        let mut page_literals = 0;
        match run.kind {
            KIND_DEFINE | KIND_REFERENCE => {
                let delta = i64::from(run.slot) - i64::from(self.next_slot);
                put_varint(out, zigzag(delta));
                self.next_slot = run.slot.wrapping_add(run.count as u32);
            }
            KIND_ZERO | KIND_UNIFORM => out.push(run.fill),
            _ => {}
        }
        if matches!(run.kind, KIND_LITERAL | KIND_DEFINE) {
            page_literals = run.count * PAGE_BYTES as u64;
        }
        if let Some(first) = run.first {
            self.next_page = first.wrapping_add(run.count);
        }
        let per_record = match (run.kind, run.first) {
            (KIND_ZERO, _) => ZERO_RECORD_BYTES,
            (_, Some(_)) => PAGE_HEADER_BYTES + PAGE_BYTES,
            (_, None) => PAGE_BYTES,
        };
        let cost = match run.kind {
            KIND_ZERO => &mut self.costs.zero,
            KIND_UNIFORM => &mut self.costs.uniform,
            KIND_REFERENCE => &mut self.costs.reference[run.group.min(1)],
            _ => &mut self.costs.literal,
        };
        cost.stream += run.count * per_record as u64;
        cost.payload += (self.operations.len() - before) as u64 + page_literals;
    }

    /// Ends the payload: appends it to `out` and says what it cost.
    pub fn finish(&mut self, out: &mut Vec<u8>) -> Costs {
        self.close_run();
        put_varint(out, self.operations.len() as u64);
        out.extend_from_slice(&self.operations);
        out.extend_from_slice(&self.literals);
        self.costs
    }

    /// Bytes of literals so far.
    pub fn literal_bytes(&self) -> usize {
        self.literals.len()
    }
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// One decoded step of rebuilding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    Opaque(&'a [u8]),
    Zero { address: u64, fill: u8 },
    Page { place: Place, content: Content<'a> },
}

impl Operation<'_> {
    /// Stream bytes this operation stands for.
    pub fn stream_len(&self) -> usize {
        match self {
            Operation::Opaque(bytes) => bytes.len(),
            Operation::Zero { .. } => ZERO_RECORD_BYTES,
            Operation::Page { place, .. } => match place {
                Place::Record { .. } => PAGE_HEADER_BYTES + PAGE_BYTES,
                Place::Body => PAGE_BYTES,
            },
        }
    }
}

/// Decodes a payload, run by run, into single operations.
///
/// The caller bounds the rebuilt length: a run's count is not limited here, but each call
/// yields one operation, and an error ends the iteration.
#[derive(Debug)]
pub struct Operations<'a> {
    operations: Reader<'a>,
    literals: Reader<'a>,
    run: Option<Run>,
    next_page: u64,
    next_slot: u32,
    failed: bool,
}

impl<'a> Operations<'a> {
    /// Reads the frame of a payload.
    pub fn new(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(payload);
        let len = usize::try_from(reader.varint("operations_len")?)
            .map_err(|_| WireError::Value("operations_len"))?;
        let operations = reader.bytes(len, "operations")?;
        Ok(Self {
            operations: Reader::new(operations),
            literals: reader,
            run: None,
            next_page: 0,
            next_slot: 0,
            failed: false,
        })
    }

    fn step(&mut self) -> Result<Option<Operation<'a>>, WireError> {
        if self.run.is_none() {
            if self.operations.is_empty() {
                self.literals.finish()?;
                return Ok(None);
            }
            if let Some(opaque) = self.read_run()? {
                return Ok(Some(Operation::Opaque(opaque)));
            }
        }
        let Some(mut run) = self.run.take() else {
            return Ok(None);
        };
        let place = match run.first {
            Some(page) => Place::Record {
                address: page << 12,
            },
            None => Place::Body,
        };
        let operation = match run.kind {
            KIND_ZERO => Operation::Zero {
                address: run.first.unwrap_or(0) << 12,
                fill: run.fill,
            },
            KIND_UNIFORM => Operation::Page {
                place,
                content: Content::Uniform { fill: run.fill },
            },
            KIND_REFERENCE => Operation::Page {
                place,
                content: Content::Reference {
                    slot: run.slot,
                    group: 0,
                },
            },
            kind => {
                let page: &[u8; PAGE_BYTES] = self
                    .literals
                    .bytes(PAGE_BYTES, "literals")?
                    .try_into()
                    .map_err(|_| WireError::Truncated("literals"))?;
                let content = if kind == KIND_DEFINE {
                    Content::Define {
                        slot: run.slot,
                        page,
                    }
                } else {
                    Content::Literal(page)
                };
                Operation::Page { place, content }
            }
        };
        run.count -= 1;
        if run.count > 0 {
            run.first = run.first.map(|page| page.wrapping_add(1));
            run.slot = run.slot.wrapping_add(1);
            self.run = Some(run);
        }
        Ok(Some(operation))
    }

    /// Reads the next operation into `run`, or returns opaque bytes.
    fn read_run(&mut self) -> Result<Option<&'a [u8]>, WireError> {
        let r = &mut self.operations;
        let byte = r.u8("kind")?;
        let kind = byte & KIND_MASK;
        let known_flags = match kind {
            KIND_OPAQUE => 0,
            KIND_ZERO => EXPLICIT_ADDRESS,
            _ => EXPLICIT_ADDRESS | BODY_ONLY,
        };
        let flags = byte & !KIND_MASK;
        if kind > KIND_UNIFORM || flags & !known_flags != 0 || flags == EXPLICIT_ADDRESS | BODY_ONLY
        {
            return Err(WireError::Value("kind"));
        }
        if kind == KIND_OPAQUE {
            let len = usize::try_from(r.varint("count")?).map_err(|_| WireError::Value("count"))?;
            if len == 0 {
                return Err(WireError::Value("count"));
            }
            return self.literals.bytes(len, "literals").map(Some);
        }
        let first = if flags & BODY_ONLY != 0 {
            None
        } else if flags & EXPLICIT_ADDRESS != 0 {
            let page = r.varint("address")?;
            if page > u64::MAX >> 12 {
                return Err(WireError::Value("address"));
            }
            Some(page)
        } else {
            Some(self.next_page)
        };
        let count = r.varint("count")?;
        if count == 0 || count > u64::from(u32::MAX) {
            return Err(WireError::Value("count"));
        }
        let mut slot = 0;
        let mut fill = 0;
        match kind {
            KIND_DEFINE | KIND_REFERENCE => {
                let delta = unzigzag(r.varint("slot")?);
                slot = i64::from(self.next_slot)
                    .checked_add(delta)
                    .and_then(|slot| u32::try_from(slot).ok())
                    .ok_or(WireError::Value("slot"))?;
                self.next_slot = slot.wrapping_add(count as u32);
            }
            KIND_ZERO | KIND_UNIFORM => fill = r.u8("fill")?,
            _ => {}
        }
        if let Some(first) = first {
            self.next_page = first
                .checked_add(count)
                .filter(|next| next - 1 <= u64::MAX >> 12)
                .ok_or(WireError::Value("count"))?;
        }
        self.run = Some(Run {
            kind,
            first,
            count,
            slot,
            fill,
            group: 0,
        });
        Ok(None)
    }
}

impl<'a> Iterator for Operations<'a> {
    type Item = Result<Operation<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        step.transpose()
    }
}
