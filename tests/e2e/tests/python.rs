//! The unit tests of what is written in Python, with the Python of this machine.

use std::process::Command;

use anyhow::{Result, ensure};
use vmgang_e2e::Ended;
use vmgang_e2e::documents::workspace;

#[test]
fn units_of_the_virt_manager_plugin() -> Result<()> {
    let room = workspace().join("plugin/virt-manager");
    let ended: Ended = Command::new("python3")
        .args(["-m", "unittest", "discover", "-s", "tests"])
        .current_dir(&room)
        .env("PYTHONPATH", &room)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()?
        .into();
    ensure!(ended.code == 0, "{}", ended.stderr);
    // Finding no tests is no success.
    ensure!(!ended.stderr.contains("Ran 0 tests"), "{}", ended.stderr);
    Ok(())
}
