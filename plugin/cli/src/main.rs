//! vmgang: the command line. Parses arguments, and has the rest of the crate do what they say.

use std::process::ExitCode;

use clap::Parser;

use vmgang_cli::arguments::{Arguments, Command};
use vmgang_cli::{
    bring_back, control, doctor, estimate, exit, gang, history, migrate, proxies, stage, status,
    text,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{}", text::complaint(&proxies::sentence(&error)));
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
        Command::Status(options) => status::status(&connection, options).await,
        Command::Abort { job } => control::abort(&connection, &job).await,
        Command::Postcopy { job } => control::post_copy(&connection, &job).await,
        Command::Bandwidth { job, mib_per_s } => {
            control::bandwidth(&connection, &job, mib_per_s).await
        }
        Command::Doctor(options) => doctor::run(&connection, options).await,
        Command::History(options) => history::history(&connection, options).await,
    }
}
