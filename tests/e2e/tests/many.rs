//! A gang of more members than libvirtd's default limits let migrate at once.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    Ended, boot_all, expect_clean, expect_not_paused, expect_running, start_vmgang, uri, vmgang,
    wait_until, with_lab,
};
use vmgang_lab::{GuestSpec, Host, Lab};

const MEMBERS: usize = 24;
const SLOW: u64 = 40_000_000;

/// Not in `make test`: so many emulated guests take their time to boot.
#[test]
fn slowly_twenty_four_members_go_back_and_go() -> Result<()> {
    with_lab(Some(SLOW), |lab| {
        let a = lab.host("a")?;
        let names: Vec<String> = (0..MEMBERS).map(|number| format!("m{number:02}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let spec = |name: &&str| GuestSpec::new(name).with_memory_mib(96).with_idle();
        for some in names.chunks(6) {
            boot_all(a, &some.iter().map(spec).collect::<Vec<_>>())?;
        }
        for concurrency in ["12", "16"] {
            aborted(lab, &names, concurrency).with_context(|| concurrency.to_owned())?;
        }
        lab.shape(None)?;
        let job = vmgang(a, &["migrate", "--json", "--all", &uri(lab.host("b")?)])?;
        ensure!(job.expect(0)?.job()?.domains.len() == MEMBERS);
        expect_running(lab.host("b")?, &names)
    })
}

fn under_way(a: &Host) -> Result<usize> {
    let status = vmgang(a, &["status", "--json"])?.expect(0)?;
    let jobs: serde_json::Value = serde_json::from_str(&status.stdout)?;
    let members = jobs[0]["domains"].as_array().cloned().unwrap_or_default();
    let sends = |member: &&serde_json::Value| {
        let under_way = member["state"] == "copying" || member["state"] == "held";
        under_way && member["qemu_stream_bytes"].as_u64() > Some(0)
    };
    Ok(members.iter().filter(sends).count())
}

fn aborted(lab: &Lab, names: &[&str], concurrency: &str) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let words = [
        "migrate",
        "--json",
        "--all",
        "--concurrency",
        concurrency,
        &uri(b),
    ];
    let migrating = start_vmgang(a, &words)?;
    let wanted: usize = concurrency.parse()?;
    wait_until("as many as may be are under way", || {
        Ok(under_way(a)? >= wanted)
    })?;
    let jobs = vmgang(a, &["status", "--json"])?.stdout;
    let jobs: serde_json::Value = serde_json::from_str(&jobs)?;
    let asked = Instant::now();
    vmgang(a, &["abort", jobs[0]["job"].as_str().context("a job")?])?.expect(0)?;
    let job = Ended::from(migrating.wait_with_output()?)
        .expect(4)?
        .job()?;
    eprintln!(
        "{concurrency} under way: aborted after {:?}",
        asked.elapsed()
    );
    ensure!(job.domains.iter().all(|d| d.state == "source"), "{job:?}");
    expect_running(a, names)?;
    expect_not_paused(a, names)?;
    expect_running(b, &[])?;
    expect_clean(a)
}
