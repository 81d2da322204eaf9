//! What libvirt's hook tells this daemon: which domains come to this host, and which leave it.
//!
//! Owns: the socket, and whom libvirt has announced as arriving.
//! Must not: be taken for complete: a host may have no hook, and a message may be lost. Who is not
//! announced may still arrive; libvirt knows.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::sync::Notify;
use uuid::Uuid;
use vmgang_hook::{Announcement, Event, MESSAGE_BYTES_MAX};

/// libvirt announces a domain right before its stream comes. What is older than this may be over,
/// and libvirt is asked.
const FRESH: Duration = Duration::from_secs(60);
/// More than ever arrive at once; the oldest makes place.
const ARRIVING_MAX: usize = 1024;
/// Messages read in one go, so that a flood of them does not keep a caller.
const MESSAGES_MAX: usize = 1024;

/// What was announced.
#[derive(Default)]
pub struct Announcements {
    hook: Option<Hook>,
    /// Since when.
    arriving: Mutex<BTreeMap<Uuid, Instant>>,
    /// A domain was started or has stopped.
    changed: Notify,
}

struct Hook {
    /// Read by system calls only: whoever asks needs what is there now, and tokio's readiness lags.
    socket: UnixDatagram,
    /// The same one, which says when there is something to read.
    readable: tokio::net::UnixDatagram,
    /// Is told who has left this host.
    left: Box<dyn Fn(Uuid) + Send + Sync>,
}

impl Announcements {
    /// Of a host without a hook.
    pub fn none() -> Announcements {
        Announcements::default()
    }

