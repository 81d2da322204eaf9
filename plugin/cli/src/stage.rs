//! `vmgang prepare`, and stages in `vmgang status` and `vmgang abort`: contents of a gang at its
//! destination before it migrates.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use zbus::{Connection, Variant};

use crate::arguments::PrepareOptions;
use crate::proxies::{self, Dictionary, ManagerProxy};
use crate::snapshot::{number, string};
use crate::{exit, paint, text};

const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// A stage as the daemon describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stage {
    pub id: String,
    pub incoming: bool,
    pub gang: String,
    pub peer: String,
    pub state: String,
    pub error: String,
    pub contents: u64,
    pub bytes: u64,
    pub wire_bytes: u64,
    pub found: u64,
    pub remaining_bytes: u64,
    pub refreshed: u64,
    pub expires: u64,
}

impl Stage {
    fn read(stage: &Dictionary) -> Stage {
        Stage {
            id: string(stage, "id"),
            incoming: string(stage, "direction") == "incoming",
            gang: string(stage, "gang"),
            peer: string(stage, "peer"),
            state: string(stage, "state"),
            error: string(stage, "error"),
            contents: number(stage, "contents"),
            bytes: number(stage, "bytes"),
            wire_bytes: number(stage, "wire_bytes"),
            found: number(stage, "found"),
            remaining_bytes: number(stage, "remaining_bytes"),
            refreshed: number(stage, "refreshed"),
            expires: number(stage, "expires"),
        }
    }

    pub fn live(&self) -> bool {
        !matches!(self.state.as_str(), "taken" | "ended")
    }

    pub fn to_json(&self) -> Value {
        let time = |unix_s: u64| (unix_s > 0).then_some(unix_s);
        json!({
            "stage": self.id,
            "direction": if self.incoming { "incoming" } else { "outgoing" },
            "gang": (!self.gang.is_empty()).then_some(&self.gang),
            "peer": self.peer, "state": self.state,
            "error": (!self.error.is_empty()).then_some(&self.error),
            "contents": self.contents, "bytes": self.bytes, "wire_bytes": self.wire_bytes,
            "found": self.found, "remaining_bytes": self.remaining_bytes,
            "refreshed_unix_s": time(self.refreshed), "expires_unix_s": time(self.expires),
        })
    }

    /// Its row in the table of `vmgang status`.
    fn row(&self, now: u64) -> Vec<String> {
        let direction = if self.incoming { "from" } else { "to" };
        let fresh = match self.refreshed {
            0 => "-".to_owned(),
            at => format!("{} ago", seconds(now.saturating_sub(at))),
        };
        vec![
            self.id.chars().take(8).collect(),
            self.gang.clone(),
            format!("{direction} {}", text::plain(&self.peer)),
            paint::state(&self.state),
            text::bytes(self.bytes),
            fresh,
            format!("in {}", seconds(self.expires.saturating_sub(now))),
        ]
    }
}

fn seconds(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The stages that are alive, as a table; empty without any.
pub fn table(stages: &[Stage]) -> String {
    if stages.is_empty() {
        return String::new();
    }
    let now = now();
    let rows: Vec<_> = stages.iter().map(|stage| stage.row(now)).collect();
    let header = [
        "STAGE", "GANG", "WHERE", "STATE", "SIZE", "FRESH", "EXPIRES",
    ];
    text::table(&header, &rows)
}

/// All stages the daemon tells of.
pub async fn list(manager: &ManagerProxy<'_>) -> anyhow::Result<Vec<Stage>> {
    let stages = manager.list_stages().await?;
    Ok(stages.iter().map(Stage::read).collect())
}

/// The stage with this id, or with the only one that begins like this.
pub fn find<'a>(stages: &'a [Stage], id: &str) -> Option<&'a Stage> {
    let wanted = id.replace('-', "").to_ascii_lowercase();
    let mut found = stages
        .iter()
        .filter(|stage| !wanted.is_empty() && stage.id.starts_with(&wanted));
    match (found.next(), found.next()) {
        (Some(stage), None) => Some(stage),
        _ => None,
    }
}

