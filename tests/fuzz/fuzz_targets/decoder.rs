//! DATA frames of a session from a hostile source: an error, or the stream bytes that the
//! digest is of. Frames with nothing wrong give the bytes that they were made of.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmgang_fuzz::session::Session;

fuzz_target!(|session: Session| session.run());
