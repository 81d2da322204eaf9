//! One wave of a job: starts libvirt's migrations, feeds the barrier with all that happens and
//! does what it says. Decides nothing: `barrier.rs` does.
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
use crate::barrier::{Action, Barrier, Cause, Input, Outcome};
use crate::driver::{Driver, Known};
use crate::hypervisor::{Verdict, ask};
use crate::job::{Control, MemberState};
use crate::report::JobState;
use crate::switchover::{Limits, RATE_MIB_S};

const REFRESH_INTERVAL: Duration = Duration::from_millis(500);
const STATS_INTERVAL: Duration = Duration::from_secs(1);

/// libvirt's answer for one member, with the task that waited for it.
type Answer = Result<(Id, (usize, Result<(), LibvirtError>)), JoinError>;

/// Tasks that each wait for libvirt's answer for one member.
#[derive(Default)]
struct Answers {
    tasks: JoinSet<(usize, Result<(), LibvirtError>)>,
    members: HashMap<Id, usize>,
}

impl Driver {
    /// Migrates one wave of members; returns its barrier at the end.
    pub(crate) async fn wave(&mut self, wave: &[usize], known: &mut Known) -> Barrier {
        let mut barrier = Barrier::new(wave.iter().copied(), self.request.on_failure);
        let mut aborts = Aborts::new(self.hypervisor.clone(), wave);
        let mut answers = Answers::default();
        let mut inputs = Vec::new();
        for &member in wave {
            known.facts[member].started = Some(Instant::now().into_std());
            let answered = aborts.answered(member);
            match self.start_member(member) {
                Ok(verdict) => {
                    let task = answers.tasks.spawn(async move {
                        let result = verdict.await;
                        answered.store(true, SeqCst);
                        (member, result)
                    });
                    answers.members.insert(task.id(), member);
                }
                Err(error) => {
                    answered.store(true, SeqCst);
                    inputs.push(Input::MigrateFailed(member, error.to_string()));
                }
            }
        }
        self.job.update(|view| {
            view.state = JobState::Running;
            for &member in wave {
                view.members[member].state = MemberState::Copying;
            }
        });
        known.limits = self.limit_passes.then(|| {
            let members = wave.iter().map(|&m| (m, self.members[m].uuid));
            Limits::new(&self.hypervisor, members)
        });
        // Ends with this function, however that ends.
        let mut statistics = JoinSet::new();
        statistics.spawn(self.watch_statistics(wave));
        let mut refresh = tokio::time::interval(REFRESH_INTERVAL);
        let mut deadline = self.request.timeout.map(|timeout| Instant::now() + timeout);

        'wave: loop {
            for action in barrier.handle(inputs.drain(..)) {
                match action {
                    Action::Release(members) => {
                        self.release(&members);
                        // After the release: a member that has its limit first would look for
                        // dirty pages in the middle of a pass.
                        self.sample(known);
                        if let Some(limits) = &known.limits {
                            for member in members {
                                limits.release(member, known.rates.unsent_bytes(member));
                            }
                        }
                    }
                    Action::AbortMember(member) => aborts.start(member, &self.members[member]),
                    Action::Finish => break 'wave,
                }
            }
            tokio::select! {
                biased;
                event = self.events.recv(), if known.events_open => {
                    inputs.extend(self.take_event(event, known));
                }
                Some(answer) = answers.tasks.join_next_with_id() => {
                    inputs.extend(answers.take(answer, known));
                }
                Some(control) = self.control.recv() => inputs.extend(self.take_control(control)),
                () = sleep_until(deadline) => {
                    deadline = None;
                    inputs.push(Input::TimedOut);
                }
                _ = refresh.tick() => {
                    self.sample(known);
                    if let Some(limits) = &known.limits {
                        for &member in wave {
                            limits.raise(member, known.rates.unsent_bytes(member));
                        }
                    }
                    self.refresh(&barrier);
                }
            }
            // Answers before events: what broke a channel was reported before libvirt noticed.
            while let Some(answer) = answers.tasks.try_join_next_with_id() {
                inputs.extend(answers.take(answer, known));
            }
            inputs.extend(self.waiting(known));
        }
        aborts.shutdown().await;
        known.limits = None;
        for &member in wave {
            known.facts[member].outcome = barrier.outcome(member).cloned();
            known.facts[member].error = barrier.member_error(member).map(str::to_owned);
        }
        self.refresh(&barrier);
        self.job.update(|view| {
            for &member in wave {
                view.members[member].state = match known.facts[member].outcome {
                    Some(Outcome::Migrated) => MemberState::Migrated,
                    _ => MemberState::Source,
                };
            }
        });
        barrier
    }

    /// Takes note of how far each member's stream has come.
    fn sample(&self, known: &mut Known) {
        let counters = self.session.counters();
        let streams = counters.members.iter().map(|m| m.qemu_stream_bytes);
        known.rates.sample(Instant::now().into_std(), streams);
    }

    /// Between waves: whether something has happened that forbids the next one.
    pub(crate) fn stopped(&mut self, known: &mut Known) -> Option<Cause> {
        let mut cause = None;
        for input in self.waiting(known) {
            match input {
                Input::AbortRequested => return Some(Cause::Aborted),
                Input::SessionFailed(error) => cause = Some(Cause::Failure(error)),
                // Of members that libvirt has answered for.
                _ => {}
            }
        }
        cause
    }

    fn start_member(&self, member: usize) -> Result<Verdict, LibvirtError> {
        let domain = &self.members[member];
        let options = MigrateOptions {
            destination_uri: self.request.destination.uri.clone(),
            migrate_uri: self.session.migrate_uri(member),
            persistent: self.request.persistent,
            undefine_source: self.request.undefine_source,
            suspend: self.request.suspend,
            switchover_mib_s: self.limit_passes.then_some(RATE_MIB_S),
        };
        self.hypervisor.migrate(domain.uuid, &domain.name, options)
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

    fn take_control(&self, control: Control) -> Option<Input> {
        match control {
            Control::Abort => {
                tracing::info!(job = self.job.id, "abort requested");
                Some(Input::AbortRequested)
            }
            Control::SetBandwidth(bandwidth) => {
                self.session.set_bandwidth(bandwidth);
                None
            }
        }
    }

    /// `None` is the end of all events.
    fn take_event(&self, event: Option<SourceEvent>, known: &mut Known) -> Option<Input> {
        let set = |member: usize, state: MemberState| {
            self.job.update(|view| {
                if let Some(member) = view.members.get_mut(member) {
                    member.state = state;
                }
            });
        };
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
                let member = self.name(member);
                tracing::debug!(job = self.job.id, member, "channel opened");
                None
            }
            SourceEvent::FirstPassDone { member } => {
                if let Some(limits) = &known.limits {
                    limits.free_unless_held(member, known.rates.unsent_bytes(member));
                }
                set(member, MemberState::Held);
                Some(Input::FirstPassDone(member))
            }
            SourceEvent::Unreadable { member } => {
                let member_name = self.name(member);
                tracing::warn!(
                    job = self.job.id,
                    member = member_name,
                    "its stream is not understood: the gang's barrier is approximate"
                );
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
                set(member, MemberState::Switching);
                if let Some(facts) = known.facts.get_mut(member) {
                    facts.guest_stopped.get_or_insert(at);
                }
                Some(Input::GuestStopped(member))
            }
            SourceEvent::StreamEnded { member } => {
                // Says nothing about the guest: libvirt's verdict does.
                let member = self.name(member);
                tracing::debug!(job = self.job.id, member, "stream ended");
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

    /// The commit point.
    fn release(&self, members: &[usize]) {
        tracing::info!(
            job = self.job.id,
            members = members.len(),
            "released: the gang switches over"
        );
        if members.len() == self.members.len() {
            self.session.release();
        } else {
            for &member in members {
                self.session.release_member(member);
            }
        }
        self.job.update(|view| view.state = JobState::Switching);
    }

    /// Reads libvirt's own figures once a second, beside the job.
    fn watch_statistics(&self, wave: &[usize]) -> impl Future<Output = ()> + Send + 'static {
        let hypervisor = self.hypervisor.clone();
        let job = self.job.clone();
        let members: Vec<_> = wave.iter().map(|&m| (m, self.members[m].uuid)).collect();
        async move {
            loop {
                tokio::time::sleep(STATS_INTERVAL).await;
                for &(member, uuid) in &members {
                    let asked = ask(&hypervisor, move |hypervisor| hypervisor.running_job(uuid));
                    // A member that has left has no job to ask about.
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
