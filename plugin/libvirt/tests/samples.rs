//! The samples of `xml-schemas/` against the parser, and against the RELAX NG schema where
//! xmllint is installed: both must say the same.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmgang_libvirt::Membership;

fn schemas() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xml-schemas")
}

fn samples(kind: &str) -> Vec<PathBuf> {
    let directory = schemas().join("samples").join(kind);
    let mut samples: Vec<_> = std::fs::read_dir(&directory)
        .expect("samples")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    samples.sort();
    assert!(
        samples.len() >= 5,
        "{} has too few samples",
        directory.display()
    );
    samples
}

/// The schema's verdict; `None` without xmllint.
fn schema_accepts(sample: &Path) -> Option<bool> {
    let status = Command::new("xmllint")
        .args(["--noout", "--relaxng"])
        .arg(schemas().join("member.rng"))
        .arg(sample)
        .stderr(Stdio::null())
        .status()
        .ok()?;
    Some(status.success())
}

#[test]
fn parser_and_schema_agree_with_the_samples() {
    for (kind, valid) in [("valid", true), ("invalid", false)] {
        for sample in samples(kind) {
            let xml = std::fs::read_to_string(&sample).expect("a sample");
            let parsed = Membership::parse("vm", &xml);
            assert_eq!(parsed.is_ok(), valid, "{}: {parsed:?}", sample.display());
            if let Some(accepted) = schema_accepts(&sample) {
                assert_eq!(accepted, valid, "{}: the schema differs", sample.display());
            }
        }
    }
}
