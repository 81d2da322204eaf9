//! The page about a job, looked at in a browser at a phone's and a desk's width, light and dark. Pictures are
//! left in `target/report`. Needs chromium: `make test-report`.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vmgang_e2e::browser::{Browser, Screen};
use vmgang_e2e::documents::workspace;
use vmgang_e2e::{boot_all, clone_guest, schema, uri, vmgang, with_lab};
use vmgang_page::{Job, render};

const SCREENS: [Screen; 3] = [
    Screen {
        width: 1200,
        dark: false,
    },
    Screen {
        width: 1200,
        dark: true,
    },
    Screen {
        width: 360,
        dark: false,
    },
];

fn directory() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| workspace().join("target"), PathBuf::from);
    let directory = target.join("report");
    std::fs::create_dir_all(&directory)?;
    Ok(directory.canonicalize()?)
}

/// Looks at pages, by the names of their files.
fn look_at(name: &str, pages: &[(&str, String)]) -> Result<()> {
    let directory = directory()?;
    let mut browser = Browser::start(&directory.join(format!("profile-{name}")))?;
    for (name, page) in pages {
        let file = directory.join(format!("{name}.html"));
        std::fs::write(&file, page)?;
        for screen in SCREENS {
            let shade = if screen.dark { "dark" } else { "light" };
            let picture = format!("{name}-{}-{shade}.png", screen.width);
            browser.look(&file, screen, &directory.join(picture))?;
        }
    }
    Ok(())
}

/// A job of these members that takes some seconds, as vmgangd would tell it.
fn made_up(names: &[&str], state: &str, error: Option<&str>) -> (Value, Value) {
    let all = names.len() as u64;
    let uuid = |at: usize| format!("00000000-0000-0000-0000-{at:012}");
    let there = |at: u64| state == "completed" || at.is_multiple_of(2);
    let domains: Vec<Value> = (0..all)
        .zip(names)
        .map(|(at, name)| {
            json!({"name": name, "uuid": uuid(at as usize), "state": if there(at) { "migrated" } else { "source" },
                "elapsed_ms": 5000 + at, "downtime_ms": there(at).then_some(24 + at * 3), "iterations": 4 + at % 3,
                "qemu_stream_bytes": (200 + at) << 20, "wire_bytes": (30 + at) << 20,
                "error": if there(at) { None } else { error }})
        })
        .collect();
    let saved = |part: i64| {
        let of = |mib: i64| (mib << 20) * part / 100;
        json!({"zero": of(40), "uniform": of(12), "intra_vm": of(38), "cross_vm": of(420), "staged": 0,
            "destination": of(31), "sub_page": of(20), "delta": of(9), "compression": of(79)})
    };
    let total = 800u64 << 20;
    let wire = 151u64 << 20;
    let report = json!({"job": "0123456789abcdef0123456789abcdef", "gang": "web", "destination": "qemu+tls://b/system",
        "state": state, "error": error, "elapsed_ms": 5300, "switchover_spread_ms": 310, "domains": domains,
        "bytes": {"qemu_stream": total, "wire": wire, "literal": 0, "saved": saved(100)}});
    let phases = |at: u64| {
        let begin = 20 + at * 5;
        let held = 2600 + (at * 577) % 1400;
        let stopped = 4500 + at * 310 / all;
        json!([{"at_ms": 0, "phase": "waiting"}, {"at_ms": begin, "phase": "copying"}, {"at_ms": held, "phase": "held"},
            {"at_ms": stopped, "phase": "switching"},
            {"at_ms": stopped + 90, "phase": if there(at) { "migrated" } else { "source" }}])
    };
    let members: Vec<Value> = (0..all)
        .zip(names)
        .map(|(at, name)| json!({"name": name, "uuid": uuid(at as usize), "phases": phases(at)}))
        .collect();
    // Fast at first, then what the guests write.
    let times: Vec<u64> = (0..=21).map(|step| step * 250).collect();
    let part = |at: u64| (100 - (21 - at).pow(2) * 100 / 441) as i64;
    let shared: Vec<Vec<u64>> = (0..all)
        .map(|row| {
            let of = |column: u64| match column {
                column if column == row => 2400,
                column if column < row => 26_000 / (row + 1 - column),
                _ => 900,
            };
            (0..all).map(of).chain([0, 1900]).collect()
        })
        .collect();
    let timeline = json!({"members": members, "switching_ms": 4480, "shared_pages": shared, "samples": {
        "at_ms": times,
        "qemu_stream": (0..=21).map(|at| total * part(at) as u64 / 100).collect::<Vec<_>>(),
        "wire": (0..=21).map(|at| wire * part(at) as u64 / 100).collect::<Vec<_>>(),
        "saved": (0..=21).map(|at| saved(part(at))).collect::<Vec<_>>()}});
    (report, timeline)
}

