//! Pages of made-up jobs: whatever members are called, and whatever is not known of them.

use serde_json::{Value, json};
use vmgang_page::{Job, render};

fn page(report: &Value, timeline: &str) -> String {
    render(&Job {
        report: &report.to_string(),
        timeline,
        started: "2026-11-26 10:17 UTC",
        barrier_approximate: false,
    })
    .expect("as vmgangd tells it")
}

fn report(names: &[&str]) -> Value {
    let domains: Vec<Value> = names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            json!({"name": name, "uuid": at.to_string(), "state": "migrated", "elapsed_ms": 900, "downtime_ms": 30,
                "iterations": null, "qemu_stream_bytes": 1000, "wire_bytes": 300, "error": null})
        })
        .collect();
    json!({"job": "0123", "gang": "web", "destination": "qemu+tls://b/system", "state": "completed", "error": null,
        "elapsed_ms": 1000, "switchover_spread_ms": 10, "domains": domains,
        "bytes": {"qemu_stream": 1000, "wire": 300, "literal": 1, "saved": {"zero": 500, "uniform": 0, "intra_vm": 0,
            "cross_vm": 250, "staged": 0, "destination": 0, "sub_page": 0, "delta": 0, "compression": -50}}})
}

fn timeline(names: &[&str]) -> Value {
    let members: Vec<Value> = names
        .iter()
        .enumerate()
        .map(|(at, name)| {
            json!({"name": name, "uuid": at.to_string(), "phases": [{"at_ms": 0, "phase": "copying"},
                {"at_ms": 700, "phase": "held"}, {"at_ms": 900, "phase": "switching"}, {"at_ms": 940, "phase": "migrated"}]})
        })
        .collect();
    let mut shared = vec![vec![7u64; names.len()]; names.len()];
    for row in &mut shared {
        row.extend([0, 3]);
    }
    let saved = report(names)["bytes"]["saved"].clone();
    json!({"members": members, "switching_ms": 890, "shared_pages": shared,
        "samples": {"at_ms": [0, 500, 1000], "qemu_stream": [0, 600, 1000], "wire": [0, 200, 300],
            "saved": [saved, saved, saved]}})
}

#[test]
fn names_are_only_ever_text() {
    let names = [
        "<script>alert(1)</script>",
        "\"><img src=x>",
        "a&b'",
        "\u{1}\u{9b}ünï",
    ];
    let mut report = report(&names);
    report["error"] = json!("<b>broke</b>");
    let page = page(&report, &timeline(&names).to_string());
    for part in ["<script", "<img", "<b>broke", "http://", "https://", "url("] {
        assert!(!page.contains(part), "{part}");
    }
    assert!(page.contains("&lt;script&gt;") && page.contains("a&amp;b'"));
}

#[test]
fn what_was_not_noted_is_said_to_be_unknown() {
    let page_without = page(&report(&["a"]), "");
    assert!(page_without.contains("was not noted for this job"));
    assert!(!page_without.contains("Who shared with whom"));
    let names = ["a", "b"];
    let mut nothing = timeline(&names);
    nothing["samples"] = json!({"at_ms": [], "qemu_stream": [], "wire": [], "saved": []});
    nothing["shared_pages"] = json!([]);
    let short = page(&report(&names), &nothing.to_string());
    assert!(short.contains("too short") && !short.contains("Who shared with whom"));
    let whole = page(&report(&names), &timeline(&names).to_string());
    for part in [
        "Who shared with whom",
        "was there",
        "paused 30\u{a0}ms",
        "70\u{a0}%",
        "had from others",
    ] {
        assert!(whole.contains(part), "{part}");
    }
    assert!(!whole.contains(">prepared<"), "nothing was");
}

#[test]
fn what_cannot_be_read_is_named() {
    let broken = |report, timeline| {
        let job = Job {
            report,
            timeline,
            started: "",
            barrier_approximate: false,
        };
        render(&job).expect_err("broken").to_string()
    };
    assert!(broken("{", "").contains("the report of the job"));
    let good = report(&["a"]).to_string();
    assert!(broken(&good, "[]").contains("the timeline of the job"));
}