pub async fn prepare(connection: &Connection, options: PrepareOptions) -> anyhow::Result<u8> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch ctrl-C")?;
    let manager = proxies::manager(connection).await?;
    let mut dictionary = HashMap::from([("for", Variant::from(options.time.as_secs()))]);
    if let Some(bandwidth) = options.bandwidth {
        dictionary.insert("bandwidth", Variant::from(bandwidth));
    }
    if let Some(peer) = &options.peer {
        dictionary.insert("peer", Variant::from(peer.as_str()));
    }
    let id = manager
        .prepare(&options.gang, &options.destination, dictionary)
        .await?;
    let mut shown = Shown::new(options.quiet || options.json);
    loop {
        tokio::select! {
            () = tokio::time::sleep(POLL_INTERVAL) => {}
            _ = interrupt.recv() => {
                shown.finish();
                manager.abort_stage(&id).await?;
                let what = format!("dropped the stage {id}, because it was interrupted");
                eprintln!("{}", text::complaint(&what));
                return Ok(exit::ABORTED);
            }
        }
        let stages = list(&manager).await?;
        let Some(stage) = stages.iter().find(|stage| stage.id == id) else {
            shown.finish();
            anyhow::bail!(
                "vmgangd does not know the stage {id} any more; see `journalctl -u vmgangd`"
            );
        };
        let done = stage.state == "fresh" || !stage.live();
        if !done {
            shown.show(stage);
            continue;
        }
        shown.finish();
        if options.json {
            println!("{}", stage.to_json());
        }
        // A migration that has taken it meanwhile is what it is for.
        if stage.state == "ended" {
            let why = match stage.error.as_str() {
                "" => "it was dropped",
                error => error,
            };
            let what = format!("the gang '{}' is not prepared: {why}", options.gang);
            eprintln!("{}", text::complaint(&what));
            return Ok(exit::FAILED);
        }
        if !options.json && !options.quiet {
            print!("{}", summary(stage, &options));
        }
        return Ok(exit::MIGRATED);
    }
}

fn summary(stage: &Stage, options: &PrepareOptions) -> String {
    let found = match stage.found {
        0 => String::new(),
        pages => format!(
            "; {} of that it had already",
            text::bytes(pages.saturating_mul(4096))
        ),
    };
    format!(
        "{} of '{}' are at {}, for {} over the wire{found}.\n\
         They are kept fresh until {}; `vmgang migrate {gang} {destination}` uses them by itself,\n\
         `vmgang abort {id}` drops them.\n",
        text::bytes(stage.bytes),
        stage.gang,
        stage.peer,
        text::bytes(stage.wire_bytes),
        text::time(stage.expires),
        gang = options.gang,
        destination = options.destination,
        id = stage.id.get(..8).unwrap_or(&stage.id),
    )
}

/// Progress: a bar on a terminal, else a line a second.
enum Shown {
    Nothing,
    Bar(ProgressBar),
    Lines(u8),
}

impl Shown {
    fn new(nothing: bool) -> Shown {
        if nothing {
            return Shown::Nothing;
        }
        if !std::io::stderr().is_terminal() {
            return Shown::Lines(0);
        }
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{msg:10} {wide_bar} {binary_bytes:>10} staged");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Shown::Bar(bar)
    }

    fn show(&mut self, stage: &Stage) {
        match self {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                bar.set_message(stage.state.clone());
                bar.set_length(stage.bytes + stage.remaining_bytes);
                bar.set_position(stage.bytes);
            }
            Shown::Lines(calls) => {
                // Every other time, which is once a second.
                if *calls % 2 == 0 {
                    eprintln!("{}", line(stage));
                }
                *calls = calls.wrapping_add(1);
            }
        }
    }

    fn finish(&self) {
        if let Shown::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn line(stage: &Stage) -> String {
    format!(
        "{} staged {} left {} wire {}",
        stage.state,
        text::bytes(stage.bytes),
        text::bytes(stage.remaining_bytes),
        text::bytes(stage.wire_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(id: &str) -> Stage {
        Stage {
            id: id.into(),
            gang: "web".into(),
            peer: "qemu+tls://b/system".into(),
            state: "fresh".into(),
            contents: 256,
            bytes: 1 << 20,
            wire_bytes: 1 << 19,
            found: 10,
            refreshed: now() - 3,
            expires: now() + 1800,
            ..Stage::default()
        }
    }

    #[test]
    fn the_table_tells_direction_age_and_time_left() {
        let incoming = Stage {
            incoming: true,
            peer: "a".into(),
            refreshed: 0,
            ..stage("ffff0000aaaa")
        };
        let table = table(&[stage("0123456789ab"), incoming]);
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[1].starts_with("01234567  web   to qemu+tls://b/system  fresh  1.00 MiB"));
        assert!(
            lines[1].contains(" s ago") && lines[1].ends_with("min"),
            "{table}"
        );
        assert!(
            lines[2].contains("from a") && lines[2].contains(" - "),
            "{table}"
        );
        assert!(lines.iter().all(|line| line.len() <= 80), "{table}");
        assert_eq!(super::table(&[]), "");
    }

    #[test]
    fn stages_by_unique_prefix() {
        let stages = [stage("abc1"), stage("abd2")];
        assert_eq!(find(&stages, "AB-C").map(|stage| &*stage.id), Some("abc1"));
        assert_eq!(find(&stages, "ab"), None);
        assert_eq!(find(&stages, ""), None);
    }

    #[test]
    fn json_says_null_for_what_is_not() {
        let json = Stage {
            refreshed: 0,
            ..stage("abc1")
        }
        .to_json();
        assert_eq!(json["stage"], "abc1");
        assert!(json["error"].is_null() && json["refreshed_unix_s"].is_null());
        assert_eq!(json["direction"], "outgoing");
    }
}
