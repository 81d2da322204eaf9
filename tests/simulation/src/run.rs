//! One run: two hosts, one job, the faults of its plan, and what must hold at its end.
//!
//! Must not: read a clock or a random number that does not come from the seed.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use vmgang_libvirt::QemuUser;
use vmgang_service::job::{Control, Job};
use vmgang_service::report::{DomainOutcome, JobState, Report};
use vmgang_service::request::MigrateRequest;
use zbus::{OwnedVariant, Variant};

use crate::daemon::{DestinationDaemon, Directories, SourceDaemon};
use crate::invariants;
use crate::plan::{Event, Plan, When};
use crate::world::{Here, There, World, lock};

/// After the last fault a job ends within this, in virtual time.
const END: Duration = Duration::from_secs(300);
/// And all that is left of it is gone after this.
const TIDY: Duration = Duration::from_secs(120);

/// What one run has shown.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub seed: u64,
    pub plan: Plan,
    /// Of all that happened.
    pub hash: u64,
    pub steps: u64,
    pub trace: Vec<String>,
    pub findings: Vec<String>,
    pub ending: Ending,
}

/// How a job went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Refused(String),
    Reported(JobState, Option<String>),
    /// The daemon had died, and another one told.
    ToldLater(JobState, Option<String>),
    /// It had died before there was a job.
    NoJob,
}

/// Runs a seed.
pub fn run(seed: u64, keep_trace: bool) -> Outcome {
    watch_panics();
    let plan = Plan::new(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => panic!("no runtime: {error}"),
    };
    let (world, ending) = runtime.block_on(async {
        let world = World::new(plan.clone(), keep_trace);
        let ending = simulate(&world).await;
        (world, ending)
    });
    drop(runtime);
    let (hash, steps, trace) = world.trace();
    let mut findings = world.findings();
    findings.extend(PANICS.take());
    let ending = match ending {
        Ok(ending) => ending,
        Err(error) => {
            findings.push(format!("the simulation failed: {error}"));
            Ending::NoJob
        }
    };
    Outcome {
        seed,
        plan,
        hash,
        steps,
        trace,
        findings,
        ending,
    }
}

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// A task that panics does not end its run, but is a finding.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with_borrow_mut(|panics| panics.push(format!("panicked: {info}")));
            before(info);
        }));
    });
}

/// What faults are done to.
struct Hosts {
    world: Arc<World>,
    user: QemuUser,
    source: Mutex<SourceDaemon>,
    destination: Mutex<DestinationDaemon>,
    job: Mutex<Option<Arc<Job>>>,
    source_killed: Mutex<bool>,
    killed: Notify,
}

async fn simulate(world: &Arc<World>) -> std::io::Result<Ending> {
    let memory = Path::new("/dev/shm");
    let root = match memory.is_dir() {
        true => tempfile::tempdir_in(memory)?,
        false => tempfile::tempdir()?,
    };
    let meta = std::fs::metadata(root.path())?;
    let user = QemuUser {
        uid: meta.uid(),
        gid: meta.gid(),
    };
    let here = Directories::below(&root.path().join("a"));
    let there = Directories::below(&root.path().join("b"));
    here.make()?;
    there.make()?;
    let hosts = Hosts {
        world: world.clone(),
        user,
        destination: Mutex::new(DestinationDaemon::start(world, there.clone(), user)?),
        source: Mutex::new(SourceDaemon::start(world, here, &there, user).await?),
        job: Mutex::default(),
        source_killed: Mutex::default(),
        killed: Notify::new(),
    };
    let ending = {
        // A bit that flips may lose a frame and be noticed with the next one only; TLS would have noticed
        // at once. Then the user ends it.
        let job = async {
            let mut job = pin!(job(&hosts, &there));
            match timeout(END, &mut job).await {
                Err(_) if world.plan.corrupts() => {
                    happen(&hosts, Event::Abort);
                    timeout(END, job).await
                }
                ended => ended,
            }
        };
        tokio::select! {
            biased;
            ending = job => ending,
            () = faults(&hosts) => unreachable!("faults go on"),
        }
    };
    let ending = match ending {
        Ok(ending) => ending?,
        Err(_) => {
            world.wrong("the job does not end".to_owned());
            Ending::NoJob
        }
    };
    world.step(format_args!("ended: {ending:?}"));
    let settled = timeout(TIDY, async {
        while world.guests().any(|guest| guest.busy()) {
            sleep(Duration::from_millis(100)).await;
        }
    });
    if settled.await.is_err() {
        world.wrong("a migration does not end".to_owned());
    }
    let links = world.net().links.clone();
    for (number, link) in links.iter().enumerate() {
        world.step(format_args!("connection {number}: {:?}", link.written()));
    }
    invariants::at_the_end(world, &ending);
    tidy(&hosts).await;
    invariants::nothing_left(world, root.path());
    Ok(ending)
}

