//! One run: both halves started, the streams played through, everything measured and checked.
//!
//! Must not: report a run whose bytes differ or whose savings do not add up; that is an error.

use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use vmgang_lab::{Authority, CertificateRequest};

use super::half::{Counters, HALF_ARGUMENT, HalfConfig, HalfEnd, HalfSays, Role, socket};
use super::link::Link;
use super::qemu;
use crate::streams::StreamSet;

/// What moves the streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contender {
    /// Sockets copied to sockets, without vmgang.
    Relay,
    /// vmgang with these techniques, as `--technique` takes them.
    Vmgang(String),
}

impl Contender {
    /// What reports call it.
    pub fn title(&self) -> &str {
        match self {
            Contender::Relay => "plain relay",
            Contender::Vmgang(techniques) => techniques,
        }
    }
}

/// What all runs have in common.
#[derive(Debug, Clone)]
pub struct Settings {
    pub window_bytes: u64,
    pub tls: bool,
    /// Threads of each half's runtime.
    pub workers: usize,
    /// TCP connections of a session.
    pub connections: NonZeroUsize,
    /// The program to start for each half; it calls [`super::half::serve_if_asked`] first.
    pub program: PathBuf,
}

/// What one run took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measurement {
    pub contender: String,
    pub link_bits_per_second: Option<u64>,
    pub stream_bytes: u64,
    /// Bytes the halves exchanged, both directions, TLS included.
    pub wire_bytes: u64,
    /// The same, as the link counted them.
    pub link_bytes: Option<u64>,
    /// From the first byte of any member to the last byte of all.
    pub seconds: f64,
    pub source: HalfEnd,
    pub destination: HalfEnd,
    pub counters: Option<Counters>,
}

/// Certificates for loopback, in a directory that goes with it.
#[derive(Debug)]
struct TlsDir(TempDir);

impl TlsDir {
    fn create() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let authority = Authority::new("replay")?;
        let issued = authority.issue(&CertificateRequest {
            host_name: "localhost".to_owned(),
            address: Some("127.0.0.1".to_owned()),
            expired: false,
            days_left: None,
        })?;
        std::fs::write(dir.path().join("ca.pem"), authority.certificate())?;
        std::fs::write(dir.path().join("cert.pem"), issued.certificate)?;
        std::fs::write(dir.path().join("key.pem"), issued.key)?;
        Ok(Self(dir))
    }
}

/// What reaches the run from its threads.
enum Event {
    Half(Role, Result<HalfSays>),
    /// A source QEMU has written everything and read its return path.
    Sent(Result<()>),
    /// A destination QEMU has everything since.
    Arrived(Result<Instant>),
}

/// A QEMU that is stuck says so itself, well before this.
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// Plays the streams once.
pub fn run(
    set: &StreamSet,
    contender: &Contender,
    link_bits_per_second: Option<u64>,
    settings: &Settings,
) -> Result<Measurement> {
    play(set, contender, link_bits_per_second, settings)
        .with_context(|| format!("the run of `{}` failed", contender.title()))
}

fn play(
    set: &StreamSet,
    contender: &Contender,
    link_bits_per_second: Option<u64>,
    settings: &Settings,
) -> Result<Measurement> {
    let (source_dir, destination_dir) = (tempfile::tempdir()?, tempfile::tempdir()?);
    // The relay knows no TLS: it is the least that moving the bytes can take.
    let tls = match contender {
        Contender::Vmgang(_) if settings.tls => Some(TlsDir::create()?),
        _ => None,
    };
    let (source_role, destination_role, techniques) = match contender {
        Contender::Relay => (Role::RelaySource, Role::RelayDestination, "none"),
        Contender::Vmgang(techniques) => (Role::Source, Role::Destination, techniques.as_str()),
    };
    let config = |role, dir: &TempDir, peer_port| HalfConfig {
        role,
        runtime_dir: dir.path().to_owned(),
        peer_port,
        members: set
            .members
            .iter()
            .map(|member| (member.name.clone(), member.memory_bytes))
            .collect(),
        techniques: techniques.to_owned(),
        window_bytes: settings.window_bytes,
        tls: tls.as_ref().map(|dir| dir.0.path().to_owned()),
        workers: settings.workers,
        connections: settings.connections,
    };
    let (events, inbox) = channel();

    let at_destination = config(destination_role, &destination_dir, 0);
    let destination = Half::start(settings, &at_destination, &events)?;
    let HalfSays::Listening { port } = first_word(&inbox)? else {
        bail!("the destination half does not listen");
    };
    let link = link_bits_per_second
        .map(|rate| Link::start(port, rate))
        .transpose()?;
    let port = link.as_ref().map_or(port, Link::port);
    let at_source = config(source_role, &source_dir, port);
    let source = Half::start(settings, &at_source, &events)?;
    let HalfSays::Ready = first_word(&inbox)? else {
        bail!("the source half does not take connections");
    };

    // By now both halves have made the directories of the sockets.
    let listeners = (0..set.members.len())
        .map(|member| {
            let path = socket(&at_destination, member);
            UnixListener::bind(&path).with_context(|| format!("cannot bind {}", path.display()))
        })
        .collect::<Result<Vec<_>>>()?;
    let called_off = AtomicBool::new(false);
    let played = std::thread::scope(|scope| {
        let start = Instant::now();
        for (index, (member, listener)) in set.members.iter().zip(&listeners).enumerate() {
            let (sent, arrived) = (events.clone(), events.clone());
            let (path, called_off) = (socket(&at_source, index), &called_off);
            scope.spawn(move || {
                let result = qemu::destination(listener, member, called_off);
                let _ = arrived.send(Event::Arrived(result));
            });
            scope.spawn(move || {
                let _ = sent.send(Event::Sent(qemu::source(&path, member)));
            });
        }
        let played = collect(&inbox, set.members.len());
        // Whoever still waits for something notices at once.
        called_off.store(true, Relaxed);
        drop((source, destination));
        played.map(|played| (start, played))
    });
    let (start, played) = played?;

    let stream_bytes = set.stream_bytes();
    if let Some(counters) = &played.source.counters {
        check_books(counters, stream_bytes, played.source.wire_bytes)?;
    }
    Ok(Measurement {
        contender: contender.title().to_owned(),
        link_bits_per_second,
        stream_bytes,
        wire_bytes: played.source.wire_bytes,
        link_bytes: link.map(|link| link.bytes()),
        seconds: (played.last_byte - start).as_secs_f64(),
        counters: played.source.counters.clone(),
        source: played.source,
        destination: played.destination,
    })
}

