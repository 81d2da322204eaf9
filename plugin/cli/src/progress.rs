//! Progress of a job on the terminal: a bar a member and one for the gang; elsewhere one line
//! a second. Fits 80 columns; colours only where NO_COLOR allows them.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use zbus::{OwnedVariant, Variant};

use crate::proxies::Dictionary;
use crate::text;

const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// One member as the daemon describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub state: String,
    pub total_bytes: u64,
    pub remaining_bytes: u64,
    pub memory_bytes: u64,
    pub qemu_stream_bytes: u64,
    /// While it does not converge: how fast its guest dirties memory, and how fast that is sent.
    pub dirtied_per_s: u64,
    pub carried_per_s: u64,
    /// QEMU slows its guest down.
    pub throttled: bool,
}

impl Member {
    /// What is wrong with it, if anything.
    pub fn trouble(&self) -> Option<String> {
        if self.dirtied_per_s > 0 {
            return Some(format!(
                "dirties {}/s, {}/s can be sent",
                text::bytes(self.dirtied_per_s),
                text::bytes(self.carried_per_s)
            ));
        }
        self.throttled.then(|| "slowed down".to_owned())
    }

    /// Whether libvirt has said yet how much there is: that comes after a second.
    fn measured(&self) -> bool {
        self.total_bytes > 0 || matches!(self.state.as_str(), "migrated" | "switching")
    }

    /// How far it is, in a thousand.
    fn permille(&self) -> u64 {
        match self.state.as_str() {
            "waiting" | "ballooning" => 0,
            "migrated" => 1000,
            "switching" => 999,
            _ if self.total_bytes == 0 => 0,
            _ => {
                (self.total_bytes.saturating_sub(self.remaining_bytes)).saturating_mul(999)
                    / self.total_bytes
            }
        }
    }
}

/// A job's progress as the daemon describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub state: String,
    pub elapsed_ms: u64,
    pub qemu_stream_bytes: u64,
    pub wire_bytes: u64,
    pub members: Vec<Member>,
}

impl Snapshot {
    pub fn read(state: String, progress: &Dictionary, statistics: &Dictionary) -> Snapshot {
        Snapshot {
            state,
            elapsed_ms: number(progress, "elapsed_ms"),
            qemu_stream_bytes: number(statistics, "qemu_stream"),
            wire_bytes: number(statistics, "wire"),
            members: members(progress),
        }
    }

    fn permille(&self) -> u64 {
        let sum: u64 = self.members.iter().map(Member::permille).sum();
        sum.checked_div(self.members.len() as u64).unwrap_or(0)
    }

    /// All of it in one line.
    pub fn line(&self) -> String {
        let members: Vec<_> = self
            .members
            .iter()
            .map(|member| {
                let percent = percent(member.measured(), member.permille());
                let trouble = member.trouble().map(|trouble| format!(" ({trouble})"));
                let trouble = trouble.unwrap_or_default();
                format!("{} {}{percent}{trouble}", member.name, member.state)
            })
            .collect();
        // Before the first guest sends, the daemons have only greeted each other.
        let streams = match self.qemu_stream_bytes {
            0 => String::new(),
            bytes => format!(" of {}", text::bytes(bytes)),
        };
        format!(
            "{} {}{} wire {}{streams}: {}",
            text::milliseconds(self.elapsed_ms),
            self.state,
            percent(self.members.iter().any(Member::measured), self.permille()),
            text::bytes(self.wire_bytes),
            members.join(", ")
        )
    }
}

fn percent(known: bool, permille: u64) -> String {
    if known {
        format!(" {}%", permille / 10)
    } else {
        String::new()
    }
}

/// Whether some member could not be held, as the daemon's statistics tell.
pub fn barrier_approximate(statistics: &Dictionary) -> bool {
    string(statistics, "barrier") == "approximate"
}

pub fn number(dictionary: &Dictionary, key: &str) -> u64 {
    match dictionary.get(key).map(|value| &**value) {
        Some(Variant::U64(number)) => *number,
        _ => 0,
    }
}

pub fn string(dictionary: &Dictionary, key: &str) -> String {
    match dictionary.get(key).map(|value| &**value) {
        Some(Variant::Str(text)) => text.to_string(),
        _ => String::new(),
    }
}

fn members(progress: &Dictionary) -> Vec<Member> {
    let Some(value) = progress
        .get("members")
        .and_then(|value| value.try_clone().ok())
    else {
        return Vec::new();
    };
    let members = Vec::<HashMap<String, OwnedVariant>>::try_from(value).unwrap_or_default();
    members
        .iter()
        .map(|member| Member {
            name: string(member, "name"),
            state: string(member, "state"),
            total_bytes: number(member, "total_bytes"),
            remaining_bytes: number(member, "remaining_bytes"),
            memory_bytes: number(member, "memory_bytes"),
            qemu_stream_bytes: number(member, "qemu_stream_bytes"),
            dirtied_per_s: number(member, "dirtied_per_s"),
            carried_per_s: number(member, "carried_per_s"),
            throttled: matches!(
                member.get("throttled").map(|value| &**value),
                Some(Variant::Bool(true))
            ),
        })
        .collect()
}

/// Where progress goes.
pub enum Display {
    Bars(Bars),
    Lines {
        last: Option<Instant>,
    },
    Nothing,
    /// Somebody's own way of showing it.
    Other(Box<dyn FnMut(&Snapshot)>),
}

