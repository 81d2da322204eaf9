//! The results: one cell, the file they are kept in, and the page that shows them.
//!
//! Owns: words and layout. Must not: leave out or soften what a cell says.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::faults::Fault;
use crate::phases::Phase;

/// What became of the gang in one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cell {
    pub fault: Fault,
    pub phase: Phase,
    /// The job was over whenever the fault came.
    pub missed: bool,
    /// Members that run on the source, on the destination, and that went with their only QEMU.
    pub source: usize,
    pub moved: usize,
    pub lost: Vec<String>,
    /// Members that waited, paused, until somebody did what the report says.
    pub paused: Vec<String>,
    /// How the guests stood on the source when the fault struck.
    pub moment: String,
    pub note: Option<String>,
    /// What the job has reported.
    pub job: String,
    pub sentence: Option<String>,
    /// From the fault to the end of the command.
    pub seconds: f64,
    pub broken: Vec<String>,
}

impl Cell {
    /// The short text of the table.
    fn short(&self) -> String {
        let mut parts = Vec::new();
        if self.moved > 0 {
            parts.push(format!("{} moved", self.moved));
        }
        if self.source > 0 {
            parts.push(format!("{} source", self.source));
        }
        if !self.lost.is_empty() {
            parts.push(format!("{} lost¹", self.lost.len()));
        }
        if !self.paused.is_empty() {
            parts.push(format!("{} paused²", self.paused.len()));
        }
        let mut text = parts.join(", ");
        if self.missed {
            text += " (over before)³";
        }
        if !self.broken.is_empty() {
            text = format!("**BROKEN**: {text}");
        }
        text
    }
}

/// The results that are kept, one line of JSON a cell.
pub fn load(path: &Path) -> Result<Vec<Cell>> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.with_context(|| format!("cannot read {}", path.display()))?,
    };
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("not a cell: {line}")))
        .collect()
}

