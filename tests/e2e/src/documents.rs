//! Commands as the documents show them: the lines of their code blocks.
//!
//! Must not: run anything.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The top of the source tree.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every line in a plain code block of the document, without its trailing comment. Blocks
/// with a language (`rust`, `js`, `mermaid`) are not commands.
pub fn commands(document: &str) -> Result<Vec<String>> {
    let path = workspace().join(document);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(commands_of(&text))
}

fn commands_of(text: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut block: Option<&str> = None;
    for line in text.lines() {
        match (line.trim().strip_prefix("```"), block) {
            (Some(language), None) => block = Some(language),
            (Some(_), Some(_)) => block = None,
            (None, Some("")) => {
                let command = line.split("  #").next().unwrap_or_default().trim();
                if !command.is_empty() {
                    commands.push(command.to_owned());
                }
            }
            (None, _) => {}
        }
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_plain_blocks_are_commands() {
        let text = "a\n```\nls -l   # all\n\n```\nb\n```rust\nlet x;\n```\n```\nmake x\n```\n";
        assert_eq!(commands_of(text), ["ls -l", "make x"]);
    }
}
