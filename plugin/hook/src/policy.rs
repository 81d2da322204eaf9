//! `/etc/vmgang/incoming.toml`: what may migrate into this host without vmgang.
//!
//! Without the file, and with one in which nothing is set, everything may. One that cannot be read or
//! understood counts as the strictest: whoever wrote it wanted something refused, and a guest that is
//! refused runs on where it is.
//! Must not: wait, whatever is found in the file's place.

use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use wildmatch::WildMatch;

/// No policy is longer.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The file's content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Refuse migrations that do not come through vmgang.
    pub require_vmgang: bool,
    /// Names of domains that may come any way; `*` matches anything, `?` one character.
    pub except: Vec<String>,
}

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("{} cannot be read: {error}", path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("{} is not valid: {error}", path.display())]
    Invalid {
        path: PathBuf,
        error: Box<toml::de::Error>,
    },
}

impl Policy {
    /// Reads it; the file may be absent.
    pub fn load(path: &Path) -> Result<Policy, PolicyError> {
        let text = match read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Policy::default()),
            Err(error) => {
                let path = path.to_owned();
                return Err(PolicyError::Read { path, error });
            }
        };
        toml::from_str(&text).map_err(|error| PolicyError::Invalid {
            path: path.to_owned(),
            error: Box::new(error),
        })
    }

    /// Whether a domain of this name may come without vmgang.
    pub fn lets_in(&self, name: &str) -> bool {
        let excepted = |pattern: &String| WildMatch::new(pattern).matches(name);
        !self.require_vmgang || self.except.iter().any(excepted)
    }
}

fn read(path: &Path) -> io::Result<String> {
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(nonblocking)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    if metadata.len() > FILE_BYTES_MAX {
        return Err(io::Error::other("it is too long"));
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Result<Policy, PolicyError> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("incoming.toml");
        std::fs::write(&path, text).expect("writes");
        Policy::load(&path)
    }

    #[test]
    fn without_a_word_everything_may_come() {
        let absent = Policy::load(Path::new("/no/such/incoming.toml")).expect("may be absent");
        let packaged = include_str!("../../../packaging/incoming.toml");
        for policy in [
            absent,
            policy("").expect("valid"),
            policy(packaged).expect("valid"),
        ] {
            assert_eq!(policy, Policy::default());
            assert!(policy.lets_in("anything"));
        }
        // What is commented out in the packaged file is valid, and the default.
        let uncommented: String = packaged
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| !line.starts_with(' ') && !line.is_empty())
            .map(|line| format!("{line}\n"))
            .collect();
        assert!(uncommented.contains("require_vmgang"), "{uncommented}");
        assert_eq!(policy(&uncommented).expect("valid"), Policy::default());
    }

    #[test]
    fn exceptions_are_by_name() {
        let policy = policy("require_vmgang = true\nexcept = ['router', 'test-*']").expect("valid");
        assert!(policy.lets_in("router") && policy.lets_in("test-1"));
        for name in ["router2", "Router", "a-test-1", ""] {
            assert!(!policy.lets_in(name), "{name}");
        }
    }

    #[test]
    fn the_administrators_example_is_valid() {
        let document = include_str!("../../../docs/operations.md");
        let example = document
            .split("```toml\n")
            .find(|text| text.starts_with("require_vmgang"));
        let example = example
            .and_then(|text| text.split("```").next())
            .expect("an example");
        let policy = policy(example).expect("valid");
        assert!(policy.lets_in("router") && !policy.lets_in("web1"));
    }

    #[test]
    fn what_cannot_be_understood_is_an_error_that_names_file_and_line() {
        for text in [
            "\nrequire_vmgan = true",
            "\nrequire_vmgang = 'yes'",
            "\nexcept = 'a'",
            "\n[",
        ] {
            let error = policy(text).expect_err(text).to_string();
            assert!(
                error.contains("incoming.toml") && error.contains("line 2"),
                "{error}"
            );
        }
        policy(&"#".repeat(FILE_BYTES_MAX as usize + 1)).expect_err("too long");
    }

    #[test]
    fn what_is_no_file_is_an_error_and_not_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        Policy::load(directory.path()).expect_err("a directory");
        let fifo = directory.path().join("incoming.toml");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .expect("a fifo");
        Policy::load(&fifo).expect_err("nobody writes to it");
    }
}
