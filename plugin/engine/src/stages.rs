//! The stages that this host holds for others, until a migration takes them.
//!
//! Must not: hold a window itself: each stays with its session, which ends when it gives it up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use uuid::Uuid;
use vmgang_dedup::PageWindow;
use vmgang_wire::TakenStage;

/// What was sent before the migration was begun has arrived by then, or is not waited for.
const TAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// A session's stage is wanted.
pub(crate) struct Take {
    /// STAGE frames that must be in it.
    pub frames: u64,
    pub answer: oneshot::Sender<PageWindow>,
}

struct Held {
    certificate_names: Vec<String>,
    takes: mpsc::Sender<Take>,
}

/// All stages of a listener; clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Stages(Arc<Mutex<HashMap<Uuid, Held>>>);

/// A stage can be taken as long as this is there.
pub(crate) struct Holding {
    stages: Stages,
    id: Uuid,
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.stages.lock().remove(&self.id);
    }
}

impl Stages {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a stage for that peer. What comes through the receiver wants it.
    pub(crate) fn hold(
        &self,
        id: Uuid,
        certificate_names: &[String],
    ) -> (Holding, mpsc::Receiver<Take>) {
        let (takes, taken) = mpsc::channel(1);
        let held = Held {
            certificate_names: certificate_names.to_vec(),
            takes,
        };
        self.lock().insert(id, held);
        let holding = Holding {
            stages: self.clone(),
            id,
        };
        (holding, taken)
    }

    /// The window of a stage, which its session has given up. `None`: there is no such stage for
    /// that peer, or not all of it has arrived.
    pub(crate) async fn take(
        &self,
        stage: TakenStage,
        certificate_names: &[String],
    ) -> Option<PageWindow> {
        let takes = {
            let stages = self.lock();
            let held = stages.get(&stage.id)?;
            if held.certificate_names != certificate_names {
                return None;
            }
            held.takes.clone()
        };
        let (answer, window) = oneshot::channel();
        let take = Take {
            frames: stage.frames,
            answer,
        };
        takes.try_send(take).ok()?;
        timeout(TAKE_TIMEOUT, window).await.ok()?.ok()
    }
}
