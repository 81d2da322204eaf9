//! The packages on a clean Debian: installed, used, upgraded, removed and purged with dpkg; built with
//! rpmbuild; and what is in them, by the programs that read it on a real host.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use vmgang_e2e::documents::{commands, workspace};
use vmgang_e2e::{Ended, install_tree};
use vmgang_lab::{Host, Lab, LabOptions, RootRecipe};

/// Beside what every host of the lab has.
const TOOLS: [&str; 9] = [
    "apparmor",
    "checkpolicy",
    "init-system-helpers",
    "make",
    "man-db",
    "rpm",
    "rpmlint",
    "selinux-policy-default",
    "semodule-utils",
];

const HOOK: &str = "/etc/libvirt/hooks/qemu.d/vmgang";
/// A user without rights.
const READER: &str = "reader";
const CONFIGURATION: &str = "/etc/vmgang/vmgang.toml";
const VIRSH: &str = "/usr/bin/virsh";
const REAL_VIRSH: &str = "/usr/bin/virsh.libvirt";
const SNIPPET: &str = "/etc/apparmor.d/abstractions/libvirt-qemu.d/vmgang";

#[test]
fn packages_install_upgrade_and_leave_nothing() -> Result<()> {
    let options = LabOptions {
        hosts: vec!["a".to_owned()],
        root: RootRecipe {
            extra_packages: TOOLS.map(str::to_owned).into(),
            ..RootRecipe::default()
        },
        ..LabOptions::default()
    };
    Lab::scope(&options, |lab| {
        let host = lab.host("a")?;
        // The lab's roots have no manuals.
        host.run(&["rm", "/etc/dpkg/dpkg.cfg.d/lab"])?;
        let package = "/root/vmgang.deb";
        host.write_file(package, fs::read(built()?)?)?;
        let newer = newer(host, package)?;
        let newer_virsh = newer_virsh(host)?;
        host.run(&["useradd", READER])?;
        let before = files(host)?;

        install(host, package)?;
        is_installed(host)?;
        works(host)?;
        unit_is_sound(host)?;
        manuals_are_sound(host)?;
        completions_complete(host)?;
        virsh_has_a_front_end(host)?;
        virsh_can_be_upgraded_and_missing(host, &newer_virsh)?;
        virsh_can_be_switched_off_and_on(host)?;
        apparmor_takes_the_snippet(host)?;
        selinux_takes_the_module(host)?;
        let packed =
            "dpkg -L vmgang | while read -r file; do test -d \"$file\" || echo \"$file\"; done";
        let packed = listed(&host.run(&["sh", "-c", packed])?);
        rpm_has_the_same(host, &packed)?;

        upgrade(host, &newer)?;
        remove(host)?;
        virsh_is_its_own(host)?;
        // Taken in again, it is as it was, and as it is from the start after a purge.
        install(host, package)?;
        virsh_has_a_front_end(host)?;
        purge(host, &before)?;
        virsh_is_its_own(host)?;

        // Somebody has put people into the group: it stays.
        install(host, package)?;
        virsh_has_a_front_end(host)?;
        host.run(&["useradd", "--groups", "vmgang", "somebody"])?;
        host.run(&["dpkg", "--purge", "vmgang"])?;
        host.run(&["getent", "group", "vmgang"])?;
        Ok(())
    })
}

/// The package that `make deb` or `make test-packages` has built.
fn built() -> Result<PathBuf> {
    let directory = install_tree()?.with_file_name("deb");
    let entries = fs::read_dir(&directory)
        .with_context(|| format!("no {}; run `make test-packages`", directory.display()))?;
    let mut packages = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "deb") {
            packages.push(path);
        }
    }
    match packages.as_slice() {
        [package] => Ok(package.clone()),
        others => bail!("one package was due: {others:?}"),
    }
}

/// The same package as a version to come, with another text in both configuration files.
fn newer(host: &Host, package: &str) -> Result<String> {
    let script = format!(
        "cd /root && dpkg-deb -R {package} next && sed -i 's/^Version: .*/&+next/' next/DEBIAN/control \
         && echo '# next' >> next{CONFIGURATION} && echo '  # next' >> next{SNIPPET} \
         && dpkg-deb -b next next.deb && rm -r next"
    );
    host.run(&["sh", "-c", &script])?;
    Ok("/root/next.deb".to_owned())
}

