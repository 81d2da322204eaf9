//! Measuring vmgang, with real guests and with recorded streams.
//!
//! Owns: the gangs, the contenders that move them and what is read before and after each move
//! (`demo`, `bench` and what is beside them); recording the streams of guests (`record`); and driving recorded or
//! synthetic streams through both halves of the engine without guests (`replay`, and `ablation` for
//! all of them); and computing from that what larger hosts would take (`scaling`).
//! Must not: prefer anyone. Contenders of a run move the same guests, or the same bytes, over
//! the same link, and what decides (bytes, seconds, processor time) is read from outside of them.

pub mod ablation;
mod canvas;
pub mod congestion;
pub mod contender;
pub mod cost;
pub mod floor;
pub mod gang;
pub mod load;
pub mod measure;
pub mod recorder;
pub mod replay;
pub mod scaling;
pub mod streams;
pub mod suite;
pub mod synthetic;
pub mod table;
mod tap;