pub fn store(path: &Path, cells: &[Cell]) -> Result<()> {
    let mut text = String::new();
    for cell in cells {
        text += &serde_json::to_string(cell)?;
        text.push('\n');
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Puts a cell in the place of an earlier one.
pub fn put(cells: &mut Vec<Cell>, cell: Cell) {
    cells.retain(|old| (old.fault, old.phase) != (cell.fault, cell.phase));
    cells.push(cell);
    cells.sort_by_key(|cell| (cell.fault, cell.phase));
}

/// Who made the results.
pub struct Origin {
    pub date: String,
    pub versions: Vec<String>,
    pub gang: String,
}

fn name(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}

/// The page.
pub fn page(cells: &[Cell], origin: &Origin) -> String {
    let find = |fault: Fault, phase: Phase| {
        cells
            .iter()
            .find(|cell| (cell.fault, cell.phase) == (fault, phase))
    };
    let mut text = String::from(
        "# Fault matrix\n\n\
         Written by `make fault-matrix`; do not edit. What becomes of a gang of three real guests when \
         something breaks while they migrate, with real libvirtd, QEMU, vmgangd and system bus on two \
         hosts of the lab.\n\n",
    );
    let titles = Phase::ALL.map(Phase::title).join(" | ");
    let _ = writeln!(text, "| fault | {titles} |\n|---|---|---|---|---|---|");
    for fault in Fault::ALL {
        let row = Phase::ALL.map(|phase| find(fault, phase).map_or("not run".into(), Cell::short));
        let _ = writeln!(text, "| {} | {} |", fault.title(), row.join(" | "));
    }
    text += "\n\"Source\" and \"moved\" are members that ran there, in one place and nowhere else, after \
             the fault was healed, and whose memory the guest itself then found intact.\n\n\
             ¹ The fault killed the only QEMU that had the guest: stock QEMU and libvirt lose it as well.\n\
             ² Paused on the source, and the job's report says so and what to do; it was done, and the \
             guest went on.\n\
             ³ The phase is shorter than the fault takes to strike, and was over in three attempts.\n\n";
    text += &verdict(cells);
    text += "\n## What holds in every cell\n\n\
             - Every guest runs in one place, but those under ¹ and ².\n\
             - Every guest that runs has checked all its memory once more, and found it as it must be.\n\
             - No QEMU without a domain, no socket in `/run/vmgang/migrate` and no running job is left on \
             either host.\n\
             - The job has ended by itself, with a report that agrees with where the guests are; one whose \
             daemon was killed, with a record that its next start wrote.\n\
             - A migration of the surviving members afterwards succeeds.\n\n\
             A cell that breaks one of these is marked, and makes the command fail.\n\n";
    text += "## Phases\n\n";
    for phase in Phase::ALL {
        let _ = writeln!(text, "- **{}**: {}.", phase.title(), phase.meaning());
    }
    text += "\n## Faults\n\n";
    for fault in Fault::ALL {
        let _ = writeln!(text, "- **{}**: {}.", fault.title(), fault.meaning());
    }
    text += "\n## Cell by cell\n\n\
             How the guests stood on the source when the fault struck, what the job reported, and how many \
             seconds after the fault.\n\n\
             | fault | phase | guests | job | after, s | what it said |\n|---|---|---|---|--:|---|\n";
    for cell in cells {
        let note = cell.note.as_ref().map(|note| format!(" ({note})"));
        let _ = writeln!(
            text,
            "| {}{} | {} | {} | {} | {:.1} | {} |",
            cell.fault.title(),
            note.unwrap_or_default(),
            cell.phase.title(),
            cell.moment,
            cell.job,
            cell.seconds,
            cell.sentence
                .as_deref()
                .unwrap_or_default()
                .replace('|', "\\|")
                .replace('\n', " ")
        );
    }
    let example = Fault::ALL.first().zip(Phase::ALL.get(2));
    let example = example.map(|(fault, phase)| format!("{}:{}", name(fault), name(phase)));
    let _ = write!(
        text,
        "\n## How it was made\n\n\
         `make fault-matrix`, last on {}; a few cells: `make fault-matrix FAULTS='--cells {}'`. With \
         `--resume` the cells may come from several runs; each is the last one of its kind.\n\n\
         - {}\n- Gang: {}\n",
        origin.date,
        example.unwrap_or_default(),
        origin.versions.join("\n- "),
        origin.gang
    );
    text
}

/// In a sentence or two, whether anything was lost.
fn verdict(cells: &[Cell]) -> String {
    let broken: Vec<&Cell> = cells
        .iter()
        .filter(|cell| !cell.broken.is_empty())
        .collect();
    let lost: usize = cells.iter().map(|cell| cell.lost.len()).sum();
    let mut text = format!(
        "{} cells. {lost} guests went with the only QEMU that had them, in faults that kill a QEMU; ",
        cells.len()
    );
    match broken.len() {
        0 => text += "no other was lost, and none ran twice.\n",
        number => {
            let _ = writeln!(text, "{number} cells broke what must hold:\n");
            for cell in broken {
                let _ = writeln!(
                    text,
                    "- {}, {}: {}",
                    cell.fault.title(),
                    cell.phase.title(),
                    cell.broken.join("; ").replace('\n', " ")
                );
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(fault: Fault, phase: Phase) -> Cell {
        Cell {
            fault,
            phase,
            missed: false,
            source: 2,
            moved: 0,
            lost: vec!["small".to_owned()],
            paused: Vec::new(),
            moment: "large running".to_owned(),
            note: None,
            job: "failed".to_owned(),
            sentence: Some("a | b".to_owned()),
            seconds: 1.0,
            broken: Vec::new(),
        }
    }

    fn origin() -> Origin {
        Origin {
            date: "2026-01-01".to_owned(),
            versions: vec!["QEMU 10".to_owned()],
            gang: "three".to_owned(),
        }
    }

    #[test]
    fn a_broken_cell_is_not_overlooked() {
        let mut cells = vec![cell(Fault::SourceQemu, Phase::Barrier)];
        let page_of = |cells: &[Cell]| page(cells, &origin());
        let good = page_of(&cells);
        assert!(good.contains("| a source QEMU killed | not run | not run | 2 source, 1 lost¹ |"));
        assert!(good.contains("no other was lost") && good.contains("a \\| b"));
        cells[0].broken.push("small runs twice".to_owned());
        let bad = page_of(&cells);
        assert!(bad.contains("**BROKEN**: 2 source") && bad.contains("small runs twice"));
        assert!(!bad.contains("no other was lost"));
    }

    #[test]
    fn a_cell_that_is_run_again_replaces_the_old_one() {
        let mut cells = Vec::new();
        put(&mut cells, cell(Fault::Loss, Phase::Finish));
        put(&mut cells, cell(Fault::SourceQemu, Phase::Finish));
        let again = Cell {
            source: 3,
            ..cell(Fault::Loss, Phase::Finish)
        };
        put(&mut cells, again);
        assert_eq!(cells.len(), 2);
        assert_eq!((cells[1].fault, cells[1].source), (Fault::Loss, 3));

        let dir = std::env::temp_dir().join(format!("fault-matrix-{}", std::process::id()));
        store(&dir, &cells).expect("writes");
        let loaded = load(&dir).expect("reads");
        std::fs::remove_file(&dir).expect("removes");
        assert_eq!(loaded.len(), 2);
        assert_eq!(loaded[1].source, 3);
        assert!(load(&dir).expect("nothing is kept").is_empty());
    }
}
