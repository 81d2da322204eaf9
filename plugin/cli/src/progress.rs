//! Progress of a job on the terminal: a bar for the gang and one for each member; elsewhere one line
//! a second. Fits 80 columns; colours only where NO_COLOR allows them.

use std::time::{Duration, Instant};

use console::Term;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::meter::{Meter, Pace};
use crate::paint;
use crate::snapshot::{Member, Snapshot, saved_percent};
use crate::text;

const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// The heading, the columns' names, the gang's bar, what is not shown, and a line for the cursor.
const OTHER_ROWS: usize = 5;

const NAME: usize = 16;
const STATE: usize = 10;
/// Of a bar, and the percentage behind it.
const DONE: usize = 19 + 5;

/// Where progress goes.
pub enum Display {
    Bars(Box<Bars>),
    Lines {
        meter: Meter,
        last: Option<Instant>,
    },
    Nothing,
    /// Somebody's own way of showing it.
    Other(Box<dyn FnMut(&Snapshot)>),
}

impl Display {
    /// `job` is its id, as far as it is shown.
    pub fn new(silent: bool, job: &str) -> Display {
        if silent {
            return Display::Nothing;
        }
        let terminal = Term::stderr();
        // Not where its TERM says that it cannot move the cursor.
        if terminal.is_term() {
            let area = MultiProgress::new();
            Display::Bars(Box::new(Bars::new(area, terminal.size().0.into(), job)))
        } else {
            Display::Lines {
                meter: Meter::default(),
                last: None,
            }
        }
    }

