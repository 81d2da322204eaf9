//! The words after `virsh migrate`, by virsh's grammar and in virsh's words; and what vmgangd is asked for by them.
//! Pure.

use std::collections::BTreeMap;

use zbus::Variant;

use super::options::{self, POSITIONAL, Takes};

/// What libvirt takes when nobody says how many.
const PARALLEL_CONNECTIONS: u64 = 2;

#[derive(Debug, PartialEq)]
pub enum Asked {
    Help,
    Migration(Migration),
}

/// A gang's migration as vmgangd is asked for it.
#[derive(Debug, PartialEq)]
pub struct Migration {
    pub domain: String,
    pub destination: String,
    pub verbose: bool,
    /// Of `Migrate`.
    pub options: BTreeMap<&'static str, Variant<'static>>,
}

/// Reads the words, or says what is wrong with them, one problem a line.
pub fn parse(words: &[String]) -> Result<Asked, String> {
    let given = given(words)?;
    if given.has("help") {
        return Ok(Asked::Help);
    }
    given.check()?;
    Ok(Asked::Migration(Migration {
        domain: given.needed("domain")?,
        destination: given.needed("desturi")?,
        verbose: given.has("verbose"),
        options: given.options()?,
    }))
}

/// The options that were given, and their values.
struct Given(BTreeMap<&'static str, String>);

fn given(words: &[String]) -> Result<Given, String> {
    let mut given = BTreeMap::new();
    let mut words = words.iter();
    let mut only_data = false;
    while let Some(word) = words.next() {
        let named = word
            .strip_prefix("--")
            .filter(|name| !only_data && name.starts_with(|c: char| c.is_ascii_alphanumeric()));
        if word == "--" && !only_data {
            only_data = true;
            continue;
        }
        let Some(named) = named else {
            let free = POSITIONAL.iter().find(|name| !given.contains_key(*name));
            let name = free.ok_or_else(|| format!("unexpected data '{word}'"))?;
            given.insert(*name, word.clone());
            continue;
        };
        let (name, value) = match named.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (named, None),
        };
        let Some((name, takes, _)) = options::find(name) else {
            return Err(format!(
                "command 'migrate --gang' doesn't support option --{name}"
            ));
        };
        if given.contains_key(name) {
            return Err(format!("option --{name} already seen"));
        }
        let value = match (takes, value) {
            (Takes::Nothing, None) => String::new(),
            (Takes::Nothing, Some(_)) => return Err(format!("invalid '=' after option --{name}")),
            (_, Some(value)) => value,
            (_, None) => words
                .next()
                .cloned()
                .ok_or_else(|| format!("expected syntax: --{name}{}", takes.placeholder()))?,
        };
        given.insert(name, value);
    }
    Ok(Given(given))
}

impl Given {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn needed(&self, name: &str) -> Result<String, String> {
        match self.0.get(name).map(String::as_str) {
            None => Err(format!("command 'migrate --gang' requires <{name}> option")),
            Some("") => Err(format!(
                "Failed to get option '{name}': Option argument is empty"
            )),
            Some(value) => Ok(value.to_owned()),
        }
    }

    fn number(&self, name: &str) -> Result<Option<u64>, String> {
        let Some(value) = self.0.get(name) else {
            return Ok(None);
        };
        value.parse().map(Some).map_err(|_| {
            format!("Numeric value '{value}' for <{name}> option is malformed or out of range")
        })
    }

    /// Refusals, all at once; then what virsh has against pairs of options.
    fn check(&self) -> Result<(), String> {
        let refusal = |name: &&str| {
            let why = options::find(name)?.2?;
            Some(format!("--{name} does not go with --gang: {why}"))
        };
        let refusals: Vec<String> = self.0.keys().filter_map(refusal).collect();
        if !refusals.is_empty() {
            return Err(refusals.join("\n"));
        }
        for (option, needs) in [
            ("timeout-postcopy", "postcopy"),
            ("postcopy-after-precopy", "postcopy"),
            ("parallel-connections", "parallel"),
        ] {
            if self.has(option) && !self.has(needs) {
                return Err(format!("Option --{needs} is required by option --{option}"));
            }
        }
        let after = ["timeout-suspend", "timeout-postcopy"].map(|option| self.has(option));
        match after {
            [true, true] => Err(
                "Options --timeout-suspend and --timeout-postcopy are mutually exclusive".into(),
            ),
            [false, false] => Ok(()),
            _ if self.has("timeout") => Ok(()),
            _ => Err("migrate: Unexpected --timeout-* option without --timeout".into()),
        }
    }

