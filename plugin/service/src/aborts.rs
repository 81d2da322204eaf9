//! Cancels members' migrations, again and again until libvirt has answered for them: libvirt
//! refuses while a migration has not begun yet. Must not abort anything after that answer,
//! because the domain's next job may be somebody else's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use tokio::task::JoinSet;
use vmgang_libvirt::DomainInfo;

use crate::hypervisor::{Hypervisor, ask};

const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The aborts of one job. Dropped, none of them reaches libvirt any more.
pub(crate) struct Aborts {
    hypervisor: Arc<dyn Hypervisor>,
    /// Whether libvirt has answered for the migration begun last, by member.
    answered: HashMap<usize, Arc<AtomicBool>>,
    loops: JoinSet<()>,
}

impl Aborts {
    pub(crate) fn new(hypervisor: Arc<dyn Hypervisor>) -> Aborts {
        Aborts {
            hypervisor,
            answered: HashMap::new(),
            loops: JoinSet::new(),
        }
    }

    /// A migration of the member begins. What this returns is to be set the moment libvirt has
    /// answered for it; that ends its abort.
    pub(crate) fn begin(&mut self, member: usize) -> Arc<AtomicBool> {
        let answered = Arc::new(AtomicBool::new(false));
        let before = self.answered.insert(member, answered.clone());
        if let Some(before) = before {
            before.store(true, SeqCst);
        }
        answered
    }

    /// Starts to abort the member's migration.
    pub(crate) fn start(&mut self, member: usize, domain: &DomainInfo) {
        let Some(answered) = self.answered.get(&member).cloned() else {
            return;
        };
        let hypervisor = self.hypervisor.clone();
        let (uuid, name) = (domain.uuid, domain.name.clone());
        self.loops.spawn(async move {
            while !answered.load(SeqCst) {
                // The blocking call outlives this task, so it looks at the answer itself.
                let unless = answered.clone();
                let asked = ask(&hypervisor, move |hypervisor| {
                    hypervisor.abort_job(uuid, &unless)
                });
                if let Err(error) = asked.await {
                    let error = error.sentence();
                    tracing::debug!(domain = name, error, "abort not taken yet");
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        });
    }

    /// Ends all aborts; returns when none of their tasks runs.
    pub(crate) async fn shutdown(mut self) {
        self.close();
        self.loops.shutdown().await;
    }

    fn close(&self) {
        for answered in self.answered.values() {
            answered.store(true, SeqCst);
        }
    }
}

impl Drop for Aborts {
    fn drop(&mut self) {
        self.close();
    }
}
