//! A member that dirties its memory as fast as it can be sent does not hold the gang for ever: it is
//! named with its figures, and what was asked for is done about it.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    Ended, boot_all, clone_guest, expect_clean, expect_running, start_vmgang, uri, verify_all,
    vmgang, wait_until, with_lab,
};
use vmgang_lab::{GuestSpec, Host, Lab};

const GUESTS: [&str; 2] = ["hog", "quiet"];
/// 5 MB/s, and the guest dirties more than twice as much.
const SLOW: u64 = 40_000_000;
const DIRTY_PAGES_PER_SECOND: u64 = 8000;
/// 25 MB, which takes five seconds to send.
const HOT_PAGES: u64 = 6000;

/// Not in `make test`, like the next one: passes over a slow link take their time.
#[test]
fn slowly_a_member_that_dirties_without_end_is_left_or_ends_the_job() -> Result<()> {
    with_gang(|lab| {
        aborted(lab).context("on-stall abort")?;
        left(lab).context("on-stall leave")
    })
}

/// QEMU takes minutes to slow a guest down.
#[test]
fn slowly_a_member_that_dirties_without_end_is_slowed_down() -> Result<()> {
    with_gang(slowed_down)
}

fn with_gang(test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    with_lab(Some(SLOW), |lab| {
        let a = lab.host("a")?;
        let hog = GuestSpec::new("hog")
            .with_memory_mib(96)
            .with_fill("unique:100")
            .with_dirty_rate(DIRTY_PAGES_PER_SECOND)
            .with_hot_pages(HOT_PAGES);
        let quiet = clone_guest("quiet").with_memory_mib(96).with_idle();
        boot_all(a, &[hog, quiet])?;
        vmgang(a, &[&["gang", "add", "web"], &GUESTS[..]].concat())?.expect(0)?;
        test(lab)
    })
}

fn migrate(a: &Host, b: &Host, more: &[&str]) -> Result<Ended> {
    let destination = uri(b);
    let words = [&["migrate", "--json"], more, &["web", &destination]].concat();
    vmgang(a, &words)
}

fn expect_figures(error: Option<&str>) -> Result<()> {
    let error = error.context("an error")?;
    ensure!(error.contains("hog") && error.contains("MB/s"), "{error}");
    Ok(())
}

fn aborted(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let job = migrate(a, b, &["--on-stall", "abort"])?.expect(1)?.job()?;
    ensure!(job.state == "failed", "{job:?}");
    expect_figures(job.error.as_deref())?;
    expect_running(a, &GUESTS)?;
    verify_all(a, &GUESTS)?;
    expect_clean(a)
}

fn left(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let job = migrate(a, b, &["--on-stall", "leave"])?.expect(3)?.job()?;
    ensure!(job.state == "partial", "{job:?}");
    let hog = job.domains.iter().find(|domain| domain.name == "hog");
    let hog = hog.context("the hog")?;
    ensure!(hog.state == "source", "{job:?}");
    expect_figures(hog.error.as_deref())?;
    expect_running(a, &["hog"])?;
    expect_running(b, &["quiet"])?;
    verify_all(a, &["hog"])?;
    verify_all(b, &["quiet"])?;
    let back = vmgang(b, &["migrate", "--quiet", "--domains", "quiet", &uri(a)])?;
    back.expect(0)?;
    expect_running(a, &GUESTS)
}

fn slowed_down(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let destination = uri(b);
    let mut migrating = start_vmgang(a, &["migrate", "--json", "web", &destination])?;
    let hog = || -> Result<serde_json::Value> {
        let status = vmgang(a, &["status", "--json"])?.expect(0)?;
        let jobs: serde_json::Value = serde_json::from_str(&status.stdout)?;
        let members = jobs[0]["domains"].as_array().cloned().unwrap_or_default();
        let hog = members.into_iter().find(|member| member["name"] == "hog");
        Ok(hog.unwrap_or_default())
    };
    wait_until(
        "status tells of the stall, and that the guest is slowed down",
        || {
            ensure!(migrating.try_wait()?.is_none(), "the job ended before");
            let hog = hog()?;
            Ok(hog["throttled"] == true && hog["dirtied_per_s"].as_u64() > Some(1_000_000))
        },
    )?;
    let job = Ended::from(migrating.wait_with_output()?)
        .expect(0)?
        .job()?;
    ensure!(job.state == "completed", "{job:?}");
    expect_running(b, &GUESTS)?;
    verify_all(b, &GUESTS)
}
