//! A guest's word is worth something only if it can say no: one byte of its memory is changed from
//! outside, and the guest must find it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmgang_lab::{GuestSpec, Lab, LabError, LabOptions};

const PAGE_BYTES: usize = 4096;

/// Changes one byte in a page that is all one byte; with this recipe such a page is the guest's.
fn damage(memory: &File) -> Result<()> {
    let pages = memory.metadata()?.len() / PAGE_BYTES as u64;
    let mut page = [0; PAGE_BYTES];
    // From the middle: the kernel itself lies at the beginning.
    for offset in (pages / 2..pages).map(|page| page * PAGE_BYTES as u64) {
        memory.read_exact_at(&mut page, offset)?;
        let byte = page[0];
        if !matches!(byte, 0 | 0xcc | 0xff) && page.iter().all(|found| *found == byte) {
            memory.write_all_at(&[byte ^ 1], offset + 1234)?;
            return Ok(());
        }
    }
    anyhow::bail!("no uniform page found")
}

#[test]
fn a_guest_finds_one_changed_byte() -> Result<()> {
    let options = LabOptions {
        hosts: vec!["a".to_owned()],
        ..LabOptions::default()
    };
    Lab::scope(&options, |lab| {
        let host = lab.host("a")?;
        let guest = host.boot(&GuestSpec::new("g1").with_fill("uniform:100"))?;
        guest.verify(Duration::from_secs(60))?;
        damage(&guest.memory()?)?;
        let started = Instant::now();
        let fault = loop {
            match guest.report() {
                Err(LabError::Guest { line, .. }) => break line,
                other => drop(other?),
            }
            ensure!(started.elapsed() < Duration::from_secs(30), "not found");
            std::thread::sleep(Duration::from_millis(50));
        };
        ensure!(
            fault.contains("BAD id=g1 kind=uniform") && fault.contains("offset=1234"),
            "{fault}"
        );
        let verdict = guest.verify(Duration::from_secs(60));
        verdict.err().context("a damaged guest does not verify")?;
        Ok(())
    })
}
