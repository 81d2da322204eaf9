//! Moving one gang in different ways, measured the same way, in one run.
//!
//! Owns: the gang, the contenders, and what is read before and after each move.
//! Must not: prefer anyone: all contenders move the same guests over the same link, and
//! every figure comes from outside of them (interface counters, libvirt, the wall clock).

pub mod contender;
pub mod gang;
pub mod measure;
pub mod table;
