//! Any bytes, in chunks of any sizes: the tokens put together are the bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmgang_stream::{Tokenizer, rebuild};

fuzz_target!(|input: (u64, &[u8])| {
    let (mut state, stream) = input;
    let mut tokenizer = Tokenizer::new();
    let mut out = Vec::new();
    let mut covered = 0;
    let mut unread = 0;
    while covered < stream.len() {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        // Short chunks tear units apart, long ones hold many.
        let more = 1 + (state >> 33) as usize % if state >> 62 == 0 { 7 } else { 9000 };
        unread = (unread + more).min(stream.len() - covered);
        let last = covered + unread == stream.len();
        let flush = last || state >> 60 & 3 == 0;
        let buf = &stream[covered..covered + unread];
        let taken = tokenizer.push(buf, flush, |token| rebuild::token(&mut out, &token));
        assert!(taken <= buf.len());
        assert!(!flush || taken == buf.len());
        covered += taken;
        unread -= taken;
        assert_eq!(out.len(), covered);
    }
    assert!(out == stream);
});
