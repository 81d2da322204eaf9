//! The log as records of systemd's journal: the line that stderr would get as MESSAGE, and each field
//! of the event once more by its name, such as VMGANG_JOB and VMGANG_DOMAIN.
//! Must not: lose a record: what the journal does not take goes to stderr.

use std::fmt::{self, Write};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

const SOCKET: &str = "/run/systemd/journal/socket";
const IDENTIFIER: &str = "vmgangd";
/// Names in the journal have at most so many bytes.
const NAME_BYTES_MAX: usize = 64;
/// What is longer came from elsewhere. All values of an event, twice, fit into one datagram.
const VALUE_BYTES_MAX: usize = 4096;

/// A layer of the log that sends it to the journal.
pub struct Journal {
    socket: UnixDatagram,
}

impl Journal {
    /// The journal, if that is where this process's stderr goes: what systemd says of a service it
    /// started ($JOURNAL_STREAM, device and inode) is true of the stderr that it has now.
    pub fn of_stderr() -> Option<Journal> {
        let stream = std::env::var("JOURNAL_STREAM").ok()?;
        let stderr = rustix::fs::fstat(io::stderr()).ok()?;
        if stream != format!("{}:{}", stderr.st_dev, stderr.st_ino) {
            return None;
        }
        Journal::connect(Path::new(SOCKET)).ok()
    }

    fn connect(path: &Path) -> io::Result<Journal> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        Ok(Journal { socket })
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text::default();
        event.record(&mut text);
        let metadata = event.metadata();
        let line = text.line();
        let mut record = Record::default();
        record.add("MESSAGE", &line);
        record.add("PRIORITY", priority(metadata.level()));
        record.add("SYSLOG_IDENTIFIER", IDENTIFIER);
        record.add("VMGANG_TARGET", metadata.target());
        if let (Some(file), Some(number)) = (metadata.file(), metadata.line()) {
            record.add("CODE_FILE", file);
            record.add("CODE_LINE", &number.to_string());
        }
        for (name, value) in &text.fields {
            record.add(&journal_name(name), value);
        }
        if self.socket.send(&record.bytes).is_err() {
            eprintln!("{line}");
        }
    }
}

/// As syslog numbers them.
fn priority(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}

/// Capitals, digits and underscores, beginning with ours.
fn journal_name(name: &str) -> String {
    let mut known = String::from("VMGANG_");
    known.extend(name.chars().map(|letter| match letter {
        letter if letter.is_ascii_alphanumeric() => letter.to_ascii_uppercase(),
        _ => '_',
    }));
    known.truncate(NAME_BYTES_MAX);
    known
}

/// What an event says.
#[derive(Default)]
struct Text {
    message: String,
    fields: Vec<(&'static str, String)>,
}

impl Text {
    /// As `tracing_subscriber::fmt` writes it, less time, level and target.
    fn line(&self) -> String {
        let mut line = self.message.clone();
        for (name, value) in &self.fields {
            let separator = if line.is_empty() { "" } else { " " };
            let _ = write!(line, "{separator}{name}={value}");
        }
        line
    }

    fn add(&mut self, field: &Field, mut value: String) {
        let mut end = value.len().min(VALUE_BYTES_MAX);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        value.truncate(end);
        match field.name() {
            "message" => self.message = value,
            name => self.fields.push((name, value)),
        }
    }
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }
}

/// A datagram of the journal's native protocol.
#[derive(Default)]
struct Record {
    bytes: Vec<u8>,
}

impl Record {
    /// With its length before it a value may hold anything.
    fn add(&mut self, name: &str, value: &str) {
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(b'\n');
        self.bytes
            .extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tracing_subscriber::prelude::*;

    use super::*;

    type Fields = HashMap<String, String>;

    /// Reads a record as journald does.
    fn parse(mut bytes: &[u8]) -> Fields {
        let mut fields = Fields::new();
        while !bytes.is_empty() {
            let end = bytes
                .iter()
                .position(|byte| *byte == b'\n')
                .expect("a name");
            let name = String::from_utf8(bytes[..end].to_vec()).expect("letters");
            let (length, rest) = bytes[end + 1..].split_at(8);
            let length = u64::from_le_bytes(length.try_into().expect("eight")) as usize;
            let value = String::from_utf8(rest[..length].to_vec()).expect("UTF-8");
            assert_eq!(rest[length], b'\n');
            bytes = &rest[length + 1..];
            fields.insert(name, value);
        }
        fields
    }

    fn logged(log: impl FnOnce()) -> Fields {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let journald = UnixDatagram::bind(&path).expect("a socket");
        let journal = Journal::connect(&path).expect("connects");
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), log);
        let mut buffer = vec![0; 1 << 20];
        let length = journald.recv(&mut buffer).expect("a record");
        parse(&buffer[..length])
    }

    #[test]
    fn job_and_domain_are_fields_and_the_line_has_all() {
        let fields = logged(|| {
            tracing::warn!(job = "12ab", domain = "web1", error = %"no\nroute", tries = 3, "lost it");
        });
        assert_eq!(fields["VMGANG_JOB"], "12ab");
        assert_eq!(fields["VMGANG_DOMAIN"], "web1");
        assert_eq!(fields["VMGANG_TRIES"], "3");
        assert_eq!(fields["PRIORITY"], "4");
        assert_eq!(fields["SYSLOG_IDENTIFIER"], "vmgangd");
        assert_eq!(
            fields["MESSAGE"],
            "lost it job=12ab domain=web1 error=no\nroute tries=3"
        );
        assert!(fields["CODE_FILE"].ends_with("journal.rs"));
    }

    #[test]
    fn fields_from_a_peer_cannot_make_a_record_too_large() {
        let long = "ä".repeat(1 << 20);
        let fields = logged(|| tracing::info!(text = long, r#type = ?long, "{long}"));
        assert_eq!(fields["VMGANG_TEXT"].len(), VALUE_BYTES_MAX);
        assert!(fields["VMGANG_TYPE"].starts_with("\"ä"));
        assert_eq!(fields["PRIORITY"], "6");
    }

    #[test]
    fn names_are_what_the_journal_takes() {
        assert_eq!(
            journal_name("window_offered_bytes"),
            "VMGANG_WINDOW_OFFERED_BYTES"
        );
        assert_eq!(journal_name("log.target"), "VMGANG_LOG_TARGET");
        assert_eq!(journal_name(&"x".repeat(100)).len(), NAME_BYTES_MAX);
    }
}
