//! Any bytes as a frame: an error, or a frame that is written back as the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmgang_wire::{Frame, FrameHeader, HEADER_BYTES};

fuzz_target!(|bytes: &[u8]| {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let Ok(header) = FrameHeader::decode(header) else {
        return;
    };
    let body = &bytes[HEADER_BYTES..];
    if let Ok(frame) = Frame::decode(&header, body) {
        let mut again = Vec::new();
        frame.encode(&mut again);
        let Ok(header) = FrameHeader::decode(again.first_chunk().expect("a header")) else {
            panic!("a frame that was read is not one when written: {frame:?}");
        };
        assert_eq!(Frame::decode(&header, &again[HEADER_BYTES..]), Ok(frame));
    }
});
