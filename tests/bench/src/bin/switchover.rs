//! `make switchover`: four busy guests that stamp time, moved by each way of letting them go and by
//! stock virsh: how long each stood still, and how far apart they switched over; and what a gang that
//! is held for a while costs the daemons.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use vmgang_bench::contender::Contender;
use vmgang_bench::gang::GANG;
use vmgang_bench::table::median;
use vmgang_e2e::{
    Ended, boot_all, expect_running, install_tree, start_vmgang, uri, verify_all, vmgang,
    wait_until,
};
use vmgang_lab::{Daemon, GuestSpec, Host, Lab, LabOptions, Pause, Stamps, parse_rate};

#[derive(Parser)]
#[command(about = "Measures pauses and spread of switchovers, and what holding a gang costs")]
struct Arguments {
    /// Times each way moves the gang.
    #[arg(long, default_value_t = 5)]
    repetitions: usize,
    /// Link between the hosts, such as 100mbit or 1gbit, or none.
    #[arg(long, default_value = "1gbit")]
    link: String,
    /// Memory of each guest in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u64,
    /// Pages that each guest rewrites a second.
    #[arg(long, default_value_t = 500)]
    dirty: u64,
    /// How long the gang is held to measure what that costs; 0 for not at all.
    #[arg(long, default_value_t = 60)]
    hold: u64,
    /// Write the single measurements here, as JSON.
    #[arg(long, overrides_with = "json")]
    json: Option<PathBuf>,
}

const GUESTS: [&str; 4] = ["one", "two", "three", "four"];
/// Its QEMU is stopped for as long as the gang is to be held.
const SLOW_GUEST: &str = "slow";
const STAMP_MS: u64 = 5;
/// Clock ticks a second of /proc/PID/stat.
const TICKS: f64 = 100.0;

/// A way to let a gang go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Stock,
    Free,
    Together,
    Staggered,
}

impl Way {
    const ALL: [Way; 4] = [Way::Stock, Way::Free, Way::Together, Way::Staggered];

    fn title(self) -> &'static str {
        match self {
            Way::Stock => "virsh, in parallel",
            Way::Free => "vmgang --switchover free",
            Way::Together => "vmgang --switchover together",
            Way::Staggered => "vmgang --switchover staggered",
        }
    }

    fn migrate(self, from: &Host, to: &Host) -> Result<()> {
        let how = match self {
            Way::Stock => {
                return Contender::StockParallel
                    .migrate(&GUESTS, from, to)
                    .map(drop);
            }
            Way::Free => "free",
            Way::Together => "together",
            Way::Staggered => "staggered",
        };
        let words = ["migrate", "--json", "--switchover", how, GANG, &uri(to)];
        let job = vmgang(from, &words)?.expect(0)?.job()?;
        ensure!(job.state == "completed", "{job:?}");
        Ok(())
    }
}

#[derive(Debug, Serialize)]
struct Measured {
    way: &'static str,
    seconds: f64,
    /// Of each guest, by the stamps that reached its serial ports.
    pause_ms: Vec<f64>,
    /// From the first to the last guest that stood still.
    spread_ms: f64,
}

