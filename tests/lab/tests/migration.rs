//! A guest of the lab survives a stock migration, by its own word: the lab's reason to exist.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vmgang_lab::{GuestSpec, Lab, LabOptions};

const BOOT: Duration = Duration::from_secs(60);
const VERIFY: Duration = Duration::from_secs(60);

#[test]
fn stock_virsh_migrates_a_guest_that_keeps_checking_its_memory() -> Result<()> {
    let options = LabOptions {
        link_bits_per_second: Some(1_000_000_000),
        ..LabOptions::default()
    };
    Lab::scope(&options, migrate)
}

fn migrate(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let started = Instant::now();
    let moving = a.boot(
        &GuestSpec::new("moving")
            .with_dirty_rate(200)
            .with_metadata("<lab:note xmlns:lab='urn:lab' text='kept'/>"),
    )?;
    let staying = a.boot(&GuestSpec::new("staying").with_private_memory().with_idle())?;
    moving.wait_for_report(BOOT)?;
    staying.wait_for_report(BOOT)?;
    println!("two guests booted in {} ms", started.elapsed().as_millis());
    let before = moving.verify(VERIFY)?;

    let counters = a.net_counters()?;
    let started = Instant::now();
    a.virsh(&["migrate", "--live", "--p2p", "moving", &b.libvirt_uri()])?;
    println!("migrated in {} ms", started.elapsed().as_millis());
    let sent = a.net_counters()?.since(&counters);

    let moved = moving.on(b);
    let after = moved.verify(VERIFY)?;
    println!("{before:?}\n{after:?}");
    ensure!(after.bad == 0, "{after:?}");
    ensure!(after.pass > before.pass, "{before:?} then {after:?}");
    ensure!(after.dirtied > before.dirtied, "{before:?} then {after:?}");
    ensure!(after.uptime_ms > before.uptime_ms, "it is the same guest");
    ensure!(moved.xml()?.contains("text=\"kept\""));

    // The memory went over the link: this much of it is neither zero nor uniform.
    ensure!(sent.tx_bytes > after.pages * 4096 / 2, "{sent:?}");
    ensure!(a.domains()? == ["staying"], "{:?}", a.domains()?);
    ensure!(b.domains()? == ["moving"], "{:?}", b.domains()?);
    ensure!(lab.find_guest("moving")?.host().name() == "b");
    ensure!(staying.verify(VERIFY)?.bad == 0);
    Ok(())
}
