//! How far a migration is, as read from its stream: pass boundaries and the switchover.
//!
//! Must not: influence tokenising. It only watches records go by; bad input can make it
//! wrong about a pass, never about a byte.

use crate::PAGE_BYTES;

/// At most this many RAM blocks are remembered for their order; a stream with more only
/// loses the exact end of its first pass.
const BLOCKS_MAX: usize = 1024;

/// How far post-copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum PostCopy {
    #[default]
    No,
    /// The guest's devices are on their way.
    Package,
    /// The guest runs at the destination, and its pages follow.
    Pages,
}

/// What the stream has told about the migration so far.
#[derive(Debug, Default)]
pub struct Progress {
    begun: bool,
    blocks: Vec<Box<[u8]>>,
    current: Option<usize>,
    last_address: Option<u64>,
    records_in_section: u64,
    zero_records: u64,
    page_records: u64,
    first_pass_done: bool,
    guest_stopped: bool,
    ram_ended: bool,
    tail_is_empty_part: bool,
    total_bytes: u64,
    /// Pages go over other connections.
    multifd: bool,
    post_copy: PostCopy,
    passes: u64,
    last_pass_pages: u64,
    /// Page and zero records up to the end of the last pass.
    pages_before_pass: u64,
}

impl Progress {
    /// This is a migration stream: its file header was read. (Other connections of QEMU,
    /// multifd channels for one, have none.)
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// Every page has been sent at least once.
    pub fn first_pass_done(&self) -> bool {
        self.first_pass_done
    }

    /// Passes over the dirty pages that have ended, the first one included. A pass whose pages all
    /// lie behind those of the one before counts as the same one.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// Pages go over other connections: this one tells only where passes end.
    pub fn multifd(&self) -> bool {
        self.multifd
    }

    /// Pages sent on this connection in the last pass that has ended; 0 if the guest had written to none.
    pub fn last_pass_pages(&self) -> u64 {
        self.last_pass_pages
    }

    /// The source guest does not run any more: everything that follows is downtime.
    pub fn guest_stopped(&self) -> bool {
        self.guest_stopped
    }

    /// The guest runs at the destination by now, and its memory follows.
    pub fn post_copy(&self) -> bool {
        self.post_copy == PostCopy::Pages
    }

    /// The RAM section has ended; device state follows.
    pub fn ram_ended(&self) -> bool {
        self.ram_ended
    }

    /// The last RAM PART section had no page, and nothing but such a section has begun since:
    /// the guest is idle and QEMU, held back from switching over, spins through empty passes.
    pub fn tail_is_empty_part(&self) -> bool {
        self.tail_is_empty_part
    }

    /// Guest memory as announced at the start, in bytes; 0 until then.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Zero records seen.
    pub fn zero_records(&self) -> u64 {
        self.zero_records
    }

    /// Page records seen.
    pub fn page_records(&self) -> u64 {
        self.page_records
    }

    pub(crate) fn begins(&mut self) {
        self.begun = true;
    }

    pub(crate) fn declare_total(&mut self, bytes: u64) {
        self.total_bytes = bytes;
    }

    pub(crate) fn declare_block(&mut self, name: &[u8]) {
        if self.blocks.len() < BLOCKS_MAX {
            self.blocks.push(name.into());
        }
    }

    pub(crate) fn package_begins(&mut self) {
        self.post_copy = PostCopy::Package;
    }

    pub(crate) fn section_begins(&mut self) {
        if self.post_copy == PostCopy::Package {
            self.post_copy = PostCopy::Pages;
        }
        self.records_in_section = 0;
    }

    pub(crate) fn section_ends(&mut self, is_part: bool) {
        if is_part && self.records_in_section == 0 {
            // QEMU sends at least one page per section while a pass has pages left, unless these
            // go over other connections.
            if !self.multifd && !self.tail_is_empty_part && self.pages() > 0 {
                if self.pages() > self.pages_before_pass {
                    self.pass_ends(0);
                }
                self.pass_ends(0);
            }
            self.tail_is_empty_part = true;
        }
    }

    /// QEMU has sent all it had to, over all connections: at set-up, and then after each pass.
    pub(crate) fn multifd_flush(&mut self, is_part: bool) {
        self.multifd = true;
        if is_part {
            self.pass_ends(0);
        }
    }

    /// A packet lists so many pages.
    pub(crate) fn packet(&mut self, normal: u32, zero: u32) {
        self.page_records += u64::from(normal);
        self.zero_records += u64::from(zero);
    }

    fn pages(&self) -> u64 {
        self.zero_records + self.page_records
    }

    /// The last `next` of the pages so far belong to the next pass.
    fn pass_ends(&mut self, next: u64) {
        let pages = self.pages().saturating_sub(next);
        self.first_pass_done = true;
        self.passes += 1;
        self.last_pass_pages = pages.saturating_sub(self.pages_before_pass);
        self.pages_before_pass = pages;
    }

    pub(crate) fn ram_end_begins(&mut self) {
        self.first_pass_done = true;
        self.guest_stopped = true;
    }

    pub(crate) fn ram_end_done(&mut self) {
        self.ram_ended = true;
    }

    pub(crate) fn switchover_starts(&mut self) {
        self.first_pass_done = true;
        self.guest_stopped = true;
        self.tail_is_empty_part = false;
    }

    pub(crate) fn other_unit(&mut self) {
        self.tail_is_empty_part = false;
    }

    pub(crate) fn zero(&mut self, address: u64) {
        self.zero_records += 1;
        self.record(address);
    }

    pub(crate) fn page(&mut self, address: u64) {
        self.page_records += 1;
        self.record(address);
    }

    /// A record that names its block.
    pub(crate) fn block(&mut self, name: &[u8]) {
        let next = self.blocks.iter().position(|known| **known == *name);
        if next != self.current {
            // QEMU walks the blocks in the order it announced them: going back is a new pass.
            if let (Some(next), Some(current)) = (next, self.current)
                && next < current
            {
                self.pass_ends(0);
            }
            self.current = next;
            self.last_address = None;
        }
    }

    /// `count` more zero records behind that of `address`, one page after the other.
    pub(crate) fn more_zeros(&mut self, address: u64, count: usize) {
        self.zero_records += count as u64;
        self.records_in_section += count as u64;
        self.last_address = Some(address + (count * PAGE_BYTES) as u64);
    }

    fn record(&mut self, address: u64) {
        self.records_in_section += 1;
        self.tail_is_empty_part = false;
        if self.last_address.is_some_and(|last| address <= last) {
            self.pass_ends(1);
        }
        self.last_address = Some(address);
    }
}
