//! `vmgang estimate`: what a migration of a gang would send, and who shares how much with whom.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use zbus::Connection;

use crate::arguments::EstimateOptions;
use crate::savings::Saved;
use crate::{exit, heat_map, migrate, proxies, savings, text};

const PAGE_BYTES: u64 = 4096;
/// A wider matrix does not fit 80 columns.
const MATRIX_MEMBERS_MAX: usize = 8;

/// What vmgangd says.
#[derive(Debug, Deserialize)]
pub struct Estimate {
    pub gang: String,
    pub members: Vec<Member>,
    /// Pages of the row's member that the column's has as well.
    shared: Vec<Vec<u64>>,
    migration: Migration,
}

/// Counts of pages.
#[derive(Debug, Deserialize)]
pub struct Member {
    pub name: String,
    memory_bytes: u64,
    zero: u64,
    uniform: u64,
    content: u64,
    distinct: u64,
    intra_vm: u64,
    cross_vm: u64,
}

#[derive(Debug, Deserialize)]
struct Migration {
    qemu_stream: u64,
    wire: u64,
    saved: Saved,
}

impl Estimate {
    /// How many percent of the row's pages the column's member has, too.
    pub fn percent(&self, row: usize, column: usize) -> u64 {
        let of = self.members.get(row).map_or(0, |member| member.content);
        let pages = self.shared.get(row).and_then(|row| row.get(column));
        (pages.copied().unwrap_or(0) * 100)
            .checked_div(of)
            .unwrap_or(0)
    }

    /// For people, at 80 columns.
    fn report(&self) -> String {
        let size = |pages: u64| text::bytes(pages.saturating_mul(PAGE_BYTES));
        let rows: Vec<_> = self
            .members
            .iter()
            .map(|member| {
                vec![
                    text::plain(&member.name),
                    text::bytes(member.memory_bytes),
                    size(member.zero + member.uniform),
                    size(member.intra_vm),
                    size(member.cross_vm),
                    size(member.distinct),
                ]
            })
            .collect();
        let header = [
            "DOMAIN", "MEMORY", "ZERO", "UNIFORM", "TWICE", "SHARED", "ITS OWN",
        ];
        let mut report = text::table(&header, &rows);
        report.push_str(&self.matrix());
        report.push_str(&self.savings());
        report
    }

    fn matrix(&self) -> String {
        let members = self.members.len();
        if members < 2 {
            return String::new();
        }
        if members > MATRIX_MEMBERS_MAX {
            return "\nWho shares with whom: `--svg FILE` draws it, `--json` has the numbers.\n"
                .into();
        }
        let mut header = vec!["PERCENT OF".to_owned()];
        header.extend((1..=members).map(|number| format!("IN {number}")));
        let rows: Vec<Vec<String>> = (0..members)
            .map(|row| {
                let name = text::plain(&self.members[row].name);
                let mut cells = vec![format!("{} {name}", row + 1)];
                cells.extend((0..members).map(|column| match row == column {
                    true => "-".to_owned(),
                    false => self.percent(row, column).to_string(),
                }));
                cells
            })
            .collect();
        let header: Vec<&str> = header.iter().map(String::as_str).collect();
        format!("\n{}", text::table(&header, &rows))
    }

    fn savings(&self) -> String {
        let Migration {
            qemu_stream,
            wire,
            saved,
        } = &self.migration;
        format!(
            "\nA MIGRATION NOW\n{}What the guests write while they migrate comes on top.\n",
            savings::table(*qemu_stream, *wire, saved)
        )
    }
}

pub async fn run(connection: &Connection, options: EstimateOptions) -> anyhow::Result<u8> {
    let manager = proxies::manager(connection).await?;
    let result = manager.estimate(&options.gang, HashMap::new()).await?;
    let estimate: Estimate = serde_json::from_str(&result).context(migrate::REPORT_UNREADABLE)?;
    if let Some(file) = &options.svg {
        write(file, &heat_map::draw(&estimate)?)?;
    }
    match options.json {
        true => println!("{result}"),
        false => print!("{}", estimate.report()),
    }
    Ok(exit::MIGRATED)
}

fn write(file: &Path, svg: &str) -> anyhow::Result<()> {
    std::fs::write(file, svg)
        .with_context(|| format!("cannot write the picture to {}", file.display()))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn sample(names: &[&str]) -> Estimate {
        let members: Vec<String> = names
            .iter()
            .map(|name| {
                let name = serde_json::to_string(name).expect("a string");
                format!(
                    r#"{{"name":{name},"uuid":"x","memory_bytes":1073741824,"pages":262144,"zero":200000,
                    "uniform":10,"content":62134,"distinct":40000,"intra_vm":134,"cross_vm":22000,"stable":1,"scans":2}}"#
                )
            })
            .collect();
        let row = vec![31067u64; names.len()];
        let shared = vec![row; names.len()];
        let json = format!(
            r#"{{"gang":"web","scanned_unix_s":1,"members":[{}],"shared":{},
            "migration":{{"qemu_stream":1000000,"wire":100000,"literal":1,"saved":{{"zero":1,"uniform":0,"intra_vm":5,
            "cross_vm":600000,"staged":0,"destination":0,"sub_page":0,"delta":0,"compression":-9}}}}}}"#,
            members.join(","),
            serde_json::to_string(&shared).expect("numbers")
        );
        serde_json::from_str(&json).expect("as vmgangd says it")
    }

    #[test]
    fn the_report_fits_80_columns_and_says_the_numbers() {
        let report = sample(&["web1", "web2", "a-longer-name"]).report();
        assert!(
            report.lines().all(|line| line.chars().count() <= 80),
            "{report}"
        );
        for part in [
            "1.00 GiB",
            "50",
            "from others",
            "60%",
            "over the wire",
            "10%",
        ] {
            assert!(report.contains(part), "{part}: {report}");
        }
        assert!(
            !report.contains("compression"),
            "it saves nothing: {report}"
        );
        let many: Vec<String> = (0..9).map(|number| format!("vm{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(sample(&many).report().contains("--svg"));
        assert!(!sample(&["one"]).report().contains("PERCENT"));
    }
}
