//! The fault matrix: real processes broken in every phase of a job, and what became of the guests.
//!
//! Must not: know how vmgang works inside. A cell looks at what users see: commands, libvirt, and
//! the guests' own word about their memory.

mod cell;
mod fault;
mod phase;
mod table;

pub use cell::{Cell, Gang, Site};
pub use fault::Fault;
pub use phase::Phase;
pub use table::markdown;
