//! What `vmgang` prints with `--json`, held against `docs/json.schema.json`.
//!
//! Must not: know any field; the schema does.

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use crate::documents::workspace;

/// The definition for what these arguments print.
fn definition(arguments: &[&str]) -> Result<&'static str> {
    let words: Vec<&str> = arguments
        .iter()
        .copied()
        .filter(|word| !word.starts_with("--"))
        .collect();
    Ok(match words[..] {
        ["gang", "list"] => "gang list",
        ["gang", "show", _] => "gang show",
        ["estimate", ..] => "estimate",
        ["prepare", ..] => "prepare",
        ["migrate", ..] => "migrate",
        ["return", ..] => "return",
        ["status", ..] if arguments.contains(&"--watch") => "status --watch",
        ["status"] => "status",
        ["status", _] => "status JOB",
        ["history"] => "history",
        ["history", _] => "history JOB",
        ["doctor", ..] => "doctor",
        _ => return Err(anyhow!("no schema for {arguments:?}")),
    })
}

/// Fails unless `printed` is what the document promises for these arguments.
pub fn check(arguments: &[&str], printed: &str) -> Result<()> {
    let name = definition(arguments)?;
    let printed: Value = serde_json::from_str(printed)
        .with_context(|| format!("{arguments:?} printed no JSON: {printed}"))?;
    check_value(name, &printed)
}

/// Fails unless the value is as the definition of this name says.
pub fn check_value(name: &str, value: &Value) -> Result<()> {
    let file = workspace().join("docs/json.schema.json");
    let text = std::fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}", file.display()))?;
    let document: Value = serde_json::from_str(&text)?;
    ensure!(
        document["$defs"].get(name).is_some(),
        "{} defines no {name:?}",
        file.display()
    );
    let pointer = format!("#/$defs/{}", name.replace(' ', "%20"));
    let schema = json!({"$ref": pointer, "$defs": document["$defs"]});
    let validator = jsonschema::validator_for(&schema).map_err(|error| anyhow!("{error}"))?;
    let problems: Vec<String> = validator
        .iter_errors(value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    ensure!(
        problems.is_empty(),
        "{value} is not what the schema {name:?} says: {}",
        problems.join("; ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_unknown_or_of_another_kind_is_noticed() {
        let good = json!([{"gang": "web", "running": 2, "members": 3}]);
        check_value("gang list", &good).expect("as it is");
        for bad in [
            json!([{"gang": "web", "running": 2}]),
            json!([{"gang": "web", "running": 2, "members": 3, "more": 1}]),
            json!([{"gang": "web", "running": -2, "members": 3}]),
            json!({"gang": "web", "running": 2, "members": 3}),
        ] {
            check_value("gang list", &bad).expect_err("another");
        }
        check_value("nothing", &good).expect_err("not defined");
    }

    #[test]
    fn each_command_has_its_own() {
        let of = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            definition(&words).expect(line)
        };
        assert_eq!(of("status --json"), "status");
        assert_eq!(of("status 12ab --json"), "status JOB");
        assert_eq!(of("status --json --watch"), "status --watch");
        assert_eq!(of("history --json"), "history");
        assert!(definition(&["abort", "x"]).is_err());
    }
}