#[derive(Debug, Serialize)]
struct Held {
    seconds: f64,
    /// Of one processor.
    libvirtd_percent: f64,
    vmgangd_percent: f64,
    /// Passes of all held members; each is an event for libvirtd.
    passes_per_second: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let link = parse_rate(&arguments.link)?;
    let options = LabOptions {
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    let mut measured = Vec::new();
    let mut held = None;
    Lab::scope(&options, |lab| {
        let a = lab.host("a")?;
        let busy = |name: &&str| {
            GuestSpec::new(name)
                .with_memory_mib(arguments.memory)
                .with_fill("zero:40,same:30,compressible:20,unique:10")
                .with_dirty_rate(arguments.dirty)
                .with_stamps(STAMP_MS)
        };
        let specs: Vec<GuestSpec> = GUESTS.iter().map(busy).collect();
        boot_all(a, &specs)?;
        vmgang(a, &[&["gang", "add", GANG], &GUESTS[..]].concat())?.expect(0)?;
        for round in 0..arguments.repetitions {
            for turn in 0..Way::ALL.len() {
                let way = Way::ALL[(round + turn) % Way::ALL.len()];
                let one = there_and_back(lab, way, link)?;
                eprintln!("round {}: {one:.1?}", round + 1);
                measured.push(one);
            }
        }
        verify_all(a, &GUESTS)?;
        if arguments.hold > 0 {
            held = Some(hold(lab, Duration::from_secs(arguments.hold))?);
            eprintln!("{held:.1?}");
        }
        anyhow::Ok(())
    })?;
    if let Some(path) = arguments.json {
        let all = serde_json::json!({"moves": measured, "held": held});
        std::fs::write(&path, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("{}", table(&measured));
    if let Some(held) = held {
        println!(
            "Held for {:.0} s: libvirtd {:.1} %, vmgangd {:.1} % of one processor, {:.0} passes a second.",
            held.seconds, held.libvirtd_percent, held.vmgangd_percent, held.passes_per_second
        );
    }
    Ok(())
}

fn there_and_back(lab: &Lab, way: Way, link: Option<u64>) -> Result<Measured> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    lab.shape(link)?;
    let watched: Vec<Stamps> = GUESTS
        .iter()
        .map(|guest| Stamps::watch(lab.hosts(), guest))
        .collect();
    let start = Instant::now();
    way.migrate(a, b)?;
    let seconds = start.elapsed().as_secs_f64();
    // The last one has run for a while, too.
    std::thread::sleep(Duration::from_millis(500));
    let pauses = watched.into_iter().map(Stamps::move_pause);
    let pauses: Vec<Pause> = pauses.collect::<Result<_, _>>()?;
    expect_running(b, &GUESTS)?;
    lab.shape(None)?;
    Contender::StockParallel.migrate(&GUESTS, b, a)?;
    let began = pauses.iter().map(|pause| pause.began);
    let spread = match (began.clone().min(), began.max()) {
        (Some(first), Some(last)) => last - first,
        _ => Duration::ZERO,
    };
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    Ok(Measured {
        way: way.title(),
        seconds,
        pause_ms: pauses.iter().map(|pause| ms(pause.length)).collect(),
        spread_ms: ms(spread),
    })
}

/// What it costs to hold the four guests while a fifth does not come to an end.
fn hold(lab: &Lab, time: Duration) -> Result<Held> {
    let (a, b) = (lab.host("a")?, lab.host("b")?);
    let slow = GuestSpec::new(SLOW_GUEST)
        .with_memory_mib(512)
        .with_fill("unique:100")
        .with_idle();
    boot_all(a, &[slow])?;
    vmgang(a, &["gang", "add", GANG, SLOW_GUEST])?.expect(0)?;
    lab.shape(Some(400_000_000))?;
    let mut migrating = start_vmgang(a, &["migrate", "--json", GANG, &uri(b)])?;
    let members = |state: &str| -> Result<Vec<String>> {
        let status = vmgang(a, &["status", "--json"])?.expect(0)?;
        let jobs: serde_json::Value = serde_json::from_str(&status.stdout)?;
        let members = jobs[0]["domains"].as_array().cloned().unwrap_or_default();
        let members = members.iter().filter(|member| match state {
            "sending" => member["qemu_stream_bytes"].as_u64() > Some(0),
            state => member["state"] == state,
        });
        let names = members.map(|member| member["name"].as_str().unwrap_or_default().to_owned());
        Ok(names.collect())
    };
    wait_until("the slow guest sends", || {
        ensure!(migrating.try_wait()?.is_none(), "it ended before");
        Ok(members("sending")?.iter().any(|name| name == SLOW_GUEST))
    })?;
    a.guest(SLOW_GUEST).freeze()?;
    wait_until("the four are held", || {
        ensure!(migrating.try_wait()?.is_none(), "it ended before");
        let held = members("held")?;
        Ok(GUESTS
            .iter()
            .all(|name| held.iter().any(|held| held == name)))
    })?;
    std::thread::sleep(Duration::from_secs(2));
    let (libvirtd, daemon) = (a.libvirtd(), a.vmgangd());
    let spent =
        || -> Result<[f64; 2]> { Ok([cpu_seconds(a, &libvirtd)?, cpu_seconds(a, &daemon)?]) };
    let passes = || -> Result<u64> { GUESTS.iter().map(|guest| iterations(a, guest)).sum() };
    let (start, before, passes_before) = (Instant::now(), spent()?, passes()?);
    std::thread::sleep(time);
    let (after, passes_after) = (spent()?, passes()?);
    let seconds = start.elapsed().as_secs_f64();
    ensure!(migrating.try_wait()?.is_none(), "it ended before");
    a.guest(SLOW_GUEST).thaw()?;
    let job = Ended::from(migrating.wait_with_output()?)
        .expect(0)?
        .job()?;
    ensure!(job.state == "completed", "{job:?}");
    let percent = |which: usize| (after[which] - before[which]) / seconds * 100.0;
    Ok(Held {
        seconds,
        libvirtd_percent: percent(0),
        vmgangd_percent: percent(1),
        passes_per_second: (passes_after - passes_before) as f64 / seconds,
    })
}

/// Processor time that a daemon has used so far.
fn cpu_seconds(host: &Host, daemon: &Daemon) -> Result<f64> {
    let pid = daemon.pid()?.context("the daemon runs")?;
    let stat = host.run(&["cat", &format!("/proc/{pid}/stat")])?;
    // The name in brackets may hold anything.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let field = |number: usize| -> Option<f64> { fields.split(' ').nth(number)?.parse().ok() };
    let (user, system) = (field(12), field(13));
    let (user, system) = user
        .zip(system)
        .context("/proc/PID/stat reads as expected")?;
    Ok((user + system) / TICKS)
}

fn iterations(host: &Host, guest: &str) -> Result<u64> {
    let info = host.virsh(&["domjobinfo", guest])?;
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("Iteration:"));
    Ok(line.context("no iterations")?.trim().parse()?)
}

fn table(moves: &[Measured]) -> String {
    let mut lines =
        "| | time | mean pause | longest pause | spread |\n|---|--:|--:|--:|--:|\n".to_owned();
    for way in Way::ALL {
        let of: Vec<&Measured> = moves.iter().filter(|m| m.way == way.title()).collect();
        let median = |value: &dyn Fn(&Measured) -> f64| median(of.iter().map(|m| value(m)));
        let mean = |m: &Measured| m.pause_ms.iter().sum::<f64>() / m.pause_ms.len().max(1) as f64;
        let longest = |m: &Measured| m.pause_ms.iter().copied().fold(0.0, f64::max);
        lines.push_str(&format!(
            "| {} | {:.1} s | {:.0} ms | {:.0} ms | {:.2} s |\n",
            way.title(),
            median(&|m| m.seconds),
            median(&mean),
            median(&longest),
            median(&|m| m.spread_ms) / 1e3,
        ));
    }
    lines
}