    /// The dictionary of `Migrate`.
    fn options(&self) -> Result<BTreeMap<&'static str, Variant<'static>>, String> {
        let mut options = BTreeMap::new();
        for name in [
            "persistent",
            "undefinesource",
            "suspend",
            "unsafe",
            "auto-converge",
            "postcopy-resume",
            "tls",
        ] {
            if self.has(name) {
                options.insert(name, Variant::from(true));
            }
        }
        // What goes on has its members' passes behind it.
        if self.has("postcopy") && !self.has("postcopy-resume") {
            match self.has("postcopy-after-precopy") {
                true => options.insert("postcopy", Variant::from(true)),
                false => options.insert("on-stall", Variant::from("postcopy")),
            };
        }
        // To virsh, 0 is no timeout.
        if let Some(seconds) = self.number("timeout")?.filter(|seconds| *seconds > 0) {
            options.insert("timeout", Variant::from(seconds));
            let action = match self.has("timeout-postcopy") {
                true => "timeout-postcopy",
                false => "timeout-suspend",
            };
            options.insert(action, Variant::from(true));
        }
        if let Some(mib_per_s) = self.number("bandwidth")? {
            options.insert("bandwidth", Variant::from(mib_per_s));
        }
        if self.has("parallel") {
            let connections = self.number("parallel-connections")?;
            let connections = connections.unwrap_or(PARALLEL_CONNECTIONS);
            options.insert("parallel", Variant::from(connections));
        }
        if let Some(uri) = self.0.get("migrateuri") {
            options.insert("peer", Variant::from(peer(uri)?));
        }
        Ok(options)
    }
}

