//! What a destination must make of a session's operations, written down a second time.
//!
//! Owns: the window's contents and the stream bytes of the frame at hand, both kept the
//! plainest way.

use std::collections::HashMap;

use arbitrary::Arbitrary;
use vmgang_dedup::{PAGE_BYTES, Page, delta};
use vmgang_wire::payload::{BLOCKS_MAX, BlockReference, Content, Encoder, PageBlocks, Place};

#[derive(Debug, Arbitrary)]
pub enum Step {
    Opaque(Vec<u8>),
    /// Opaque bytes of which a page is kept.
    Kept {
        before: u8,
        seed: u8,
        slot: u8,
    },
    Zeros {
        page: u16,
        fill: u8,
        count: u8,
    },
    /// Pages in sequence, with slots in sequence.
    Pages {
        page: Option<u16>,
        slot: u8,
        content: PageContent,
        count: u8,
    },
}

#[derive(Debug, Arbitrary)]
pub enum PageContent {
    Literal(u8),
    Define(u8),
    Reference,
    Uniform(u8),
    /// A delta that the encoder makes of these changes.
    Edited {
        base: u8,
        edits: Vec<(u16, u8)>,
    },
    /// Any bytes for a delta.
    Delta {
        base: u8,
        delta: Vec<u8>,
    },
    /// By size: slot and number of a source block, or none.
    Blocks {
        size: u8,
        sources: [Option<(u8, u8)>; BLOCKS_MAX],
        seed: u8,
    },
}

/// The peer has broken the rules.
#[derive(Debug)]
pub struct Broken;

pub struct Model {
    window: HashMap<u32, Page>,
    slots: u32,
}

fn page_of(seed: u8) -> Page {
    let mut state = u64::from(seed) + 1;
    let mut page = [0; PAGE_BYTES];
    // Half of it compressible.
    for word in page.as_chunks_mut::<8>().0.iter_mut().step_by(2) {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        *word = state.to_le_bytes();
    }
    page
}

impl Model {
    pub fn new(slots: u32) -> Self {
        Self {
            window: HashMap::new(),
            slots,
        }
    }

    fn get(&self, slot: u32) -> Result<&Page, Broken> {
        self.window.get(&slot).ok_or(Broken)
    }

    fn define(&mut self, slot: u32, page: &Page) -> Result<(), Broken> {
        if slot >= self.slots {
            return Err(Broken);
        }
        self.window.insert(slot, *page);
        Ok(())
    }

    /// Writes a step into a payload, whether it is right or not, and its stream bytes behind
    /// `stream` as far as it is.
    pub fn step(
        &mut self,
        step: &Step,
        payload: &mut Encoder,
        stream: &mut Vec<u8>,
    ) -> Result<(), Broken> {
        match step {
            Step::Opaque(bytes) => {
                payload.opaque(bytes);
                stream.extend_from_slice(bytes);
                Ok(())
            }
            Step::Kept { before, seed, slot } => {
                let page = page_of(*seed);
                let mut bytes = vec![0xaa; usize::from(*before)];
                bytes.extend_from_slice(&page);
                let at = payload.literal_bytes() + usize::from(*before);
                payload.opaque(&bytes);
                payload.keep(at, (*slot).into());
                stream.extend_from_slice(&bytes);
                self.define((*slot).into(), &page)
            }
            Step::Zeros { page, fill, count } => {
                let address = u64::from(*page) << 12;
                payload.zeros(address, *fill, usize::from(*count));
                for number in 0..u64::from(*count) {
                    stream.extend_from_slice(&((address + (number << 12)) | 0x22).to_be_bytes());
                    stream.push(*fill);
                }
                Ok(())
            }
            Step::Pages {
                page,
                slot,
                content,
                count,
            } => {
                let mut result = Ok(());
                for number in 0..1 + u64::from(count % 8) {
                    let place = match page {
                        Some(page) => {
                            let address = (u64::from(*page) + number) << 12;
                            stream.extend_from_slice(&(address | 0x28).to_be_bytes());
                            Place::Record { address }
                        }
                        None => Place::Body,
                    };
                    let slot = u32::from(*slot) + number as u32;
                    match self.page(place, slot, content, payload) {
                        Ok(page) => stream.extend_from_slice(&page),
                        Err(Broken) => {
                            stream.extend_from_slice(&[0; PAGE_BYTES]);
                            result = Err(Broken);
                        }
                    }
                }
                result
            }
        }
    }

    fn page(
        &mut self,
        place: Place,
        slot: u32,
        content: &PageContent,
        payload: &mut Encoder,
    ) -> Result<Page, Broken> {
        match content {
            PageContent::Literal(seed) => {
                let page = page_of(*seed);
                payload.page(place, Content::Literal(&page));
                Ok(page)
            }
            PageContent::Uniform(fill) => {
                payload.page(place, Content::Uniform { fill: *fill });
                Ok([*fill; PAGE_BYTES])
            }
            PageContent::Reference => {
                payload.page(place, Content::Reference { slot, group: 0 });
                self.get(slot).copied()
            }
            PageContent::Define(seed) => {
                let page = page_of(*seed);
                payload.page(place, Content::Define { slot, page: &page });
                self.define(slot, &page)?;
                Ok(page)
            }
            PageContent::Edited { base, edits } => {
                let before = self.get((*base).into()).copied().unwrap_or([0; PAGE_BYTES]);
                let mut after = before;
                for (at, byte) in edits {
                    after[usize::from(*at) % PAGE_BYTES] = *byte;
                }
                let mut delta = Vec::new();
                delta::encode(&after, &before, PAGE_BYTES / 2, &mut delta);
                self.delta(place, slot, (*base).into(), &delta, payload)
            }
            PageContent::Delta { base, delta } => {
                let delta = &delta[..delta.len().min(PAGE_BYTES - 1)];
                self.delta(place, slot, (*base).into(), delta, payload)
            }
            PageContent::Blocks {
                size,
                sources,
                seed,
            } => self.blocks(place, slot, 512 << (size % 3), sources, *seed, payload),
        }
    }

    fn delta(
        &mut self,
        place: Place,
        slot: u32,
        base: u32,
        delta: &[u8],
        payload: &mut Encoder,
    ) -> Result<Page, Broken> {
        payload.page(place, Content::Delta { slot, base, delta });
        let mut page = [0; PAGE_BYTES];
        // What a delta is has a target of its own.
        delta::apply(self.get(base)?, delta, &mut page).map_err(|_| Broken)?;
        self.define(slot, &page)?;
        Ok(page)
    }

    fn blocks(
        &mut self,
        place: Place,
        slot: u32,
        size: usize,
        sources: &[Option<(u8, u8)>; BLOCKS_MAX],
        seed: u8,
        payload: &mut Encoder,
    ) -> Result<Page, Broken> {
        let mut page = page_of(seed);
        let mut result = Ok(());
        let mut references = [None; BLOCKS_MAX];
        for (number, block) in page.chunks_exact_mut(size).enumerate() {
            let Some((slot, index)) = sources[number] else {
                continue;
            };
            let index = usize::from(index) % (PAGE_BYTES / size);
            references[number] = Some(BlockReference {
                slot: slot.into(),
                index: index as u8,
            });
            match self.get(slot.into()) {
                Ok(source) => block.copy_from_slice(&source[index * size..][..size]),
                Err(Broken) => result = Err(Broken),
            }
        }
        let blocks = PageBlocks::of_page(size, references, &page).expect("a size and indexes");
        payload.page(place, Content::Blocks { slot, blocks });
        result?;
        self.define(slot, &page)?;
        Ok(page)
    }
}
