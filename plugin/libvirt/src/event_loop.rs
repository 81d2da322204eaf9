//! libvirt's event loop, which keepalive messages need, in a thread of its own.
//! Must be started before the first connection is opened; there is one per process.

use std::sync::Once;
use std::thread;
use std::time::Duration;

static START: Once = Once::new();

/// Silences libvirt's own stderr output and runs its event loop. Cheap when already done.
pub(crate) fn ensure_running() {
    START.call_once(|| {
        // Without this libvirt prints every error to stderr, beside the log.
        virt::error::clear_error_callback();
        if let Err(error) = virt::event::event_register_default_impl() {
            tracing::warn!(%error, "no libvirt event loop: dead libvirtd connections are noticed late");
            return;
        }
        let spawned = thread::Builder::new()
            .name("libvirt-events".into())
            .spawn(|| {
                loop {
                    if let Err(error) = virt::event::event_run_default_impl() {
                        tracing::debug!(%error, "libvirt event loop turn failed");
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for the libvirt event loop");
        }
    });
}
