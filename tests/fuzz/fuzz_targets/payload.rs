//! Any bytes as a payload, carried out on a page window as the destination does: an error, or
//! operations that come back from the encoder.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmgang_dedup::{PAGE_BYTES, Page, PageWindow, Slot, delta};
use vmgang_wire::payload::{Block, Content, Encoder, Operation, Operations};

/// The stream bytes after which an input is given up: runs may claim billions of records.
const STREAM_BYTES_MAX: usize = 64 << 10;

/// False where a peer's error would end the session.
fn carry_out(window: &mut PageWindow, content: &Content<'_>) -> bool {
    let mut page: Page = [0; PAGE_BYTES];
    let slot = match *content {
        Content::Literal(_) | Content::Uniform { .. } => return true,
        Content::Reference { slot, .. } => return window.get(Slot(slot)).is_ok(),
        Content::Define {
            slot,
            page: content,
        } => {
            page = *content;
            slot
        }
        Content::Delta { slot, base, delta } => {
            let Ok(base) = window.get(Slot(base)) else {
                return false;
            };
            if delta::apply(base, delta, &mut page).is_err() {
                return false;
            }
            slot
        }
        Content::Blocks { slot, blocks } => {
            let size = blocks.block_bytes();
            for (to, block) in page.chunks_exact_mut(size).zip(blocks.iter()) {
                match block {
                    Block::Literal(bytes) => to.copy_from_slice(bytes),
                    Block::Reference(block) => {
                        let Ok(from) = window.get(Slot(block.slot)) else {
                            return false;
                        };
                        to.copy_from_slice(&from[usize::from(block.index) * size..][..size]);
                    }
                }
            }
            slot
        }
    };
    window.define(Slot(slot), &page).is_ok()
}

fuzz_target!(|payload: &[u8]| {
    let Ok(operations) = Operations::new(payload) else {
        return;
    };
    let mut window = PageWindow::new(64);
    let mut encoder = Encoder::default();
    let mut read = Vec::new();
    let mut stream_len = 0;
    let mut kept = false;
    for operation in operations {
        let Ok(operation) = operation else { return };
        stream_len += operation.stream_len();
        if stream_len > STREAM_BYTES_MAX {
            return;
        }
        match operation {
            Operation::Opaque(bytes) => encoder.opaque(bytes),
            Operation::Zero { address, fill } => encoder.zero(address, fill),
            Operation::Address { address } => encoder.addresses(address, 1),
            // Where it lay is not told; the model of the decoder target has it.
            Operation::Keep { slot, page } => {
                if window.define(Slot(slot), page).is_err() {
                    return;
                }
                kept = true;
                continue;
            }
            Operation::Page { place, content } => {
                if !carry_out(&mut window, &content) {
                    return;
                }
                encoder.page(place, content);
            }
        }
        read.push(operation);
    }
    if kept {
        return;
    }
    let mut again = Vec::new();
    let costs = encoder.finish(&mut again);
    assert_eq!(costs.total().stream, stream_len as u64);
    let operations = Operations::new(&again).expect("written by the encoder");
    let operations: Result<Vec<_>, _> = operations.collect();
    assert!(operations.as_ref() == Ok(&read));
});
