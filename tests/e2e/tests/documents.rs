//! Every command in the documents works as it is written there.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use vmgang_e2e::documents::{commands, workspace};
use vmgang_e2e::{
    Ended, boot_all, clone_guest, install_tree, start_vmgang, uri, vmgang, wait_until, with_lab,
};
use vmgang_lab::Lab;

/// The guests that the documents speak of.
const GUESTS: [&str; 4] = ["web1", "web2", "web3", "db1"];

#[test]
fn commands_for_administrators_work() -> Result<()> {
    with_lab(None, |lab| {
        let guests: Vec<_> = GUESTS
            .iter()
            .map(|name| clone_guest(name).with_memory_mib(96).with_idle())
            .collect();
        configure(lab)?;
        boot_all(lab.host("a")?, &guests)?;
        for document in ["README.md", "docs/operations.md", "docs/virt-manager.md"] {
            for command in commands(document)? {
                run(lab, &command).with_context(|| format!("{document}: {command}"))?;
            }
        }
        Ok(())
    })
}

fn run(lab: &Lab, command: &str) -> Result<()> {
    let a = lab.host("a")?;
    let words: Vec<&str> = command.split_whitespace().collect();
    match words[..] {
        ["make", target, ..] => {
            let makefile = std::fs::read_to_string(workspace().join("Makefile"))?
                + &std::fs::read_to_string(workspace().join("packaging/install.mk"))?;
            let rule = format!("\n{target}:");
            ensure!(makefile.contains(&rule), "there is no target {target}");
        }
        ["vmgang", "migrate", ..] => {
            bring_home(lab)?;
            vmgang(a, &words[1..])?.expect(0)?;
        }
        ["vmgang", "return", "JOB"] => {
            bring_home(lab)?;
            let away = ["migrate", "--json", "--domains", "web1,db1", "b"];
            let job = vmgang(a, &away)?.expect(0)?.job()?;
            vmgang(a, &["return", &job.job])?.expect(0)?;
        }
        ["vmgang", "status", ref options @ ..] if options.contains(&"--watch") => {
            while_migrating(lab, |job| {
                let watching = start_vmgang(a, &["status", "--watch"])?;
                std::thread::sleep(Duration::from_millis(1500));
                vmgang(a, &["abort", job])?.expect(0)?;
                // It watches to the end of the job, and tells it.
                let ended = Ended::from(watching.wait_with_output()?).expect(0)?;
                ensure!(ended.stdout.contains("abort"), "{ended:?}");
                Ok(())
            })?;
        }
        ["vmgang", "abort", "JOB"] => while_migrating(lab, |job| {
            vmgang(a, &["abort", job])?.expect(0)?;
            Ok(())
        })?,
        ["vmgang", "bandwidth", "JOB", "MIB/S"] => while_migrating(lab, |job| {
            vmgang(a, &["bandwidth", job, "1"])?.expect(0)?;
            vmgang(a, &["bandwidth", job, "0"])?.expect(0)?;
            vmgang(a, &["abort", job])?.expect(0)?;
            Ok(())
        })?,
        ["vmgang", "history", "JOB", "--html", file] => {
            vmgang(a, &["history", &newest_job(lab)?, "--html", file])?.expect(0)?;
        }
        ["vmgang", verb @ ("status" | "history"), "[JOB]", ..] => {
            vmgang(a, &[verb])?.expect(0)?;
            vmgang(a, &[verb, &newest_job(lab)?])?.expect(0)?;
        }
        ["vmgang", ref arguments @ ..] => {
            bring_home(lab)?;
            if arguments.starts_with(&["gang", "add"]) {
                // Shown twice; a domain is in one gang at most.
                vmgang(a, &["gang", "remove", "web", "web1", "web2", "web3"])?;
            }
            vmgang(a, arguments)?.expect(0)?;
        }
        // What a host of the lab can do like any other; diversions are for packages.rs.
        ["ln", "-s", _, "/usr/local/bin/virsh"] | ["rm", "/usr/local/bin/virsh"] => {
            a.run(&words)?;
        }
        ["command", "-v", "virsh"] => {
            let found = a.run(&["sh", "-c", command])?;
            ensure!(found.trim() == "/usr/local/bin/virsh", "{found}");
        }
        ["dpkg-divert", ..] | ["rm", "/usr/bin/virsh", ..] => {}
        // As where it is switched on.
        ["virsh", ref arguments @ ..] if arguments.contains(&"--gang") => {
            bring_home(lab)?;
            a.run(&[&["/usr/libexec/vmgang/virsh"], arguments].concat())?;
        }
        ["virsh", ..] => {
            bring_home(lab)?;
            a.run(&words)?;
        }
        ["busctl", "introspect", ..] => {}
        ["busctl", "call", _, _, interface, method, ..] => {
            let xml = workspace().join(format!("xml-schemas/{interface}.xml"));
            let xml = std::fs::read_to_string(xml)?;
            ensure!(
                xml.contains(&format!("<method name=\"{method}\"")),
                "no such method"
            );
        }
        // What needs a host with systemd, a firewall or SELinux; packages are for packages.rs.
        [
            "systemctl" | "journalctl" | "systemd-sysusers" | "firewall-cmd" | "nft",
            ..,
        ] => {}
        ["dpkg", ..]
        | [
            "checkmodule" | "semodule_package" | "semodule" | "restorecon",
            ..,
        ] => {}
        ["usermod", "-a", "-G", group, "USER"] => {
            a.run(&["useradd", "user"])?;
            a.run(&["usermod", "-a", "-G", group, "user"])?;
        }
        // The second line of a comment.
        ["#", ..] => {}
        _ => bail!("the test does not know this command"),
    }
    Ok(())
}

