//! The init of a lab guest: fills memory by a recipe, dirties it, checks it for ever and reports
//! on the serial console.
//!
//! Runs as process 1 of a virtual machine, from the initramfs, alone. It never ends by itself:
//! the end of process 1 would be a kernel panic and hide what went wrong.

mod memory;
mod modules;
mod page;
mod recipe;
mod worker;

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use memory::Memory;
use recipe::Recipe;
use worker::Worker;

/// What the kernel and this process keep for themselves.
const RESERVE_PAGES: usize = 2048;

fn main() {
    // Only ever as the first process: by hand it would fill a machine's memory.
    if std::process::id() != 1 {
        eprintln!("vmgang-guest is the init of a lab guest; it does nothing anywhere else");
        std::process::exit(2);
    }
    if let Err(error) = work() {
        println!("vmgang-guest error={error}");
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn work() -> Result<(), String> {
    let started = Instant::now();
    mount_proc().map_err(|error| format!("cannot mount /proc: {error}"))?;
    let command_line = read("/proc/cmdline")?;
    let recipe = Recipe::parse(&command_line)?;
    if recipe.modules {
        modules::load().map_err(|error| format!("cannot load the kernel's modules: {error}"))?;
    }
    let meminfo = read("/proc/meminfo")?;
    write_and_free(managed_pages(&meminfo, recipe.freed_percent)?, recipe.seed);
    let pages = managed_pages(&meminfo, recipe.memory_percent)?;
    let memory =
        Memory::map(pages).map_err(|error| format!("cannot map {pages} pages: {error}"))?;
    let mut worker = Worker::new(&recipe, memory, started, io::stdout());
    worker.fill();
    worker
        .run()
        .map_err(|error| format!("cannot write to the console: {error}"))
}

/// Leaves free memory as programs do that have ended: full of what they had in it.
fn write_and_free(pages: usize, seed: u64) {
    const WORDS: usize = 512;
    let words: Vec<u64> = (0..(pages * WORDS) as u64)
        .map(|number| page::mix(seed, number, 1))
        .collect();
    std::hint::black_box(&words);
}

fn mount_proc() -> io::Result<()> {
    // SAFETY: every argument is a constant C string, the data pointer may be null for proc.
    let result = unsafe {
        libc::mount(
            c"proc".as_ptr(),
            c"/proc".as_ptr(),
            c"proc".as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
}

/// How many pages to manage: a share of all memory, never more than is free.
fn managed_pages(meminfo: &str, percent: u64) -> Result<usize, String> {
    let pages_of = |key: &str| {
        meminfo
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|kib| kib.parse::<usize>().ok())
            .map(|kib| kib / 4)
            .ok_or_else(|| format!("/proc/meminfo has no {key}"))
    };
    let wanted = pages_of("MemTotal:")? * percent as usize / 100;
    let free = pages_of("MemAvailable:")?.saturating_sub(RESERVE_PAGES);
    Ok(wanted.min(free).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manages_a_share_but_never_more_than_is_free() {
        let roomy = "MemTotal: 400000 kB\nMemAvailable: 390000 kB\n";
        assert_eq!(managed_pages(roomy, 75), Ok(75_000));
        let tight = "MemTotal: 400000 kB\nMemAvailable: 100000 kB\n";
        assert_eq!(managed_pages(tight, 75), Ok(25_000 - RESERVE_PAGES));
        assert!(managed_pages("", 75).is_err());
    }
}
