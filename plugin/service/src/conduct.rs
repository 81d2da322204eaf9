//! Conducts a job's members: feeds the barrier with all that happens and does what it says. Decides
//! nothing: `barrier.rs` does.
//!
//! After each wake-up everything that has arrived is read before the barrier is asked, so that
//! no release overtakes a failure or an abort that waits in a queue.

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use tokio::sync::mpsc::error::TryRecvError;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::Instant;
use vmgang_engine::SourceEvent;
use vmgang_libvirt::{LibvirtError, MigrateOptions};

use crate::aborts::Aborts;
use crate::barrier::{Action, Barrier, Input, Outcome};
use crate::convergence::{Convergence, Judgement};
use crate::doubt;
use crate::driver::{Driver, Known};
use crate::hypervisor::{Verdict, ask};
use crate::job::{Control, MemberState};
use crate::report::JobState;
use crate::switchover::{Limits, RATE_MIB_S};

const REFRESH_INTERVAL: Duration = Duration::from_millis(250);
const STATS_INTERVAL: Duration = Duration::from_secs(1);
/// How long libvirt may take to answer for a member that was aborted before its QEMU had connected.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(5);
/// For what libvirt refuses while a migration is only beginning.
const ATTEMPTS: u32 = 20;
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// libvirt's answer for one member, with the task that waited for it.
type Answer = Result<(Id, (usize, Result<(), LibvirtError>)), JoinError>;

/// Tasks that each wait for libvirt's answer for one member.
#[derive(Default)]
struct Answers {
    tasks: JoinSet<(usize, Result<(), LibvirtError>)>,
    members: HashMap<Id, usize>,
}

