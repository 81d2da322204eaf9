//! Well-formed migration streams for tests: what QEMU 10.0 writes for a small guest.
//!
//! Must not: be used outside tests (feature `synthetic`).

use crate::{PAGE_BYTES, Page, multifd, rebuild, record};

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

    /// All connections have sent what they had.
    pub fn multifd_flush(&mut self) -> &mut Self {
        self.bytes
            .extend_from_slice(&record::FLAG_MULTIFD_FLUSH.to_be_bytes());
        self
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

/// What QEMU writes on a multifd channel.
#[derive(Debug)]
pub struct MultifdBuilder {
    bytes: Vec<u8>,
    packets: u64,
    /// The list of addresses keeps what an earlier packet had in it.
    addresses: [u64; multifd::ADDRESSES as usize],
}

impl MultifdBuilder {
    pub fn new(channel: u8) -> Self {
        let mut bytes = multifd::START.to_vec();
        bytes.extend_from_slice(&[0x77; 16]);
        bytes.push(channel);
        bytes.resize(multifd::START_BYTES, 0);
        Self {
            bytes,
            packets: 0,
            addresses: [0; multifd::ADDRESSES as usize],
        }
    }

    /// A packet of pages as they are, and of the addresses of zero pages; 128 together at most.
    pub fn packet(&mut self, pages: &[(u64, Page)], zeros: &[u64]) -> &mut Self {
        self.header(0, pages, zeros, (pages.len() * PAGE_BYTES) as u32);
        for (_, page) in pages {
            self.bytes.extend_from_slice(page);
        }
        self
    }

    /// A packet whose pages are compressed.
    pub fn compressed(&mut self, pages: &[(u64, Page)], body: &[u8]) -> &mut Self {
        self.header(4, pages, &[], body.len() as u32);
        self.bytes.extend_from_slice(body);
        self
    }

    /// The end of a round.
    pub fn sync(&mut self) -> &mut Self {
        self.header(1, &[], &[], 0);
        self
    }

    /// The same of QEMU before 9.0, which leaves the size of the pages before in it.
    pub fn sync_after(&mut self, bytes: u32) -> &mut Self {
        self.header(1, &[], &[], bytes);
        self
    }

    /// Device state.
    pub fn device(&mut self, body: &[u8]) -> &mut Self {
        let out = &mut self.bytes;
        out.extend_from_slice(&multifd::START);
        out.extend_from_slice(&0x40u32.to_be_bytes());
        out.extend_from_slice(&[0; 260]);
        out.extend_from_slice(&(body.len() as u32).to_be_bytes());
        out.extend_from_slice(body);
        self
    }

    fn header(&mut self, flags: u32, pages: &[(u64, Page)], zeros: &[u64], bytes: u32) {
        let listed = pages.iter().map(|(address, _)| address).chain(zeros);
        for (place, address) in self.addresses.iter_mut().zip(listed) {
            *place = *address;
        }
        let out = &mut self.bytes;
        out.extend_from_slice(&multifd::START);
        let (normal, zero) = (pages.len() as u32, zeros.len() as u32);
        for field in [flags, multifd::ADDRESSES, normal, bytes] {
            out.extend_from_slice(&field.to_be_bytes());
        }
        out.extend_from_slice(&self.packets.to_be_bytes());
        out.extend_from_slice(&zero.to_be_bytes());
        out.extend_from_slice(&[0; 28]);
        let mut name = BLOCK.to_vec();
        name.resize(256, 0);
        out.extend_from_slice(&name);
        for address in self.addresses {
            out.extend_from_slice(&address.to_be_bytes());
        }
        self.packets += 1;
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}
