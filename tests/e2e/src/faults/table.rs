//! The matrix as `docs/fault-matrix.md` shows it.

use super::{Cell, Fault, Phase};

/// The page, all of it.
pub fn markdown(cells: &[Cell], versions: &str, date: &str) -> String {
    let mut page = format!(
        "# Fault matrix\n\n\
         Made by `make fault-matrix` on {date} with {versions}. Three guests (192 MiB, 96 MiB idle, 96 MiB\n\
         that dirties 200 pages a second) migrate as one gang over 120 Mbit/s; in each cell one thing breaks\n\
         in one phase. Afterwards each guest must run in exactly one place and find every page of its memory\n\
         intact, the report must be true, and nothing may be left behind.\n\n"
    );
    page.push_str("| fault |");
    for phase in Phase::ALL {
        page.push_str(&format!(" {} |", phase.title()));
    }
    page.push_str("\n|---|---|---|---|---|---|\n");
    for fault in Fault::ALL {
        let row = Phase::ALL.map(|phase| {
            let is_it = |cell: &&Cell| cell.fault == fault && cell.phase == phase;
            match cells.iter().find(is_it) {
                Some(cell) if cell.violations.is_empty() => cell.outcome.clone(),
                Some(cell) => format!("**{}**", cell.outcome),
                None => "not run".into(),
            }
        });
        page.push_str(&format!("| {} | {} |\n", fault.title(), row.join(" | ")));
    }
    page.push_str(
        "\n*stayed*: runs on the source. *moved*: runs on the destination. *exit*: of `vmgang migrate`\n\
         (0 all moved, 1 none, 3 some). *lost with its only QEMU*: that process was the guest; stock QEMU\n\
         loses it as well. *not met*: the phase was over before the fault, in three attempts. *nothing to break*:\n\
         that process is not there in this phase. Bold: something that must hold did not.\n",
    );
    let broken = cells.iter().filter(|cell| !cell.violations.is_empty());
    for cell in broken {
        page.push_str(&format!(
            "\n- {}, {}: {}\n",
            cell.fault.title(),
            cell.phase.title(),
            cell.violations.join("; ")
        ));
    }
    page
}
