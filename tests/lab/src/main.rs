//! The `lab` command: labs for people, and the helper processes behind every lab.
//!
//! Owns the command line only; everything it does is in the library.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmgang_lab::state::{self, LabState};
use vmgang_lab::{GuestSpec, Lab, LabOptions, Role, node, parse_rate};

/// Long enough for a Debian guest with much data on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Real libvirt hosts on one machine.
#[derive(Parser)]
#[command(name = "lab", version)]
struct Cli {
    /// Which lab; several can run at once.
    #[arg(long, global = true, default_value = "default")]
    lab: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Start a lab in the background.
    Up(Up),
    /// End a lab.
    Down,
    /// Show the running labs.
    List,
    /// Run a command on a host.
    Exec {
        host: String,
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Boot a guest that checks itself and wait for its first report.
    Boot(Boot),
    /// Show the newest report of a guest, wherever it runs.
    Report { guest: String },
    /// Limit every host's link, for example to 1gbit; `none` takes the limit away.
    Shape { rate: String },
    /// Show the logs of vmgangd and libvirtd on a host.
    Logs { host: String },
    /// Build what labs need and start nothing.
    Prepare,
    #[command(name = node::NODE_COMMAND, hide = true)]
    Node { name: String },
    #[command(name = node::NODE_INIT_COMMAND, hide = true)]
    NodeInit { name: String },
    #[command(name = "__serve", hide = true)]
    Serve(Up),
}

#[derive(Args)]
struct Up {
    /// How many hosts; they are called a, b, c and so on.
    #[arg(long, default_value_t = 2)]
    hosts: u8,
    /// What each host may send, for example 1gbit.
    #[arg(long, default_value = "none")]
    link: String,
    /// A tree made by `make install DESTDIR=`, laid over every host's root.
    #[arg(long)]
    install_tree: Option<PathBuf>,
    /// Stay, and end the lab with ctrl-C.
    #[arg(long)]
    foreground: bool,
}

#[derive(Args)]
struct Boot {
    host: String,
    name: String,
    /// Boot Debian with a role, under load: idle, redis, nginx or sqlite.
    #[arg(long, value_name = "ROLE")]
    debian: Option<Role>,
    /// Memory in MiB; 128 unless set, 1024 with --debian.
    #[arg(long)]
    memory: Option<u64>,
    /// Shares of page kinds in percent, for example zero:20,same:60,unique:20.
    #[arg(long)]
    recipe: Option<String>,
    /// Pages rewritten per second.
    #[arg(long, default_value_t = 0)]
    dirty_rate: u64,
    /// Sleep most of the time after the first complete check.
    #[arg(long)]
    idle: bool,
    /// With --debian: requests per second.
    #[arg(long, requires = "debian")]
    rate: Option<u64>,
    /// With --debian: MiB of data that the server holds.
    #[arg(long, requires = "debian")]
    data: Option<u64>,
    /// With --debian: how many seconds a complete check of the data takes.
    #[arg(long, requires = "debian")]
    check: Option<u64>,
    /// XML for the domain's metadata element.
    #[arg(long)]
    metadata: Option<String>,
    /// Return as soon as QEMU runs.
    #[arg(long)]
    no_wait: bool,
}

impl Up {
    fn options(&self) -> Result<LabOptions> {
        if !(1..=26).contains(&self.hosts) {
            bail!("a lab started by hand has 1 to 26 hosts");
        }
        Ok(LabOptions {
            hosts: (b'a'..b'a' + self.hosts)
                .map(|letter| char::from(letter).to_string())
                .collect(),
            link_bits_per_second: parse_rate(&self.link)?,
            install_tree: self.install_tree.clone(),
            ..LabOptions::default()
        })
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    match cli.action {
        Action::Node { name } => node::run_outer(&name).context("the host's outer process")?,
        Action::NodeInit { .. } => node::run_init().context("the host's process 1")?,
        Action::Serve(up) => serve(&cli.lab, &up)?,
        Action::Up(up) if up.foreground => serve(&cli.lab, &up)?,
        Action::Up(up) => start_in_background(&cli.lab, &up)?,
        Action::Down => running(&cli.lab)?.stop()?,
        Action::List => {
            for lab in LabState::list()? {
                let hosts = lab.host_names().join(" ");
                println!("{}\tprocess {}\thosts {hosts}", lab.name, lab.owner_pid());
            }
        }
        Action::Exec { host, command } => return exec(&cli.lab, &host, &command),
        Action::Boot(boot) => boot_guest(&cli.lab, &boot)?,
        Action::Report { guest } => {
            let guest = running(&cli.lab)?.attach()?.find_guest(&guest)?;
            match guest.report()? {
                Some(report) => println!("{} {report:?}", guest.host().name()),
                None => println!("{} has not reported yet", guest.host().name()),
            }
        }
        Action::Shape { rate } => running(&cli.lab)?.attach()?.shape(parse_rate(&rate)?)?,
        Action::Logs { host } => {
            let lab = running(&cli.lab)?.attach()?;
            let host = lab.host(&host)?;
            for daemon in [host.libvirtd(), host.vmgangd()] {
                println!("==> {} <==\n{}", daemon.log_path(), daemon.log());
            }
        }
        Action::Prepare => {
            Lab::prepare(&LabOptions::default())?;
            Lab::prepare_debian()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn running(name: &str) -> Result<LabState> {
    LabState::load(name)?
        .with_context(|| format!("no lab {name:?} is running; start one with `lab up`"))
}

/// Owns a lab until it is told to end.
fn serve(name: &str, up: &Up) -> Result<()> {
    refuse_second(name)?;
    let lab = Lab::start(&up.options()?)?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot listen to signals")?;
    LabState::of(name, &lab)?.save()?;
    println!("lab {name} is up");
    std::io::stdout().flush()?;
    signals.forever().next();
    state::remove(name)?;
    drop(lab);
    Ok(())
}

fn refuse_second(name: &str) -> Result<()> {
    if let Some(lab) = LabState::load(name)? {
        bail!(
            "lab {name:?} is running already (process {}); end it with `lab --lab {name} down`",
            lab.owner_pid()
        );
    }
    Ok(())
}

fn start_in_background(name: &str, up: &Up) -> Result<()> {
    refuse_second(name)?;
    // What takes minutes happens here, where its progress can be seen.
    Lab::prepare(&up.options()?)?;
    let log = state::log_path(name)?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--lab", name, "__serve", "--hosts"])
        .arg(up.hosts.to_string())
        .args(["--link", &up.link]);
    if let Some(tree) = &up.install_tree {
        command.arg("--install-tree").arg(tree);
    }
    let mut server = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(&log).with_context(|| format!("cannot write {}", log.display()))?)
        .process_group(0)
        .spawn()
        .context("cannot start the lab's own process")?;
    let answer = server.stdout.take().context("its output is missing")?;
    let mut line = String::new();
    BufReader::new(answer).read_line(&mut line)?;
    if line.is_empty() {
        server.wait()?;
        bail!(
            "the lab did not start:\n{}",
            std::fs::read_to_string(&log).unwrap_or_default().trim_end()
        );
    }
    print!("{line}");
    Ok(())
}

fn exec(lab: &str, host: &str, command: &[String]) -> Result<ExitCode> {
    let lab = running(lab)?.attach()?;
    let mut command = lab.host(host)?.command(command).stdin(Stdio::inherit());
    if let Ok(terminal) = std::env::var("TERM") {
        command = command.env("TERM", &terminal);
    }
    let status = command.spawn()?.wait()?;
    // A shell says the same of a command that a signal ended.
    let code = status.code().unwrap_or(128);
    Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from))
}

fn boot_guest(lab: &str, boot: &Boot) -> Result<()> {
    let lab = running(lab)?.attach()?;
    let mut spec = match boot.debian {
        Some(role) => GuestSpec::debian(&boot.name, role),
        None => GuestSpec::new(&boot.name),
    };
    spec = spec.with_dirty_rate(boot.dirty_rate);
    if let Some(memory) = boot.memory {
        spec = spec.with_memory_mib(memory);
    }
    if let Some(rate) = boot.rate {
        spec = spec.with_request_rate(rate);
    }
    if let Some(data) = boot.data {
        spec = spec.with_data_mib(data);
    }
    if let Some(seconds) = boot.check {
        spec = spec.with_check_seconds(seconds);
    }
    if let Some(recipe) = &boot.recipe {
        spec = spec.with_fill(recipe);
    }
    if let Some(metadata) = &boot.metadata {
        spec = spec.with_metadata(metadata);
    }
    if boot.idle {
        spec = spec.with_idle();
    }
    let guest = lab.host(&boot.host)?.boot(&spec)?;
    if !boot.no_wait {
        let report = guest.wait_for_report(BOOT_TIMEOUT)?;
        let what = boot.debian.map_or("pages", |_| "items");
        println!("{} checks {} {what}", boot.name, report.pages);
    }
    Ok(())
}
