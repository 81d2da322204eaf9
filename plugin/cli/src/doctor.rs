//! `vmgang doctor`: whether a migration would be refused, what could be better, and what to do about it.

use std::collections::HashMap;

use anyhow::Context;
use serde::Deserialize;
use zbus::{Connection, Variant};

use crate::arguments::DoctorOptions;
use crate::{exit, migrate, paint, proxies, text};

/// Where the text of a finding begins, behind its level.
const INDENT: usize = 9;

/// What vmgangd says.
#[derive(Debug, Deserialize)]
struct Diagnosis {
    ready: bool,
    destination: Option<String>,
    findings: Vec<Finding>,
}

#[derive(Debug, Deserialize)]
struct Finding {
    level: String,
    subject: String,
    what: String,
    fix: Option<String>,
}

impl Diagnosis {
    /// For people, at 80 columns.
    fn report(&self) -> String {
        let mut report = String::new();
        for finding in &self.findings {
            let told = format!("{}: {}", finding.subject, finding.what);
            let level = paint::state(&finding.level);
            report.push_str(&text::paragraph(&level, INDENT, &told));
            if let Some(fix) = &finding.fix {
                report.push_str(&text::paragraph("", INDENT, &format!("-> {fix}")));
            }
        }
        report.push('\n');
        report.push_str(&self.verdict());
        report.push('\n');
        report
    }

    fn verdict(&self) -> String {
        let migration = match &self.destination {
            Some(destination) => format!("a migration to {destination}"),
            None => "a migration from here".to_owned(),
        };
        let refused = |finding: &&Finding| finding.level == "refused";
        let count = self.findings.iter().filter(refused).count();
        match (self.ready, &self.destination) {
            (true, Some(_)) => format!("Ready: {migration} would not be refused."),
            (true, None) => {
                "Nothing here would refuse a migration; name a destination to see the pair.".into()
            }
            (false, _) => format!("Not ready: {migration} would be refused ({count} findings)."),
        }
    }
}

pub async fn run(connection: &Connection, options: DoctorOptions) -> anyhow::Result<u8> {
    let mut asked: HashMap<&str, Variant<'_>> = HashMap::new();
    if let Some(gang) = &options.gang {
        asked.insert("gang", Variant::from(gang.as_str()));
    }
    if let Some(peer) = &options.peer {
        asked.insert("peer", Variant::from(peer.as_str()));
    }
    let manager = proxies::manager(connection).await?;
    let destination = options.destination.as_deref().unwrap_or_default();
    let result = manager.diagnose(destination, asked).await?;
    let diagnosis: Diagnosis = serde_json::from_str(&result).context(migrate::REPORT_UNREADABLE)?;
    match options.json {
        true => println!("{result}"),
        false => print!("{}", diagnosis.report()),
    }
    Ok(match diagnosis.ready {
        true => exit::MIGRATED,
        false => exit::FAILED,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(ready: bool) -> Diagnosis {
        let level = if ready { "warning" } else { "refused" };
        let json = format!(
            r#"{{"ready":{ready},"host":"a","destination":"qemu+tls://b/system","peer":"b:16520","gangs":["web"],
            "findings":[{{"check":"clock","level":"ok","subject":"this host","what":"the clock is synchronised","fix":null}},
            {{"check":"peer","level":"{level}","subject":"b","what":"cannot reach vmgangd on b:16520: Connection refused (os error 111)","fix":"is it running there, and is the port open? If it is, then look at the firewall of both hosts"}}]}}"#
        );
        serde_json::from_str(&json).expect("as vmgangd says it")
    }

    #[test]
    fn the_report_fits_80_columns_and_names_each_fix() {
        let report = sample(false).report();
        assert!(
            report.lines().all(|line| line.chars().count() <= 80),
            "{report}"
        );
        for part in [
            "ok       this host: the clock is synchronised\n",
            "refused  b: cannot reach",
            "\n         -> is it running there",
            "\nNot ready: a migration to qemu+tls://b/system would be refused (1 findings).\n",
        ] {
            assert!(report.contains(part), "{part}: {report}");
        }
        assert!(sample(true).report().contains("\nReady: "));
    }
}
