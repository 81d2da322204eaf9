//! vmgangd as a library, so that tests can serve its D-Bus surface without a daemon.
//!
//! Owns: requests from the bus, gangs, jobs, the gang's barrier, and whom to admit as a peer.
//! Must not: touch the bytes of a migration (the engine's), or libvirt other than through
//! `vmgang-libvirt`, or guests' memory other than through `vmgang-snapshot`.
//!
//! Path of a request: `bus` -> `request` -> `coordinator` -> `preflight` -> `driver` ->
//! `conduct` (with `barrier` deciding) -> `report` -> `history`.

mod aborts;
pub mod access;
pub mod ambient;
pub mod announcements;
pub mod balloon;
pub mod barrier;
pub mod bring_back;
pub mod budget;
pub mod bus;
pub mod certificates;
mod clock;
mod conduct;
pub mod config;
pub mod convergence;
pub mod coordinator;
pub mod daemon;
mod departures;
pub mod destination;
pub mod doctor;
mod doubt;
pub mod driver;
pub mod error;
mod estimate;
mod examination;
pub mod gangs;
pub mod guests;
pub mod history;
pub mod hypervisor;
pub mod job;
pub mod jobs;
pub mod journal;
pub mod libvirt_access;
pub mod memory;
pub mod metrics;
mod outcome;
pub mod peers;
pub mod policy;
mod preflight;
pub mod recall;
pub mod report;
pub mod request;
pub mod scans;
pub mod stages;
mod switchover;
mod timeline;
pub mod tunnel;
mod watchdog;
