//! What the hook tells the daemon: one datagram for one event of one domain.
//!
//! Must not: be believed to be complete. A datagram is lost when the daemon does not run or its queue
//! is full; whoever needs to know asks libvirt then.

use uuid::Uuid;

/// A message is no longer than this; what is, is none of ours.
pub const MESSAGE_BYTES_MAX: usize = 512;

/// First line of a message. Raise the number when the rest changes.
const MAGIC: &str = "vmgang-hook 1";
/// The name is for people: one that is longer is cut.
const NAME_BYTES_MAX: usize = 255;

/// What has happened to a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// libvirt prepares an incoming migration of it.
    Incoming,
    /// Its QEMU runs: the guest has been started, or waits for its migration stream.
    Started,
    /// It is gone from this host, whatever the reason.
    Stopped,
}

impl Event {
    /// From the second and third argument of a hook; `None` for what nobody needs to know.
    pub fn of_hook(operation: &str, suboperation: &str) -> Option<Event> {
        match (operation, suboperation) {
            ("migrate", "begin") => Some(Event::Incoming),
            ("started", "begin") => Some(Event::Started),
            // The last one, also after a start that failed; `stopped` comes just before it.
            ("release", "end") => Some(Event::Stopped),
            _ => None,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Event::Incoming => "incoming",
            Event::Started => "started",
            Event::Stopped => "stopped",
        }
    }

    fn parse(text: &str) -> Option<Event> {
        [Event::Incoming, Event::Started, Event::Stopped]
            .into_iter()
            .find(|event| event.as_str() == text)
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    pub event: Event,
    pub uuid: Uuid,
    /// The domain's name, for logs.
    pub name: String,
}

impl Announcement {
    /// Four lines: magic, event, UUID, name. At most [`MESSAGE_BYTES_MAX`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let name = self.name.replace('\n', " ");
        let (event, name) = (self.event.as_str(), cut(&name, NAME_BYTES_MAX));
        format!("{MAGIC}\n{event}\n{}\n{name}", self.uuid).into_bytes()
    }

    /// `None` for anything else than a message of this version.
    pub fn parse(bytes: &[u8]) -> Option<Announcement> {
        if bytes.len() > MESSAGE_BYTES_MAX {
            return None;
        }
        let mut lines = std::str::from_utf8(bytes).ok()?.splitn(4, '\n');
        if lines.next()? != MAGIC {
            return None;
        }
        Some(Announcement {
            event: Event::parse(lines.next()?)?,
            uuid: Uuid::try_parse(lines.next()?).ok()?,
            name: lines
                .next()
                .filter(|name| !name.contains('\n') && name.len() <= NAME_BYTES_MAX)?
                .to_owned(),
        })
    }
}

/// At most so many bytes of it, whole characters.
fn cut(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_message_is_read_as_it_was_written(
            name in "[^\n]{0,85}",
            uuid: u128,
            event in prop_oneof![Just(Event::Incoming), Just(Event::Started), Just(Event::Stopped)],
        ) {
            let told = Announcement { event, uuid: Uuid::from_u128(uuid), name: name.clone() };
            let heard = Announcement::parse(&told.to_bytes()).expect("a message");
            prop_assert!(name.starts_with(&heard.name));
            prop_assert_eq!(Announcement { name: heard.name.clone(), ..told }, heard);
        }

        #[test]
        fn whatever_comes_is_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Announcement::parse(&bytes);
            let mut framed = b"vmgang-hook 1\nstarted\n".to_vec();
            framed.extend(&bytes);
            let _ = Announcement::parse(&framed);
        }
    }

    #[test]
    fn names_are_cut_and_stay_one_line() {
        let told = Announcement {
            event: Event::Stopped,
            uuid: Uuid::nil(),
            name: format!("a\nb{}", "é".repeat(400)),
        };
        let bytes = told.to_bytes();
        assert!(bytes.len() <= MESSAGE_BYTES_MAX, "{}", bytes.len());
        let heard = Announcement::parse(&bytes).expect("a message");
        assert!(heard.name.starts_with("a bé") && heard.name.len() == 255);
    }

    #[test]
    fn other_versions_and_events_are_nothing() {
        let good = Announcement {
            event: Event::Started,
            uuid: Uuid::from_u128(7),
            name: "vm".into(),
        };
        let good = String::from_utf8(good.to_bytes()).expect("text");
        assert!(Announcement::parse(good.as_bytes()).is_some());
        for bad in [
            good.replace("hook 1", "hook 2"),
            good.replace("started", "paused"),
            good.replace("-0", "-x"),
            good.replace("\nvm", ""),
            good.replace("\nvm", "\nv\nm"),
            format!("{good}{}", "m".repeat(MESSAGE_BYTES_MAX)),
            String::new(),
        ] {
            assert_eq!(Announcement::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn only_what_somebody_needs_to_know_is_an_event() {
        let event = |operation, sub| Event::of_hook(operation, sub);
        assert_eq!(event("migrate", "begin"), Some(Event::Incoming));
        assert_eq!(event("started", "begin"), Some(Event::Started));
        assert_eq!(event("release", "end"), Some(Event::Stopped));
        for (operation, sub) in [
            ("prepare", "begin"),
            ("start", "begin"),
            ("stopped", "end"),
            ("reconnect", "begin"),
            ("restore", "begin"),
            ("migrate", "end"),
            ("", ""),
        ] {
            assert_eq!(event(operation, sub), None, "{operation}");
        }
    }
}