/// The host, and the port if there is one, of a migration URI.
fn peer(uri: &str) -> Result<String, String> {
    let host = uri
        .strip_prefix("tcp:")
        .map(|rest| rest.strip_prefix("//").unwrap_or(rest));
    match host.map(|host| host.strip_suffix('/').unwrap_or(host)) {
        Some(host) if !host.is_empty() && !host.contains('/') => Ok(host.to_owned()),
        _ => Err(format!(
            "--migrateuri is tcp://HOST[:PORT] with --gang, where the destination's vmgangd listens (port 16520 unless said), not {uri}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Asked, String> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        parse(&words)
    }

    fn migration(line: &str) -> Migration {
        match parsed(line) {
            Ok(Asked::Migration(migration)) => migration,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn domain_and_destination_in_each_of_virshs_ways() {
        for line in [
            "--gang web1 qemu+tls://b/system",
            "web1 --gang --live --p2p qemu+tls://b/system --change-protection",
            "--gang --domain web1 --desturi qemu+tls://b/system",
            "--gang --desturi=qemu+tls://b/system --domain=web1",
            "--gang --desturi qemu+tls://b/system web1",
            "--gang web1 -- qemu+tls://b/system",
        ] {
            let expected = Migration {
                domain: "web1".into(),
                destination: "qemu+tls://b/system".into(),
                verbose: false,
                options: BTreeMap::new(),
            };
            assert_eq!(migration(line), expected, "{line}");
        }
        assert_eq!(migration("--gang -- --odd b").domain, "--odd");
        assert_eq!(migration("--gang -odd b").domain, "-odd");
        assert!(migration("--gang a b --verbose").verbose);
    }

    #[test]
    fn options_become_vmgangs() {
        let yes = || Variant::from(true);
        let number = |number: u64| Variant::from(number);
        for (line, expected) in [
            (
                "--persistent --undefinesource",
                vec![("persistent", yes()), ("undefinesource", yes())],
            ),
            (
                "--suspend --unsafe --auto-converge",
                vec![
                    ("auto-converge", yes()),
                    ("suspend", yes()),
                    ("unsafe", yes()),
                ],
            ),
            ("--tls", vec![("tls", yes())]),
            ("--bandwidth 100", vec![("bandwidth", number(100))]),
            ("--parallel", vec![("parallel", number(2))]),
            (
                "--parallel --parallel-connections=4",
                vec![("parallel", number(4))],
            ),
            // virsh suspends unless told otherwise.
            (
                "--timeout 60",
                vec![("timeout", number(60)), ("timeout-suspend", yes())],
            ),
            (
                "--timeout 60 --timeout-suspend",
                vec![("timeout", number(60)), ("timeout-suspend", yes())],
            ),
            ("--timeout 0", vec![]),
            ("--postcopy", vec![("on-stall", Variant::from("postcopy"))]),
            (
                "--postcopy --postcopy-after-precopy",
                vec![("postcopy", yes())],
            ),
            (
                "--postcopy --timeout 9 --timeout-postcopy",
                vec![
                    ("on-stall", Variant::from("postcopy")),
                    ("timeout", number(9)),
                    ("timeout-postcopy", yes()),
                ],
            ),
            (
                "--postcopy --postcopy-resume",
                vec![("postcopy-resume", yes())],
            ),
            ("--migrateuri tcp://c", vec![("peer", Variant::from("c"))]),
            (
                "--migrateuri tcp:c:17",
                vec![("peer", Variant::from("c:17"))],
            ),
            (
                "tcp://[fd00::2]:17/",
                vec![("peer", Variant::from("[fd00::2]:17"))],
            ),
        ] {
            let options = migration(&format!("--gang a b {line}")).options;
            assert_eq!(options, expected.into_iter().collect(), "{line}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_as_virsh_says_it() {
        for (line, said) in [
            (
                "--gang",
                "command 'migrate --gang' requires <domain> option",
            ),
            ("--gang a", "requires <desturi> option"),
            ("--gang a --desturi", "expected syntax: --desturi <string>"),
            ("--gang a b --nonsense", "doesn't support option --nonsense"),
            ("--gang a b --live=1", "invalid '=' after option --live"),
            ("--gang a b --live --live", "option --live already seen"),
            ("--gang --gang a b", "option --gang already seen"),
            (
                "--gang a b tcp:c --migrateuri tcp:d",
                "option --migrateuri already seen",
            ),
            ("--gang a b tcp:c d e f g", "unexpected data 'g'"),
            (
                "--gang a b --timeout soon",
                "Numeric value 'soon' for <timeout> option is malformed or out of range",
            ),
            ("--gang a b --timeout -1", "Numeric value '-1'"),
            (
                "--gang a b --timeout-suspend",
                "migrate: Unexpected --timeout-* option without --timeout",
            ),
            (
                "--gang a b --timeout 5 --timeout-postcopy",
                "Option --postcopy is required by option --timeout-postcopy",
            ),
            (
                "--gang a b --postcopy-after-precopy",
                "Option --postcopy is required",
            ),
            (
                "--gang a b --parallel-connections 2",
                "Option --parallel is required",
            ),
            (
                "--gang a b --postcopy --timeout 5 --timeout-postcopy --timeout-suspend",
                "Options --timeout-suspend and --timeout-postcopy are mutually exclusive",
            ),
            ("--gang a b --migrateuri unix:///x", "not unix:///x"),
            ("--gang a b --migrateuri tcp://", "not tcp://"),
            (
                "--gang  b",
                "Failed to get option 'domain': Option argument is empty",
            ),
        ] {
            let error = parsed(line).expect_err(line);
            assert!(error.contains(said), "{line}: {error}");
        }
    }

    #[test]
    fn every_refused_option_is_refused_by_name_with_its_reason() {
        let mut refused = 0;
        for group in options::REFUSED {
            for (name, takes) in group.options {
                let value = match takes {
                    Takes::Nothing => "",
                    Takes::Text | Takes::Number => "=1",
                };
                let error = parsed(&format!("--gang a b --{name}{value}")).expect_err(name);
                let expected = format!("--{name} does not go with --gang: {}", group.why);
                assert_eq!(error, expected);
                refused += 1;
            }
        }
        assert!(refused > 20, "{refused}");
        let error = parsed("--gang a b tcp:c d e --xml f --live").expect_err("four of them");
        for name in ["--graphicsuri", "--listen-address", "--xml"] {
            assert!(error.lines().any(|line| line.starts_with(name)), "{error}");
        }
        assert_eq!(error.lines().count(), 3, "{error}");
    }

    #[test]
    fn help_needs_nothing_else() {
        for line in [
            "--gang --help",
            "--help --gang a b",
            "--gang --help --offline",
        ] {
            assert_eq!(parsed(line), Ok(Asked::Help), "{line}");
        }
    }
}
