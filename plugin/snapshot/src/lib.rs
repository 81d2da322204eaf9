//! Shared-memory snapshots: guests' RAM read from outside their QEMU, and scanned for what each
//! page is.
//!
//! Owns: finding a guest's QEMU and its RAM blocks ([`QemuProcess`], [`GuestMemory`]), and scans
//! that keep to a budget ([`Scanner`], [`Pace`]).
//! Must not: write to a guest, stop it, or touch memory it has not touched itself. What is read is
//! a copy of memory that changes meanwhile, so everything found is a hint.
//!
//! Path of a page: RAM block -> copy -> fingerprint -> digest, if the fingerprint is a new one ->
//! `dedup::Snapshot`.

mod holes;
mod layout;
mod memory;
mod pace;
mod process;
mod scan;

pub use memory::{GuestMemory, SnapshotError};
pub use pace::{Budget, Pace, Unpaced, idle_priority};
pub use process::QemuProcess;
pub use scan::{ScanReport, Scanner};
