//! The `sqlite3` command as a child that is asked one thing after another through its pipes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::workload::Result;

/// What the shell prints after each request; no row of ours looks like it.
const END: &str = "end-of-request";
/// A row is never longer; more would be somebody else's.
const LINES_MAX: usize = 100_000;

#[derive(Debug)]
pub struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Shell {
    pub fn open(program: &str, database: &str) -> Result<Shell> {
        // Errors go where the rows go, so that they are read in their place.
        let mut child = Command::new("/bin/sh")
            .args(["-c", "exec \"$0\" -batch \"$1\" 2>&1", program, database])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start {program}: {error}"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(format!("{program} has no pipes"));
        };
        Ok(Shell {
            child,
            input,
            output: BufReader::new(output),
        })
    }

    /// Has the statements executed; gives the rows they print.
    pub fn ask(&mut self, statements: &str) -> Result<Vec<String>> {
        let request = format!("{statements}\n.print {END}\n");
        self.input
            .write_all(request.as_bytes())
            .map_err(|error| format!("sqlite3 does not read: {error}"))?;
        let mut rows = Vec::new();
        loop {
            let mut line = String::new();
            match self.output.read_line(&mut line) {
                Ok(0) => return Err(format!("sqlite3 ended: {:?}", self.child.wait())),
                Ok(_) => {}
                Err(error) => return Err(format!("sqlite3 does not write: {error}")),
            }
            let line = line.trim_end();
            if line == END {
                return Ok(rows);
            }
            if rows.len() == LINES_MAX {
                return Err(format!("sqlite3 prints without end: {line}"));
            }
            rows.push(line.to_owned());
        }
    }

    /// Has statements executed that print nothing.
    pub fn run(&mut self, statements: &str) -> Result<()> {
        match self.ask(statements)?.first() {
            None => Ok(()),
            Some(line) => Err(format!("sqlite3 says: {line}")),
        }
    }
}
