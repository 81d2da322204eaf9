//! Writes what is made from other sources at build time, into one directory: the manual pages and
//! shell completions of `vmgang`, from its own grammar, vmgang-virsh(1), and vmgang.toml(5), from the packaged file.
//! Must not: say anything of its own about options and keys.

mod config_page;

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;
use vmgang_cli::arguments::Arguments;
use vmgang_cli::virsh::manual;

/// What the grammar does not know, at the end of vmgang(1).
const EPILOGUE: &str = "\
.SH EXIT STATUS
.TP
.B 0
all members migrated; of other commands: done
.TP
.B 1
no member migrated, because something failed or was refused; of other commands: an error
.TP
.B 2
wrong usage
.TP
.B 3
some members migrated and some not
.TP
.B 4
aborted on request
.PP
With 1 and 4 every member is on the source as before, unless its state is
.BR failed :
then its error says what is known.
.SH SEE ALSO
.BR vmgang-virsh (1),
.BR vmgangd (8),
.BR vmgang.toml (5),
.BR virsh (1)
";

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [configuration, directory] = arguments.as_slice() else {
        bail!("usage: manuals VMGANG.TOML DIRECTORY");
    };
    let directory = Path::new(directory);
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let write = |name: &str, content: &[u8]| {
        let path = directory.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))
    };

    let text = fs::read_to_string(configuration)
        .with_context(|| format!("cannot read {configuration}"))?;
    write("vmgang.toml.5", config_page::page(&text)?.as_bytes())?;

    write("vmgang-virsh.1", manual::page().as_bytes())?;

    let command = Arguments::command();
    for (name, shell) in [
        ("vmgang.bash", Shell::Bash),
        ("_vmgang", Shell::Zsh),
        ("vmgang.fish", Shell::Fish),
    ] {
        let mut completions = Vec::new();
        clap_complete::generate(shell, &mut command.clone(), "vmgang", &mut completions);
        write(name, &completions)?;
    }
    // One of its own would have a page for each of the others.
    let command = command.disable_help_subcommand(true);
    clap_mangen::generate_to(command.clone(), directory).context("cannot write the manual")?;
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    page.extend_from_slice(EPILOGUE.as_bytes());
    write("vmgang.1", &page)
}