/// Stops both daemons and waits until none of their tasks is left.
async fn tidy(hosts: &Hosts) {
    let coordinator = lock(&hosts.source).coordinator.clone();
    coordinator.shutdown().await;
    if let Some(stop) = lock(&hosts.destination).stop.take() {
        let _ = stop.send(());
    }
    let metrics = tokio::runtime::Handle::current().metrics();
    let until = Instant::now() + TIDY;
    while metrics.num_alive_tasks() > 0 && Instant::now() < until {
        sleep(Duration::from_millis(500)).await;
    }
    // A killed daemon's tasks that ask the destination on and on, one a member, do not know that they
    // are dead.
    let dead = match *lock(&hosts.source_killed) {
        true => hosts.world.plan.guests.len(),
        false => 0,
    };
    if metrics.num_alive_tasks() > dead {
        let left = metrics.num_alive_tasks();
        hosts.world.wrong(format!("{left} tasks are left"));
    }
}

fn request(plan: &Plan) -> std::io::Result<MigrateRequest> {
    let mut options: HashMap<String, OwnedVariant> = HashMap::new();
    let mut add = |name: &str, value: Variant<'_>| {
        if let Ok(value) = OwnedVariant::try_from(value) {
            options.insert(name.to_owned(), value);
        }
    };
    add("all", Variant::from(true));
    if plan.continue_on_failure {
        add("on-failure", Variant::from("continue"));
    }
    if let Some(seconds) = plan.timeout_s {
        add("timeout", Variant::from(seconds));
    }
    if plan.bandwidth_mib_s > 0 {
        add("bandwidth", Variant::from(plan.bandwidth_mib_s));
    }
    if !plan.techniques.is_empty() {
        add("technique", Variant::from(plan.techniques));
    }
    MigrateRequest::parse("", "qemu+tls://b/system", options)
        .map_err(|error| std::io::Error::other(error.sentence().to_owned()))
}

/// Runs the job to its report, if need be by a daemon that was started anew.
async fn job(hosts: &Hosts, there: &Directories) -> std::io::Result<Ending> {
    let world = &hosts.world;
    let coordinator = lock(&hosts.source).coordinator.clone();
    let killed = hosts.killed.notified();
    let reported = async {
        let job = match coordinator.migrate(request(&world.plan)?).await {
            Ok(job) => job,
            Err(error) => return Ok(Ending::Refused(error.sentence().to_owned())),
        };
        world.step(format_args!("job"));
        *lock(&hosts.job) = Some(job.clone());
        let mut changes = job.watch();
        loop {
            if let Some(report) = job.view().report {
                invariants::report(world, &report);
                return Ok(Ending::Reported(report.state, text(&report)));
            }
            if changes.changed().await.is_err() {
                return Err(std::io::Error::other("the job is gone"));
            }
        }
    };
    tokio::select! {
        biased;
        () = killed => {}
        reported = reported => return reported,
    }
    *lock(&hosts.job) = None;
    let ms = world.random().scaled(14);
    sleep(Duration::from_millis(ms)).await;
    world.step(format_args!("source daemon started anew"));
    let directories = lock(&hosts.source).directories.clone();
    let again = SourceDaemon::start(world, directories, there, hosts.user).await?;
    let told = again.coordinator.jobs().first().cloned();
    *lock(&hosts.source) = again;
    let Some(report) = told.and_then(|job| job.view().report) else {
        return Ok(Ending::NoJob);
    };
    invariants::report(world, &report);
    Ok(Ending::ToldLater(report.state, text(&report)))
}

