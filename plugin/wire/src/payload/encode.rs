//! Writing payloads.
//!
//! Owns: collapsing sequences into runs, and counting what each kind costs.
//! Must not: decide how a page is sent.

use super::blocks::{Block, NextBlock, block_number};
use super::{
    ADDRESS_BYTES, BODY_ONLY, Content, Costs, EXPLICIT_ADDRESS, GROUPS, KIND_ADDRESS, KIND_BLOCKS,
    KIND_DEFINE, KIND_DELTA, KIND_KEEP, KIND_LITERAL, KIND_OPAQUE, KIND_REFERENCE, KIND_UNIFORM,
    KIND_ZERO, PAGE_BYTES, PAGE_HEADER_BYTES, PageBlocks, Place, ZERO_RECORD_BYTES,
};
use crate::cursor::put_varint;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    kind: u8,
    /// Page number of the first record; `None`: body only.
    first: Option<u64>,
    count: u64,
    slot: u32,
    /// The fill byte, or the block size.
    detail: u8,
    group: usize,
}

/// Builds payloads, reusing its buffers.
#[derive(Debug, Default)]
pub struct Encoder {
    operations: Vec<u8>,
    literals: Vec<u8>,
    run: Option<Run>,
    /// Fields of each page of the run, which follow those of the run itself.
    page_fields: Vec<u8>,
    /// Where the literals of the run begin.
    run_literals_from: usize,
    next_page: u64,
    next_slot: u32,
    next_base: u32,
    next_block: NextBlock,
    /// Literals that the caller puts behind the payload itself.
    passed_bytes: usize,
    /// The end of the page that was kept last, in the literals.
    kept_to: usize,
    costs: Costs,
}

impl Encoder {
    /// Starts a new payload.
    pub fn clear(&mut self) {
        self.operations.clear();
        self.literals.clear();
        self.run = None;
        self.page_fields.clear();
        self.next_page = 0;
        self.next_slot = 0;
        self.next_base = 0;
        self.next_block = NextBlock::default();
        self.passed_bytes = 0;
        self.kept_to = 0;
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

    /// Bytes passed on as they are, which the caller appends to the payload itself. Nothing else
    /// of this payload may take literals.
    pub fn passed(&mut self, len: usize) {
        self.close_run();
        let before = self.operations.len();
        self.operations.push(KIND_OPAQUE);
        put_varint(&mut self.operations, len as u64);
        self.passed_bytes += len;
        self.costs.literal.stream += len as u64;
        self.costs.literal.payload += (self.operations.len() - before) as u64 + len as u64;
    }

    /// Puts the page that begins `at` so many bytes into the literals into a slot, too. Pages are
    /// kept in the order in which they lie there, and do not overlap.
    pub fn keep(&mut self, at: usize, slot: u32) {
        self.extend(KIND_KEEP, None, slot, 0, 0);
        let skip = at.saturating_sub(self.kept_to);
        put_varint(&mut self.page_fields, skip as u64);
        self.kept_to = at + PAGE_BYTES;
    }

    /// A zero record with CONTINUE.
    pub fn zero(&mut self, address: u64, fill: u8) {
        self.zeros(address, fill, 1);
    }

    /// `count` zero records with CONTINUE, each one page further than the one before it.
    pub fn zeros(&mut self, address: u64, fill: u8, count: usize) {
        self.several(KIND_ZERO, address, fill, count);
    }

    /// `count` page addresses, each one page further than the one before it.
    pub fn addresses(&mut self, address: u64, count: usize) {
        self.several(KIND_ADDRESS, address, 0, count);
    }

    fn several(&mut self, kind: u8, address: u64, detail: u8, count: usize) {
        let Some(more) = count.checked_sub(1) else {
            return;
        };
        self.extend(kind, Some(address / PAGE_BYTES as u64), 0, detail, 0);
        if let Some(run) = &mut self.run {
            run.count += more as u64;
        }
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
            Content::Delta { slot, base, delta } => {
                self.extend(KIND_DELTA, page_number, slot, 0, 0);
                self.delta(base, delta);
            }
            Content::Blocks { slot, blocks } => {
                self.extend(KIND_BLOCKS, page_number, slot, blocks.log2(), 0);
                self.blocks(&blocks);
            }
        }
    }

    fn delta(&mut self, base: u32, delta: &[u8]) {
        let out = &mut self.page_fields;
        put_varint(out, difference(u64::from(base), u64::from(self.next_base)));
        put_varint(out, delta.len() as u64);
        self.literals.extend_from_slice(delta);
        self.next_base = base.wrapping_add(1);
    }

