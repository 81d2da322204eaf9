//! The payload of a DATA frame: operations that rebuild a piece of stream, and the literal
//! bytes they need.
//!
//! Owns: the encoding, with runs collapsed ([`Encoder`]), its decoding ([`Operations`]),
//! and exact counts of what each kind of operation cost.
//! Must not: look up or keep pages, apply deltas, or know what a digest is.
//!
//! A payload is: varint length of the operations, the operations, the literals.
//! An operation is: u8 kind, [varint page address / 4096], varint count, then by kind a slot,
//! a fill byte or a block size; deltas and pages of blocks have fields for each page as well.

mod blocks;
mod decode;
mod encode;

pub use blocks::{BLOCKS_MAX, Block, BlockReference, PageBlocks};
pub use decode::Operations;
pub use encode::Encoder;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of the stream that a page record's header takes.
pub const PAGE_HEADER_BYTES: usize = 8;
/// Bytes of the stream that a zero record takes.
pub const ZERO_RECORD_BYTES: usize = 9;
/// Bytes of the stream that a page's address takes in the list of a multifd packet.
pub const ADDRESS_BYTES: usize = 8;
/// No delta is longer; one that is not shorter than its page would not be sent as one.
pub const DELTA_BYTES_MAX: usize = PAGE_BYTES - 1;

const KIND_OPAQUE: u8 = 0;
const KIND_ZERO: u8 = 1;
const KIND_LITERAL: u8 = 2;
const KIND_DEFINE: u8 = 3;
const KIND_REFERENCE: u8 = 4;
const KIND_UNIFORM: u8 = 5;
const KIND_DELTA: u8 = 6;
const KIND_BLOCKS: u8 = 7;
const KIND_KEEP: u8 = 8;
const KIND_ADDRESS: u8 = 9;
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
    /// The page in slot `base`, changed by a delta of at most [`DELTA_BYTES_MAX`] bytes; it
    /// goes into `slot`, which may be the same one. What a delta is, this crate does not know.
    Delta {
        slot: u32,
        base: u32,
        delta: &'a [u8],
    },
    /// Blocks that are in the window or follow; the page goes into `slot`, out of which blocks
    /// of its own may come.
    Blocks { slot: u32, blocks: PageBlocks<'a> },
}

/// Payload bytes spent, by what they were spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Stream bytes that the operations stand for.
    pub stream: u64,
    /// Payload bytes of operations and literals.
    pub payload: u64,
}

/// Groups that references are counted in.
pub const GROUPS: usize = 4;

/// Costs of one payload by kind of operation; together they cover it exactly, but for the
/// one length field in front.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Costs {
    /// Opaque bytes, pages sent in full, and what is kept of them.
    pub literal: Cost,
    /// Zero records, and the lists of addresses that multifd has instead.
    pub zero: Cost,
    pub uniform: Cost,
    /// References, by the caller's group, less than [`GROUPS`].
    pub reference: [Cost; GROUPS],
    /// Pages made of blocks, literal blocks included.
    pub sub_page: Cost,
    /// Deltas.
    pub delta: Cost,
}

impl Costs {
    /// All of them added up.
    pub fn total(&self) -> Cost {
        let all = [
            self.literal,
            self.zero,
            self.uniform,
            self.sub_page,
            self.delta,
        ];
        all.iter()
            .chain(&self.reference)
            .fold(Cost::default(), |sum, cost| Cost {
                stream: sum.stream + cost.stream,
                payload: sum.payload + cost.payload,
            })
    }
}

/// One step of rebuilding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    Opaque(&'a [u8]),
    Zero {
        address: u64,
        fill: u8,
    },
    /// The address of a page, without the page.
    Address {
        address: u64,
    },
    Page {
        place: Place,
        content: Content<'a>,
    },
    /// A page that lies anywhere in the literals goes into a slot. It adds nothing to the stream:
    /// another operation passes its bytes on.
    Keep {
        slot: u32,
        page: &'a [u8; PAGE_BYTES],
    },
}

impl Operation<'_> {
    /// Stream bytes this operation stands for.
    pub fn stream_len(&self) -> usize {
        match self {
            Operation::Opaque(bytes) => bytes.len(),
            Operation::Zero { .. } => ZERO_RECORD_BYTES,
            Operation::Address { .. } => ADDRESS_BYTES,
            Operation::Keep { .. } => 0,
            Operation::Page { place, .. } => match place {
                Place::Record { .. } => PAGE_HEADER_BYTES + PAGE_BYTES,
                Place::Body => PAGE_BYTES,
            },
        }
    }
}
