//! Reading payloads.
//!
//! Must not: allocate, or trust a count: each call yields one operation.

use super::blocks::{BLOCK_LOG2, NextBlock, block_at};
use super::{
    BLOCKS_MAX, BODY_ONLY, Content, DELTA_BYTES_MAX, EXPLICIT_ADDRESS, KIND_ADDRESS, KIND_BLOCKS,
    KIND_DEFINE, KIND_DELTA, KIND_KEEP, KIND_LITERAL, KIND_MASK, KIND_OPAQUE, KIND_REFERENCE,
    KIND_UNIFORM, KIND_ZERO, Operation, PAGE_BYTES, PageBlocks, Place,
};
use crate::WireError;
use crate::cursor::Reader;

#[derive(Debug, Clone, Copy)]
struct Run {
    kind: u8,
    /// Page number of the next record; `None`: body only.
    page: Option<u64>,
    left: u64,
    slot: u32,
    /// The fill byte, or the block size.
    detail: u8,
}

/// Decodes a payload, run by run, into single operations.
///
/// The caller bounds the rebuilt length: a run's count is not limited here, but each call
/// yields one operation, and an error ends the iteration.
#[derive(Debug)]
pub struct Operations<'a> {
    operations: Reader<'a>,
    literals: Reader<'a>,
    all_literals: &'a [u8],
    /// The end of the page that was kept last, in all literals.
    kept_to: usize,
    run: Option<Run>,
    next_page: u64,
    next_slot: u32,
    next_base: u32,
    next_block: NextBlock,
    failed: bool,
}

impl<'a> Operations<'a> {
    /// Reads the frame of a payload.
    pub fn new(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(payload);
        let len = usize::try_from(reader.varint("operations_len")?)
            .map_err(|_| WireError::Value("operations_len"))?;
        let operations = reader.bytes(len, "operations")?;
        let literals = reader.rest();
        Ok(Self {
            operations: Reader::new(operations),
            literals: Reader::new(literals),
            all_literals: literals,
            kept_to: 0,
            run: None,
            next_page: 0,
            next_slot: 0,
            next_base: 0,
            next_block: NextBlock::default(),
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
        let operation = self.record(&run)?;
        run.left -= 1;
        if run.left > 0 {
            run.page = run.page.map(|page| page.wrapping_add(1));
            run.slot = run.slot.wrapping_add(1);
            self.run = Some(run);
        }
        Ok(Some(operation))
    }

    /// The next record of a run.
    fn record(&mut self, run: &Run) -> Result<Operation<'a>, WireError> {
        let place = match run.page {
            Some(page) => Place::Record {
                address: page << 12,
            },
            None => Place::Body,
        };
        let slot = run.slot;
        let content = match run.kind {
            KIND_KEEP => {
                let page = self.kept()?;
                return Ok(Operation::Keep { slot, page });
            }
            KIND_ZERO => {
                return Ok(Operation::Zero {
                    address: run.page.unwrap_or(0) << 12,
                    fill: run.detail,
                });
            }
            KIND_ADDRESS => {
                return Ok(Operation::Address {
                    address: run.page.unwrap_or(0) << 12,
                });
            }
            KIND_LITERAL => Content::Literal(self.page()?),
            KIND_DEFINE => Content::Define {
                slot,
                page: self.page()?,
            },
            KIND_REFERENCE => Content::Reference { slot, group: 0 },
            KIND_UNIFORM => Content::Uniform { fill: run.detail },
            KIND_DELTA => self.delta(slot)?,
            KIND_BLOCKS => Content::Blocks {
                slot,
                blocks: self.blocks(run.detail)?,
            },
            _ => return Err(WireError::Value("kind")),
        };
        Ok(Operation::Page { place, content })
    }

    fn page(&mut self) -> Result<&'a [u8; PAGE_BYTES], WireError> {
        let bytes = self.literals.bytes(PAGE_BYTES, "literals")?;
        bytes
            .try_into()
            .map_err(|_| WireError::Truncated("literals"))
    }

