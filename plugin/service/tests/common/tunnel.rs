//! The scripted tunnel of a scripted host.

use super::*;

pub(super) struct FakeTunnel(pub(super) Fake);

struct FakeSession {
    wires: Wires,
    outcomes: Arc<Barrier>,
    open: Arc<AtomicUsize>,
    let_go: Arc<Mutex<(usize, usize)>>,
}

impl Drop for FakeSession {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Tunnel for FakeTunnel {
    fn connect(&self, options: SourceOptions) -> BoxFuture<'_, Result<Opened, SourceError>> {
        let members: Vec<Uuid> = options.offer.members.iter().map(|m| m.uuid).collect();
        let (events, receiver) = mpsc::unbounded_channel();
        let wires = Wires {
            events,
            released: watch::Sender::new(vec![options.hold == Hold::Nothing; members.len()]),
            limits: watch::Sender::new(vec![300; members.len()]),
            aborted: watch::Sender::new(vec![false; members.len()]),
            post_copy: watch::Sender::new(vec![false; members.len()]),
            members,
        };
        *self.0.wires.lock().expect("lock") = Some(wires.clone());
        *self.0.window_offered.lock().expect("lock") = options.offer.window_budget_bytes;
        let fake = self.0.clone();
        Box::pin(async move {
            tokio::time::sleep(fake.connect_delay).await;
            fake.sessions.fetch_add(1, Ordering::SeqCst);
            let session = FakeSession {
                wires,
                outcomes: fake.outcomes.clone(),
                open: fake.sessions.clone(),
                let_go: fake.let_go.clone(),
            };
            *fake.calls.0.lock().expect("lock") += 1;
            fake.calls.1.notify_all();
            Ok((Box::new(session) as Box<dyn Session>, receiver))
        })
    }
}

impl Session for FakeSession {
    fn migrate_uri(&self, member: usize) -> String {
        format!("unix:///fake/{member}")
    }
    fn release_member(&self, member: usize) {
        let mut let_go = self.let_go.lock().expect("lock");
        let_go.0 += 1;
        let_go.1 = let_go.1.max(let_go.0);
        self.wires
            .released
            .send_modify(|released| released[member] = true);
    }
    fn close_socket(&self, _: usize) {}
    fn restart_member(&self, member: usize) {
        self.wires
            .aborted
            .send_modify(|aborted| aborted[member] = false);
        self.wires.limits.send_modify(|limits| limits[member] = 0);
    }
    fn set_bandwidth(&self, _: Option<u64>) {}
    fn counters(&self) -> SessionCounters {
        SessionCounters {
            qemu_stream_bytes: 1000,
            wire_bytes: 300,
            literal_bytes: 200,
            shared_pages: vec![vec![1, 0, 0]],
            saved: Saved {
                zero: 800,
                compression: -100,
                ..Saved::default()
            },
            members: vec![
                MemberCounters {
                    qemu_stream_bytes: 100,
                    wire_bytes: 30,
                    ..MemberCounters::default()
                };
                self.wires.members.len()
            ],
        }
    }
    fn member_outcome(
        &self,
        _: usize,
    ) -> BoxFuture<'_, Result<Option<MemberOutcome>, SourceError>> {
        let outcomes = self.outcomes.clone();
        Box::pin(async move {
            outcomes.wait().await;
            Ok(Some(MemberOutcome {
                downtime_ms: Some(7),
                iterations: None,
                memory_bytes: None,
            }))
        })
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
        let counters = self.counters();
        Box::pin(async move {
            SessionEnd {
                counters,
                remains: None,
            }
        })
    }
}
