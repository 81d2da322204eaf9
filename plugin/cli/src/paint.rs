//! Colours of the states that members and jobs are in. `console` decides whether there are colours at all:
//! not where the stream is no terminal, `TERM` is dumb or `NO_COLOR` is set.

use console::{StyledObject, style};

/// A state's word for standard output.
pub fn state(word: &str) -> String {
    coloured(word, word).to_string()
}

/// `text` in the colour of the state `word`, for standard error.
pub fn beside_progress(word: &str, text: &str) -> String {
    coloured(word, text).for_stderr().to_string()
}

/// Before what went wrong, on standard error.
pub fn complaint(text: &str) -> String {
    style(text).red().bold().for_stderr().to_string()
}

/// Is there, but is not what one looks for, on standard error.
pub fn faint(text: &str) -> String {
    style(text).dim().for_stderr().to_string()
}

fn coloured<'a>(word: &str, text: &'a str) -> StyledObject<&'a str> {
    let text = style(text);
    match word {
        "migrated" | "completed" | "ok" | "fresh" => text.green(),
        "failed" | "refused" | "ended" => text.red(),
        "partial" | "aborted" | "warning" => text.yellow(),
        "copying" | "running" | "scanning" | "staging" => text.cyan(),
        "held" | "switching" => text.blue(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_and_bad_ends_look_different() {
        let painted = |word| coloured(word, "x").force_styling(true).to_string();
        assert_ne!(painted("completed"), painted("failed"));
        assert_ne!(painted("partial"), painted("completed"));
        assert_eq!(painted("waiting"), "x");
    }
}
