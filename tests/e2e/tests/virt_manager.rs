//! "Migrate gang..." in a real virt-manager, driven through accessibility on a screen that nobody sees. Keeps pictures.
//!
//! The steps on the screen are in `virt_manager/walk.py`; what has become of the guests is checked here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use vmgang_e2e::documents::workspace;
use vmgang_e2e::{
    Ended, boot_all, clone_guest, expect_clean, expect_not_paused, expect_running, install_tree,
    verify_all, vmgang, wait_until,
};
use vmgang_lab::{Host, HostChild, Lab, LabOptions, RootRecipe};

/// Beside what every host of the lab has.
const DESKTOP: [&str; 6] = [
    "adwaita-icon-theme",
    "python3-dogtail",
    "virt-manager",
    "xdotool",
    "xfwm4",
    "xvfb",
];
const FILES: [&str; 3] = ["desktop.py", "session.sh", "walk.py"];
const PICTURES: [&str; 5] = ["menu", "dialog", "progress", "result", "error"];

/// Slow enough that a job can be looked at, closed, opened and aborted.
const SLOW_BITS_PER_S: u64 = 10_000_000;
const GANG: [&str; 3] = ["web1", "web2", "web3"];

#[test]
fn virt_manager_migrates_a_gang() -> Result<()> {
    let desktop = RootRecipe {
        extra_packages: DESKTOP.map(str::to_owned).into(),
        ..RootRecipe::default()
    };
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        other_roots: BTreeMap::from([("a".to_owned(), desktop)]),
        ..LabOptions::default()
    };
    Lab::scope(&options, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        for name in FILES {
            let file = workspace().join("tests/e2e/virt_manager").join(name);
            a.write_file(format!("/opt/test/{name}"), std::fs::read(file)?)?;
        }
        let guests = [&GANG[..], &["db1"]].concat();
        let specs: Vec<_> = guests
            .iter()
            .map(|name| clone_guest(name).with_memory_mib(96).with_idle())
            .collect();
        boot_all(a, &specs)?;
        let added = [&["gang", "add", "web"], &GANG[..]].concat();
        vmgang(a, &added)?.expect(0)?;

        let anna = Screen::start(a, "anna", "libvirt,vmgang")?;
        anna.walk("menus")?;
        anna.walk("look")?;
        lab.shape(Some(SLOW_BITS_PER_S))?;
        anna.walk("abort")?;
        expect_running(a, &guests)?;
        expect_not_paused(a, &guests)?;
        lab.shape(None)?;
        anna.walk("migrate")?;
        expect_running(b, &GANG)?;
        verify_all(b, &GANG)?;

        anna.walk("refuse")?;
        expect_running(a, &["db1"])?;
        Screen::start(a, "ben", "libvirt")?.walk("forbidden")?;
        expect_running(a, &["db1"])?;

        // Before the last guest leaves: a virt-manager that vmgang does not fit.
        let extension = "/usr/lib/python3/dist-packages/vmgang_virt_manager/menu.py";
        let text = a.read_text(extension)?;
        a.write_file(extension, text.replace("VMActionMenu", "NoSuchMenu"))?;
        let carla = Screen::start(a, "carla", "libvirt,vmgang")?;
        carla.walk("broken")?;
        let log = carla.log()?;
        ensure!(log.contains("vmgang: no \"Migrate gang...\""), "{log}");

        anna.walk("everything")?;
        expect_running(a, &[])?;
        for host in [a, b] {
            expect_clean(host)?;
        }
        keep_pictures(&anna)
    })
}

/// A user's screen with virt-manager on it.
struct Screen {
    host: Host,
    user: String,
    _session: HostChild,
}

impl Screen {
    fn start(host: &Host, user: &str, groups: &str) -> Result<Screen> {
        host.run(&["useradd", "--create-home", "--groups", groups, user])?;
        let directory = format!("/run/{user}");
        host.run(&["install", "-d", "-o", user, "-m", "0700", &directory])?;
        let as_user = ["runuser", "-u", user, "--"];
        let session = ["dbus-run-session", "--", "sh", "/opt/test/session.sh"];
        let words = [&as_user[..], &session, &[&directory]].concat();
        let session = host
            .command(&words)
            .env("HOME", &format!("/home/{user}"))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        wait_until("the screen is there", || {
            Ok(host.file_exists(format!("{directory}/environment")))
        })?;
        Ok(Screen {
            host: host.clone(),
            user: user.to_owned(),
            _session: session,
        })
    }

    /// Does a step of `walk.py`.
    fn walk(&self, step: &str) -> Result<()> {
        let script = "cd /opt/test && . /run/$0/environment && PYTHONDONTWRITEBYTECODE=1 exec python3 walk.py $1";
        let words = [
            "runuser", "-u", &self.user, "--", "sh", "-c", script, &self.user, step,
        ];
        let walked: Ended = self.host.exec(&words)?.into();
        if walked.code != 0 {
            // Where the lab looks for logs to keep.
            let failure = format!("/run/{}/failure.png", self.user);
            self.host.exec(&["cp", &failure, "/var/log"])?;
        }
        ensure!(
            walked.code == 0,
            "{step}: {}\n{}",
            walked.stderr,
            last_lines(&self.log()?)
        );
        Ok(())
    }

    /// virt-manager's own words.
    fn log(&self) -> Result<String> {
        Ok(self
            .host
            .read_text(format!("/run/{}/virt-manager.log", self.user))?)
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// For docs/pictures, in a directory beside the installed tree.
fn keep_pictures(screen: &Screen) -> Result<()> {
    let directory: PathBuf = install_tree()?.with_file_name("pictures");
    std::fs::create_dir_all(&directory)?;
    for name in PICTURES {
        let file = format!("{name}.png");
        let picture = screen
            .host
            .read_file(format!("/run/{}/{file}", screen.user))
            .with_context(|| format!("no picture {name}"))?;
        ensure!(picture.len() > 5000, "the picture {name} is empty");
        std::fs::write(directory.join(format!("virt-manager-{file}")), picture)?;
    }
    Ok(())
}
