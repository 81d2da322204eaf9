//! The front end of virsh: `virsh migrate --gang` moves a whole gang, and everything else is the real virsh, to the byte.

use std::io::Read;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use vmgang_e2e::{
    Ended, boot_all, clone_guest, expect_clean, expect_running, uri, verify_all, vmgang,
    wait_until, with_lab,
};
use vmgang_lab::{Host, Lab, Signal};

const GANG: [&str; 3] = ["web1", "web2", "web3"];
/// In no gang.
const ALONE: &str = "db1";

/// What the documents say switches the front end on.
const SWITCH_ON: [&str; 4] = [
    "ln",
    "-s",
    "/usr/libexec/vmgang/virsh",
    "/usr/local/bin/virsh",
];
/// How the system shows that virsh waits for its standard input: pselect6 of one file.
const PSELECT_STDIN: &str = "270 0x1 ";
const FRONT: &str = "/usr/local/bin/virsh";
const REAL: &str = "/usr/bin/virsh";

/// Lines of a shell, in which `virsh` is one or the other.
const LINES: &[&str] = &[
    "virsh --help",
    "virsh -h",
    "virsh help",
    "virsh help migrate",
    "virsh help nosuch",
    "virsh migrate --help",
    "virsh --version",
    "virsh --version=long",
    "virsh -v",
    "virsh -V",
    "virsh list --all",
    "virsh -q list --all",
    "virsh --quiet --readonly list --name",
    "virsh -c qemu:///system uri",
    "virsh -c test:///default list",
    "virsh --connect=test:///default list",
    "virsh -c nonsense list",
    "LIBVIRT_DEFAULT_URI=test:///default virsh list",
    "virsh 'list --all; uri'",
    "virsh domuuid web1",
    "virsh dumpxml web1",
    "virsh domstate nosuch",
    "virsh nosuch",
    "virsh --nosuch",
    "virsh -k list",
    "virsh migrate",
    "virsh migrate web1",
    "virsh migrate web1 nowhere",
    "virsh migrate web1 nowhere --nosuch",
    "virsh migrate nosuch qemu+tls://b/system --live --p2p",
    "virsh migrate -- --gang nowhere",
    // In one string, or at its prompt, it is the real virsh's to refuse.
    "virsh 'migrate --gang web1 qemu+tls://b/system'",
    "echo 'migrate --gang web1 qemu+tls://b/system' | virsh",
    "virsh list --gang",
    "virsh help migrate --gang",
    "virsh echo migrate --gang",
    "virsh echo --shell 'a b' 'c\"d' ''",
    "virsh echo $'\\xff\\xfe'",
    "virsh ''",
    "printf 'list --all\\nuri\\nnosuch\\n' | virsh",
    "printf 'uri\\nquit\\nuri\\n' | virsh -q",
    "virsh -c test:///default < /dev/null",
    "virsh uri <&-",
    // A connection would get the number of the closed file, and what is printed with it.
    "virsh --version >&-",
    "virsh nosuch 2>&-",
    "virsh list > /dev/full",
    // The reader has gone before anything is written.
    "(sleep 1; virsh help) | true; echo ${PIPESTATUS[0]}",
    "trap '' PIPE; (sleep 1; virsh help) | true; echo ${PIPESTATUS[0]}",
    // What the completion of bash calls.
    "virsh complete -- mig",
    "virsh complete -- migrate ''",
    "virsh complete -- migrate --",
    "virsh complete -- migrate --ti",
    "virsh complete -- domstate w",
    "virsh -r -c qemu:///system complete -- domstate w",
];

#[test]
fn a_gang_moves_by_virsh_and_everything_else_is_the_real_one() -> Result<()> {
    with_lab(Some(1_000_000_000), |lab| {
        let a = lab.host("a")?;
        let guests: Vec<_> = GANG
            .iter()
            .chain([&ALONE])
            .map(|name| clone_guest(name).with_memory_mib(96).with_idle())
            .collect();
        boot_all(a, &guests)?;
        vmgang(a, &[&["gang", "add", "web"], &GANG[..]].concat())?.expect(0)?;
        for host in lab.hosts() {
            host.run(&SWITCH_ON)?;
        }
        the_rest_is_unchanged(a)?;
        the_process_is_the_real_ones(a)?;
        help_has_every_option(a)?;
        what_does_not_go_with_a_gang_is_refused(lab)?;
        ctrl_c_aborts(lab)?;
        it_moves_and_returns(lab)
    })
}