/// libvirt-clients with another virsh in it, which differs by a byte at its end.
fn newer_virsh(host: &Host) -> Result<String> {
    let script = "set -e; cd /root; mkdir -p clients/DEBIAN\n\
        dpkg -L libvirt-clients | sed 's|^/||' | tar -C / -c --no-recursion -T - | tar -x -C clients\n\
        dpkg-query -W -f 'Package: libvirt-clients\\nVersion: ${Version}+next\\nArchitecture: ${Architecture}\\n\
            Maintainer: ${Maintainer}\\nDescription: virsh\\n' libvirt-clients | sed 's/^ *//' > clients/DEBIAN/control\n\
        echo >> clients/usr/bin/virsh\n\
        dpkg-deb -b clients clients.deb; rm -r clients";
    host.run(&["bash", "-c", script])?;
    Ok("/root/clients.deb".to_owned())
}

/// All files of the host but those that dpkg, systemd's tools and daemons write for themselves.
fn files(host: &Host) -> Result<BTreeSet<String>> {
    let found = host.run(&[
        "find",
        "/etc",
        "/usr",
        "/var",
        "/run",
        "/opt",
        "/srv",
        "-xdev",
        "-not",
        "-path",
        "/var/lib/dpkg*",
        "-not",
        "-path",
        "/var/log*",
        "-not",
        "-path",
        "/var/cache*",
        "-not",
        "-path",
        "/run/libvirt*",
        "-not",
        "-path",
        "/run/systemd*",
        "-not",
        "-path",
        "/var/lib/libvirt*",
    ])?;
    Ok(found.lines().map(str::to_owned).collect())
}

fn install(host: &Host, package: &str) -> Result<()> {
    host.command(&["dpkg", "--force-confold", "--install", package])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .run()?;
    Ok(())
}

fn status(host: &Host) -> Result<String> {
    let format = "-f=${db:Status-Status} ${Version}";
    Ok(host.run(&["dpkg-query", "-W", format, "vmgang"])?)
}

fn is_installed(host: &Host) -> Result<()> {
    ensure!(status(host)?.starts_with("installed "), "{}", status(host)?);
    host.run(&["getent", "group", "vmgang"])?;
    let mode = host.run(&["stat", "-c", "%a %U", "/run/vmgang"])?;
    ensure!(mode.trim() == "711 root", "/run/vmgang: {mode}");
    let conffiles = host.run(&["dpkg-query", "-W", "-f=${Conffiles}", "vmgang"])?;
    for file in [CONFIGURATION, SNIPPET, HOOK] {
        ensure!(
            conffiles.contains(file),
            "{file} is no configuration file: {conffiles}"
        );
    }
    let changed = host.run(&["dpkg", "--verify", "vmgang"])?;
    ensure!(changed.is_empty(), "{changed}");
    host.run(&[
        "test",
        "-L",
        "/etc/systemd/system/multi-user.target.wants/vmgangd.service",
    ])?;
    Ok(())
}

/// The daemon starts with the packaged files, and answers the packaged command.
fn works(host: &Host) -> Result<()> {
    host.vmgangd().start()?;
    host.run(&["vmgang", "gang", "list"])?;
    host.run(&["runuser", "-u", READER, "--", "vmgang", "gang", "list"])?;
    let version = host.run(&["vmgang", "--version"])?;
    let status = status(host)?;
    let (_, packaged) = status.split_once(' ').context("a version")?;
    ensure!(
        version.trim() == format!("vmgang {packaged}"),
        "{version} in {packaged}"
    );
    host.vmgangd().stop()?;
    Ok(())
}

/// dpkg tells of the front end, and that nobody has tampered with libvirt's file.
fn virsh_has_a_front_end(host: &Host) -> Result<()> {
    let diverted = host.run(&["dpkg-divert", "--list", "vmgang"])?;
    ensure!(
        diverted.contains(&format!("{VIRSH} to {REAL_VIRSH} by vmgang")),
        "{diverted}"
    );
    // It misses manuals, which the lab's roots never had.
    let altered: Ended = host.exec(&["dpkg", "--verify", "libvirt-clients"])?.into();
    let programs = altered.stdout.lines().filter(|line| line.contains("/bin/"));
    ensure!(programs.count() == 0, "{altered:?}");
    let (front, real) = (host.run(&[VIRSH, "-v"])?, host.run(&[REAL_VIRSH, "-v"])?);
    ensure!(front == real, "{front}, {real}");
    host.run(&["virsh", "migrate", "--gang", "--help"])?;
    Ok(())
}

