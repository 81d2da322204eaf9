//! The managed memory: one anonymous mapping seen as pages. Owns the mapping and nothing else.

use std::io;
use std::ptr::NonNull;

use crate::page::{PAGE_BYTES, Page};

/// An anonymous private mapping of whole pages, zero at first.
pub struct Memory {
    base: NonNull<Page>,
    pages: usize,
}

impl Memory {
    pub fn map(pages: usize) -> io::Result<Memory> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing
        // that exists; the result is checked.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                pages * PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(address.cast())
            .map(|base| Memory { base, pages })
            .ok_or_else(|| io::Error::other("the kernel mapped address zero"))
    }

    pub fn len(&self) -> usize {
        self.pages
    }

    pub fn pages(&self) -> &[Page] {
        // SAFETY: the mapping holds `pages` whole pages for as long as `self` lives, every bit
        // pattern is a valid `Page`, and `&self` keeps writers away.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.pages) }
    }

    pub fn pages_mut(&mut self) -> &mut [Page] {
        // SAFETY: as for `pages`, and `&mut self` keeps everyone else away.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.pages) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `base` and the length are those of the mapping made in `map`, and no reference
        // into it outlives `self`. A failure leaves it mapped, which harms nobody.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.pages * PAGE_BYTES) };
    }
}
