//! vmgang: the command line. Parses arguments, talks to vmgangd over D-Bus, prints.
//! Must not talk to libvirt or to peers.

mod arguments;
mod bring_back;
mod control;
mod doctor;
mod estimate;
mod gang;
mod heat_map;
mod history;
mod migrate;
mod progress;
mod proxies;
mod report;
mod stage;
mod text;

use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, Command};

/// Exit codes that scripts rely on. 2, wrong usage, is clap's.
pub mod exit {
    pub const MIGRATED: u8 = 0;
    pub const FAILED: u8 = 1;
    pub const USAGE: u8 = 2;
    pub const PARTIAL: u8 = 3;
    pub const ABORTED: u8 = 4;
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("vmgang: {}", proxies::sentence(&error));
            ExitCode::from(exit::FAILED)
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let connection = proxies::connect().await?;
    match arguments.command {
        Command::Gang(command) => gang::run(&connection, command).await,
        Command::Estimate(options) => estimate::run(&connection, options).await,
        Command::Prepare(options) => stage::prepare(&connection, options).await,
        Command::Migrate(options) => migrate::run(&connection, options).await,
        Command::Return(options) => bring_back::run(&connection, options).await,
        Command::Status(options) => history::status(&connection, options).await,
        Command::Abort { job } => control::abort(&connection, &job).await,
        Command::Postcopy { job } => control::post_copy(&connection, &job).await,
        Command::Bandwidth { job, mib_per_s } => {
            control::bandwidth(&connection, &job, mib_per_s).await
        }
        Command::Doctor(options) => doctor::run(&connection, options).await,
        Command::History(options) => history::history(&connection, options).await,
    }
}