/// As if vmgang had never been there.
fn virsh_is_its_own(host: &Host) -> Result<()> {
    let diverted = host.run(&["dpkg-divert", "--list", "vmgang"])?;
    ensure!(diverted.is_empty(), "{diverted}");
    ensure!(!host.file_exists(REAL_VIRSH), "{REAL_VIRSH} is still there");
    host.run(&["virsh", "--version"])?;
    let unknown: Ended = host.exec(&["virsh", "migrate", "--gang", "--help"])?.into();
    ensure!(unknown.expect(1)?.stderr.contains("support option --gang"));
    Ok(())
}

fn virsh_can_be_upgraded_and_missing(host: &Host, newer: &str) -> Result<()> {
    let bytes = |file: &str| host.run(&["stat", "-L", "-c", "%s", file]);
    let (front, real) = (bytes(VIRSH)?, bytes(REAL_VIRSH)?);
    install(host, newer)?;
    ensure!(bytes(VIRSH)? == front, "the front end was overwritten");
    ensure!(bytes(REAL_VIRSH)? != real, "virsh is the old one");
    virsh_has_a_front_end(host)?;

    host.run(&["dpkg", "--remove", "--force-depends", "libvirt-clients"])?;
    for words in [&["virsh", "list"][..], &["virsh"]] {
        let missing = Ended::from(host.exec(words)?).expect(127)?;
        ensure!(missing.stderr.contains("libvirt-clients"), "{missing:?}");
    }
    install(host, newer)?;
    virsh_has_a_front_end(host)
}

/// By the commands that the guide has, which then hold over an upgrade.
fn virsh_can_be_switched_off_and_on(host: &Host) -> Result<()> {
    switch_virsh(host, "rm /usr/bin/virsh && dpkg-divert")?;
    virsh_is_its_own(host)?;
    switch_virsh(host, "dpkg-divert --package vmgang --rename --divert")?;
    virsh_has_a_front_end(host)
}

fn switch_virsh(host: &Host, begins: &str) -> Result<()> {
    let commands = commands("docs/operations.md")?;
    let command = commands.iter().find(|command| command.starts_with(begins));
    host.run(&["sh", "-c", command.context("the guide does not say how")?])?;
    Ok(())
}

fn unit_is_sound(host: &Host) -> Result<()> {
    let unit = "/usr/lib/systemd/system/vmgangd.service";
    let said: Ended = host.exec(&["systemd-analyze", "verify", unit])?.into();
    let about_it: Vec<&str> = said
        .stderr
        .lines()
        .filter(|line| line.contains("vmgang"))
        .collect();
    ensure!(about_it.is_empty(), "{about_it:?}");
    // The exposure in tenths.
    let limit = "--threshold=40";
    host.run(&["systemd-analyze", "security", "--offline=true", limit, unit])?;
    Ok(())
}

fn manuals_are_sound(host: &Host) -> Result<()> {
    let pages = host.run(&["sh", "-c", "ls /usr/share/man/man*/vmgang*"])?;
    for page in [
        "vmgang.1",
        "vmgang-migrate.1",
        "vmgang-virsh.1",
        "vmgang.toml.5",
        "vmgangd.8",
    ] {
        ensure!(
            pages.contains(&format!("/{page}.gz")),
            "{page} is not in {pages}"
        );
    }
    for page in pages.lines() {
        let words = [
            "man",
            "--warnings",
            "-E",
            "UTF-8",
            "-l",
            "-Tutf8",
            "-Z",
            page,
        ];
        let shown: Ended = host.exec(&words)?.into();
        ensure!(
            shown.code == 0 && shown.stderr.is_empty(),
            "{page}: {}",
            shown.stderr
        );
    }
    let page = host.run(&["man", "-P", "cat", "5", "vmgang.toml"])?;
    for key in [
        "allow_peers = []",
        "[scan]",
        "checkpoint_s = 900",
        "server_key =",
    ] {
        ensure!(page.contains(key), "{key} is not in {page}");
    }
    Ok(())
}