/// What the documents say is to be configured.
fn configure(lab: &Lab) -> Result<()> {
    let config = "allow_libvirt = ['a', 'b']\n[ambient]\npeers = ['a', 'b']\n";
    for host in lab.hosts() {
        host.write_file("/etc/vmgang/vmgang.toml", config)?;
        host.vmgangd().restart()?;
    }
    Ok(())
}

/// Brings guests that an earlier command has migrated back to a.
fn bring_home(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    for guest in b.domains()? {
        b.virsh(&["migrate", "--live", "--p2p", &guest, &uri(a)])?;
    }
    Ok(())
}

/// Does something to a slow job, which must end it by an abort.
fn while_migrating(lab: &Lab, act: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    let a = lab.host("a")?;
    bring_home(lab)?;
    lab.shape(Some(10_000_000))?;
    let migrating = start_vmgang(a, &["migrate", "--all", "b"])?;
    let mut job = None;
    wait_until("the job is listed", || {
        let status = vmgang(a, &["status", "--json"])?;
        let jobs: serde_json::Value = serde_json::from_str(&status.stdout)?;
        job = jobs[0]["job"].as_str().map(str::to_owned);
        Ok(job.is_some())
    })?;
    act(&job.context("a job")?)?;
    Ended::from(migrating.wait_with_output()?).expect(4)?;
    lab.shape(None)?;
    Ok(())
}

fn newest_job(lab: &Lab) -> Result<String> {
    let history = vmgang(lab.host("a")?, &["history", "--json"])?.expect(0)?;
    let jobs: serde_json::Value = serde_json::from_str(&history.stdout)?;
    let job = jobs[0]["job"].as_str().context("no job in the history")?;
    Ok(job.to_owned())
}

#[test]
fn commands_of_the_lab_work() -> Result<()> {
    let program = vmgang_lab_program()?;
    let name = format!("docs-{}", std::process::id());
    let lab = |words: &[&str]| -> Result<()> {
        let output = Command::new(&program)
            .args(["--lab", &name])
            .args(words)
            .output()?;
        ensure!(
            output.status.success(),
            "{words:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    };
    let tree = install_tree()?.display().to_string();
    let run_all = || -> Result<()> {
        let both = [
            commands("tests/lab/README.md")?,
            commands("docs/tutorial.md")?,
        ];
        for command in both.concat() {
            // Where this build has it.
            let command = command.replace("target/install", &tree);
            let words: Vec<&str> = command.split_whitespace().collect();
            match words[..] {
                ["lab", ref arguments @ ..] => lab(arguments)?,
                ["cargo", "build", .., "-p", "vmgang-lab"] | ["make", "stage"] => {}
                _ => bail!("the test does not know this command: {command}"),
            }
        }
        Ok(())
    };
    let result = run_all();
    if result.is_err() {
        // It may be down already, or never have been up.
        let _ = lab(&["down"]);
    }
    result
}

fn vmgang_lab_program() -> Result<std::path::PathBuf> {
    if let Some(program) = std::env::var_os("VMGANG_LAB_BIN") {
        return Ok(program.into());
    }
    let test = std::env::current_exe()?;
    let directory = test.parent().and_then(|deps| deps.parent());
    let program = directory.context("the test has no directory")?.join("lab");
    ensure!(program.exists(), "{} is not built", program.display());
    Ok(program)
}