/// Every byte that QEMU wrote and did not cross the wire is credited to something, exactly.
fn check_books(counters: &Counters, stream_bytes: u64, wire_bytes: u64) -> Result<()> {
    ensure!(
        counters.stream_bytes == stream_bytes,
        "the session counted {} bytes of stream, there are {stream_bytes}",
        counters.stream_bytes
    );
    let saved = stream_bytes as i64 - wire_bytes as i64;
    ensure!(
        counters.saved_total() == saved,
        "savings do not add up: {:?} are {} together, {saved} were saved",
        counters.saved,
        counters.saved_total()
    );
    Ok(())
}

/// What a run ends with.
struct Played {
    last_byte: Instant,
    source: HalfEnd,
    destination: HalfEnd,
}

/// Waits for everything that has to happen, or for the first thing that goes wrong.
fn collect(inbox: &Receiver<Event>, members: usize) -> Result<Played> {
    let (mut sent, mut arrived) = (0, Vec::new());
    let (mut source, mut destination) = (None, None);
    loop {
        match next(inbox)? {
            Event::Sent(result) => {
                result?;
                sent += 1;
            }
            Event::Arrived(result) => arrived.push(result?),
            Event::Half(role, says) => match (role, says?) {
                (Role::Source | Role::RelaySource, HalfSays::Ended(end)) => source = Some(*end),
                (_, HalfSays::Ended(end)) => destination = Some(*end),
                (role, says) => bail!("{role:?} says {says:?} in the middle of a run"),
            },
        }
        if sent < members || arrived.len() < members {
            continue;
        }
        if let (Some(source), Some(destination), Some(last_byte)) =
            (&source, &destination, arrived.iter().max())
        {
            return Ok(Played {
                last_byte: *last_byte,
                source: source.clone(),
                destination: destination.clone(),
            });
        }
    }
}

fn next(inbox: &Receiver<Event>) -> Result<Event> {
    inbox
        .recv_timeout(SILENCE_MAX)
        .map_err(|error| match error {
            RecvTimeoutError::Timeout => anyhow!("nothing has happened for {SILENCE_MAX:?}"),
            RecvTimeoutError::Disconnected => anyhow!("all parts of the run have ended"),
        })
}

fn first_word(inbox: &Receiver<Event>) -> Result<HalfSays> {
    match next(inbox)? {
        Event::Half(_, says) => says,
        Event::Sent(_) | Event::Arrived(_) => bail!("streams moved before the halves were ready"),
    }
}

/// A half's process; dropping it ends it.
struct Half {
    child: Child,
    /// The half ends when this closes.
    _lifeline: ChildStdin,
}

impl Half {
    fn start(settings: &Settings, config: &HalfConfig, events: &Sender<Event>) -> Result<Self> {
        let mut child = Command::new(&settings.program)
            .arg(HALF_ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", settings.program.display()))?;
        let (lifeline, says) = (child.stdin.take(), child.stdout.take());
        let (Some(lifeline), Some(says)) = (lifeline, says) else {
            bail!("a half has no pipes");
        };
        let mut half = Self {
            child,
            _lifeline: lifeline,
        };
        let mut line = serde_json::to_string(config)?;
        line.push('\n');
        half._lifeline.write_all(line.as_bytes())?;
        let (role, events) = (config.role, events.clone());
        std::thread::spawn(move || {
            let mut over = false;
            for line in BufReader::new(says).lines() {
                let said = understand(line.map_err(anyhow::Error::from));
                over = !matches!(said, Ok(HalfSays::Listening { .. } | HalfSays::Ready));
                if events.send(Event::Half(role, said)).is_err() || over {
                    break;
                }
            }
            if !over {
                let died = anyhow!("{role:?} has died; its last words, if any, are above");
                let _ = events.send(Event::Half(role, Err(died)));
            }
        });
        Ok(half)
    }
}

fn understand(line: Result<String>) -> Result<HalfSays> {
    match serde_json::from_str(&line?)? {
        HalfSays::Failed { error } => Err(anyhow!(error)),
        says => Ok(says),
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program to start for each half: this one.
pub fn this_program() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find this program")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn books_that_do_not_balance_are_an_error() {
        let mut counters = Counters {
            stream_bytes: 100,
            literal_bytes: 0,
            saved: vec![("zero".to_owned(), 70), ("compression".to_owned(), -10)],
        };
        check_books(&counters, 100, 40).expect("balanced");
        assert!(check_books(&counters, 100, 41).is_err());
        assert!(check_books(&counters, 99, 39).is_err());
        counters.saved[1].1 += 1;
        assert!(check_books(&counters, 100, 40).is_err());
    }
}