impl Display {
    pub fn new(silent: bool) -> Display {
        if silent {
            Display::Nothing
        } else if std::io::stderr().is_terminal() {
            Display::Bars(Bars::default())
        } else {
            Display::Lines { last: None }
        }
    }

    pub fn show(&mut self, snapshot: &Snapshot) {
        match self {
            Display::Bars(bars) => bars.show(snapshot),
            Display::Lines { last } => {
                if last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
                    *last = Some(Instant::now());
                    eprintln!("{}", snapshot.line());
                }
            }
            Display::Nothing => {}
            Display::Other(show) => show(snapshot),
        }
    }

    /// Says something beside the progress.
    pub fn say(&self, text: &str) {
        match self {
            Display::Bars(bars) => bars.area.suspend(|| eprintln!("{text}")),
            Display::Lines { .. } => eprintln!("{text}"),
            Display::Nothing | Display::Other(_) => {}
        }
    }

    /// Takes the bars away; the summary follows.
    pub fn finish(&self) {
        if let Display::Bars(bars) = self {
            let _ = bars.area.clear();
        }
    }
}

/// One bar a member, and the gang's below them.
#[derive(Default)]
pub struct Bars {
    area: MultiProgress,
    bars: Vec<ProgressBar>,
}

impl Bars {
    fn show(&mut self, snapshot: &Snapshot) {
        if self.bars.is_empty() {
            for _ in 0..=snapshot.members.len() {
                let bar = ProgressBar::new(1000).with_style(style());
                self.bars.push(self.area.add(bar));
            }
        }
        for (bar, member) in self.bars.iter().zip(&snapshot.members) {
            bar.set_prefix(shortened(&member.name));
            bar.set_position(member.permille());
            let sent = text::bytes(member.qemu_stream_bytes);
            let beside = match (member.dirtied_per_s, member.throttled) {
                (0, false) => sent,
                (0, true) => "slowed down".to_owned(),
                (dirtied, _) => format!("dirties {}/s", text::bytes(dirtied)),
            };
            bar.set_message(format!("{:9} {beside}", member.state));
        }
        if let Some(gang) = self.bars.last() {
            gang.set_prefix("gang");
            gang.set_position(snapshot.permille());
            gang.set_message(format!(
                "{:9} {} sent",
                snapshot.state,
                text::bytes(snapshot.wire_bytes)
            ));
        }
    }
}

/// 16 + 1 + 30 + 1 + 4 + 1 + at most 25 columns.
fn style() -> ProgressStyle {
    // NO_COLOR is honoured by the console crate, which colours these.
    ProgressStyle::with_template("{prefix:16} {bar:30.cyan/blue} {percent:>3}% {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

fn shortened(name: &str) -> String {
    if name.chars().count() <= 16 {
        name.to_owned()
    } else {
        name.chars().take(15).chain(['~']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_it_all() {
        let member = |name: &str, state: &str, remaining_bytes| Member {
            name: name.into(),
            state: state.into(),
            total_bytes: 1000,
            remaining_bytes,
            ..Member::default()
        };
        let snapshot = Snapshot {
            state: "running".into(),
            elapsed_ms: 1500,
            qemu_stream_bytes: 2048,
            wire_bytes: 1024,
            members: vec![
                Member {
                    dirtied_per_s: 3 << 20,
                    carried_per_s: 1 << 20,
                    ..member("a", "copying", 500)
                },
                member("b", "migrated", 0),
            ],
        };
        assert_eq!(
            snapshot.line(),
            "1.5 s running 74% wire 1.00 KiB of 2.00 KiB: a copying 49% (dirties 3.00 MiB/s, 1.00 MiB/s can be sent), b migrated 100%"
        );
        assert_eq!(Snapshot::default().permille(), 0);

        let waits = Member {
            name: "a".into(),
            state: "copying".into(),
            ..Member::default()
        };
        let first = Snapshot {
            qemu_stream_bytes: 0,
            members: vec![waits],
            ..snapshot
        };
        assert_eq!(first.line(), "1.5 s running wire 1.00 KiB: a copying");
    }

    #[test]
    fn reads_the_daemons_dictionaries() {
        let own = |value: Variant<'static>| OwnedVariant::try_from(value).expect("plain");
        let member = Dictionary::from([
            ("name".to_owned(), own(Variant::from("vm1"))),
            ("total_bytes".to_owned(), own(Variant::from(7u64))),
        ]);
        let progress = Dictionary::from([
            ("members".to_owned(), own(Variant::from(vec![member]))),
            ("elapsed_ms".to_owned(), own(Variant::from(5u64))),
        ]);
        let snapshot = Snapshot::read("running".into(), &progress, &Dictionary::new());
        assert_eq!(snapshot.elapsed_ms, 5);
        let barrier = |text: &'static str| {
            barrier_approximate(&Dictionary::from([(
                "barrier".to_owned(),
                own(Variant::from(text)),
            )]))
        };
        assert!(barrier("approximate") && !barrier("exact"));
        assert!(!barrier_approximate(&Dictionary::new()));
        assert_eq!(
            (
                snapshot.members[0].name.as_str(),
                snapshot.members[0].total_bytes
            ),
            ("vm1", 7)
        );
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(shortened("a-name-that-is-too-long"), "a-name-that-is-~");
    }
}
