//! What is called in virsh's place. Without Rust's own start of a program, which changes the signal SIGPIPE
//! and closed standard streams: the real virsh is to find both as they were.
#![no_main]

use std::ffi::{c_char, c_int};

/// What the C library calls.
// SAFETY: no other symbol of this program has the name, and this is the signature the C library calls.
#[unsafe(no_mangle)]
pub extern "C" fn main(_count: c_int, _words: *const *const c_char) -> c_int {
    // On Linux the C library gives Rust's standard library the arguments, too.
    vmgang_cli::virsh::program(std::env::args_os().collect()).into()
}
