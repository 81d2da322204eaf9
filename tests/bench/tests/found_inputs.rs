//! Inputs that fuzzing has kept, run again without a fuzzer: so the decoder's target is built and
//! its model is compared with every change.

use std::path::Path;

use arbitrary::{Arbitrary, Unstructured};

#[path = "../../fuzz/src/model.rs"]
mod model;
#[path = "../../fuzz/src/session.rs"]
mod session;

use session::Session;

#[test]
fn sessions_that_were_kept_go_as_the_model_says() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus/decoder");
    let mut sessions = 0;
    for input in std::fs::read_dir(corpus).expect("the corpus is there") {
        let bytes = std::fs::read(input.expect("an entry").path()).expect("a file");
        if let Ok(session) = Session::arbitrary_take_rest(Unstructured::new(&bytes)) {
            session.run();
            sessions += 1;
        }
    }
    assert!(sessions >= 9, "{sessions}");
}

/// Sessions out of thin air: most end in an error, some are right to their end.
#[test]
fn random_sessions_go_as_the_model_says() {
    let mut state = 1u64;
    for _ in 0..300 {
        let bytes: Vec<u8> = (0..600)
            .map(|_| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        if let Ok(session) = Session::arbitrary_take_rest(Unstructured::new(&bytes)) {
            session.run();
        }
    }
}
