//! The replay tool on small synthetic streams: every technique alone, all but each, and all, plain
//! and with TLS, over loopback and over a link. Each run compares every byte that arrives with
//! what was sent and fails when one differs; here the books are checked once more from outside.

use std::path::Path;
use std::process::{Command, Output};

use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct Document {
    floor: Option<Floor>,
    runs: Vec<Run>,
}

#[derive(Debug, Deserialize)]
struct Floor {
    bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Run {
    contender: String,
    stream_bytes: u64,
    wire_bytes: u64,
    link_bytes: Option<u64>,
    seconds: f64,
    source: Half,
    destination: Half,
    counters: Option<Counters>,
}

#[derive(Debug, Deserialize)]
struct Half {
    cpu_seconds: f64,
    peak_memory_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Counters {
    saved: Vec<(String, i64)>,
}

impl Run {
    fn saved(&self, name: &str) -> i64 {
        let counters = self.counters.as_ref().expect("vmgang counts");
        let found = counters.saved.iter().find(|(saved, _)| saved == name);
        found.expect("a known name").1
    }
}

fn replay(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_replay"))
        .args(arguments)
        .output()
        .expect("replay starts")
}

fn measure(json: &Path, arguments: &[&str]) -> Document {
    let json_path = json.to_str().expect("a plain path");
    let output = replay(&[arguments, &["--json", json_path]].concat());
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&std::fs::read(json).expect("a document")).expect("reads")
}

#[test]
fn every_technique_keeps_every_byte_and_savings_add_up() {
    let dir = tempfile::tempdir().expect("a directory");
    let json = dir.path().join("mixed.json");
    let document = measure(
        &json,
        &[
            "--synthetic",
            "mixed",
            "--size",
            "6",
            "--members",
            "3",
            "--ablation",
            "--floor-level",
            "1",
        ],
    );
    for run in &document.runs {
        assert!(run.seconds > 0.0, "{run:?}");
        for half in [&run.source, &run.destination] {
            assert!(
                half.cpu_seconds > 0.0 && half.peak_memory_bytes > 1 << 20,
                "{run:?}"
            );
        }
        let Some(counters) = &run.counters else {
            continue;
        };
        let saved: i64 = counters.saved.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(
            saved,
            run.stream_bytes as i64 - run.wire_bytes as i64,
            "{run:?}"
        );
    }
    let run = |title: &str| {
        let found = document.runs.iter().find(|run| run.contender == title);
        found.unwrap_or_else(|| panic!("there is no row for {title}"))
    };
    let relay = run("plain relay");
    assert!(relay.counters.is_none() && relay.wire_bytes >= relay.stream_bytes);
    // What is off saves nothing, what is on saves something.
    for (list, name, works) in [
        ("none", "uniform", false),
        ("none", "cross_vm", false),
        ("uniform", "uniform", true),
        ("uniform", "intra_vm", false),
        ("page", "intra_vm", true),
        ("page", "cross_vm", true),
        ("page", "uniform", false),
        ("zstd", "compression", true),
        ("zstd", "cross_vm", false),
        ("all", "cross_vm", true),
    ] {
        let saved = run(list).saved(name);
        assert_eq!(
            saved > 100_000,
            works,
            "{list} saves {saved} bytes as {name}"
        );
    }
    let floor = document.floor.expect("was asked for").bytes;
    let wire = |title: &str| run(title).wire_bytes;
    let wires = ["all", "page", "none"].map(wire);
    assert!(wires.is_sorted(), "{wires:?}");
    // It is of whole pages at zstd's level 1; deltas may get below it, but not by much.
    assert!(
        floor < wires[0] * 2 && floor < wires[1],
        "{floor} {wires:?}"
    );
    // What is not made smaller is passed on, with a few bytes to each frame.
    let passed_on = relay.stream_bytes + relay.stream_bytes / 1000;
    assert!(wires[2] <= passed_on, "{wires:?}");
}

#[test]
fn a_link_carries_what_the_halves_count_with_tls_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let json = dir.path().join("unique.json");
    // 8 MiB and some on 200 Mbit/s take a third of a second.
    let set = [
        "--synthetic",
        "unique",
        "--size",
        "4",
        "--members",
        "2",
        "--link",
        "200mbit",
    ];
    for transport in ["--plain", "--tls"] {
        let document = measure(&json, &[&set[..], &[transport]].concat());
        let titles: Vec<_> = document
            .runs
            .iter()
            .map(|run| run.contender.as_str())
            .collect();
        assert_eq!(titles, ["plain relay", "default"]);
        for run in &document.runs {
            let link = run.link_bytes.expect("there was one");
            // The last words of a session may pass after the halves have counted.
            assert!(link.abs_diff(run.wire_bytes) < 200, "{transport}: {run:?}");
            let least = run.wire_bytes as f64 * 8.0 / 200e6 * 0.9;
            assert!(run.seconds > least, "{transport}: {run:?}");
        }
        let all = &document.runs[1];
        // Nothing to save. What TLS adds to 16 KiB is 22 bytes.
        assert!(
            all.wire_bytes < all.stream_bytes + all.stream_bytes / 100,
            "{all:?}"
        );
    }
}

#[test]
fn near_copies_pass_a_window_too_small_for_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let document = measure(
        &dir.path().join("near.json"),
        &[
            "--synthetic",
            "near-copies",
            "--size",
            "4",
            "--members",
            "2",
            "--window",
            "64KiB",
            "--no-relay",
            "--technique",
            "all",
            "--technique",
            "none",
        ],
    );
    assert_eq!(document.runs.len(), 2);
    assert!(document.runs[0].wire_bytes < document.runs[1].wire_bytes);
}

#[test]
fn what_cannot_be_is_refused_before_anything_runs() {
    let empty = tempfile::tempdir().expect("a directory");
    let empty = empty.path().to_str().expect("a plain path");
    for (arguments, reason) in [
        (&["--ablation"][..], "--streams"),
        (&["--streams", empty], "holds no recorded streams"),
        (&["--synthetic", "mixed", "--technique", "magic"], "magic"),
        (&["--synthetic", "mixed", "--window", "2GB"], "512MiB"),
        (&["--synthetic", "mixed", "--link", "fast"], "not a rate"),
        (
            &["--synthetic", "mixed", "--members", "0"],
            "at least one member",
        ),
    ] {
        let output = replay(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(said.contains(reason), "{arguments:?}: {said}");
    }
}
