//! Any return path in any chunks: never more passes than there is, the order stays, and after
//! a release everything passes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmgang_stream::ReturnPath;

fuzz_target!(|input: (u8, &[u8])| {
    let (chunk, bytes) = input;
    let chunk = usize::from(chunk) + 1;
    let mut held = ReturnPath::new(true);
    let mut passed = 0;
    let mut read = 0;
    while read < bytes.len() {
        read = (read + chunk).min(bytes.len());
        let passable = held.passable(&bytes[passed..read]);
        assert!(passable <= read - passed);
        passed += passable;
    }
    // What was read at once passes as far as what was read in pieces.
    let mut whole = ReturnPath::new(true);
    assert_eq!(whole.passable(bytes), passed);
    assert_eq!(whole.ack_withheld(), held.ack_withheld());
    held.release();
    assert_eq!(held.passable(&bytes[passed..]), bytes.len() - passed);
});
