//! The made-up tunnel: sessions that break, and releases that are checked.

use super::*;

/// The engine.
pub struct SimTunnel(pub World);

struct SimSession {
    world: World,
    members: usize,
    _breaking: tokio::task::JoinSet<()>,
}

impl Tunnel for SimTunnel {
    fn connect(&self, options: SourceOptions) -> BoxFuture<'_, Result<Opened, SourceError>> {
        Box::pin(async move {
            self.0.pause(1, 300).await;
            let (events, receiver) = mpsc::unbounded_channel();
            let members = options.offer.members.len();
            let mut state = self.0.lock();
            state.session = Some(SessionState {
                events,
                released: watch::Sender::new(vec![options.hold == Hold::Nothing; members]),
                broken: (0..members).map(|_| watch::Sender::new(false)).collect(),
                hold: options.hold,
            });
            state.say("the session opens");
            let mut breaking = tokio::task::JoinSet::new();
            if let Some(after) = state.breaks_after {
                let world = self.0.clone();
                breaking.spawn(async move {
                    tokio::time::sleep(after).await;
                    let mut state = world.lock();
                    state.failed();
                    state.say("the session breaks");
                    state.tell(SourceEvent::SessionFailed {
                        error: "connection reset by peer".into(),
                    });
                    if let Some(session) = &state.session {
                        for broken in &session.broken {
                            broken.send_replace(true);
                        }
                    }
                });
            }
            let session = SimSession {
                world: self.0.clone(),
                members,
                _breaking: breaking,
            };
            Ok((Box::new(session) as Box<dyn Session>, receiver))
        })
    }
}

impl SimSession {
    fn let_go(&self, member: usize) {
        let mut state = self.world.lock();
        let policy = state.policy.expect("a job");
        let keeps_all = policy.on_failure == OnFailure::Abort;
        let first = !state.released_any;
        assert!(
            !(first && keeps_all && state.failed_before_release && !state.stopped_any),
            "released after something had gone wrong"
        );
        state.released_any = true;
        state.say("released");
        if let Some(session) = &state.session {
            session
                .released
                .send_modify(|released| released[member] = true);
        }
    }
}

impl Session for SimSession {
    fn migrate_uri(&self, member: usize) -> String {
        format!("unix:///sim/{member}")
    }
    fn release_member(&self, member: usize) {
        self.let_go(member);
    }
    fn close_socket(&self, member: usize) {
        self.world.lock().guests[member].closed = true;
    }
    fn restart_member(&self, member: usize) {
        let state = self.world.lock();
        assert!(
            !state.guests[member].under_way,
            "begins anew before its end"
        );
    }
    fn set_bandwidth(&self, _: Option<u64>) {}
    fn counters(&self) -> SessionCounters {
        SessionCounters {
            members: vec![MemberCounters::default(); self.members],
            ..SessionCounters::default()
        }
    }
    fn member_outcome(
        &self,
        _: usize,
    ) -> BoxFuture<'_, Result<Option<MemberOutcome>, SourceError>> {
        Box::pin(async { Ok(None) })
    }
    fn has_stage(&self) -> bool {
        false
    }
    fn may_find_contents(&self) -> bool {
        false
    }
    fn offers(&self) -> Box<OfferContents> {
        Box::new(|_| Box::pin(async { 0 }))
    }
    fn close(self: Box<Self>) -> BoxFuture<'static, SessionEnd> {
        Box::pin(async { SessionEnd::default() })
    }
}
