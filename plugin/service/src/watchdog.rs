//! Tells systemd at intervals that the daemon is alive, which is that its tasks run and that its locks
//! can be taken. Must not: tell it from a thread of its own, which would live on in a daemon that hangs.

use std::time::Duration;

use sd_notify::NotifyState;

/// Answers, while the daemon runs, the watchdog that the unit asks for; ends at once without one.
/// `look` takes the locks that a daemon that hangs would not give.
pub(crate) async fn answer(look: impl Fn()) {
    let Some(timeout) = sd_notify::watchdog_enabled() else {
        return;
    };
    // As sd_watchdog_enabled(3) recommends.
    beat(timeout / 2, look, || {
        if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
            tracing::warn!(%error, "cannot answer systemd's watchdog");
        }
    })
    .await;
}

async fn beat(interval: Duration, look: impl Fn(), alive: impl Fn()) {
    loop {
        look();
        alive();
        tokio::time::sleep(interval).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
    use std::sync::{Arc, Barrier, Mutex, mpsc};

    use super::*;

    const INTERVAL: Duration = Duration::from_millis(1);
    /// Many times the interval: long enough to see that there is no beat.
    const SILENCE: Duration = Duration::from_millis(200);
    const THREADS: usize = 2;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .enable_all()
            .build()
            .expect("a runtime")
    }

    /// How many beats have been counted, once there is one more.
    fn next(beats: &AtomicU32) -> u32 {
        let before = beats.load(SeqCst);
        while beats.load(SeqCst) == before {
            std::thread::yield_now();
        }
        beats.load(SeqCst)
    }

    fn start(
        runtime: &tokio::runtime::Runtime,
        look: impl Fn() + Send + 'static,
    ) -> Arc<AtomicU32> {
        let beats = Arc::new(AtomicU32::new(0));
        let counted = beats.clone();
        runtime.spawn(beat(INTERVAL, look, move || {
            counted.fetch_add(1, SeqCst);
        }));
        beats
    }

    #[test]
    fn a_runtime_that_hangs_is_silent() {
        let runtime = runtime();
        let beats = start(&runtime, || {});
        next(&beats);
        let all_hang = Arc::new(Barrier::new(THREADS + 1));
        let (go_on, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        for _ in 0..THREADS {
            let (all_hang, wait) = (all_hang.clone(), wait.clone());
            runtime.spawn(async move {
                all_hang.wait();
                // Ends when the test lets go of the sender.
                let _ = wait.lock().map(|wait| wait.recv());
            });
        }
        all_hang.wait();
        let hung = beats.load(SeqCst);
        std::thread::sleep(SILENCE);
        assert_eq!(beats.load(SeqCst), hung);
        drop(go_on);
        next(&beats);
    }

    #[test]
    fn a_lock_that_nobody_gives_back_is_silence() {
        let runtime = runtime();
        let lock = Arc::new(Mutex::new(()));
        let taken = lock.clone();
        let beats = start(&runtime, move || drop(taken.lock()));
        next(&beats);
        let held = lock.lock().expect("not poisoned");
        // One beat may have taken it before.
        std::thread::sleep(SILENCE);
        let hung = beats.load(SeqCst);
        std::thread::sleep(SILENCE);
        assert_eq!(beats.load(SeqCst), hung);
        drop(held);
        next(&beats);
    }
}