/// All that a report says about what went wrong.
fn text(report: &Report) -> Option<String> {
    let of_domains = report.domains.iter().filter(|domain| {
        let failed = domain.state != DomainOutcome::Migrated;
        failed || domain.error.is_some()
    });
    let texts: Vec<String> = of_domains
        .filter_map(|domain| domain.error.clone())
        .chain(report.error.clone())
        .collect();
    (!texts.is_empty()).then(|| texts.join(" | "))
}

/// Lets happen what the plan says, when it says so.
async fn faults(hosts: &Hosts) {
    let world = &hosts.world;
    let began = Instant::now();
    let mut timed: Vec<(u64, Event)> = Vec::new();
    for (when, event) in &world.plan.faults {
        if let When::Ms(ms) = when {
            timed.push((*ms, *event));
        }
    }
    timed.sort_by_key(|(ms, _)| *ms);
    let mut timed = timed.into_iter().peekable();
    loop {
        while let Some(event) = world.next_due() {
            happen(hosts, event);
        }
        let next = timed.peek().copied();
        let due = async {
            match next {
                Some((ms, _)) => sleep_until(began + Duration::from_millis(ms)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = world.due_now.notified() => {}
            () = due => {
                timed.next();
                if let Some((_, event)) = next {
                    happen(hosts, event);
                }
            }
        }
    }
}

fn happen(hosts: &Hosts, event: Event) {
    let world = &hosts.world;
    world.step(format_args!("FAULT {event:?}"));
    match event {
        Event::KillSourceDaemon => {
            let mut killed = lock(&hosts.source_killed);
            if std::mem::replace(&mut killed, true) {
                return;
            }
            let mut source = lock(&hosts.source);
            world.sever(&source.life);
            source.directories = moved(&source.directories);
            hosts.killed.notify_waiters();
        }
        Event::KillDestinationDaemon => {
            let mut destination = lock(&hosts.destination);
            if !destination.life.alive() {
                return;
            }
            world.sever(&destination.life);
            destination.directories = moved(&destination.directories);
            destination.serving.abort();
            // It is there again, and sweeps.
            let directories = destination.directories.clone();
            match DestinationDaemon::start(world, directories, hosts.user) {
                Ok(again) => *destination = again,
                Err(error) => world.wrong(format!("the destination daemon fails: {error}")),
            }
        }
        Event::StopSourceDaemon => {
            let coordinator = lock(&hosts.source).coordinator.clone();
            world.abort_requested();
            tokio::spawn(async move { coordinator.shutdown().await });
        }
        Event::StopDestinationDaemon => {
            if let Some(stop) = lock(&hosts.destination).stop.take() {
                let _ = stop.send(());
            }
        }
        Event::SourceQemuDies(member) => {
            // Its end is the job's business only while libvirt has not answered for it.
            let unanswered = lock(&hosts.job).is_none() || world.guest(member).called;
            if unanswered && world.guest(member).here != Here::Gone {
                world.set_here(member, Here::Dead);
                world.guest(member).cancelled.send_replace(true);
            }
        }
        Event::DestinationQemuDies(member) => {
            let guest = world.guest(member);
            if guest.there != There::Running {
                guest.destination_dies.send_replace(true);
            }
        }
        Event::DestinationQemuStops(member, ms) => {
            world.guest(member).reads_from = Instant::now() + Duration::from_millis(ms);
        }
        Event::ResetConnection(number) => {
            let link = world.net().links.get(number).cloned();
            if let Some(link) = link {
                link.reset();
            }
        }
        Event::Abort => {
            if let Some(job) = lock(&hosts.job).as_ref()
                && job.control(Control::Abort).is_ok()
            {
                world.abort_requested();
            }
        }
    }
}

/// What a killed daemon has left, at another place: its tasks that still end do not touch it.
fn moved(directories: &Directories) -> Directories {
    let left = |path: &Path| {
        let left = path.with_extension("left");
        // Without it there is nothing to leave.
        let _ = std::fs::rename(path, &left);
        let _ = std::fs::create_dir_all(&left);
        left
    };
    Directories {
        runtime: left(&directories.runtime),
        state: left(&directories.state),
    }
}
