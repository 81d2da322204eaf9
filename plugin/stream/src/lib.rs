//! QEMU's migration stream, understood just well enough to find the pages in it.
//!
//! Owns: cutting a stream into [`Token`]s ([`Tokenizer`]), putting tokens back into bytes
//! ([`rebuild`]), and reading the return path ([`ReturnPath`]).
//! Must not: do I/O, know a clock, hash or compress, or keep page contents.
//!
//! Invariant: tokenising is a bijection. The bytes of all tokens, in order, are the input,
//! whatever the input was; a mis-parse can only cost savings.
//!
//! Formats: QEMU 10.0 `migration/savevm.c`, `migration/ram.c`, `migration/migration.c`.

mod multifd;
mod progress;
pub mod rebuild;
mod record;
mod return_path;
#[cfg(feature = "synthetic")]
pub mod synthetic;
mod tokenizer;
mod zero_run;

pub use progress::Progress;
pub use return_path::ReturnPath;
pub use tokenizer::{ConnectionKind, Tokenizer};

/// Bytes of a target page. x86, s390x, ppc64 and KVM arm guests all migrate in 4 KiB pages,
/// also when the host backs them with huge pages.
pub const PAGE_BYTES: usize = 4096;

/// The content of one page.
pub type Page = [u8; PAGE_BYTES];

/// One piece of a migration stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token<'a> {
    /// Bytes passed on as they are.
    Opaque(&'a [u8]),
    /// `count` zero records, at least one, in the same RAM block as the record before them,
    /// each one page further than the one before it, none beyond the end of addresses:
    /// be64 (address | ZERO | CONTINUE), then the fill byte. 9 bytes each.
    Zeros {
        address: u64,
        fill: u8,
        count: usize,
    },
    /// `count` page addresses as a multifd packet lists them, at least one, each one page further than
    /// the one before it, none beyond the end of addresses: be64 each. 8 bytes each.
    Addresses { address: u64, count: usize },
    /// A page record in the same RAM block as the record before it:
    /// be64 (address | PAGE | CONTINUE), then the page. 4104 bytes.
    Page { address: u64, body: &'a Page },
    /// A page whose record header was passed on in the opaque bytes before it. 4096 bytes.
    Body(&'a Page),
}

impl Token<'_> {
    /// How many stream bytes this token stands for.
    pub fn stream_len(&self) -> usize {
        match self {
            Token::Opaque(bytes) => bytes.len(),
            Token::Zeros { count, .. } => count * rebuild::ZERO_RECORD_BYTES,
            Token::Addresses { count, .. } => count * rebuild::ADDRESS_BYTES,
            Token::Page { .. } => rebuild::PAGE_RECORD_BYTES,
            Token::Body(_) => PAGE_BYTES,
        }
    }
}
