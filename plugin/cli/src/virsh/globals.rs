//! virsh's own options, before its command; and whether that is the migration of a gang.

use std::ffi::OsString;

use clap::{Parser, Subcommand};

/// The only libvirt whose domains vmgangd knows.
const SYSTEM: [&str; 2] = ["qemu:///system", "qemu+unix:///system"];
/// What names a libvirt when no option does, the first one first.
const VARIABLES: [&str; 2] = ["VIRSH_DEFAULT_CONNECT_URI", "LIBVIRT_DEFAULT_URI"];

#[derive(Parser, Debug, Default)]
#[command(
    no_binary_name = true,
    disable_help_flag = true,
    disable_version_flag = true,
    disable_help_subcommand = true,
    args_override_self = true,
    infer_long_args = true
)]
pub struct Globals {
    #[arg(short, long, allow_hyphen_values = true)]
    connect: Option<String>,
    #[arg(short, long, allow_hyphen_values = true)]
    debug: Option<String>,
    /// Is for `virsh console`.
    #[arg(short, long, allow_hyphen_values = true)]
    escape: Option<String>,
    #[arg(short, long)]
    help: bool,
    /// There is no connection that these could keep alive.
    #[arg(short = 'k', long, allow_hyphen_values = true)]
    keepalive_interval: Option<String>,
    #[arg(short = 'K', long, allow_hyphen_values = true)]
    keepalive_count: Option<String>,
    #[arg(short, long, allow_hyphen_values = true)]
    log: Option<String>,
    #[arg(short, long)]
    pub quiet: bool,
    #[arg(short, long)]
    readonly: bool,
    #[arg(short, long)]
    pub timing: bool,
    #[arg(short = 'v')]
    version_short: bool,
    #[arg(short = 'V')]
    version_long: bool,
    #[arg(long, num_args = 0..=1, require_equals = true)]
    version: Option<Option<String>>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// virsh's command and what belongs to it.
    #[command(external_subcommand)]
    Words(Vec<String>),
}

/// The words after `migrate` if one of them is `--gang`; nothing if this is for the real virsh.
pub fn gang_migration(arguments: &[OsString]) -> Option<(Globals, Vec<String>)> {
    // Nearly always the end of it.
    if !arguments.iter().any(|word| word == "--gang") {
        return None;
    }
    let mut globals = Globals::try_parse_from(arguments.get(1..)?).ok()?;
    if globals.help || globals.version_short || globals.version_long || globals.version.is_some() {
        return None;
    }
    let Some(Command::Words(mut words)) = globals.command.take() else {
        return None;
    };
    if words.first()? != "migrate" {
        return None;
    }
    words.remove(0);
    // What comes after "--" are no options.
    let asked = words.iter().take_while(|word| *word != "--");
    asked.clone().any(|word| word == "--gang").then_some(())?;
    Some((globals, words))
}

impl Globals {
    /// Says what of these options does not go with a gang.
    pub fn check(&self) -> Result<(), String> {
        self.check_with(|variable| std::env::var(variable).ok())
    }

    fn check_with(&self, variable: impl Fn(&str) -> Option<String>) -> Result<(), String> {
        if self.readonly {
            return Err("-r (--readonly) does not go with --gang: it asks for a connection that changes nothing; leave it out".into());
        }
        for (given, name) in [(&self.debug, "-d (--debug)"), (&self.log, "-l (--log)")] {
            if given.is_some() {
                return Err(format!(
                    "{name} does not go with --gang: the log of a gang's migration is vmgangd's, `journalctl -u vmgangd`"
                ));
            }
        }
        let options = self
            .connect
            .iter()
            .map(|uri| ("-c (--connect)", uri.clone()));
        let variables = VARIABLES
            .iter()
            .filter_map(|name| Some((*name, variable(name)?)));
        // An empty one names nothing.
        match options.chain(variables).find(|(_, uri)| !uri.is_empty()) {
            Some((name, uri)) if !SYSTEM.contains(&uri.as_str()) => Err(format!(
                "{name} names {uri}, but --gang is for the domains of qemu:///system on this host; run it on the host where the gang is"
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gang(line: &str) -> Option<(Globals, String)> {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let (globals, words) = gang_migration(&arguments)?;
        Some((globals, words.join(" ")))
    }

    #[test]
    fn a_gang_is_asked_for_by_an_option_of_migrate() {
        for (line, words) in [
            ("virsh migrate --gang web1 b", "--gang web1 b"),
            ("virsh -q migrate web1 b --gang", "web1 b --gang"),
            (
                "virsh -qt -c qemu:///system migrate --gang a b",
                "--gang a b",
            ),
            ("virsh -cqemu:///system migrate --gang a b", "--gang a b"),
            (
                "virsh --connect=qemu:///system -k0 -K 0 migrate --gang a b",
                "--gang a b",
            ),
            (
                "virsh --conn qemu:///system migrate --gang -c b",
                "--gang -c b",
            ),
            ("virsh -q -q migrate --gang --help", "--gang --help"),
        ] {
            let found = gang(line).map(|(_, words)| words);
            assert_eq!(found.as_deref(), Some(words), "{line}");
        }
    }

    #[test]
    fn everything_else_is_for_the_real_virsh() {
        for line in [
            "virsh",
            "virsh list --all",
            "virsh migrate web1 b",
            "virsh migrate -- --gang b",
            "virsh list --gang",
            "virsh help migrate --gang",
            "virsh -h migrate --gang a b",
            "virsh --version migrate --gang a b",
            "virsh --version=long migrate --gang",
            "virsh -v migrate --gang",
            "virsh --nonsense migrate --gang a b",
            "virsh -c migrate --gang",
            "virsh --gang",
            "virsh echo migrate --gang",
        ] {
            assert!(gang(line).is_none(), "{line}");
        }
        assert!(gang_migration(&[]).is_none());
    }

    #[test]
    fn only_this_hosts_system_libvirt_has_gangs() {
        let check = |line: &str, variable: &[(&str, &str)]| {
            let (globals, _) = gang(line).expect(line);
            globals.check_with(|wanted| {
                let found = variable.iter().find(|(name, _)| *name == wanted);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        let plain = "virsh migrate --gang a b";
        assert_eq!(check(plain, &[]), Ok(()));
        assert_eq!(check(plain, &[("LIBVIRT_DEFAULT_URI", "")]), Ok(()));
        assert_eq!(
            check(plain, &[("LIBVIRT_DEFAULT_URI", "qemu:///system")]),
            Ok(())
        );
        let named = |result: Result<(), String>, what: &str| {
            let error = result.expect_err(what);
            assert!(error.contains(what), "{error}");
        };
        named(
            check(plain, &[("LIBVIRT_DEFAULT_URI", "qemu:///session")]),
            "LIBVIRT_DEFAULT_URI names qemu:///session",
        );
        named(
            check(plain, &[("VIRSH_DEFAULT_CONNECT_URI", "xen:///")]),
            "VIRSH_DEFAULT_CONNECT_URI",
        );
        let here = "virsh -c qemu:///system migrate --gang a b";
        assert_eq!(check(here, &[("LIBVIRT_DEFAULT_URI", "xen:///")]), Ok(()));
        named(
            check("virsh -c qemu+ssh://c/system migrate --gang a b", &[]),
            "--connect",
        );
        named(check("virsh -r migrate --gang a b", &[]), "--readonly");
        named(check("virsh -d 0 migrate --gang a b", &[]), "--debug");
        named(check("virsh --log=x migrate --gang a b", &[]), "--log");
    }
}
