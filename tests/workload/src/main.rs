//! The init of a Debian guest of the lab: brings the userland up as far as one role needs, puts a
//! steady load on it over loopback, checks what it gives back, and reports on the serial console.
//!
//! Runs as process 1 of a virtual machine. It never ends by itself: the end of process 1 would be
//! a kernel panic and hide what went wrong.

mod content;
mod http;
mod idle;
mod loopback;
mod nginx;
mod orders;
mod redis;
mod resp;
mod server;
mod shell;
mod sqlite;
mod system;
mod worker;
mod workload;

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use orders::{Orders, Role};
use worker::Worker;
use workload::{Result, Workload};

fn main() {
    // Only ever as the first process: by hand it would mount things over a machine's own.
    if std::process::id() != 1 {
        eprintln!("vmgang-workload is the init of a lab guest; it does nothing anywhere else");
        std::process::exit(2);
    }
    if let Err(error) = work() {
        println!("vmgang-guest error={}", error.replace('\n', " "));
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn work() -> Result<()> {
    let started = Instant::now();
    system::mount_all()?;
    loopback::raise().map_err(|error| format!("cannot raise the loopback interface: {error}"))?;
    let command_line = fs::read_to_string("/proc/cmdline")
        .map_err(|error| format!("cannot read /proc/cmdline: {error}"))?;
    let orders = Orders::parse(&command_line)?;
    let workload = start(&orders)?;
    Worker::new(&orders, workload, started, io::stdout()).run()
}

/// Starts the role's servers and gives them their data.
fn start(orders: &Orders) -> Result<Box<dyn Workload>> {
    Ok(match orders.role {
        Role::Idle => Box::new(idle::Idle::start("/usr")?),
        Role::Redis => Box::new(redis::Redis::start(
            orders.seed,
            orders.values,
            orders.data_bytes(),
        )?),
        // Servers of one group have one web root.
        Role::Nginx => Box::new(nginx::Nginx::start(orders.group, orders.data_bytes())?),
        Role::Sqlite => Box::new(sqlite::Sqlite::start(orders.seed, orders.data_bytes())?),
    })
}