fn page(report: &Value, timeline: Option<&Value>) -> Result<String> {
    Ok(render(&Job {
        report: &report.to_string(),
        timeline: &timeline.map(Value::to_string).unwrap_or_default(),
        started: "2026-11-26 10:17 UTC",
        barrier_approximate: timeline.is_none(),
    })?)
}

#[test]
fn browser_shows_pages_on_every_screen() -> Result<()> {
    let (report, timeline) = made_up(&["web1", "web2", "web3", "db1"], "completed", None);
    schema::check_value("timeline", &timeline)?;
    let long = format!("{}<b>&", "a-very-long-name-".repeat(4));
    let names: Vec<String> = (0..40).map(|number| format!("{long}{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let why = "domain db1: cannot migrate, because libvirt on qemu+tls://b/system says: internal error: \
               unable/to/open/a/file/with/a/very/long/name/that/has/no/blank/in/it/at/all.qcow2; put it on shared storage";
    let (failed, broken) = made_up(&["web1", "db1"], "partial", Some(why));
    let (many, crowd) = made_up(&names, "completed", None);
    look_at(
        "made-up",
        &[
            ("gang", page(&report, Some(&timeline))?),
            ("partial", page(&failed, Some(&broken))?),
            ("many", page(&many, Some(&crowd))?),
            ("old", page(&report, None)?),
        ],
    )
}

#[test]
fn browser_notices_what_is_wrong() -> Result<()> {
    let (report, _) = made_up(&["web1"], "completed", None);
    let page = page(&report, None)?;
    let with = |more: &str| page.replace("</main>", &format!("{more}</main>"));
    for (name, more, problem) in [
        (
            "wide",
            "<div style='width:2000px'>x</div>",
            "beyond the screen",
        ),
        (
            "cut",
            "<div style='width:20px;overflow:hidden;white-space:nowrap'>too long for it</div>",
            "cut off",
        ),
        (
            "over",
            "<svg height=20><text x=1 y=10>one</text><text x=2 y=10>two</text></svg>",
            "over each other",
        ),
        // The page's own policy forbids both.
        (
            "script",
            "<script>console.log('x')</script>",
            "Log.entryAdded",
        ),
        ("fetch", "<img src='http://192.0.2.1/x.png'>", "192.0.2.1"),
    ] {
        let told = look_at(name, &[(name, with(more))]).err().context(name)?;
        ensure!(told.to_string().contains(problem), "{name}: {told}");
    }
    Ok(())
}

#[test]
fn browser_shows_the_page_of_a_real_job() -> Result<()> {
    with_lab(Some(200_000_000), |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let names = ["web1", "web2", "db1"];
        boot_all(a, &names.map(clone_guest))?;
        vmgang(a, &[&["gang", "add", "web"], &names[..]].concat())?.expect(0)?;
        let job = vmgang(a, &["migrate", "--json", "web", &uri(b)])?
            .expect(0)?
            .job()?;
        vmgang(a, &["history", &job.job, "--html", "/root/page.html"])?.expect(0)?;
        let page = a.read_text("/root/page.html")?;
        for part in [
            "Who did what when",
            "Who shared with whom",
            "Bytes a second",
            "paused",
            "db1",
        ] {
            ensure!(page.contains(part), "there is no {part:?} on the page");
        }
        let path = format!("/org/vmgang/jobs/{}", job.job);
        let call = [
            "busctl",
            "--json=short",
            "call",
            "org.vmgang.VMGang1",
            &path,
        ];
        let told = a.run(&[&call[..], &["org.vmgang.Job1", "GetTimeline"]].concat())?;
        let told: Value = serde_json::from_str(&told)?;
        let timeline: Value = serde_json::from_str(told["data"][0].as_str().context("a string")?)?;
        schema::check_value("timeline", &timeline)?;
        let shared = timeline["shared_pages"].as_array().context("rows")?;
        let from_others = |(at, row): (usize, &Value)| {
            let row = row
                .as_array()
                .into_iter()
                .flatten()
                .take(names.len())
                .enumerate();
            row.filter(|(column, _)| *column != at)
                .filter_map(|(_, pages)| pages.as_u64())
                .sum::<u64>()
        };
        let pages: u64 = shared.iter().enumerate().map(from_others).sum();
        ensure!(pages > 1000 && job.bytes.saved.cross_vm > 0, "{timeline}");
        look_at("real", &[("real", page)])
    })
}
