//! Documents made up for the tests of this module.

use super::plan::{Class, Row};
use super::{Document, LinkResult, MixResult};
use crate::replay::Measurement;
use crate::replay::half::{Counters, HalfEnd};

/// A set over one link: class, title, seconds and bytes on the wire of each row. QEMU wrote a
/// million bytes.
pub fn mix(name: &str, rows: &[(Class, &str, f64, u64)]) -> MixResult {
    let half = HalfEnd {
        cpu_seconds: 0.5,
        peak_memory_bytes: 50_000_000,
        wire_bytes: 0,
        counters: None,
    };
    let run = |&(class, title, seconds, wire_bytes): &(Class, &str, f64, u64)| Measurement {
        contender: title.to_owned(),
        link_bits_per_second: None,
        stream_bytes: 1_000_000,
        wire_bytes,
        link_bytes: None,
        seconds,
        source: half.clone(),
        destination: half.clone(),
        counters: (class != Class::Relay).then(|| Counters {
            stream_bytes: 1_000_000,
            literal_bytes: 0,
            saved: vec![("zero".to_owned(), 1_000_000 - wire_bytes as i64)],
        }),
    };
    MixResult {
        name: name.to_owned(),
        title: format!("made up {name}"),
        members: vec!["g0".to_owned()],
        stream_bytes: 1_000_000,
        floors: Vec::new(),
        rows: rows
            .iter()
            .map(|(class, title, _, _)| Row {
                class: *class,
                title: (*title).to_owned(),
                techniques: String::new(),
            })
            .collect(),
        links: vec![LinkResult {
            rate: "none".to_owned(),
            runs: rows.iter().map(run).collect(),
        }],
    }
}

pub fn document(mix: MixResult) -> Document {
    Document {
        window_bytes: 1 << 29,
        tls: false,
        workers: 2,
        processors: 2,
        mixes: vec![mix],
    }
}
