//! Ways to migrate that administrators know from virsh, on a gang: multifd, post-copy, and the options
//! that say how the guests are left.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    JobResult, Versions, boot_all, clone_guest, expect_clean, expect_not_paused, expect_running,
    uri, verify_all, vmgang, with_lab,
};
use vmgang_lab::{Host, Lab};

const GUESTS: [&str; 2] = ["one", "two"];
const LINK: u64 = 400_000_000;

#[test]
fn a_gang_moves_in_all_the_ways_there_are() -> Result<()> {
    with_lab(Some(LINK), |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let guest = |name| clone_guest(name).with_memory_mib(128).with_dirty_rate(100);
        boot_all(a, &[guest("one").with_persistence(), guest("two")])?;
        vmgang(a, &[&["gang", "add", "web"], &GUESTS[..]].concat())?.expect(0)?;
        multifd(a, b).context("multifd")?;
        if !Versions::asked_for()?.goes_back() {
            eprintln!("the rest goes back, which these versions do not");
            return Ok(());
        }
        staggered(b, a).context("staggered, free, and the domains' definitions")?;
        if Versions::asked_for()? == Versions::Own {
            eprintln!("post-copy takes another configuration there: see post_copy.rs");
            return Ok(());
        }
        post_copy(lab).context("post-copy")
    })
}

fn migrate(from: &Host, to: &Host, more: &[&str]) -> Result<JobResult> {
    let destination = uri(to);
    let words = [&["migrate", "--json"], more, &["web", &destination]].concat();
    let job = vmgang(from, &words)?.expect(0)?.job()?;
    ensure!(job.state == "completed", "{job:?}");
    expect_running(from, &[])?;
    expect_running(to, &GUESTS)?;
    expect_clean(from)?;
    expect_clean(to)?;
    Ok(job)
}

fn multifd(a: &Host, b: &Host) -> Result<()> {
    // Of itself, with QEMU as new as the lab's.
    let job = migrate(a, b, &["--technique", "default"])?;
    verify_all(b, &GUESTS)?;
    // What the two share crossed once, although each has two connections of pages.
    let saved = &job.bytes.saved;
    ensure!(saved.cross_vm > 30 << 20, "{job:?}");
    ensure!(job.bytes.wire < job.bytes.qemu_stream / 5 * 2, "{job:?}");
    Ok(())
}

fn staggered(b: &Host, a: &Host) -> Result<()> {
    let options = [
        "--switchover",
        "staggered",
        "--parallel",
        "0",
        "--persistent",
        "--undefinesource",
    ];
    migrate(b, a, &options)?;
    let defined = |host: &Host| host.virsh(&["list", "--all", "--persistent", "--name"]);
    ensure!(defined(a)?.contains("two"), "--persistent");
    ensure!(!defined(b)?.contains("one"), "--undefinesource");
    verify_all(a, &GUESTS)?;
    migrate(
        a,
        b,
        &["--switchover", "free", "--auto-converge", "--unsafe"],
    )?;
    // They arrive as they were; --suspend leaves them paused.
    migrate(b, a, &["--suspend"])?;
    for guest in GUESTS {
        ensure!(a.virsh(&["domstate", guest])?.trim() == "paused", "{guest}");
        a.virsh(&["resume", guest])?;
    }
    verify_all(a, &GUESTS)
}

fn post_copy(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let destination = uri(b);
    let both = [
        "migrate",
        "--postcopy",
        "--parallel",
        "2",
        "web",
        &destination,
    ];
    let refused = vmgang(a, &both)?.expect(1)?;
    ensure!(refused.stderr.contains("parallel"), "{refused:?}");
    expect_not_paused(a, &GUESTS)?;
    migrate(a, b, &["--postcopy"])?;
    verify_all(b, &GUESTS)
}
