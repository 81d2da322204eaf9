//! The gangs: which guests, made how.

use anyhow::Result;
use clap::ValueEnum;
use vmgang_e2e::{boot_all, verify_all, vmgang};
use vmgang_lab::{GuestSpec, Host, Role};

/// The gang's name.
pub const GANG: &str = "web";

/// Shares of memory, after what four 1 GiB Debian guests (idle, redis, nginx, sqlite) were
/// seen to hold: two thirds zero pages, of the rest a quarter to a third distinct, and most of
/// that compressible to about a third.
const FILL: &str =
    "zero:63,uniform:2,sametext:28,same:2,similar:1,repeat:1,unique:1,compressible:2";

/// What the other servers of the Debian mix hold, in MiB. With these and [`RedisData`]'s default
/// the gang's streams have about 90 thousand distinct pages in 320 thousand that are not zero: as
/// many as those of the gang on which the goals for this mix were set.
const NGINX_DATA_MIB: u64 = 24;
const SQLITE_DATA_MIB: u64 = 16;

/// What the redis of the Debian mix holds: the setting that decides most about how much of such a
/// gang can be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedisData {
    pub values: RedisValues,
    pub mib: u64,
}

impl Default for RedisData {
    fn default() -> Self {
        Self {
            values: RedisValues::Benchmark,
            mib: 32,
        }
    }
}

/// Values of the redis of the Debian mix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RedisValues {
    /// What `redis-benchmark -d 1024` sets: 1024 printable bytes, as good as random and the same
    /// under every key, but for the number and the generation that each begins with here.
    Benchmark,
    /// Of 2 to 32 KiB and all different: text that compresses well, tokens that compress to half,
    /// and random bytes. About half of it cannot be saved by anyone.
    Mixed,
}

/// A choice of guests that run together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mix {
    /// The demo gang: our own init, which fills memory by a recipe and changes it.
    Demo,
    /// Four Debian userlands under load: idle, redis, nginx, sqlite.
    Debian,
}

impl Mix {
    /// Memory of each guest unless told otherwise.
    pub fn default_memory_mib(self) -> u64 {
        match self {
            Mix::Demo => 512,
            Mix::Debian => 1024,
        }
    }

    /// The guests' names.
    pub fn names(self) -> [&'static str; 4] {
        match self {
            Mix::Demo => ["idle", "reader", "steady", "busy"],
            Mix::Debian => Role::ALL.map(Role::name),
        }
    }

    /// The guests, in the order in which they become members of a gang.
    pub fn guests(self, memory_mib: u64, redis: RedisData) -> Vec<GuestSpec> {
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
            Mix::Debian => Role::ALL
                .into_iter()
                .map(|role| {
                    let spec = GuestSpec::debian(role.name(), role).with_memory_mib(memory_mib);
                    match (role, redis.values) {
                        (Role::Redis, RedisValues::Benchmark) => {
                            spec.with_data_mib(redis.mib).with_benchmark_values()
                        }
                        (Role::Redis, RedisValues::Mixed) => spec.with_data_mib(redis.mib),
                        (Role::Nginx, _) => spec.with_data_mib(NGINX_DATA_MIB),
                        (Role::Sqlite, _) => spec.with_data_mib(SQLITE_DATA_MIB),
                        (Role::Idle, _) => spec,
                    }
                })
                .collect(),
        }
    }
}

/// Boots a mix on a host, waits until every guest has filled and checked its memory, or what its
/// server holds, and puts them into one gang.
pub fn boot(host: &Host, mix: Mix, memory_mib: u64) -> Result<()> {
    boot_all(host, &mix.guests(memory_mib, RedisData::default()))?;
    let names = mix.names();
    verify_all(host, &names)?;
    vmgang(host, &[&["gang", "add", GANG], &names[..]].concat())?.expect(0)?;
    Ok(())
}