fn completions_complete(host: &Host) -> Result<()> {
    let script = ". /usr/share/bash-completion/completions/vmgang; COMP_WORDS=(vmgang mig); \
                  COMP_CWORD=1; _vmgang vmgang mig vmgang; echo ${COMPREPLY[@]}";
    let completed = host.run(&["bash", "-c", script])?;
    ensure!(completed.trim() == "migrate", "{completed}");
    for file in [
        "zsh/site-functions/_vmgang",
        "fish/vendor_completions.d/vmgang.fish",
    ] {
        ensure!(
            host.read_text(format!("/usr/share/{file}"))?
                .contains("postcopy"),
            "{file}"
        );
    }
    Ok(())
}

/// libvirt's own abstraction takes the snippet in, and a profile of a guest made of it has the rule.
fn apparmor_takes_the_snippet(host: &Host) -> Result<()> {
    let profile = "#include <tunables/global>\nprofile guest flags=(attach_disconnected) {\n  \
                   #include <abstractions/libvirt-qemu>\n}\n";
    host.write_file("/root/guest", profile)?;
    let parser = ["apparmor_parser", "--skip-kernel-load", "--skip-cache"];
    let shown = host.run(&[&parser[..], &["--preprocess", "/root/guest"]].concat())?;
    ensure!(
        shown.contains("run/vmgang/migrate/*/*/stream.sock rw,"),
        "{shown}"
    );
    host.run(&[&parser[..], &["/root/guest"]].concat())?;
    let enabled = host
        .read_text("/sys/module/apparmor/parameters/enabled")
        .unwrap_or_default();
    if enabled.trim() == "Y" {
        host.run(&["apparmor_parser", "--replace", "/root/guest"])?;
        host.run(&["apparmor_parser", "--remove", "/root/guest"])?;
    } else {
        println!("this kernel has no AppArmor: the profile was only compiled");
    }
    Ok(())
}

/// The module compiles as the guide says, and links with Debian's whole policy.
fn selinux_takes_the_module(host: &Host) -> Result<()> {
    let script = "set -e; mkdir /root/selinux; cd /root/selinux; from=/usr/share/vmgang/selinux\n\
        checkmodule -M -m -o vmgang.mod $from/vmgang.te\n\
        semodule_package -o vmgang.pp -m vmgang.mod -f $from/vmgang.fc\n\
        for module in /usr/share/selinux/default/*.pp.bz2; do\n\
            bunzip2 -c $module > $(basename ${module%.bz2})\n\
        done\n\
        mv base.pp base; semodule_link -o linked base *.pp; semodule_expand linked policy";
    host.run(&["sh", "-c", script])?;
    host.run(&["rm", "-r", "/root/selinux"])?;
    Ok(())
}

