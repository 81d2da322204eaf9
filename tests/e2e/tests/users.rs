//! What users other than root may do, over the host's real bus and polkit: by default, as members of
//! the group, and where an administrator has taken reading away.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::documents::workspace;
use vmgang_e2e::{
    Ended, allow_libvirt, boot_all, clone_guest, expect_running, wait_until, with_lab,
};
use vmgang_lab::Host;

const BUS_NAME: &str = "org.vmgang.VMGang1";
const MANAGER: &str = "/org/vmgang/VMGang1";
const REFUSED: &str = "polkit action";

/// Nobody has said anything of her.
const ALICE: &str = "alice";
/// In the group vmgang.
const BOB: &str = "bob";
/// Denied everything by a rule of the administrator.
const MALLORY: &str = "mallory";

/// Interface, method, the action it needs, and how `busctl` calls it.
const METHODS: [(&str, &str, &str, &[&str]); 17] = [
    ("Manager1", "ListGangs", "read", &[]),
    ("Manager1", "GetGang", "read", &["s", "web"]),
    ("Manager1", "ListStages", "read", &[]),
    ("Manager1", "ListJobs", "read", &[]),
    ("Manager1", "Diagnose", "read", &["sa{sv}", "", "0"]),
    // A URI can name a program to be run.
    ("Manager1", "Diagnose", "migrate", &["sa{sv}", "b", "0"]),
    (
        "Manager1",
        "AddToGang",
        "manage",
        &["sas", "new", "1", "vm1"],
    ),
    (
        "Manager1",
        "RemoveFromGang",
        "manage",
        &["sas", "web", "1", "vm1"],
    ),
    ("Manager1", "Estimate", "manage", &["sa{sv}", "web", "0"]),
    (
        "Manager1",
        "Prepare",
        "migrate",
        &["ssa{sv}", "web", "b", "0"],
    ),
    ("Manager1", "AbortStage", "migrate", &["s", "nosuch"]),
    (
        "Manager1",
        "Migrate",
        "migrate",
        &["ssa{sv}", "web", "b", "0"],
    ),
    (
        "Manager1",
        "Return",
        "migrate",
        &["ssa{sv}", "nosuch", "", "0"],
    ),
    ("Job1", "GetTimeline", "read", &[]),
    ("Job1", "Abort", "migrate", &[]),
    ("Job1", "SetBandwidth", "migrate", &["t", "1"]),
    ("Job1", "StartPostCopy", "migrate", &[]),
];

#[test]
fn users_may_read_and_the_group_may_migrate() -> Result<()> {
    with_lab(None, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        allow_libvirt(lab)?;
        a.run(&["useradd", ALICE])?;
        a.run(&["useradd", "--groups", "vmgang", BOB])?;
        a.run(&["useradd", MALLORY])?;
        boot_all(a, &[clone_guest("vm1").with_memory_mib(96).with_idle()])?;

        command(a, BOB, &["gang", "add", "web", "vm1"])?.expect(0)?;
        command(a, ALICE, &["gang", "show", "web"])?.expect(0)?;
        for (arguments, action) in [
            (&["gang", "remove", "web", "vm1"][..], "org.vmgang.manage"),
            (&["migrate", "web", "b"], "org.vmgang.migrate"),
        ] {
            let refused = command(a, ALICE, arguments)?.expect(1)?;
            ensure!(refused.stderr.contains(action), "{refused:?}");
        }
        expect_running(a, &["vm1"])?;

        // All the way there, as a member of the group, and a job whose methods can be called.
        let job = command(a, BOB, &["migrate", "web", "b", "--json"])?
            .expect(0)?
            .job()?;
        expect_running(b, &["vm1"])?;
        b.virsh(&["migrate", "--live", "--p2p", "vm1", &a.libvirt_uri()])?;
        command(a, ALICE, &["history", &job.job])?.expect(0)?;

        deny(a)?;
        every_method_is_in_the_table()?;
        let job = format!("/org/vmgang/jobs/{}", job.job);
        for (interface, method, action, arguments) in METHODS {
            let path = if interface == "Job1" { &job } else { MANAGER };
            for user in [ALICE, MALLORY] {
                let answer = call(a, user, path, interface, method, arguments)?;
                let may = user == ALICE && action == "read";
                let refused = answer.stderr.contains(REFUSED)
                    && answer.stderr.contains(&format!("org.vmgang.{action}"));
                ensure!(refused != may, "{user}: {interface}.{method}: {answer:?}");
            }
        }
        expect_running(a, &["vm1"])?;
        properties_are_for_readers(a, &job)
    })
}