    /// Blocks that follow each other, here and in the window, are one segment.
    fn blocks(&mut self, page: &PageBlocks<'_>) {
        let log2 = page.log2();
        let mut blocks = page.iter().peekable();
        while let Some(block) = blocks.next() {
            let mut count = 1;
            match block {
                Block::Literal(bytes) => {
                    self.literals.extend_from_slice(bytes);
                    while let Some(Block::Literal(bytes)) =
                        blocks.next_if(|next| matches!(next, Block::Literal(_)))
                    {
                        self.literals.extend_from_slice(bytes);
                        count += 1;
                    }
                    self.page_fields.push(segment(count, false));
                }
                Block::Reference(reference) => {
                    let number = block_number(log2, reference);
                    let follows = |block: &Block<'_>, count: usize| match block {
                        Block::Reference(next) => {
                            block_number(log2, *next) == number + count as u64
                        }
                        Block::Literal(_) => false,
                    };
                    while blocks.next_if(|next| follows(next, count)).is_some() {
                        count += 1;
                    }
                    self.page_fields.push(segment(count, true));
                    let expected = self.next_block.number(log2);
                    put_varint(&mut self.page_fields, difference(number, expected));
                    self.next_block.advance(log2, number, count);
                }
            }
        }
    }

    fn extend(&mut self, kind: u8, page: Option<u64>, slot: u32, detail: u8, group: usize) {
        if let Some(run) = &mut self.run {
            let page_follows = match (run.first, page) {
                (Some(first), Some(page)) => first.checked_add(run.count) == Some(page),
                (None, None) => true,
                _ => false,
            };
            let slot_follows =
                !has_slot(kind) || u64::from(run.slot) + run.count == u64::from(slot);
            if run.kind == kind
                && run.detail == detail
                && run.group == group
                && page_follows
                && slot_follows
            {
                run.count += 1;
                return;
            }
        }
        self.close_run();
        self.run_literals_from = self.literals.len();
        self.run = Some(Run {
            kind,
            first: page,
            count: 1,
            slot,
            detail,
            group,
        });
    }

    fn close_run(&mut self) {
        let Some(run) = self.run.take() else { return };
        let out = &mut self.operations;
        let before = out.len();
        let mut kind = run.kind;
        match run.first {
            None if kind == KIND_KEEP => {}
            None => kind |= BODY_ONLY,
            Some(first) if first != self.next_page => kind |= EXPLICIT_ADDRESS,
            Some(_) => {}
        }
        out.push(kind);
        if kind & EXPLICIT_ADDRESS != 0 {
            put_varint(out, run.first.unwrap_or(0));
        }
        put_varint(out, run.count);
        if has_slot(run.kind) {
            put_varint(out, difference(run.slot.into(), self.next_slot.into()));
            self.next_slot = run.slot.wrapping_add(run.count as u32);
        }
        if matches!(run.kind, KIND_ZERO | KIND_UNIFORM | KIND_BLOCKS) {
            out.push(run.detail);
        }
        out.append(&mut self.page_fields);
        if let Some(first) = run.first {
            self.next_page = first.wrapping_add(run.count);
        }
        let per_record = match (run.kind, run.first) {
            (KIND_ZERO, _) => ZERO_RECORD_BYTES,
            (KIND_ADDRESS, _) => ADDRESS_BYTES,
            (KIND_KEEP, _) => 0,
            (_, Some(_)) => PAGE_HEADER_BYTES + PAGE_BYTES,
            (_, None) => PAGE_BYTES,
        };
        let cost = match run.kind {
            KIND_ZERO | KIND_ADDRESS => &mut self.costs.zero,
            KIND_UNIFORM => &mut self.costs.uniform,
            KIND_REFERENCE => &mut self.costs.reference[run.group.min(GROUPS - 1)],
            KIND_DELTA => &mut self.costs.delta,
            KIND_BLOCKS => &mut self.costs.sub_page,
            _ => &mut self.costs.literal,
        };
        let literals = self.literals.len() - self.run_literals_from;
        cost.stream += run.count * per_record as u64;
        cost.payload += (self.operations.len() - before + literals) as u64;
    }

    /// Ends the payload: appends it to `out` and says what it cost.
    pub fn finish(&mut self, out: &mut Vec<u8>) -> Costs {
        self.close_run();
        put_varint(out, self.operations.len() as u64);
        out.extend_from_slice(&self.operations);
        out.extend_from_slice(&self.literals);
        self.costs
    }

    /// Bytes of memory its buffers take.
    pub fn memory_bytes(&self) -> usize {
        self.operations.capacity() + self.literals.capacity() + self.page_fields.capacity()
    }

    /// Bytes of literals so far.
    pub fn literal_bytes(&self) -> usize {
        self.literals.len() + self.passed_bytes
    }
}

fn has_slot(kind: u8) -> bool {
    matches!(
        kind,
        KIND_DEFINE | KIND_REFERENCE | KIND_DELTA | KIND_BLOCKS | KIND_KEEP
    )
}

/// A zigzag number. Slots and blocks have 35 bits at most.
fn difference(value: u64, expected: u64) -> u64 {
    let difference = value.wrapping_sub(expected) as i64;
    ((difference << 1) ^ (difference >> 63)) as u64
}

/// Blocks of one kind in sequence; there are 8 at most.
fn segment(count: usize, is_reference: bool) -> u8 {
    ((count as u8) << 1) | u8::from(is_reference)
}