/// rpmlint takes the spec, rpmbuild builds from it, and what comes out has the same files.
fn rpm_has_the_same(host: &Host, packed: &BTreeSet<String>) -> Result<()> {
    let spec = "/root/vmgang.spec";
    host.write_file(spec, fs::read(workspace().join("packaging/vmgang.spec"))?)?;
    let said = host.run(&["rpmlint", spec])?;
    ensure!(said.contains(" 0 errors"), "{said}");

    let version = env!("CARGO_PKG_VERSION");
    let sources = Command::new("tar")
        .args([
            "--create",
            "--gzip",
            "--transform",
            &format!("s|^|vmgang-{version}/|"),
        ])
        .args([
            "Makefile",
            "LICENSE",
            "README.md",
            "CHANGELOG.md",
            "docs",
            "packaging",
            "plugin/virt-manager",
            "xml-schemas",
        ])
        .args(workspace().join("hooks").is_dir().then_some("hooks"))
        .current_dir(workspace())
        .output()?;
    ensure!(sources.status.success(), "{sources:?}");
    host.write_file(
        format!("/root/rpmbuild/SOURCES/vmgang-{version}.tar.gz"),
        sources.stdout,
    )?;
    let test = std::env::current_exe()?;
    let build = test
        .ancestors()
        .nth(2)
        .context("the test has no directory")?;
    let manuals = fs::read(build.join("examples/manuals"))?;
    host.write_file_mode("/root/prebuilt/examples/manuals", manuals, 0o755)?;
    host.run(&[
        "cp",
        "/usr/bin/vmgang",
        "/usr/sbin/vmgangd",
        "/usr/sbin/vmgang-hook",
        "/root/prebuilt",
    ])?;
    host.run(&[
        "cp",
        "/usr/libexec/vmgang/virsh",
        "/root/prebuilt/vmgang-virsh",
    ])?;
    let mut build = vec!["rpmbuild", "-bb", "--nodeps", spec];
    for macro_of_its_host in [
        "prebuilt /root/prebuilt",
        "_unitdir /usr/lib/systemd/system",
        "_sysusersdir /usr/lib/sysusers.d",
        "_tmpfilesdir /usr/lib/tmpfiles.d",
        "_libexecdir /usr/libexec",
        "_sharedstatedir /var/lib",
        "_sysconfdir /etc",
        "python3_sitelib /usr/lib/python3/dist-packages",
    ] {
        build.extend(["--define", macro_of_its_host]);
    }
    host.run(&build)?;
    let format = "[%{FILEMODES:perms} %{FILENAMES}\n]";
    let query =
        format!("rpm -qp --qf '{format}' /root/rpmbuild/RPMS/*/*.rpm | sed -n 's/^-[^ ]* //p'");
    let built = listed(&host.run(&["sh", "-c", &query])?);
    let (more, less): (Vec<_>, Vec<_>) = (
        built.difference(packed).collect(),
        packed.difference(&built).collect(),
    );
    ensure!(
        more.is_empty() && less.is_empty(),
        "the RPM has {more:?} more, and lacks {less:?}"
    );
    host.run(&["rm", "-r", "/root/rpmbuild", "/root/prebuilt"])?;
    Ok(())
}

/// The administrator's file stays, the one nobody has touched is the new one.
fn upgrade(host: &Host, newer: &str) -> Result<()> {
    let mine = host.read_text(CONFIGURATION)? + "connections = 2\n";
    host.write_file(CONFIGURATION, &mine)?;
    host.write_file("/var/lib/vmgang/jobs/kept.txt", "")?;
    switch_virsh(host, "rm /usr/bin/virsh && dpkg-divert")?;
    install(host, newer)?;
    virsh_is_its_own(host)?;
    switch_virsh(host, "dpkg-divert --package vmgang --rename --divert")?;
    ensure!(status(host)?.ends_with("+next"), "{}", status(host)?);
    ensure!(
        host.read_text(CONFIGURATION)? == mine,
        "the administrator's file has changed"
    );
    ensure!(
        host.read_text(SNIPPET)?.contains("# next"),
        "the snippet is the old one"
    );
    host.vmgangd().start()?;
    host.vmgangd().stop()?;
    Ok(())
}

fn remove(host: &Host) -> Result<()> {
    host.run(&["dpkg", "--remove", "vmgang"])?;
    ensure!(
        status(host)?.starts_with("config-files "),
        "{}",
        status(host)?
    );
    for gone in [
        "/usr/bin/vmgang",
        "/usr/sbin/vmgangd",
        "/usr/libexec/vmgang",
        "/usr/lib/systemd/system/vmgangd.service",
    ] {
        ensure!(!host.file_exists(gone), "{gone} is still there");
    }
    for kept in [CONFIGURATION, "/var/lib/vmgang/jobs/kept.txt"] {
        ensure!(host.file_exists(kept), "{kept} is gone");
    }
    Ok(())
}

fn purge(host: &Host, before: &BTreeSet<String>) -> Result<()> {
    host.run(&["dpkg", "--purge", "vmgang"])?;
    let after = files(host)?;
    let left: Vec<_> = after.difference(before).collect();
    let lost: Vec<_> = before.difference(&after).collect();
    ensure!(
        left.is_empty() && lost.is_empty(),
        "left: {left:?}, lost: {lost:?}"
    );
    let group: Ended = host.exec(&["getent", "group", "vmgang"])?.into();
    ensure!(group.code == 2, "{group:?}");
    Ok(())
}

/// Files, without what each kind of package has for itself.
fn listed(lines: &str) -> BTreeSet<String> {
    lines
        .lines()
        .map(|line| line.trim_end_matches(".gz").to_owned())
        .filter(|line| {
            !line.starts_with("/usr/share/doc") && !line.starts_with("/usr/share/licenses")
        })
        .collect()
}
