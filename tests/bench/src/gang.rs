//! The demo gang: four guests of one distribution with different jobs.

use anyhow::Result;
use vmgang_e2e::{PATIENCE, boot_all, vmgang};
use vmgang_lab::{GuestSpec, Host};

/// The guests, by name.
pub const GUESTS: [&str; 4] = ["idle", "reader", "steady", "busy"];
/// The gang's name.
pub const GANG: &str = "web";

/// Shares of memory, after what four 1 GiB Debian guests (idle, redis, nginx, sqlite) were
/// seen to hold: two thirds zero pages, and of the rest about a quarter distinct.
const FILL: &str = "zero:60,uniform:2,same:26,similar:2,repeat:2,unique:3,compressible:5";

/// Boots the gang on a host, waits until every guest has filled and checked its memory, and
/// puts them into one gang.
pub fn boot(host: &Host, memory_mib: u64) -> Result<()> {
    let spec = |name| {
        GuestSpec::new(name)
            .with_memory_mib(memory_mib)
            .with_fill(FILL)
    };
    boot_all(
        host,
        &[
            spec("idle").with_idle(),
            spec("reader"),
            spec("steady").with_dirty_rate(50),
            spec("busy").with_dirty_rate(1000),
        ],
    )?;
    for name in GUESTS {
        host.guest(name).verify(PATIENCE)?;
    }
    vmgang(host, &[&["gang", "add", GANG], &GUESTS[..]].concat())?.expect(0)?;
    Ok(())
}
