//! Programs that use vmgang without its command line, and one that uses that: the examples empty hosts.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::documents::workspace;
use vmgang_e2e::{boot_all, clone_guest, expect_running, install_tree, uri, verify_all, vmgang};
use vmgang_lab::{Host, Lab, LabOptions, RootRecipe};

const GUESTS: [&str; 3] = ["alone", "web1", "web2"];

#[test]
fn examples_empty_a_host() -> Result<()> {
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        root: RootRecipe {
            extra_packages: ["python3-dbus", "ansible-core"].map(str::to_owned).into(),
            ..RootRecipe::default()
        },
        ..LabOptions::default()
    };
    Lab::scope(&options, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        boot_all(a, &GUESTS.map(|name| clone_guest(name).with_idle()))?;
        vmgang(a, &["gang", "add", "web", "web1", "web2"])?.expect(0)?;

        let python = std::fs::read(example("evacuate.py"))?;
        a.write_file_mode("/root/evacuate.py", python, 0o755)?;
        let refused = a.exec(&["/root/evacuate.py", "qemu+tls://nowhere/system"])?;
        ensure!(!refused.status.success(), "{refused:?}");
        expect_running(a, &GUESTS)?;
        told(&a.run(&["/root/evacuate.py", &uri(b)])?)?;
        moved(a, b)?;

        // Built beside this test.
        let here = std::env::current_exe()?;
        let built = here.ancestors().nth(2).context("a build directory")?;
        let rust = std::fs::read(built.join("examples/evacuate"))?;
        b.write_file_mode("/root/evacuate", rust, 0o755)?;
        told(&b.run(&["/root/evacuate", &uri(a)])?)?;
        moved(b, a)?;

        let playbook = playbook()?;
        a.write_file("/root/evacuate.yml", playbook)?;
        let words = ["ansible-playbook", "-i", "hosta,", "-c", "local"];
        let destination = format!("destination={}", uri(b));
        let words = [&words[..], &["-e", &destination, "/root/evacuate.yml"]].concat();
        let said = a.run(&words)?;
        ensure!(said.contains("3 domains are on"), "{said}");
        moved(a, b)
    })
}

fn example(name: &str) -> std::path::PathBuf {
    workspace().join("plugin/client/examples").join(name)
}

fn told(said: &str) -> Result<()> {
    ensure!(
        said.contains("web: 2 domains") && said.contains("the rest: 1 domains"),
        "{said}"
    );
    Ok(())
}

fn moved(from: &Host, to: &Host) -> Result<()> {
    expect_running(from, &[])?;
    expect_running(to, &GUESTS)?;
    verify_all(to, &GUESTS)
}

/// The one in the guide.
fn playbook() -> Result<String> {
    let guide = std::fs::read_to_string(workspace().join("docs/operations.md"))?;
    let (_, rest) = guide.split_once("```yaml\n").context("a playbook")?;
    let (playbook, _) = rest.split_once("```").context("its end")?;
    Ok(playbook.to_owned())
}
