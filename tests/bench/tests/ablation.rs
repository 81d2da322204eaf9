//! The ablation on small synthetic streams, and made again from its own measurements.

use std::path::Path;
use std::process::{Command, Output};

fn ablation(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ablation"))
        .args(arguments)
        .output()
        .expect("ablation starts")
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn one_command_writes_tables_measurements_and_a_picture_that_can_be_made_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("out");
    let out = out.to_str().expect("a plain path");
    let recorded = dir.path().to_str().expect("a plain path");
    let sets = ["--sets", "debian,unique,mixed", "--size", "2"];
    let links = ["--link", "none,400mbit"];
    let places = ["--recorded", recorded, "--out", out];
    let output = ablation(&[&sets[..], &links, &places].concat());
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("debian: not recorded; left out"), "{said}");

    let text = read(&Path::new(out).join("ablation.md"));
    assert!(String::from_utf8_lossy(&output.stdout).contains(&text));
    for part in [
        "### unique, link: 400mbit",
        "### mixed, link: none",
        "| all but delta |",
        "| all, zstd-hard |",
        "- default, bytes beyond QEMU's: ",
        "- default, time beyond the plain relay's: ",
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    // Single techniques over the first link only; the default over each, of both sets.
    let rows = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
    // Tables of time, and of savings.
    assert_eq!(rows("| all but delta |"), 2);
    assert_eq!(rows("| default |"), 2 * 2 + 2);

    let picture = read(&Path::new(out).join("ablation.svg"));
    assert!(picture.contains("400 Mbit/s") && picture.ends_with("</svg>\n"));
    let again = dir.path().join("again");
    let json = Path::new(out).join("ablation.json");
    let elsewhere = dir.path().join("elsewhere.svg");
    let output = ablation(&[
        "--from",
        json.to_str().expect("a plain path"),
        "--out",
        again.to_str().expect("a plain path"),
        "--picture",
        elsewhere.to_str().expect("a plain path"),
    ]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(read(&again.join("ablation.md")), text);
    assert_eq!(read(&elsewhere), picture);
    assert!(!again.join("ablation.svg").exists() && !again.join("ablation.json").exists());
}

#[test]
fn what_cannot_be_is_refused_before_anything_runs() {
    let empty = tempfile::tempdir().expect("a directory");
    let empty_path = empty.path().to_str().expect("a plain path");
    std::fs::create_dir(empty.path().join("debian")).expect("a directory");
    for (arguments, reason) in [
        (&["--sets", "unique", "--link", "fast"][..], "not a rate"),
        (
            &["--sets", "unique", "--repetitions", "0"],
            "no repetitions",
        ),
        (&["--sets", "unique", "--size", "0"], "some memory"),
        (&["--sets", "../debian"], "neither a synthetic set"),
        (&["--sets", "demo"], "none of the sets is there"),
        (
            &["--sets", "debian", "--recorded", empty_path],
            "holds no recorded streams",
        ),
        (&["--from", empty_path], "cannot read"),
    ] {
        let out = empty.path().join("out");
        let place = ["--out", out.to_str().expect("a plain path")];
        let output = ablation(&[arguments, &place].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(said.contains(reason), "{arguments:?}: {said}");
        assert!(!out.exists(), "{arguments:?}");
    }
}
