//! Tokens back to stream bytes: the exact inverse of the tokenizer.
//!
//! Must not: decide anything; it appends what it is told to a caller's buffer.

use crate::{PAGE_BYTES, Page, Token, record};

/// Stream bytes of one zero record with CONTINUE: be64 header and the fill byte.
pub const ZERO_RECORD_BYTES: usize = 9;
/// Stream bytes of one page record with CONTINUE: be64 header and the page.
pub const PAGE_RECORD_BYTES: usize = 8 + PAGE_BYTES;

/// Stream bytes of one address in the list of a multifd packet.
pub const ADDRESS_BYTES: usize = 8;

/// Appends an address as a multifd packet lists it.
pub fn address(out: &mut Vec<u8>, address: u64) {
    out.extend_from_slice(&address.to_be_bytes());
}

/// Appends a zero record. `address` is a page-aligned offset in the RAM block.
pub fn zero_record(out: &mut Vec<u8>, address: u64, fill: u8) {
    out.extend_from_slice(&zero_word(address).to_be_bytes());
    out.push(fill);
}

/// The first eight bytes of a zero record, as a number.
pub(crate) fn zero_word(address: u64) -> u64 {
    address | record::ZERO_CONTINUE
}

/// Appends the header of a page record; the page follows it.
pub fn page_header(out: &mut Vec<u8>, address: u64) {
    out.extend_from_slice(&(address | record::PAGE_CONTINUE).to_be_bytes());
}

/// Appends a page record: header and page.
pub fn page_record(out: &mut Vec<u8>, address: u64, body: &Page) {
    page_header(out, address);
    out.extend_from_slice(body);
}

/// Appends the bytes of any token.
pub fn token(out: &mut Vec<u8>, token: &Token<'_>) {
    match *token {
        Token::Opaque(bytes) => out.extend_from_slice(bytes),
        Token::Zeros {
            address,
            fill,
            count,
        } => {
            for number in 0..count {
                zero_record(out, address + (number * PAGE_BYTES) as u64, fill);
            }
        }
        Token::Addresses {
            address: first,
            count,
        } => {
            for number in 0..count {
                address(out, first + (number * PAGE_BYTES) as u64);
            }
        }
        Token::Page { address, body } => page_record(out, address, body),
        Token::Body(body) => out.extend_from_slice(body),
    }
}
