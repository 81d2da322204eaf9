//! Simulation of a whole migration from one seed: both daemons with the real coordinator, barrier
//! and engine, over a network, QEMUs and libvirts that are played here, in virtual time and on one
//! thread. What it plays and what not is in `docs/simulation.md`.

mod daemon;
mod invariants;
mod libvirt;
mod network;
mod pipe;
mod plan;
mod qemu;
mod random;
mod run;
mod world;

pub use plan::Plan;
pub use run::{Ending, Outcome, run};
