//! `make leaks`: a gang goes back and forth many times; what the daemons hold must not grow.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use vmgang_e2e::{
    boot_all, clone_guest, expect_clean, expect_running, install_tree, uri, verify_all, vmgang,
};
use vmgang_lab::{Host, Lab, LabOptions};

#[derive(Parser)]
#[command(about = "Migrates a gang back and forth, and counts what the daemons hold")]
struct Arguments {
    /// Migrations, there and back counted singly.
    #[arg(long, default_value_t = 50)]
    migrations: usize,
}

const GUESTS: [&str; 2] = ["one", "two"];
/// Until then, caches and pools fill.
const WARM: usize = 10;
/// The daemons give freed memory back when they have been idle: vmgangd looks twice a minute.
const TIDIED: Duration = Duration::from_secs(40);
/// Files that come and go: a connection to libvirt or the bus more or less.
const FILES_MAX: u64 = 4;
/// Memory that the allocator keeps differs from one time to the next.
const MEMORY_KIB_MAX: u64 = 24 * 1024;

/// What a daemon holds.
#[derive(Debug, Clone, Copy)]
struct Held {
    files: u64,
    sockets: u64,
    threads: u64,
    /// Its own. The memory of guests that it looks at is not.
    memory_kib: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    Lab::scope(&options, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let guest = |name| clone_guest(name).with_memory_mib(96);
        boot_all(
            a,
            &[guest("one").with_idle(), guest("two").with_dirty_rate(100)],
        )?;
        vmgang(a, &[&["gang", "add", "web"], &GUESTS[..]].concat())?.expect(0)?;
        let mut seen: Vec<[Held; 2]> = Vec::new();
        println!(
            "| after | host | files | sockets | threads | memory, MiB |\n|--:|---|--:|--:|--:|--:|"
        );
        for number in 1..=arguments.migrations {
            let (from, to) = if number % 2 == 1 { (a, b) } else { (b, a) };
            vmgang(from, &["migrate", "--quiet", "web", &uri(to)])?.expect(0)?;
            expect_running(to, &GUESTS)?;
            expect_clean(a)?;
            expect_clean(b)?;
            let shown = number == 1 || number % WARM == 0;
            if shown {
                sleep(TIDIED);
            }
            let held = [held(a)?, held(b)?];
            if shown {
                for (host, held) in [a, b].into_iter().zip(held) {
                    println!(
                        "| {number} | {} | {} | {} | {} | {} |",
                        host.name(),
                        held.files,
                        held.sockets,
                        held.threads,
                        held.memory_kib / 1024
                    );
                }
            }
            seen.push(held);
        }
        let at = if arguments.migrations % 2 == 1 { b } else { a };
        verify_all(at, &GUESTS)?;
        check(&seen)
    })
}

/// Compares the end with the time when everything was warm.
fn check(seen: &[[Held; 2]]) -> Result<()> {
    let (Some(warm), Some(last)) = (seen.get(WARM - 1), seen.last()) else {
        return Ok(());
    };
    for (warm, last) in warm.iter().zip(last) {
        ensure!(last.files <= warm.files + FILES_MAX, "{warm:?} {last:?}");
        ensure!(
            last.sockets <= warm.sockets + FILES_MAX,
            "{warm:?} {last:?}"
        );
        ensure!(
            last.threads <= warm.threads + FILES_MAX,
            "{warm:?} {last:?}"
        );
        let memory_max = warm.memory_kib + MEMORY_KIB_MAX;
        ensure!(last.memory_kib <= memory_max, "{warm:?} {last:?}");
    }
    Ok(())
}

fn held(host: &Host) -> Result<Held> {
    let pid = host.vmgangd().pid()?.context("vmgangd runs")?;
    let open = host.run(&["ls", "-l", &format!("/proc/{pid}/fd")])?;
    let count = |what: &str| open.lines().filter(|line| line.contains(what)).count() as u64;
    let read = |file: &str| host.run(&["cat", &format!("/proc/{pid}/{file}")]);
    let text = read("status")? + &read("smaps_rollup")?;
    let field = |name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(number
            .context("/proc/PID/status reads as expected")?
            .parse()?)
    };
    Ok(Held {
        files: count("->"),
        sockets: count("socket:"),
        threads: field("Threads:")?,
        memory_kib: field("Pss_Anon:")?,
    })
}
