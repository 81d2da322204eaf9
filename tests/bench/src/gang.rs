//! The gangs: which guests, made how.

use anyhow::Result;
use clap::ValueEnum;
use vmgang_e2e::{boot_all, verify_all, vmgang};
use vmgang_lab::{GuestSpec, Host};

/// The demo gang's guests, by name.
pub const GUESTS: [&str; 4] = ["idle", "reader", "steady", "busy"];
/// The gang's name.
pub const GANG: &str = "web";

/// Shares of memory, after what four 1 GiB Debian guests (idle, redis, nginx, sqlite) were
/// seen to hold: two thirds zero pages, of the rest a quarter to a third distinct, and most of
/// that compressible to about a third.
const FILL: &str =
    "zero:63,uniform:2,sametext:28,same:2,similar:1,repeat:1,unique:1,compressible:2";

/// A choice of guests that run together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mix {
    /// The demo gang: our own init, which fills memory by a recipe and changes it.
    Demo,
}

impl Mix {
    /// The guests, in the order in which they become members of a gang.
    pub fn guests(self, memory_mib: u64) -> Vec<GuestSpec> {
        match self {
            Mix::Demo => {
                let spec = |name| {
                    GuestSpec::new(name)
                        .with_memory_mib(memory_mib)
                        .with_fill(FILL)
                        .with_verify_rate(8000)
                };
                vec![
                    spec("idle").with_idle(),
                    spec("reader"),
                    spec("steady").with_dirty_rate(50),
                    spec("busy").with_dirty_rate(1000),
                ]
            }
        }
    }
}

/// Boots the demo gang on a host, waits until every guest has filled and checked its memory, and
/// puts them into one gang.
pub fn boot(host: &Host, memory_mib: u64) -> Result<()> {
    boot_all(host, &Mix::Demo.guests(memory_mib))?;
    verify_all(host, &GUESTS)?;
    vmgang(host, &[&["gang", "add", GANG], &GUESTS[..]].concat())?.expect(0)?;
    Ok(())
}
