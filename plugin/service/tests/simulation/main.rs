//! Jobs without libvirt, a peer or a clock: the real coordinator, driver and barrier in a made-up world,
//! in virtual time and on one thread, where everything that can go wrong does at some seed.
//!
//! A seed says all: which members there are, what the options are, what breaks when. After each change
//! of a guest's state, and at the end, the world checks what must hold (`world.rs`). A failing seed is
//! printed, and replays exactly: `SEED=123 make simulate-jobs`.

mod world;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use vmgang_engine::{Transport, Workers};
use vmgang_service::config::{RecallConfig, TlsConfig, WindowBudget};
use vmgang_service::coordinator::{Coordinator, Parts};
use vmgang_service::history::History;
use vmgang_service::job::{Control, Job};
use vmgang_service::libvirt_access::LibvirtAccess;
use vmgang_service::peers::Peers;
use vmgang_service::recall::Contents;
use vmgang_service::request::MigrateRequest;
use vmgang_service::scans::Scans;
use vmgang_service::stages::Stages;
use zbus::{OwnedVariant, Variant};

use world::{NoRam, Random, SimHypervisor, SimTunnel, World};

/// Of one run of `cargo test`.
const SEEDS: u64 = 2000;
/// Longer than any migration hangs.
const AFTERWARDS: Duration = Duration::from_secs(200);
/// No job takes longer, whatever happens.
const JOB_ENDS: Duration = Duration::from_secs(3 * 3600);
const AVAILABLE_BYTES: u64 = 64 << 30;

/// What a seed has shown.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    trace: Vec<String>,
    /// The report, but for what a real clock or chance has put into it.
    report: String,
}

#[test]
fn whatever_breaks_no_guest_is_lost() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("SEED") {
        let shown = run(seed);
        for line in shown.trace {
            println!("{line}");
        }
        println!("{}", shown.report);
        return;
    }
    let workers = Workers::new(std::num::NonZeroUsize::MIN).expect("a thread");
    let seeds = number("SEEDS").unwrap_or(SEEDS);
    for seed in 0..seeds {
        let workers = workers.clone();
        let run = std::panic::catch_unwind(AssertUnwindSafe(move || run_with(seed, workers)));
        assert!(
            run.is_ok(),
            "seed {seed} fails: SEED={seed} make simulate-jobs"
        );
    }
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 0..40 {
        assert_eq!(run(seed), run(seed), "seed {seed}");
    }
}

fn run(seed: u64) -> Shown {
    run_with(
        seed,
        Workers::new(std::num::NonZeroUsize::MIN).expect("a thread"),
    )
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
}

/// What the user does meanwhile.
struct User {
    abort_after: Option<Duration>,
    post_copy_after: Option<Duration>,
    /// The daemon is killed.
    death_after: Option<Duration>,
}

fn run_with(seed: u64, workers: Workers) -> Shown {
    let mut random = Random(seed);
    let world = World::new(&mut random);
    let options = options(&mut random, world.guests());
    let mut sometimes = |percent: u64, within_ms: u64| {
        let (happens, when) = (random.below(100) < percent, random.below(within_ms));
        happens.then(|| Duration::from_millis(when))
    };
    let user = User {
        abort_after: sometimes(25, 20_000),
        post_copy_after: sometimes(15, 20_000),
        death_after: sometimes(20, 20_000),
    };
    let state_dir = tempfile::tempdir().expect("a directory");
    let parts = |world: &World| {
        let scans = Scans::new(Arc::new(NoRam));
        let hypervisor = Arc::new(SimHypervisor(world.clone()));
        let contents = Contents::new(
            RecallConfig::default(),
            scans.clone(),
            hypervisor.clone(),
            Box::new(|| Ok(AVAILABLE_BYTES)),
        );
        Parts {
            hypervisor,
            tunnel: Arc::new(SimTunnel(world.clone())),
            transport: Arc::new(|| Ok(Transport::Plain)),
            libvirt_access: Arc::new(
                LibvirtAccess::new(state_dir.path(), Arc::new(|| Ok(Transport::Plain)))
                    .expect("a directory"),
            ),
            tls: TlsConfig::Off,
            history: History::open(state_dir.path()).expect("opens"),
            peers: Arc::new(Peers::default()),
            runtime_dir: state_dir.path().to_owned(),
            window_budget: WindowBudget::Auto,
            available_memory: Box::new(|| Ok(AVAILABLE_BYTES)),
            workers: workers.clone(),
            connections: std::num::NonZeroUsize::MIN,
            scans,
            stages: Arc::new(Stages::default()),
            contents: Arc::new(contents),
        }
    };

    let first = runtime();
    let job = first.block_on(async {
        let coordinator = Coordinator::open(parts(&world)).await.expect("opens");
        live(&coordinator, &world, options, &user).await
    });
    // Whatever still ran is gone with the daemon.
    drop(first);
    world.daemon_is_gone();
    let report = match job {
        Ended::Refused(why) => {
            world.check_untouched();
            return world.shown(why);
        }
        Ended::Job(job) if job.state().ended() => {
            let report = job.view().report.expect("an ended job has one");
            world.check_report(&report, true);
            report
        }
        // The next daemon says what became of it.
        Ended::Job(job) => runtime().block_on(async {
            world.settle().await;
            let coordinator = Coordinator::open(parts(&world)).await.expect("opens");
            let known = coordinator
                .jobs()
                .into_iter()
                .find(|known| known.id == job.id);
            let report = known.expect("it is remembered").view().report;
            let report = report.expect("and has ended");
            world.check_report(&report, false);
            report
        }),
    };
    world.check_guests();
    let states: Vec<_> = report.domains.iter().map(|d| (&d.name, d.state)).collect();
    world.shown(format!("{:?} {states:?}", report.state))
}

