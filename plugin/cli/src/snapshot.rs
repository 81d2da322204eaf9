//! How a running job stands, as the daemon describes it on the bus.
//! Must not reckon: rates and expected ends are `meter.rs`'s.

use std::collections::HashMap;

use zbus::{OwnedVariant, Variant};

use crate::proxies::Dictionary;
use crate::text;

/// One member as the daemon describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub state: String,
    pub total_bytes: u64,
    pub remaining_bytes: u64,
    pub iterations: u64,
    pub memory_bytes: u64,
    pub qemu_stream_bytes: u64,
    pub wire_bytes: u64,
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
                "dirties {}, {} can be sent",
                text::rate(self.dirtied_per_s),
                text::rate(self.carried_per_s)
            ));
        }
        self.throttled
            .then(|| "its guest is slowed down".to_owned())
    }

    /// Whether libvirt has said yet how much there is: that comes after a second.
    pub fn measured(&self) -> bool {
        self.total_bytes > 0 || matches!(self.state.as_str(), "migrated" | "switching")
    }

    pub fn under_way(&self) -> bool {
        matches!(self.state.as_str(), "copying" | "held" | "switching")
    }

    /// How far it is, in a thousand.
    pub fn permille(&self) -> u64 {
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
    pub gang: String,
    pub destination: String,
    pub state: String,
    pub elapsed_ms: u64,
    pub qemu_stream_bytes: u64,
    pub wire_bytes: u64,
    pub members: Vec<Member>,
}

impl Snapshot {
    pub fn read(state: String, progress: &Dictionary, statistics: &Dictionary) -> Snapshot {
        Snapshot {
            gang: string(progress, "gang"),
            destination: string(progress, "destination"),
            state,
            elapsed_ms: number(progress, "elapsed_ms"),
            qemu_stream_bytes: number(statistics, "qemu_stream"),
            wire_bytes: number(statistics, "wire"),
            members: members(progress),
        }
    }

    pub fn measured(&self) -> bool {
        self.members.iter().any(Member::measured)
    }

    pub fn permille(&self) -> u64 {
        let sum: u64 = self.members.iter().map(Member::permille).sum();
        sum.checked_div(self.members.len() as u64).unwrap_or(0)
    }

    /// Who moves where.
    pub fn subject(&self) -> String {
        let who = match self.gang.as_str() {
            "" => "domains",
            gang => gang,
        };
        format!("{} to {}", text::plain(who), text::plain(&self.destination))
    }
}

/// How much of the streams did not have to be sent, in percent; below 0 where the wire took more. Nothing is
/// known before the first guest sends: until then the daemons have only greeted each other.
pub fn saved_percent(qemu_stream_bytes: u64, wire_bytes: u64) -> Option<i64> {
    if qemu_stream_bytes == 0 {
        return None;
    }
    let sent = text::percent(wire_bytes, qemu_stream_bytes);
    Some(100 - i64::try_from(sent).unwrap_or(i64::MAX))
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
            iterations: number(member, "iterations"),
            memory_bytes: number(member, "memory_bytes"),
            qemu_stream_bytes: number(member, "qemu_stream_bytes"),
            wire_bytes: number(member, "wire_bytes"),
            dirtied_per_s: number(member, "dirtied_per_s"),
            carried_per_s: number(member, "carried_per_s"),
            throttled: matches!(
                member.get("throttled").map(|value| &**value),
                Some(Variant::Bool(true))
            ),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_daemons_dictionaries() {
        let own = |value: Variant<'static>| OwnedVariant::try_from(value).expect("plain");
        let member = Dictionary::from([
            ("name".to_owned(), own(Variant::from("vm1"))),
            ("total_bytes".to_owned(), own(Variant::from(7u64))),
            ("wire_bytes".to_owned(), own(Variant::from(3u64))),
        ]);
        let progress = Dictionary::from([
            ("members".to_owned(), own(Variant::from(vec![member]))),
            ("elapsed_ms".to_owned(), own(Variant::from(5u64))),
            ("gang".to_owned(), own(Variant::from("web"))),
        ]);
        let snapshot = Snapshot::read("running".into(), &progress, &Dictionary::new());
        assert_eq!((snapshot.elapsed_ms, snapshot.gang.as_str()), (5, "web"));
        let member = &snapshot.members[0];
        assert_eq!(
            (member.name.as_str(), member.total_bytes, member.wire_bytes),
            ("vm1", 7, 3)
        );
        let barrier = |text: &'static str| {
            barrier_approximate(&Dictionary::from([(
                "barrier".to_owned(),
                own(Variant::from(text)),
            )]))
        };
        assert!(barrier("approximate") && !barrier("exact"));
        assert!(!barrier_approximate(&Dictionary::new()));
    }

    #[test]
    fn what_is_saved_can_be_less_than_nothing() {
        assert_eq!(saved_percent(0, 900), None);
        assert_eq!(saved_percent(1000, 190), Some(81));
        assert_eq!(saved_percent(1000, 1100), Some(-10));
        assert_eq!(Snapshot::default().permille(), 0);
    }
}
