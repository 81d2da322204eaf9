//! What `virsh migrate --gang --help` prints, in virsh's own form, and vmgang-virsh(1), both from the tables of options.

use std::fmt::Write;

use super::options::{HONOURED, REFUSED};

const NAME: &str = "migrate the whole gang of a domain to another host";

const DESCRIPTION: &str = "\
Migrate all running members of the gang that the domain belongs to, together and live, over vmgangd on both hosts. \
Without --gang virsh is as it always was. `vmgang migrate` does the same and has more options.

ctrl-C aborts: what has not switched over stays on the source. Exit code 0: all members migrated; 1: none did; 2: wrong \
usage, or an option that is refused; 3: some did; 4: aborted.";

const OPTIONS_BEFORE: &str = "\
Of virsh's own options before the command, -c takes qemu:///system only, -q and -t work as always, -e, -k and -K have nothing \
to do, and -r, -d and -l are refused.";

fn synopsis() -> String {
    let mut line = "migrate --gang <domain> <desturi>".to_owned();
    for option in HONOURED {
        if !["domain", "desturi", "gang", "help"].contains(&option.name) {
            let _ = write!(line, " [--{}{}]", option.name, option.takes.placeholder());
        }
    }
    line
}

/// The options, and what is said of each. virsh names those in brackets that need not be named.
fn honoured() -> impl Iterator<Item = (String, &'static str)> {
    HONOURED.iter().map(|option| {
        let name = match option.name {
            name @ ("domain" | "desturi") => format!("[--{name}]"),
            name => format!("--{name}"),
        };
        (format!("{name}{}", option.takes.placeholder()), option.what)
    })
}

/// The options that are refused, and why.
fn refused() -> impl Iterator<Item = (String, &'static str)> {
    REFUSED.iter().flat_map(|refused| {
        let option = |(name, takes): &(&str, super::options::Takes)| {
            (format!("--{name}{}", takes.placeholder()), refused.why)
        };
        refused.options.iter().map(option)
    })
}

/// The help as virsh prints that of a command.
pub fn help() -> String {
    let mut text = format!(
        "  NAME\n    migrate --gang - {NAME}\n\n  SYNOPSIS\n    {}\n",
        synopsis()
    );
    text.push_str("\n  DESCRIPTION\n");
    for paragraph in [DESCRIPTION, OPTIONS_BEFORE].join("\n\n").split('\n') {
        let _ = writeln!(text, "{}", format!("    {paragraph}").trim_end());
    }
    text.push_str("\n  OPTIONS\n");
    for (option, what) in honoured() {
        let _ = writeln!(text, "    {option:<16} {what}");
    }
    text.push_str("\n  REFUSED OPTIONS\n");
    for (option, why) in refused() {
        let _ = writeln!(text, "    {option:<16} {why}");
    }
    text
}

/// The manual page, for roff.
pub fn page() -> String {
    let mut page = format!(
        ".TH vmgang-virsh 1\n.SH NAME\nvmgang-virsh \\- {NAME}, by virsh\n.SH SYNOPSIS\nvirsh {}\n.SH DESCRIPTION\n",
        escaped(&synopsis())
    );
    for paragraph in [DESCRIPTION, OPTIONS_BEFORE].join("\n\n").split("\n\n") {
        let _ = writeln!(page, "{}\n.PP", escaped(paragraph));
    }
    page.push_str(".SH OPTIONS\n");
    for (option, what) in honoured() {
        let _ = writeln!(page, ".TP\n.B {}\n{}", escaped(&option), escaped(what));
    }
    page.push_str(".SH REFUSED OPTIONS\n");
    for (option, why) in refused() {
        let _ = writeln!(page, ".TP\n.B {}\n{}", escaped(&option), escaped(why));
    }
    page.push_str(".SH SEE ALSO\n.BR vmgang (1),\n.BR vmgang-migrate (1),\n.BR virsh (1)\n");
    page
}

/// Written so that roff shows it as it is.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_has_everything() {
        let help = help();
        for heading in [
            "NAME",
            "SYNOPSIS",
            "DESCRIPTION",
            "OPTIONS",
            "REFUSED OPTIONS",
        ] {
            assert!(
                help.lines().any(|line| line == format!("  {heading}")),
                "{heading}"
            );
        }
        for option in [
            "[--domain] <string>",
            "--timeout <number>",
            "--xml <string>",
            "--zerocopy ",
        ] {
            assert!(
                help.contains(&format!("\n    {option}")),
                "{option}: {help}"
            );
        }
        assert!(help.contains("[--migrateuri <string>]"), "{help}");
        assert!(!help.lines().any(|line| line.ends_with(' ')), "{help}");
    }

    #[test]
    fn roff_takes_the_page_as_text() {
        let page = page();
        assert!(page.contains(".B \\-\\-bandwidth <number>\n"), "{page}");
        let texts = page.lines().filter(|line| !line.starts_with('.'));
        assert!(
            !texts.clone().any(|line| line.starts_with(['\'', ' '])),
            "{page}"
        );
    }
}