enum Ended {
    Refused(String),
    Job(Arc<Job>),
}

/// The life of a daemon with one job.
async fn live(
    coordinator: &Arc<Coordinator>,
    world: &World,
    options: HashMap<String, OwnedVariant>,
    user: &User,
) -> Ended {
    let request = MigrateRequest::parse("", "qemu+tls://b/system", options).expect("valid");
    world.takes_policy(request.policy, request.timeout.is_some());
    let job = match coordinator.migrate(request).await {
        Ok(job) => job,
        Err(error) => return Ended::Refused(error.sentence().to_owned()),
    };
    let ended = async {
        let mut changes = job.watch();
        while !job.state().ended() && changes.changed().await.is_ok() {}
    };
    let after = |time: Option<Duration>| async move {
        match time {
            Some(time) => tokio::time::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    let commands = async {
        tokio::join!(
            async {
                after(user.abort_after).await;
                world.say("the user aborts");
                if job.control(Control::Abort).is_ok() {
                    world.abort_asked();
                }
            },
            async {
                after(user.post_copy_after).await;
                if job.start_post_copy().is_ok() {
                    world.say("the user asks for post-copy");
                }
            }
        );
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        ended = tokio::time::timeout(JOB_ENDS, ended) => {
            ended.expect("a job ends, whatever happens");
            world.check_abort_was_quick();
            // What was said of the guests stays true.
            tokio::time::sleep(AFTERWARDS).await;
        }
        () = after(user.death_after) => world.say("vmgangd is killed"),
        () = commands => {}
    }
    Ended::Job(job)
}

/// Options of the job.
fn options(random: &mut Random, members: usize) -> HashMap<String, OwnedVariant> {
    let mut options = HashMap::new();
    let mut put = |name: &str, value: Variant<'static>| {
        options.insert(name.to_owned(), value.try_into().expect("no descriptors"));
    };
    put("all", true.into());
    let one_of = |random: &mut Random, words: &[&'static str]| {
        words[random.below(words.len() as u64) as usize]
    };
    put(
        "on-failure",
        one_of(random, &["abort", "abort", "continue"]).into(),
    );
    let stalls = ["throttle", "throttle", "postcopy", "leave", "abort"];
    put("on-stall", one_of(random, &stalls).into());
    let concurrency = 1 + random.below(8);
    put("concurrency", concurrency.into());
    let ways: &[&'static str] = match concurrency >= members as u64 {
        true => &["together", "staggered", "free"],
        false => &["free"],
    };
    if random.below(2) == 0 {
        put("switchover", one_of(random, ways).into());
    }
    if random.below(5) == 0 {
        put("postcopy", true.into());
    }
    if random.below(4) == 0 {
        put("timeout", (1 + random.below(60)).into());
        match random.below(3) {
            0 => put("timeout-suspend", true.into()),
            1 => put("timeout-postcopy", true.into()),
            _ => {}
        }
    }
    options
}