impl Driver {
    /// Migrates the members; returns their barrier at the end. `said` is what was said to the job before.
    pub(crate) async fn conduct(&mut self, known: &mut Known, said: Vec<Control>) -> Barrier {
        let mut barrier = Barrier::new(0..self.members.len(), self.request.policy);
        let mut aborts = Aborts::new(self.hypervisor.clone());
        let mut answers = Answers::default();
        let mut inputs: Vec<Input> = said
            .into_iter()
            .flat_map(|it| self.take_control(it))
            .collect();
        inputs.extend(self.waiting(known));
        self.job.update(|view| view.state = JobState::Running);
        known.limits = self.limit_passes.then(|| {
            let members = self.members.iter().map(|member| member.uuid);
            Limits::new(&self.hypervisor, members)
        });
        // Ends with this function, however that ends.
        let mut beside = JoinSet::new();
        let mut suspending = JoinSet::new();
        beside.spawn(self.watch_statistics());
        let mut refresh = tokio::time::interval(REFRESH_INTERVAL);
        let mut deadline = self.request.timeout.map(|timeout| Instant::now() + timeout);

        'job: loop {
            let mut actions = barrier.handle(inputs.drain(..));
            let mut at = 0;
            while let Some(action) = actions.get(at).cloned() {
                at += 1;
                match action {
                    Action::Start { member, throttled } => {
                        let started =
                            self.start(member, throttled, &mut aborts, &mut answers, known);
                        if let Err(error) = started {
                            let failed = Input::MigrateFailed(member, error.to_string());
                            actions.extend(barrier.handle([failed]));
                        }
                    }
                    Action::Release(members) => self.release(&members, known),
                    Action::PostCopy(members) => {
                        for member in members {
                            beside.spawn(self.start_post_copy(member));
                        }
                    }
                    Action::Suspend(members) => {
                        for member in members {
                            beside.spawn(self.suspend(member));
                        }
                    }
                    Action::AbortMember(member) => {
                        known.departures.remove(member, Instant::now());
                        let facts = &mut known.facts[member];
                        if !facts.connected {
                            self.session.close_socket(member);
                            facts.closed.get_or_insert_with(Instant::now);
                        }
                        aborts.start(member, &self.members[member]);
                    }
                    Action::Finish => break 'job,
                }
            }
            self.depart(known);
            tokio::select! {
                // All that has arrived is read below; the order here only keeps a flood of events
                // from holding up the rest, and a simulation exact.
                biased;
                _ = refresh.tick() => {
                    self.sample(known);
                    if let Some(limits) = &known.limits {
                        for member in 0..self.members.len() {
                            limits.raise(member, known.may_be_left(member));
                        }
                    }
                    self.refresh(&barrier, known);
                    inputs.extend(self.not_begun(&barrier, known));
                }
                () = sleep_until(known.departures.due()) => {}
                () = sleep_until(deadline) => {
                    deadline = None;
                    inputs.push(Input::TimedOut);
                }
                Some(control) = self.control.recv() => inputs.extend(self.take_control(control)),
                Some(answer) = answers.tasks.join_next_with_id() => {
                    inputs.extend(answers.take(answer, known));
                }
                event = self.events.recv(), if known.events_open => {
                    inputs.extend(self.take_event(event, known));
                }
            }
            // Answers before events: what broke a channel was reported before libvirt noticed.
            while let Some(answer) = answers.tasks.try_join_next_with_id() {
                inputs.extend(answers.take(answer, known));
            }
            inputs.extend(self.waiting(known));
            for input in &inputs {
                if let Input::Migrated(member) | Input::MigrateFailed(member, _) = input {
                    known.departures.remove(*member, Instant::now());
                }
                if let Input::Migrated(member) = input {
                    self.set_state(*member, MemberState::Migrated);
                }
                // Before anything else: it may run on both hosts.
                if let Input::MigrateFailed(member, _) = input
                    && known.facts[*member].may_run_there()
                {
                    let uuid = self.members[*member].uuid;
                    suspending.spawn(doubt::suspend(self.hypervisor.clone(), uuid));
                }
            }
        }
        aborts.shutdown().await;
        while suspending.join_next().await.is_some() {}
        known.limits = None;
        for (member, facts) in known.facts.iter_mut().enumerate() {
            facts.outcome = barrier.outcome(member).cloned();
            facts.error = barrier.member_error(member).map(str::to_owned);
        }
        self.refresh(&barrier, known);
        self.job.update(|view| {
            for (view, facts) in view.members.iter_mut().zip(&known.facts) {
                view.state = match facts.outcome {
                    Some(Outcome::Migrated) => MemberState::Migrated,
                    _ => MemberState::Source,
                };
            }
        });
        barrier
    }

    /// Members that were aborted while libvirt was still reaching for the destination, which may take
    /// it minutes if that is silent. Their guests run, and without the socket cannot migrate.
    fn not_begun(&self, barrier: &Barrier, known: &Known) -> Vec<Input> {
        let mut inputs = Vec::new();
        for (member, facts) in known.facts.iter().enumerate() {
            let waited = facts.closed.is_some_and(|at| at.elapsed() > BEGIN_TIMEOUT);
            if waited && !facts.connected && barrier.outcome(member).is_none() {
                let name = self.name(member);
                tracing::warn!(
                    job = self.job.id,
                    domain = name,
                    "libvirt has not begun to migrate it, and does not answer; it cannot migrate any more"
                );
                let error = format!(
                    "libvirt has not begun to migrate domain {name}, and does not answer; it may take a few minutes to give up"
                );
                inputs.push(Input::MigrateFailed(member, error));
            }
        }
        inputs
    }

    /// Takes note of how far each member's stream has come.
    fn sample(&self, known: &mut Known) {
        let counters = self.session.counters();
        let streams = counters.members.iter().map(|m| m.qemu_stream_bytes);
        known.rates.sample(Instant::now().into_std(), streams);
    }

    /// Starts a member's migration, for the first time or anew.
    fn start(
        &self,
        member: usize,
        throttled: bool,
        aborts: &mut Aborts,
        answers: &mut Answers,
        known: &mut Known,
    ) -> Result<(), LibvirtError> {
        known.facts[member].started.get_or_insert_with(Instant::now);
        known.facts[member].stream_ended = false;
        known.facts[member].arrived = false;
        known.facts[member].connected = false;
        if throttled {
            tracing::info!(
                job = self.job.id,
                domain = self.name(member),
                "it does not converge: its migration begins anew, and QEMU slows its guest down"
            );
            self.session.restart_member(member);
            known.convergence[member] = Convergence::throttled();
            known.judged[member] = None;
            if let Some(limits) = &known.limits {
                limits.restart(member);
            }
        }
        self.set_state(member, MemberState::Copying);
        let answered = aborts.begin(member);
        match self.migrate_member(member, throttled) {
            Ok(verdict) => {
                let task = answers.tasks.spawn(async move {
                    let result = verdict.await;
                    answered.store(true, SeqCst);
                    (member, result)
                });
                answers.members.insert(task.id(), member);
                Ok(())
            }
            Err(error) => {
                answered.store(true, SeqCst);
                Err(error)
            }
        }
    }

    fn migrate_member(&self, member: usize, throttled: bool) -> Result<Verdict, LibvirtError> {
        let domain = &self.members[member];
        let request = &self.request;
        let as_it_is = request.as_they_are && domain.persistent;
        let options = MigrateOptions {
            destination_uri: self.libvirt.uri().to_owned(),
            migrate_uri: self.session.migrate_uri(member),
            persistent: request.persistent || as_it_is,
            undefine_source: request.undefine_source || as_it_is,
            suspend: request.suspend,
            auto_converge: throttled || request.auto_converge,
            post_copy: request.policy.can_post_copy(),
            post_copy_resume: request.post_copy_resume,
            parallel: self.parallel,
            unsafe_disks: request.unsafe_disks,
            switchover_mib_s: self.limit_passes.then_some(RATE_MIB_S),
        };
        self.hypervisor.migrate(domain.uuid, &domain.name, options)
    }

    /// Switches the member's migration to post-copy; it has begun, but libvirt may not know yet.
    fn start_post_copy(&self, member: usize) -> impl Future<Output = ()> + use<> {
        let name = self.name(member).to_owned();
        tracing::info!(job = self.job.id, domain = name, "goes to post-copy");
        let (hypervisor, uuid) = (self.hypervisor.clone(), self.members[member].uuid);
        async move {
            for attempt in 1..=ATTEMPTS {
                let asked = ask(&hypervisor, move |hypervisor| {
                    hypervisor.start_post_copy(uuid)
                });
                match asked.await {
                    Ok(()) => return,
                    Err(error) if attempt == ATTEMPTS => {
                        let error = error.sentence();
                        tracing::warn!(domain = name, error, "cannot be switched to post-copy");
                    }
                    Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
                }
            }
        }
    }

    fn suspend(&self, member: usize) -> impl Future<Output = ()> + use<> {
        let name = self.name(member).to_owned();
        tracing::info!(
            job = self.job.id,
            domain = name,
            "suspended to converge, since the time is up"
        );
        let (hypervisor, uuid) = (self.hypervisor.clone(), self.members[member].uuid);
        async move {
            let asked = ask(&hypervisor, move |hypervisor| hypervisor.suspend(uuid));
            if let Err(error) = asked.await {
                let error = error.sentence();
                tracing::warn!(domain = name, error, "cannot be suspended");
            }
        }
    }

    pub(crate) fn set_state(&self, member: usize, state: MemberState) {
        self.job.update(|view| {
            if let Some(member) = view.members.get_mut(member) {
                member.state = state;
            }
        });
    }

    /// How far a pass that has ended shows the member to be.
    fn judge(
        &self,
        member: usize,
        sent_bytes: u64,
        took: Duration,
        known: &mut Known,
    ) -> Option<Input> {
        let may_be_left = known.may_be_left(member);
        let convergence = known.convergence.get_mut(member)?;
        let judgement = convergence.pass(sent_bytes, took, may_be_left);
        let was = known.judged[member].replace(judgement);
        match judgement {
            Judgement::Converged => {
                (was != Some(Judgement::Converged)).then_some(Input::Converged(member))
            }
            Judgement::Converging => {
                (was == Some(Judgement::Converged)).then_some(Input::Diverged(member))
            }
            Judgement::Stalled(rates) => {
                let name = self.name(member);
                let why = format!(
                    "domain {name} dirties {:.1} MB/s of its memory, and {:.1} MB/s of it can be sent",
                    rates.dirtied / 1e6,
                    rates.carried / 1e6
                );
                tracing::warn!(job = self.job.id, domain = name, why, "does not converge");
                Some(Input::Stalled(member, why))
            }
        }
    }

    /// What the user and the tunnel have said and nobody has read yet.
    fn waiting(&mut self, known: &mut Known) -> Vec<Input> {
        let mut inputs = Vec::new();
        while let Ok(control) = self.control.try_recv() {
            inputs.extend(self.take_control(control));
        }
        while known.events_open {
            let event = match self.events.try_recv() {
                Ok(event) => Some(event),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => None,
            };
            inputs.extend(self.take_event(event, known));
        }
        inputs
    }

    fn take_control(&mut self, control: Control) -> Option<Input> {
        match control {
            Control::DaemonEnds => {
                tracing::info!(job = self.job.id, "aborted because vmgangd ends");
                self.daemon_ends = true;
                Some(Input::AbortRequested)
            }
            Control::Abort => {
                tracing::info!(job = self.job.id, "abort requested");
                Some(Input::AbortRequested)
            }
            Control::StartPostCopy => Some(Input::PostCopyRequested),
            Control::SetBandwidth(bandwidth) => {
                self.session.set_bandwidth(bandwidth);
                None
            }
        }
    }

    /// `None` is the end of all events.
    fn take_event(&self, event: Option<SourceEvent>, known: &mut Known) -> Option<Input> {
        let Some(event) = event else {
            known.events_open = false;
            if known.session_lost {
                return None;
            }
            known.session_lost = true;
            return Some(Input::SessionFailed(format!(
                "the session with vmgangd at {} ended",
                self.request.peer
            )));
        };
        match event {
            SourceEvent::ChannelOpened { member } => {
                if let Some(facts) = known.facts.get_mut(member) {
                    facts.connected = true;
                }
                let name = self.name(member);
                tracing::debug!(job = self.job.id, domain = name, "channel opened");
                Some(Input::Streaming(member))
            }
            SourceEvent::FirstPassDone { member } => {
                if let Some(limits) = &known.limits {
                    limits.free_unless_held(member, known.may_be_left(member));
                }
                self.set_state(member, MemberState::Held);
                Some(Input::FirstPassDone(member))
            }
            SourceEvent::PassDone {
                member,
                sent_bytes,
                took,
            } => self.judge(member, sent_bytes, took, known),
            SourceEvent::HeldInFirstPass { member } => {
                let member_name = self.name(member);
                tracing::warn!(
                    job = self.job.id,
                    domain = member_name,
                    "its QEMU sends no SWITCHOVER_ACK: held in its first pass, the gang's barrier is approximate"
                );
                self.set_state(member, MemberState::Held);
                Some(Input::HeldInFirstPass(member))
            }
            SourceEvent::Unreadable { member } => {
                let member_name = self.name(member);
                tracing::warn!(
                    job = self.job.id,
                    domain = member_name,
                    "its stream is not understood: the gang's barrier is approximate"
                );
                // Without an acknowledgement nobody would give it a limit that it can go below.
                if self.request.policy.takes_turns(self.members.len())
                    && let Some(limits) = &known.limits
                {
                    limits.free_unless_held(member, known.may_be_left(member));
                }
                Some(Input::Unreadable(member))
            }
            SourceEvent::AckWithheld { member } => {
                // libvirt's migration job runs: what is set now ends with it.
                if let Some(limits) = &known.limits {
                    limits.hold(member);
                }
                Some(Input::AckWithheld(member))
            }
            SourceEvent::GuestStopped { member, at } => {
                self.set_state(member, MemberState::Switching);
                self.job.update(|view| view.state = JobState::Switching);
                if let Some(facts) = known.facts.get_mut(member) {
                    facts.guest_stopped.get_or_insert(at);
                }
                Some(Input::GuestStopped(member))
            }
            SourceEvent::Arrived { member } => {
                if let Some(facts) = known.facts.get_mut(member) {
                    facts.arrived = true;
                }
                known.departures.arrived(member, Instant::now());
                None
            }
            SourceEvent::StreamEnded { member } => {
                if let Some(facts) = known.facts.get_mut(member) {
                    facts.stream_ended = true;
                }
                // Says nothing about the guest: libvirt's verdict does.
                let member = self.name(member);
                tracing::debug!(job = self.job.id, domain = member, "stream ended");
                None
            }
            SourceEvent::MemberFailed { member, error } => Some(Input::MemberFailed(
                member,
                format!("the channel of domain {} broke: {error}", self.name(member)),
            )),
            SourceEvent::SessionFailed { error } => {
                known.session_lost = true;
                Some(Input::SessionFailed(format!(
                    "the session with vmgangd at {} broke: {error}",
                    self.request.peer
                )))
            }
        }
    }

    /// The commit point of a gang that is held; of a larger one, of a member.
    fn release(&self, members: &[usize], known: &mut Known) {
        if self.request.policy.takes_turns(self.members.len()) {
            for member in members {
                let domain = self.name(*member);
                tracing::info!(job = self.job.id, domain, "ready: it switches over in turn");
            }
        } else {
            tracing::info!(
                job = self.job.id,
                members = members.len(),
                "released: the gang switches over"
            );
            self.job.update(|view| view.state = JobState::Switching);
        }
        known.departures.add(members, Instant::now());
    }

    /// Lets those go whose turn it is.
    fn depart(&self, known: &mut Known) {
        while let Some(member) = known.departures.leaves(Instant::now()) {
            self.session.release_member(member);
            // After the release: a member that has its limit first would look for dirty pages in
            // the middle of a pass.
            self.sample(known);
            if let Some(limits) = &known.limits {
                limits.release(member, known.may_be_left(member));
            }
        }
    }

    /// Reads libvirt's own figures once a second, beside the job.
    fn watch_statistics(&self) -> impl Future<Output = ()> + Send + 'static {
        let hypervisor = self.hypervisor.clone();
        let job = self.job.clone();
        let members: Vec<_> = self.members.iter().map(|member| member.uuid).collect();
        async move {
            loop {
                tokio::time::sleep(STATS_INTERVAL).await;
                for (member, &uuid) in members.iter().enumerate() {
                    // Members that have not begun, or have left, have no job to ask about.
                    if !job.view().members[member].state.under_way() {
                        continue;
                    }
                    let asked = ask(&hypervisor, move |hypervisor| hypervisor.running_job(uuid));
                    let Ok(stats) = asked.await else { continue };
                    if !stats.active {
                        continue;
                    }
                    job.update(|view| {
                        let view = &mut view.members[member];
                        view.total_bytes = stats.memory_total_bytes.unwrap_or(0);
                        view.remaining_bytes = stats.memory_remaining_bytes.unwrap_or(0);
                        view.iterations = stats.iterations.unwrap_or(0);
                    });
                }
            }
        }
    }
}

impl Answers {
    fn take(&self, answer: Answer, known: &mut Known) -> Option<Input> {
        let (member, result) = match answer {
            Ok((_, (member, result))) => (member, result.map_err(|error| error.to_string())),
            Err(error) => {
                let member = self.members.get(&error.id()).copied()?;
                let text = "the task that waited for libvirt ended early; see the log of vmgangd";
                (member, Err(text.to_owned()))
            }
        };
        let facts = known.facts.get_mut(member)?;
        facts.elapsed = facts
            .started
            .map_or(Duration::ZERO, |start| start.elapsed());
        Some(match result {
            Ok(()) => Input::Migrated(member),
            Err(error) => Input::MigrateFailed(member, error),
        })
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