/// Takes reading away from one user, and waits until polkit has seen it.
fn deny(host: &Host) -> Result<()> {
    let rule = format!(
        "polkit.addRule(function (action, subject) {{\n\
         if (subject.user == \"{MALLORY}\") {{ return polkit.Result.NO; }} }});\n"
    );
    host.write_file("/etc/polkit-1/rules.d/10-vmgang.rules", rule)?;
    wait_until("polkit reads its rules", || {
        let answer = call(host, MALLORY, MANAGER, "Manager1", "ListGangs", &[])?;
        Ok(answer.code != 0)
    })
}

fn properties_are_for_readers(host: &Host, job: &str) -> Result<()> {
    let of_job = ["State", "Progress", "Statistics", "Result"].map(|name| (job, "Job1", name));
    let of_manager = ["Version", "Peers"].map(|name| (MANAGER, "Manager1", name));
    for (path, interface, property) in of_job.into_iter().chain(of_manager) {
        let interface = format!("org.vmgang.{interface}");
        let words = ["get-property", BUS_NAME, path, &interface, property];
        busctl(host, ALICE, &words)?.expect(0)?;
        let refused = busctl(host, MALLORY, &words)?.expect(1)?;
        ensure!(refused.stderr.contains("org.vmgang.read"), "{refused:?}");
    }
    let standard = "org.freedesktop.DBus";
    let words = |user| -> Result<[Ended; 2]> {
        let all = format!("{standard}.Properties");
        let objects = format!("{standard}.ObjectManager");
        Ok([
            busctl(
                host,
                user,
                &[
                    "call",
                    BUS_NAME,
                    job,
                    &all,
                    "GetAll",
                    "s",
                    "org.vmgang.Job1",
                ],
            )?,
            busctl(
                host,
                user,
                &[
                    "call",
                    BUS_NAME,
                    "/org/vmgang",
                    &objects,
                    "GetManagedObjects",
                ],
            )?,
        ])
    };
    let [all, objects] = words(ALICE)?;
    ensure!(all.stdout.contains("completed"), "{all:?}");
    ensure!(objects.stdout.contains("completed"), "{objects:?}");
    let [all, objects] = words(MALLORY)?;
    ensure!(all.stdout.trim() == "a{sv} 0", "{all:?}");
    ensure!(
        objects.code == 1 && objects.stderr.contains(REFUSED),
        "{objects:?}"
    );
    Ok(())
}

/// The table has each method of the interfaces, so that a new one cannot be forgotten.
fn every_method_is_in_the_table() -> Result<()> {
    for interface in ["Manager1", "Job1"] {
        let path = workspace().join(format!("xml-schemas/org.vmgang.{interface}.xml"));
        let xml = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        for method in xml.split("<method name=\"").skip(1) {
            let name = method.split('"').next().unwrap_or_default();
            ensure!(
                METHODS
                    .iter()
                    .any(|known| known.0 == interface && known.1 == name),
                "{interface}.{name} is not tested"
            );
        }
    }
    Ok(())
}

/// `vmgang` as a user.
fn command(host: &Host, user: &str, arguments: &[&str]) -> Result<Ended> {
    let words = [&["runuser", "-u", user, "--", "vmgang"], arguments].concat();
    Ok(host.exec(&words)?.into())
}

fn call(
    host: &Host,
    user: &str,
    path: &str,
    interface: &str,
    method: &str,
    arguments: &[&str],
) -> Result<Ended> {
    let interface = format!("org.vmgang.{interface}");
    let words = [&["call", BUS_NAME, path, &interface, method], arguments].concat();
    busctl(host, user, &words)
}

fn busctl(host: &Host, user: &str, words: &[&str]) -> Result<Ended> {
    let words = [&["runuser", "-u", user, "--", "busctl", "--system"], words].concat();
    Ok(host.exec(&words)?.into())
}
