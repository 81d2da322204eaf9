//! What vmgang's programs for people are made of: the command `vmgang`, and the front end of virsh.
//! Talks to vmgangd over D-Bus, and prints. Must not talk to libvirt or to peers.

pub mod arguments;
pub mod bring_back;
pub mod control;
pub mod doctor;
pub mod estimate;
pub mod gang;
pub mod heat_map;
pub mod history;
pub mod meter;
pub mod migrate;
pub mod page;
pub mod paint;
pub mod progress;
pub mod proxies;
pub mod report;
pub mod savings;
pub mod snapshot;
pub mod stage;
pub mod status;
pub mod text;
pub mod virsh;

/// Exit codes that scripts rely on. 2, wrong usage, is clap's as well.
pub mod exit {
    pub const MIGRATED: u8 = 0;
    pub const FAILED: u8 = 1;
    pub const USAGE: u8 = 2;
    pub const PARTIAL: u8 = 3;
    pub const ABORTED: u8 = 4;
}