/// A line with one program or the other in virsh's place, called by the same name.
fn said(host: &Host, line: &str, program: &str) -> Result<Ended> {
    // A function would hide the program from pipes and redirections of the line no more than a command does.
    let script = format!("virsh() {{ (exec -a virsh {program} \"$@\"); }}; {line}");
    Ok(host.exec(&["bash", "-c", &script])?.into())
}

fn the_rest_is_unchanged(host: &Host) -> Result<()> {
    let mut failed = 0;
    for line in LINES {
        let (front, real) = (said(host, line, FRONT)?, said(host, line, REAL)?);
        ensure!(
            (front.code, &front.stdout, &front.stderr) == (real.code, &real.stdout, &real.stderr),
            "{line}\nby the front end: {front:?}\nby virsh itself: {real:?}"
        );
        failed += i32::from(real.code != 0);
    }
    // Both kinds are in the list.
    ensure!(
        failed > 10 && failed < LINES.len() as i32 / 2,
        "{failed} lines failed"
    );
    Ok(())
}

/// A virsh that waits for commands: its name, its environment, its signals and its files are as they were.
fn the_process_is_the_real_ones(host: &Host) -> Result<()> {
    let describe = |program: &str| -> Result<String> {
        let script =
            format!("trap '' PIPE USR1; exec -a /some/virsh {program} -q -c test:///default");
        let mut child = host
            .command(&["bash", "-c", &script])
            .env("SEEN", "unchanged")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let process = format!("/proc/{}", child.id());
        // Then its handlers are in place.
        wait_until("virsh waits for commands", || {
            let name = std::fs::read_to_string(format!("{process}/comm"))?;
            let call = std::fs::read_to_string(format!("{process}/syscall"))?;
            Ok(name.trim() == "virsh" && call.starts_with(PSELECT_STDIN))
        })?;
        let file = |name: &str| -> Result<String> {
            let bytes = std::fs::read(format!("{process}/{name}"))?;
            Ok(String::from_utf8_lossy(&bytes).replace('\0', " "))
        };
        let signals: Vec<String> = file("status")?
            .lines()
            .filter(|line| line.starts_with("Sig") && !line.starts_with("SigQ"))
            .map(str::to_owned)
            .collect();
        let description = format!("{}\n{}\n{signals:?}", file("cmdline")?, file("environ")?);
        child.signal(Signal::TERM)?;
        let ended = child.wait()?;
        Ok(format!("{description}\n{ended}"))
    };
    let (front, real) = (describe(FRONT)?, describe(REAL)?);
    ensure!(
        front == real,
        "by the front end: {front}\nby virsh itself: {real}"
    );
    ensure!(
        real.contains("/some/virsh") && real.contains("SEEN=unchanged"),
        "{real}"
    );
    Ok(())
}

/// Options in a help text: their names, and what they take.
fn options(help: &str) -> Vec<String> {
    let (_, options) = help.split_once("OPTIONS").unwrap_or_default();
    options
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?.trim_matches(['[', ']']);
            let takes = words.next().filter(|word| word.starts_with('<'));
            name.starts_with("--")
                .then(|| format!("{name} {}", takes.unwrap_or("-")))
        })
        .collect()
}

/// A newer virsh's options are noticed here.
fn help_has_every_option(host: &Host) -> Result<()> {
    let real = options(&said(host, "virsh help migrate", REAL)?.stdout);
    ensure!(real.len() > 45, "{real:?}");
    let help = said(host, "virsh migrate --gang --help", FRONT)?.expect(0)?;
    let known = options(&help.stdout);
    let missing: Vec<_> = real
        .iter()
        .filter(|option| !known.contains(option))
        .collect();
    ensure!(
        missing.is_empty(),
        "virsh has options that nothing is said about: {missing:?}"
    );
    for part in [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "REFUSED OPTIONS",
        "both hosts share",
    ] {
        ensure!(help.stdout.contains(part), "{part}: {}", help.stdout);
    }
    Ok(())
}

