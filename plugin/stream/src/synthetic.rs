//! Well-formed migration streams for tests: what QEMU 10.0 writes for a small guest.
//!
//! Must not: be used outside tests (feature `synthetic`).

use crate::record;
use crate::{PAGE_BYTES, Page, rebuild};

/// Builds a stream section by section.
#[derive(Debug, Default)]
pub struct StreamBuilder {
    bytes: Vec<u8>,
    in_block: bool,
}

const RAM_SECTION: u32 = 2;
const BLOCK: &[u8] = b"pc.ram";

impl StreamBuilder {
    /// File header, configuration, the first commands, and the list of RAM blocks.
    pub fn new(ram_bytes: u64) -> Self {
        let mut builder = Self::default();
        let out = &mut builder.bytes;
        out.extend_from_slice(&record::FILE_HEADER);
        out.push(record::TAG_CONFIGURATION);
        out.extend_from_slice(&13u32.to_be_bytes());
        out.extend_from_slice(b"pc-q35-10.0.2");
        builder.command(1, &[]);
        builder.command(2, &1u32.to_be_bytes());
        let out = &mut builder.bytes;
        out.push(record::TAG_SECTION_START);
        out.extend_from_slice(&RAM_SECTION.to_be_bytes());
        out.extend_from_slice(b"\x03ram");
        out.extend_from_slice(&0u32.to_be_bytes());
        out.extend_from_slice(&4u32.to_be_bytes());
        out.extend_from_slice(&((ram_bytes + 0x20000) | record::FLAG_MEM_SIZE).to_be_bytes());
        for (name, len) in [(BLOCK, ram_bytes), (b"pc.bios", 0x20000)] {
            out.push(name.len() as u8);
            out.extend_from_slice(name);
            out.extend_from_slice(&len.to_be_bytes());
        }
        builder.end_ram_section();
        builder
    }

    pub fn command(&mut self, command: u16, data: &[u8]) -> &mut Self {
        self.bytes.push(record::TAG_COMMAND);
        self.bytes.extend_from_slice(&command.to_be_bytes());
        self.bytes
            .extend_from_slice(&(data.len() as u16).to_be_bytes());
        self.bytes.extend_from_slice(data);
        self
    }

    pub fn begin_part(&mut self) -> &mut Self {
        self.begin(record::TAG_SECTION_PART)
    }

    pub fn begin_end(&mut self) -> &mut Self {
        self.begin(record::TAG_SECTION_END)
    }

    fn begin(&mut self, tag: u8) -> &mut Self {
        self.bytes.push(tag);
        self.bytes.extend_from_slice(&RAM_SECTION.to_be_bytes());
        self.in_block = false;
        self
    }

    pub fn page(&mut self, address: u64, body: &Page) -> &mut Self {
        if self.in_block {
            rebuild::page_record(&mut self.bytes, address, body);
        } else {
            self.named(address | record::FLAG_PAGE);
            self.bytes.extend_from_slice(body);
        }
        self
    }

    pub fn zero(&mut self, address: u64) -> &mut Self {
        if self.in_block {
            rebuild::zero_record(&mut self.bytes, address, 0);
        } else {
            self.named(address | record::FLAG_ZERO);
            self.bytes.push(0);
        }
        self
    }

    fn named(&mut self, word: u64) {
        self.bytes.extend_from_slice(&word.to_be_bytes());
        self.bytes.push(BLOCK.len() as u8);
        self.bytes.extend_from_slice(BLOCK);
        self.in_block = true;
    }

    pub fn end_ram_section(&mut self) -> &mut Self {
        self.bytes
            .extend_from_slice(&record::FLAG_EOS.to_be_bytes());
        self.bytes.push(record::TAG_FOOTER);
        self.bytes.extend_from_slice(&RAM_SECTION.to_be_bytes());
        self
    }

    pub fn switchover_start(&mut self) -> &mut Self {
        self.command(record::COMMAND_SWITCHOVER_START, &[])
    }

    /// Any bytes: device state, or something QEMU never wrote.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A whole migration: every page of `first_pass` once (`None` = zero page), then
    /// `dirty` again, then the final section and some device state.
    pub fn migration(first_pass: &[Option<Page>], dirty: &[(usize, Page)]) -> Vec<u8> {
        let ram_bytes = (first_pass.len() * PAGE_BYTES) as u64;
        let mut builder = Self::new(ram_bytes.max(PAGE_BYTES as u64));
        for (part, pages) in first_pass.chunks(100).enumerate() {
            builder.begin_part();
            for (i, page) in pages.iter().enumerate() {
                let address = ((part * 100 + i) * PAGE_BYTES) as u64;
                match page {
                    Some(page) => builder.page(address, page),
                    None => builder.zero(address),
                };
            }
            builder.end_ram_section();
        }
        builder.begin_part().end_ram_section().switchover_start();
        builder.begin_end();
        for (index, page) in dirty {
            builder.page((index * PAGE_BYTES) as u64, page);
        }
        builder.end_ram_section();
        builder.raw(&[record::TAG_SECTION_FULL]);
        builder.raw(&[0x55; 5000]);
        builder.bytes
    }
}