    pub fn show(&mut self, snapshot: &Snapshot) {
        match self {
            Display::Bars(bars) => bars.show(snapshot),
            Display::Lines { meter, last } => {
                meter.look(snapshot);
                if last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
                    *last = Some(Instant::now());
                    eprintln!("{}", line(snapshot, meter));
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

/// All of a job's progress in one line, for logs.
pub fn line(snapshot: &Snapshot, meter: &Meter) -> String {
    let members: Vec<_> = snapshot
        .members
        .iter()
        .map(|member| {
            let percent = percent(member.measured(), member.permille());
            let trouble = member.trouble().map(|trouble| format!(" ({trouble})"));
            let trouble = trouble.unwrap_or_default();
            format!(
                "{} {}{percent}{trouble}",
                text::plain(&member.name),
                member.state
            )
        })
        .collect();
    let Pace {
        bytes_per_s,
        left_ms,
    } = meter.gang(snapshot);
    let mut line = format!(
        "{} {}{} wire {}",
        text::milliseconds(snapshot.elapsed_ms),
        snapshot.state,
        percent(snapshot.measured(), snapshot.permille()),
        text::bytes(snapshot.wire_bytes)
    );
    if let Some(saved) = saved_percent(snapshot.qemu_stream_bytes, snapshot.wire_bytes) {
        let stream = text::bytes(snapshot.qemu_stream_bytes);
        line.push_str(&format!(" of {stream}, {saved}% saved"));
    }
    if let Some(bytes_per_s) = bytes_per_s {
        line.push_str(&format!(", {}", text::rate(bytes_per_s)));
    }
    if let Some(left_ms) = left_ms {
        line.push_str(&format!(", {} left", text::about(left_ms)));
    }
    format!("{line}: {}", members.join(", "))
}

fn percent(known: bool, permille: u64) -> String {
    if known {
        format!(" {}%", permille / 10)
    } else {
        String::new()
    }
}

/// The gang's bar, and below it one a member, as many as the terminal has room for.
pub struct Bars {
    area: MultiProgress,
    heading: ProgressBar,
    names: ProgressBar,
    gang: ProgressBar,
    members: Vec<ProgressBar>,
    others: ProgressBar,
    room: usize,
    job: String,
    meter: Meter,
}

impl Bars {
    fn new(area: MultiProgress, terminal_rows: usize, job: &str) -> Bars {
        let words = || ProgressBar::new(1).with_style(words());
        let bar = || ProgressBar::new(1000).with_style(style());
        let heading = area.add(words());
        let names = area.add(words());
        let gang = area.add(bar());
        let others = area.add(words());
        Bars {
            area,
            heading,
            names,
            gang,
            members: Vec::new(),
            others,
            room: terminal_rows.saturating_sub(OTHER_ROWS).max(1),
            job: job.chars().take(8).collect(),
            meter: Meter::default(),
        }
    }

    fn show(&mut self, snapshot: &Snapshot) {
        self.meter.look(snapshot);
        while self.members.len() < snapshot.members.len().min(self.room) {
            let bar = ProgressBar::new(1000).with_style(style());
            self.members
                .push(self.area.insert_before(&self.others, bar));
        }
        let time = text::milliseconds(snapshot.elapsed_ms);
        let beside = format!("  job {}  {time}", self.job);
        let subject = text::cell(&snapshot.subject(), 79 - beside.chars().count());
        self.heading
            .set_message(format!("{}{beside}", subject.trim_end()));
        self.names.set_message(names_of_columns());
        self.gang.set_prefix(front("gang", &snapshot.state));
        self.gang.set_position(snapshot.permille());
        let saved = saved_percent(snapshot.qemu_stream_bytes, snapshot.wire_bytes);
        self.gang
            .set_message(figures(self.meter.gang(snapshot), saved));

        let (shown, others) = chosen(&snapshot.members, self.room);
        for (bar, at) in self.members.iter().zip(shown) {
            let member = &snapshot.members[at];
            bar.set_prefix(front(&text::plain(&member.name), &member.state));
            bar.set_position(member.permille());
            let saved = saved_percent(member.qemu_stream_bytes, member.wire_bytes);
            bar.set_message(match (member.dirtied_per_s, member.throttled) {
                (0, false) => figures(self.meter.member(at, member), saved),
                (0, true) => "slowed down".to_owned(),
                (dirtied, _) => format!("dirties {}", text::rate(dirtied)),
            });
        }
        self.others.set_message(others);
    }
}

/// Which members have a bar, and what is to be said of the others: those under way come first.
fn chosen(members: &[Member], room: usize) -> (Vec<usize>, String) {
    let all = 0..members.len();
    if members.len() <= room {
        return (all.collect(), String::new());
    }
    let (first, second): (Vec<usize>, Vec<usize>) = all.partition(|at| members[*at].under_way());
    let mut shown = [first, second].concat();
    let hidden = shown.split_off(room);
    shown.sort_unstable();
    let mut states: Vec<(&str, usize)> = Vec::new();
    for at in &hidden {
        let state = members[*at].state.as_str();
        match states.iter_mut().find(|(word, _)| *word == state) {
            Some((_, count)) => *count += 1,
            None => states.push((state, 1)),
        }
    }
    let states: Vec<String> = states
        .iter()
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    let others = format!("and {} more: {}", hidden.len(), states.join(", "));
    (shown, others)
}

/// 16 + 1 + 10 + 1 + 19 + 1 + 4 + 2 + at most 25 columns.
fn style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix} {bar:19.cyan/dim} {percent:>3}%  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=>-")
}

fn words() -> ProgressStyle {
    ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn names_of_columns() -> String {
    paint::faint(&format!(
        "{:NAME$} {:STATE$} {:DONE$}  {:>10}  {:>5}  {:>6}",
        "MEMBER", "PHASE", "DONE", "RATE", "SAVED", "LEFT"
    ))
}

fn front(name: &str, state: &str) -> String {
    let name = text::cell(name, NAME);
    let phase = paint::beside_progress(state, &text::cell(state, STATE));
    format!("{name} {phase}")
}

fn figures(pace: Pace, saved: Option<i64>) -> String {
    let rate = pace.bytes_per_s.map_or("-".into(), text::rate);
    let saved = saved.map_or("-".into(), |saved| format!("{}%", saved.max(-999)));
    let left = pace.left_ms.map_or("-".into(), text::about);
    format!("{rate:>10}  {saved:>5}  {left:>6}")
}

#[cfg(test)]
mod tests {
    use indicatif::{InMemoryTerm, ProgressDrawTarget};

    use super::*;

    fn member(name: &str, state: &str, remaining_bytes: u64) -> Member {
        Member {
            name: name.into(),
            state: state.into(),
            total_bytes: 400 << 20,
            remaining_bytes,
            qemu_stream_bytes: 300 << 20,
            wire_bytes: (400 << 20) - remaining_bytes.max(300 << 20),
            ..Member::default()
        }
    }

    fn gang(elapsed_ms: u64, left: u64) -> Snapshot {
        Snapshot {
            gang: "web".into(),
            destination: "qemu+tls://b.example.org/system".into(),
            state: "running".into(),
            elapsed_ms,
            qemu_stream_bytes: 800 << 20,
            wire_bytes: (elapsed_ms << 20) / 10,
            members: vec![
                member("web1", "copying", left),
                member("a-member-with-quite-a-long-name", "held", 4096),
                Member {
                    dirtied_per_s: 300 << 20,
                    carried_per_s: 100 << 20,
                    ..member("db1", "copying", 10 << 20)
                },
                member("db2", "waiting", 0),
            ],
        }
    }

    /// What is on a terminal of so many rows and 80 columns.
    fn shown(rows: u16, snapshots: &[Snapshot]) -> String {
        let terminal = InMemoryTerm::new(rows, 80);
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(terminal.clone()), 255);
        let area = MultiProgress::with_draw_target(target);
        let mut bars = Bars::new(area, rows.into(), "0123456789abcdef");
        for snapshot in snapshots {
            // Else it waits for a moment that is worth drawing.
            std::thread::sleep(Duration::from_millis(10));
            bars.show(snapshot);
        }
        bars.others.force_draw();
        terminal.contents()
    }

    #[test]
    fn the_bars_fit_80_columns() {
        let screen = shown(24, &[gang(1000, 380 << 20), gang(2000, 340 << 20)]);
        let wanted = [
            "web to qemu+tls://b.example.org/system  job 01234567  2.0 s",
            "MEMBER           PHASE      DONE                            RATE  SAVED    LEFT",
            "gang             running    ==========>--------  53%   100 MiB/s    75%       -",
            "web1             copying    ==>----------------  15%  40.0 MiB/s    80%     9 s",
            "a-member-with-q~ held       ==================> 100%       0 B/s    67%       -",
            "db1              copying    ==================>  97%  dirties 300 MiB/s",
            "db2              waiting    -------------------   0%           -    67%       -",
        ]
        .join("\n");
        assert_eq!(screen, wanted);
    }

    #[test]
    fn of_many_members_those_under_way_are_shown() {
        let members: Vec<Member> = (0..40)
            .map(|number| match number {
                0..30 => member(&format!("vm{number}"), "migrated", 0),
                30..35 => member(&format!("vm{number}"), "copying", 1),
                _ => member(&format!("vm{number}"), "waiting", 0),
            })
            .collect();
        let (shown, others) = chosen(&members, 7);
        assert_eq!(shown, [0, 1, 30, 31, 32, 33, 34]);
        assert_eq!(others, "and 33 more: 28 migrated, 5 waiting");
        assert_eq!(chosen(&members[..7], 7).1, "");
    }

    #[test]
    fn a_line_says_it_all() {
        let mut snapshot = gang(1500, 200 << 20);
        snapshot.members.truncate(3);
        assert_eq!(
            line(&snapshot, &Meter::default()),
            "1.5 s running 82% wire 150.00 MiB of 800.00 MiB, 82% saved: web1 copying 49%, \
             a-member-with-quite-a-long-name held 99%, \
             db1 copying 97% (dirties 300 MiB/s, 100 MiB/s can be sent)"
        );
        let mut meter = Meter::default();
        for (at, left) in [(1000, 200 << 20), (2000, 100 << 20)] {
            let mut snapshot = gang(at, left);
            snapshot.wire_bytes = at << 20;
            snapshot.members.truncate(1);
            meter.look(&snapshot);
        }
        let mut last = gang(2000, 100 << 20);
        last.members.truncate(1);
        let told = line(&last, &meter);
        assert!(told.contains(", 0.98 GiB/s, 1 s left: web1"), "{told}");

        let first = Snapshot {
            qemu_stream_bytes: 0,
            members: vec![Member {
                total_bytes: 0,
                ..member("a", "copying", 0)
            }],
            ..gang(1500, 0)
        };
        assert_eq!(
            line(&first, &Meter::default()),
            "1.5 s running wire 150.00 MiB: a copying"
        );
    }
}
