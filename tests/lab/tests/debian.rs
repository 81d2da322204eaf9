//! Debian guests with real servers: all roles boot and serve, one moves while it serves, and each
//! notices when its data is damaged.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use vmgang_lab::{Guest, GuestSpec, Host, Lab, LabError, LabOptions, Role};

const PATIENCE: Duration = Duration::from_secs(180);
const PAGE_BYTES: usize = 4096;
const REDIS_RATE: u64 = 50;

#[test]
fn every_role_serves_moves_and_notices_damage() -> Result<()> {
    // Built before the clock starts, and before a host waits for it.
    Lab::prepare_debian()?;
    Lab::scope(&LabOptions::default(), |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let guests = boot(a)?;
        let redis = migrate(&guests[1], b)?;
        let now: Vec<Guest> = guests
            .iter()
            .map(|guest| {
                if guest.name() == redis.name() {
                    &redis
                } else {
                    guest
                }
            })
            .cloned()
            .collect();
        for report in together(&now, |guest| Ok(guest.verify(PATIENCE)?))? {
            ensure!(report.bad == 0, "{report:?}");
        }
        together(&now, notices_damage)?;
        Ok(())
    })
}

/// Boots a small guest of each role; they are named after it.
fn boot(host: &Host) -> Result<Vec<Guest>> {
    let started = Instant::now();
    let mut guests = Vec::new();
    for role in Role::ALL {
        let spec = GuestSpec::debian(role.name(), role)
            .with_memory_mib(320)
            .with_data_mib(12)
            .with_check_seconds(10);
        guests.push(host.boot(&match role {
            Role::Redis => spec.with_request_rate(REDIS_RATE),
            _ => spec,
        })?);
    }
    for (guest, role) in guests.iter().zip(Role::ALL) {
        let report = guest.wait_for_report(PATIENCE)?;
        ensure!(report.role == role.name(), "{report:?}");
        println!("{role} boots in {} ms", started.elapsed().as_millis());
    }
    for (guest, role) in guests.iter().zip(Role::ALL) {
        if role != Role::Idle {
            guest.wait_for("answered requests", PATIENCE, |report| report.served > 0)?;
        }
    }
    Ok(guests)
}

/// Moves a guest with stock virsh; it goes on serving where it was.
fn migrate(guest: &Guest, target: &Host) -> Result<Guest> {
    let before = guest.wait_for_report(PATIENCE)?;
    let uri = target.libvirt_uri();
    guest
        .host()
        .virsh(&["migrate", "--live", "--p2p", guest.name(), &uri])?;
    let moved = guest.on(target);
    let first = moved.wait_for_report(PATIENCE)?;
    ensure!(first.served >= before.served, "{before:?} then {first:?}");
    ensure!(first.uptime_ms > before.uptime_ms, "it is the same guest");
    let due = first.served + 5 * REDIS_RATE;
    let after = moved.wait_for("requests served there", PATIENCE, |report| {
        report.served >= due
    })?;
    ensure!(after.dirtied > before.dirtied, "{before:?} then {after:?}");
    println!("{before:?}\n{first:?}\n{after:?}");
    Ok(moved)
}

/// Pages that are damaged, at most.
const DAMAGED_PAGES: usize = 40;

/// Changes a byte in a few pages of the guest's data; the guest must say so.
fn notices_damage(guest: &Guest) -> Result<()> {
    let (pattern, times): (&[u8], usize) = match guest.name() {
        // In the C library's file, once.
        "idle" => (b"GNU C Library (Debian", 1),
        // In every record of a text; the init's own vocabulary has it once.
        _ => (b"{\"session\":\"", 3),
    };
    let memory = guest.memory()?;
    let pages = memory.metadata()?.len() / PAGE_BYTES as u64;
    let mut page = [0; PAGE_BYTES];
    let mut places_found = Vec::new();
    for offset in (0..pages).map(|page| page * PAGE_BYTES as u64) {
        memory.read_exact_at(&mut page, offset)?;
        let places = || {
            page.windows(pattern.len())
                .enumerate()
                .filter(|(_, window)| *window == pattern)
                .map(|(place, _)| place as u64)
        };
        if places().count() >= times {
            places_found.extend(places().next_back().map(|place| offset + place));
        }
    }
    ensure!(
        !places_found.is_empty(),
        "no data found in the memory of {}",
        guest.name()
    );
    // Spread over all of them: neighbours may all be of a buffer that nobody reads again.
    let step = places_found.len().div_ceil(DAMAGED_PAGES);
    let damaged: Vec<_> = places_found.iter().step_by(step).collect();
    for place in &damaged {
        memory.write_all_at(b"?", **place + 4)?;
    }
    let found = damaged.len();
    let started = Instant::now();
    loop {
        match guest.report() {
            Err(LabError::Guest { line, .. }) => {
                println!("{found} pages of {} damaged: {line}", guest.name());
                ensure!(line.contains("BAD id=") && line.contains("role="), "{line}");
                return Ok(());
            }
            other => drop(other?),
        }
        if started.elapsed() > PATIENCE {
            bail!("guest {} did not notice", guest.name());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn together<T: Send>(guests: &[Guest], act: impl Fn(&Guest) -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let act = &act;
        let running: Vec<_> = guests
            .iter()
            .map(|guest| scope.spawn(move || act(guest)))
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
            .collect()
    })
}
