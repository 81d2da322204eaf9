//! The one error type of the lab, and the checked way to run a command.
//!
//! Every message says what was tried and what came of it, so that a failed test can be read
//! without running it again.

use std::io;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

/// What can go wrong in the lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A command ran and failed.
    #[error("{place}: `{command}` ended with {status}\n{output}")]
    Command {
        place: String,
        command: String,
        status: ExitStatus,
        output: String,
    },
    /// A command could not be started.
    #[error("{place}: cannot start `{command}`; is it installed there?")]
    Start {
        place: String,
        command: String,
        source: io::Error,
    },
    /// The operating system refused something.
    #[error("cannot {action}")]
    Io { action: String, source: io::Error },
    /// Something did not happen in time.
    #[error("{what}: not within {} s; last seen: {last}", .after.as_secs())]
    Timeout {
        what: String,
        after: Duration,
        last: String,
    },
    /// The request itself is wrong; nothing was changed.
    #[error("{0}")]
    Request(String),
    /// A process of the lab could not set itself up, or is gone.
    #[error("{who}: {what}")]
    Broken { who: String, what: String },
    /// A guest reported a damaged page or another fault of its own.
    #[error("guest {guest} on host {host} reports: {line}")]
    Guest {
        guest: String,
        host: String,
        line: String,
    },
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
}

pub type Result<T> = std::result::Result<T, LabError>;

/// Adds to an I/O error what was being done.
pub(crate) trait IoContext<T> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| LabError::Io {
            action: action(),
            source: source.into(),
        })
    }
}

/// A command as a person would type it, for messages.
pub(crate) fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .map(|arg| arg.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

/// An error unless the command succeeded; its standard output otherwise.
pub(crate) fn checked(place: &str, command: &str, output: Output) -> Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let mut text = String::from_utf8_lossy(&output.stderr).into_owned();
    if text.trim().is_empty() {
        text = String::from_utf8_lossy(&output.stdout).into_owned();
    }
    Err(LabError::Command {
        place: place.to_owned(),
        command: command.to_owned(),
        status: output.status,
        output: tail(text.trim_end(), 4000).to_owned(),
    })
}

/// Runs a command of the machine itself to its end, without input.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let text = shown(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| LabError::Start {
            place: "this machine".to_owned(),
            command: text.clone(),
            source,
        })?;
    checked("this machine", &text, output)
}

/// The end of a text, at most about `bytes_max` long.
pub(crate) fn tail(text: &str, bytes_max: usize) -> &str {
    let mut start = text.len().saturating_sub(bytes_max);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_shows_itself_its_status_and_its_words() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 7"]))
            .expect_err("the command fails")
            .to_string();
        for part in ["sh -c", "exit status: 7", "broken"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_missing_command_is_named() {
        let error = run(&mut Command::new("vmgang-no-such-command")).expect_err("no such command");
        assert!(error.to_string().contains("vmgang-no-such-command"));
    }

    #[test]
    fn tail_keeps_whole_characters() {
        assert_eq!(tail("abc", 10), "abc");
        assert_eq!(tail("aé", 1), "");
    }
}