    /// The next page that is kept. They do not overlap, so the literals bound the work.
    fn kept(&mut self) -> Result<&'a [u8; PAGE_BYTES], WireError> {
        let page = usize::try_from(self.operations.varint("skip")?)
            .ok()
            .and_then(|skip| self.kept_to.checked_add(skip))
            .and_then(|at| {
                self.all_literals
                    .get(at..)?
                    .first_chunk()
                    .map(|page| (at, page))
            });
        let (at, page) = page.ok_or(WireError::Value("skip"))?;
        self.kept_to = at + PAGE_BYTES;
        Ok(page)
    }

    fn delta(&mut self, slot: u32) -> Result<Content<'a>, WireError> {
        let base = u32::try_from(self.difference(self.next_base.into(), "base")?)
            .map_err(|_| WireError::Value("base"))?;
        self.next_base = base.wrapping_add(1);
        let len = self.operations.varint("delta_len")?;
        if len > DELTA_BYTES_MAX as u64 {
            return Err(WireError::Value("delta_len"));
        }
        let delta = self.literals.bytes(len as usize, "literals")?;
        Ok(Content::Delta { slot, base, delta })
    }

    fn blocks(&mut self, log2: u8) -> Result<PageBlocks<'a>, WireError> {
        let mut sources = [None; BLOCKS_MAX];
        let mut literal_blocks = 0;
        let mut left = &mut sources[..PAGE_BYTES >> log2];
        while !left.is_empty() {
            let segment = self.operations.u8("segment")?;
            let count = usize::from(segment >> 1);
            let (blocks, rest) = left
                .split_at_mut_checked(count)
                .filter(|_| count > 0)
                .ok_or(WireError::Value("segment"))?;
            left = rest;
            if segment & 1 == 0 {
                literal_blocks += count;
                continue;
            }
            let number = self.difference(self.next_block.number(log2), "block")?;
            for (offset, block) in blocks.iter_mut().enumerate() {
                let reference = number
                    .checked_add(offset as u64)
                    .and_then(|number| block_at(log2, number));
                *block = Some(reference.ok_or(WireError::Value("block"))?);
            }
            self.next_block.advance(log2, number, count);
        }
        let literals = self.literals.bytes(literal_blocks << log2, "literals")?;
        Ok(PageBlocks::of_parts(log2, sources, literals))
    }

    /// Reads a zigzag number and adds it.
    fn difference(&mut self, expected: u64, field: &'static str) -> Result<u64, WireError> {
        let value = self.operations.varint(field)?;
        let difference = (value >> 1) as i64 ^ -((value & 1) as i64);
        expected
            .checked_add_signed(difference)
            .ok_or(WireError::Value(field))
    }

    /// Reads the next operation into `run`, or returns opaque bytes.
    fn read_run(&mut self) -> Result<Option<&'a [u8]>, WireError> {
        let r = &mut self.operations;
        let byte = r.u8("kind")?;
        let kind = byte & KIND_MASK;
        let known_flags = match kind {
            KIND_OPAQUE | KIND_KEEP => 0,
            KIND_ZERO | KIND_ADDRESS => EXPLICIT_ADDRESS,
            _ => EXPLICIT_ADDRESS | BODY_ONLY,
        };
        let flags = byte & !KIND_MASK;
        if kind > KIND_ADDRESS || flags & !known_flags != 0 || flags == EXPLICIT_ADDRESS | BODY_ONLY
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
        let page = if flags & BODY_ONLY != 0 || kind == KIND_KEEP {
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
        if matches!(
            kind,
            KIND_DEFINE | KIND_REFERENCE | KIND_DELTA | KIND_BLOCKS | KIND_KEEP
        ) {
            slot = u32::try_from(self.difference(self.next_slot.into(), "slot")?)
                .map_err(|_| WireError::Value("slot"))?;
            self.next_slot = slot.wrapping_add(count as u32);
        }
        let mut detail = 0;
        if matches!(kind, KIND_ZERO | KIND_UNIFORM) {
            detail = self.operations.u8("fill")?;
        } else if kind == KIND_BLOCKS {
            detail = self.operations.u8("block_size")?;
            if !BLOCK_LOG2.contains(&detail) {
                return Err(WireError::Value("block_size"));
            }
        }
        if let Some(page) = page {
            self.next_page = page
                .checked_add(count)
                .filter(|next| next - 1 <= u64::MAX >> 12)
                .ok_or(WireError::Value("count"))?;
        }
        self.run = Some(Run {
            kind,
            page,
            left: count,
            slot,
            detail,
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
