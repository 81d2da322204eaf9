//! Driving streams through both halves of the engine without guests.
//!
//! For each run the source half and the destination half are processes of their own
//! ([`half`]), so that processor time and peak memory of each are its own, whatever threads it
//! makes. This process plays the QEMUs of all members at both ends ([`qemu`]) and, when asked to,
//! the link between the halves ([`link`]). What arrives is compared with what was sent, byte for
//! byte.
//! Must not: reach into the engine; it uses what vmgangd uses.

pub mod half;
mod link;
mod qemu;
mod relay;
pub mod report;
mod run;

pub use run::{Contender, Measurement, Settings, run, this_program};