    /// Takes the place of an earlier daemon's socket; `left` is told of each guest that has left this
    /// host. Needs a tokio runtime.
    pub fn listen(
        path: &Path,
        left: impl Fn(Uuid) + Send + Sync + 'static,
    ) -> io::Result<Announcements> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = UnixDatagram::bind(path)?;
        // Only root may say what libvirt does.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        socket.set_nonblocking(true)?;
        Ok(Announcements {
            hook: Some(Hook {
                readable: tokio::net::UnixDatagram::from_std(socket.try_clone()?)?,
                socket,
                left: Box::new(left),
            }),
            arriving: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Reads messages as they come. For ever, if there is a socket.
    pub async fn run(&self) -> io::Result<()> {
        let Some(hook) = &self.hook else {
            return Ok(());
        };
        loop {
            hook.readable.readable().await?;
            let _ = hook.readable.try_io(Interest::READABLE, || {
                match self.hear(hook) < MESSAGES_MAX {
                    true => Err(io::ErrorKind::WouldBlock.into()),
                    false => Ok(()),
                }
            });
        }
    }

    /// Whether libvirt has just announced that this domain comes. What the hook has said before the
    /// call counts. Does not block.
    pub fn is_arriving(&self, uuid: Uuid) -> bool {
        if let Some(hook) = &self.hook {
            self.hear(hook);
        }
        let announced = self.arriving().get(&uuid).copied();
        announced.is_some_and(|at| at.elapsed() < FRESH)
    }

    /// Waits until a domain was started or has stopped since this was last waited for. One task may do so.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// These domains have arrived, or will not.
    pub fn forget(&self, uuids: impl IntoIterator<Item = Uuid>) {
        let mut arriving = self.arriving();
        for uuid in uuids {
            arriving.remove(&uuid);
        }
    }

    /// Reads what there is, and says how many messages that was.
    fn hear(&self, hook: &Hook) -> usize {
        // Held all the time, so that nobody looks while another one has a message in its hands.
        let mut arriving = self.arriving();
        // One byte more, to tell a message that is too long.
        let mut message = [0; MESSAGE_BYTES_MAX + 1];
        for read in 0..MESSAGES_MAX {
            let Ok(len) = hook.socket.recv(&mut message) else {
                return read;
            };
            let Some(told) = Announcement::parse(&message[..len]) else {
                tracing::debug!(len, "the hook said something that is none of its messages");
                continue;
            };
            tracing::debug!(domain = told.name, uuid = %told.uuid, event = ?told.event, "libvirt's hook");
            match told.event {
                Event::Incoming => {
                    arriving.insert(told.uuid, Instant::now());
                    if arriving.len() > ARRIVING_MAX {
                        let oldest = arriving.iter().min_by_key(|(_, at)| **at);
                        let oldest = oldest.map(|(uuid, _)| *uuid);
                        oldest.map(|uuid| arriving.remove(&uuid));
                    }
                }
                // Its QEMU waits for the stream, or it is none that arrives.
                Event::Started => self.changed.notify_one(),
                Event::Stopped => {
                    arriving.remove(&told.uuid);
                    (hook.left)(told.uuid);
                    self.changed.notify_one();
                }
            }
        }
        MESSAGES_MAX
    }

    fn arriving(&self) -> MutexGuard<'_, BTreeMap<Uuid, Instant>> {
        // Each change is one insert or remove, whole even if a thread died around it.
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(path: &Path, event: Event, uuid: u128) {
        let hook = UnixDatagram::unbound().expect("a socket");
        let told = Announcement {
            event,
            uuid: Uuid::from_u128(uuid),
            name: "vm".into(),
        };
        hook.send_to(&told.to_bytes(), path).expect("sends");
    }

    #[tokio::test]
    async fn what_was_said_before_the_question_counts() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("hook.sock");
        let heard = Announcements::listen(&path, |_| {}).expect("listens");
        let mode = std::fs::metadata(&path)
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let arrives = |uuid| heard.is_arriving(Uuid::from_u128(uuid));
        assert!(!arrives(1));
        say(&path, Event::Incoming, 1);
        say(&path, Event::Incoming, 2);
        say(&path, Event::Started, 1);
        say(&path, Event::Started, 3);
        assert!(arrives(1) && arrives(2));
        assert!(!arrives(3), "started here");
        say(&path, Event::Stopped, 1);
        assert!(!arrives(1) && arrives(2));
        heard.forget([Uuid::from_u128(2)]);
        assert!(!arrives(2));
        // A daemon that starts takes the socket over, and knows nothing.
        say(&path, Event::Incoming, 4);
        let heard = Announcements::listen(&path, |_| {}).expect("listens again");
        assert!(!heard.is_arriving(Uuid::from_u128(4)));
        assert!(!Announcements::none().is_arriving(Uuid::from_u128(4)));
    }

    #[tokio::test]
    async fn nonsense_is_read_over_and_does_not_grow() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("hook.sock");
        let heard = Announcements::listen(&path, |_| {}).expect("listens");
        let hook = UnixDatagram::unbound().expect("a socket");
        for nonsense in [&b""[..], b"x", &[0xff; 100], &[b'a'; 4000]] {
            hook.send_to(nonsense, &path).expect("sends");
        }
        say(&path, Event::Incoming, 1);
        assert!(heard.is_arriving(Uuid::from_u128(1)));
        for uuid in 2..2 + ARRIVING_MAX as u128 {
            say(&path, Event::Incoming, uuid);
            assert!(heard.is_arriving(Uuid::from_u128(uuid)));
        }
        assert_eq!(heard.arriving().len(), ARRIVING_MAX);
        assert!(!heard.is_arriving(Uuid::from_u128(1)), "the oldest");
    }

    #[tokio::test]
    async fn who_leaves_is_told() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("hook.sock");
        let (left, mut leaving) = tokio::sync::mpsc::unbounded_channel();
        let heard = Announcements::listen(&path, move |uuid| {
            let _ = left.send(uuid);
        });
        let heard = heard.expect("listens");
        let telling = async {
            for uuid in [5, 6] {
                say(&path, Event::Started, uuid);
                say(&path, Event::Stopped, uuid);
                assert_eq!(leaving.recv().await, Some(Uuid::from_u128(uuid)));
            }
        };
        tokio::select! {
            _ = heard.run() => panic!("it reads for ever"),
            () = telling => {}
        }
    }
}