fn what_does_not_go_with_a_gang_is_refused(lab: &Lab) -> Result<()> {
    let a = lab.host("a")?;
    for (line, code, reason) in [
        (
            "virsh migrate --gang db1 qemu+tls://b/system",
            1,
            "error: domain 'db1' belongs to no gang; put it into one with `vmgang gang add GANG db1`",
        ),
        (
            "virsh migrate --gang nosuch qemu+tls://b/system",
            1,
            "error: failed to get domain 'nosuch'",
        ),
        (
            "virsh migrate --gang web1 qemu:///system",
            1,
            "has no host part",
        ),
        (
            "virsh migrate --gang web1 qemu+tls://nowhere/system",
            1,
            "nowhere",
        ),
        (
            "virsh migrate --gang web1",
            2,
            "error: command 'migrate --gang' requires <desturi> option",
        ),
        (
            "virsh migrate --gang web1 b --nosuch",
            2,
            "doesn't support option --nosuch",
        ),
        (
            "virsh migrate --gang web1 b --copy-storage-all --live",
            2,
            "error: --copy-storage-all does not go with --gang: disks are not moved",
        ),
        (
            "virsh migrate --gang web1 b --xml new.xml --zerocopy",
            2,
            "\nerror: --zerocopy does not go with --gang: ",
        ),
        (
            "virsh -r migrate --gang web1 b",
            2,
            "error: -r (--readonly) does not go",
        ),
        (
            "virsh -c qemu+tls://b/system migrate --gang web1 b",
            2,
            "error: -c (--connect) names qemu+tls://b/system",
        ),
        (
            "LIBVIRT_DEFAULT_URI=test:///default virsh migrate --gang web1 b",
            2,
            "LIBVIRT_DEFAULT_URI names test:///default",
        ),
    ] {
        let ended = said(a, line, FRONT)?.expect(code)?;
        ensure!(ended.stderr.contains(reason), "{line}: {ended:?}");
        ensure!(
            ended.stderr.lines().all(|line| line.starts_with("error: ")),
            "{line}: {ended:?}"
        );
        // As virsh: an empty line after a command, none after what it could not read.
        ensure!(
            ended.stdout == ["", "\n", ""][usize::try_from(code)?],
            "{line}: {ended:?}"
        );
    }
    expect_running(a, &[&GANG[..], &[ALONE]].concat())
}

fn ctrl_c_aborts(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    lab.shape(Some(10_000_000))?;
    let mut migrating = a
        .command(&["virsh", "migrate", "--gang", "--verbose", "web1", &uri(b)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // The first figure.
    let stderr = migrating.child_mut().stderr.as_mut().context("a pipe")?;
    let mut begun = [0; 13];
    stderr.read_exact(&mut begun)?;
    ensure!(
        begun == *b"\rMigration: [",
        "{}",
        String::from_utf8_lossy(&begun)
    );
    migrating.signal(Signal::INT)?;
    let ended = Ended::from(migrating.wait_with_output()?).expect(4)?;
    ensure!(
        ended.stderr.ends_with("\nerror: aborted on request\n"),
        "{ended:?}"
    );
    expect_running(b, &[])?;
    lab.shape(Some(1_000_000_000))?;
    Ok(())
}

/// The last figure that a virsh has shown.
fn last_figure(shown: &str) -> Result<&str> {
    match shown.rsplit_once('\r') {
        Some((_, last)) if shown.starts_with("\rMigration: [") => Ok(last),
        _ => bail!("this is not how virsh shows progress: {shown:?}"),
    }
}

fn it_moves_and_returns(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let line = format!(
        "virsh migrate --gang --verbose --live --tls web2 {}",
        uri(b)
    );
    let moved = said(a, &line, FRONT)?.expect(0)?;
    expect_running(b, &GANG)?;
    expect_running(a, &[ALONE])?;
    verify_all(b, &GANG)?;

    // The real one with a guest of its own says the same, but for the figures on the way.
    let line = format!("virsh migrate --verbose --live --p2p {ALONE} {}", uri(b));
    let stock = said(a, &line, REAL)?.expect(0)?;
    ensure!(moved.stdout == stock.stdout, "{moved:?}, {stock:?}");
    let (ours, theirs) = (last_figure(&moved.stderr)?, last_figure(&stock.stderr)?);
    // Until libvirt 9 it had no decimals.
    ensure!(
        ours == theirs || theirs == "Migration: [100 %]",
        "{ours}, {theirs}"
    );

    // By the number of one of them, in the other way of writing, and without a word.
    let id = b.virsh(&["domid", "web3"])?;
    let line = format!(
        "virsh -q migrate --domain={} --desturi {} --gang",
        id.trim(),
        uri(a)
    );
    let returned = said(b, &line, FRONT)?.expect(0)?;
    ensure!(
        returned.stdout.is_empty() && returned.stderr.is_empty(),
        "{returned:?}"
    );
    expect_running(a, &GANG)?;
    verify_all(a, &GANG)?;
    for host in [a, b] {
        expect_clean(host)?;
    }
    Ok(())
}
