//! What people and scripts see of `vmgang`: JSON as its schema says, lines and bars that fit.

use anyhow::{Context, Result, ensure};
use vmgang_e2e::{
    Ended, boot_all, clone_guest, schema, start_vmgang, uri, vmgang, wait_until, with_lab,
};
use vmgang_lab::Host;

/// A terminal of 80 columns on which a command runs.
fn on_a_terminal(host: &Host, environment: &str, command: &str) -> Result<String> {
    let command = format!("stty cols 80 rows 24; TERM=xterm {environment} vmgang {command}");
    let ended: Ended = host
        .exec(&["script", "-qec", &command, "/dev/null"])?
        .into();
    Ok(ended.expect(0)?.stdout)
}

/// What is left when everything that moves the cursor or colours is taken out.
fn lines(shown: &str) -> Vec<String> {
    let mut plain = String::new();
    let mut letters = shown.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\u{1b}' => {
                let _ = letters.find(|letter| letter.is_ascii_alphabetic());
            }
            '\r' => plain.push('\n'),
            letter => plain.push(letter),
        }
    }
    plain
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect()
}

/// Sequences that colour.
fn colours(shown: &str) -> usize {
    let sequences = shown.split("\u{1b}[").skip(1);
    sequences
        .filter(|rest| {
            let end = rest.find(|letter: char| letter.is_ascii_alphabetic());
            end.is_some_and(|end| rest[end..].starts_with('m') && end > 0)
        })
        .count()
}

#[test]
fn all_json_is_as_its_schema_says_and_everything_fits_a_terminal() -> Result<()> {
    with_lab(None, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        let guests: Vec<_> = ["web1", "a-guest-with-quite-a-long-name"]
            .iter()
            .map(|name| clone_guest(name).with_memory_mib(96))
            .collect();
        boot_all(a, &guests)?;
        vmgang(
            a,
            &[
                "gang",
                "add",
                "web",
                "web1",
                "a-guest-with-quite-a-long-name",
            ],
        )?
        .expect(0)?;
        // `vmgang` itself holds each against the schema.
        for words in [
            "gang list",
            "gang show web",
            "estimate web",
            "doctor",
            "status",
            "history",
        ] {
            let words: Vec<&str> = words.split(' ').chain(["--json"]).collect();
            let ended = vmgang(a, &words)?.expect(0)?;
            ensure!(!ended.stdout.is_empty(), "{words:?} printed nothing");
        }
        vmgang(a, &["doctor", "--json", &uri(b)])?.expect(0)?;

        // Slow enough to be looked at.
        lab.shape(Some(20_000_000))?;
        let migrating = start_vmgang(a, &["migrate", "--json", "web", &uri(b)])?;
        wait_until("the job is listed", || {
            Ok(vmgang(a, &["status", "--json"])?.stdout.contains("copying"))
        })?;
        let picture = on_a_terminal(a, "", "status")?;
        ensure!(
            picture.contains("PHASE") && picture.contains("web to qemu+tls://b"),
            "{picture}"
        );
        let watched = on_a_terminal(a, "", "status --watch")?;
        let plain = Ended::from(migrating.wait_with_output()?).expect(0)?;
        schema::check(&["migrate", "--json"], &plain.stdout)?;
        lab.shape(None)?;

        let id = plain.job()?.job;
        for words in [["history", &id], ["status", &id]] {
            vmgang(a, &[&words[..], &["--json"]].concat())?.expect(0)?;
        }
        vmgang(a, &["history", "--json"])?.expect(0)?;
        let stage = vmgang(b, &["prepare", "--json", "--for", "60", "web", &uri(a)])?.expect(0)?;
        vmgang(b, &["status", "--json"])?.expect(0)?;
        let stage: serde_json::Value = serde_json::from_str(&stage.stdout)?;
        let stage = stage["stage"].as_str().context("an id")?;
        vmgang(b, &["status", "--json", stage])?.expect(0)?;
        vmgang(b, &["abort", stage])?.expect(0)?;

        ensure!(
            watched.contains("PHASE") && watched.contains("SAVED"),
            "{watched}"
        );
        ensure!(colours(&watched) > 0, "no colours: {watched:?}");
        // Bars are drawn over each other; how wide they are is tested where they are made.
        let mut all = vec![picture];
        for command in ["history", &format!("history {id}"), "doctor", "gang list"] {
            let bare = on_a_terminal(a, "NO_COLOR=1", command)?;
            ensure!(colours(&bare) == 0, "coloured all the same: {bare:?}");
            all.push(bare);
        }
        ensure!(
            colours(&on_a_terminal(a, "", "history")?) > 0,
            "no colours in the list"
        );
        for shown in all {
            for line in lines(&shown) {
                ensure!(line.chars().count() <= 80, "too wide: {line:?}");
            }
        }
        Ok(())
    })
}
