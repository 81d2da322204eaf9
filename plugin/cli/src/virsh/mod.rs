//! `virsh migrate --gang`: the front end of virsh. Called in virsh's place, it migrates a whole gang if that is
//! asked of it, and becomes the real virsh for everything else.
//!
//! Must not: do anything before it knows which, or change anything that the real virsh gets.

mod gang;
mod globals;
mod job;
pub mod manual;
pub mod options;
mod percent;
mod real;
mod request;

use std::ffi::OsString;
use std::time::Instant;

use globals::Globals;
use request::Asked;

use crate::{exit, proxies};

/// As a shell says that there is no such command.
const NO_VIRSH: u8 = 127;

/// The whole program; ends with its exit code.
pub fn program(arguments: Vec<OsString>) -> u8 {
    match globals::gang_migration(&arguments) {
        None => {
            let error = real::become_it(&arguments);
            eprintln!("{error}");
            NO_VIRSH
        }
        Some((globals, words)) => migrate(&globals, &words),
    }
}

fn migrate(globals: &Globals, words: &[String]) -> u8 {
    let asked = request::parse(words).and_then(|asked| {
        globals.check()?;
        Ok(asked)
    });
    let began = Instant::now();
    let code = match asked {
        // virsh, too, says nothing more about what it cannot parse.
        Err(problems) => {
            complain(&problems);
            return exit::USAGE;
        }
        Ok(Asked::Help) => {
            print!("{}", manual::help());
            exit::MIGRATED
        }
        Ok(Asked::Migration(migration)) => job::run(migration).unwrap_or_else(|error| {
            complain(&proxies::sentence(&error));
            exit::FAILED
        }),
    };
    // As virsh ends each command.
    if globals.timing {
        println!(
            "\n(Time: {:.3} ms)\n",
            began.elapsed().as_secs_f64() * 1000.0
        );
    } else if !globals.quiet {
        println!();
    }
    code
}

/// One problem a line, as virsh says them.
fn complain(problems: &str) {
    for problem in problems.lines() {
        eprintln!("error: {problem}");
    }
}
