//! vmgang.toml(5) from the packaged vmgang.toml, in which every key is commented out below the text
//! about it: `# text`, `#key = default`, `#[table]`.

use anyhow::ensure;

const HEAD: &str = ".TH vmgang.toml 5\n.SH NAME\nvmgang.toml \\- configuration of vmgangd\n\
                    .SH SYNOPSIS\n.I /etc/vmgang/vmgang.toml\n.SH DESCRIPTION\n";
const TAIL: &str = ".SH SEE ALSO\n.BR vmgangd (8),\n.BR vmgang (1)\n";

/// The manual page.
pub fn page(file: &str) -> anyhow::Result<String> {
    let mut page = HEAD.to_owned();
    let mut blocks = file
        .split("\n\n")
        .map(str::trim)
        .filter(|block| !block.is_empty());
    page.push_str(&text(blocks.next().unwrap_or_default()));
    page.push_str(".SH KEYS\n");
    for block in blocks {
        let (keys, words): (Vec<&str>, Vec<&str>) = block
            .lines()
            .partition(|line| !line.starts_with("# ") && *line != "#");
        ensure!(!words.is_empty(), "nothing is said about {block}");
        for (index, key) in keys.iter().enumerate() {
            let Some(key) = key.strip_prefix('#') else {
                anyhow::bail!("{key} is not commented out");
            };
            page.push_str(match (key.strip_prefix('['), index) {
                (Some(_), _) => ".SS ",
                (None, 0) => ".TP\n.B ",
                (None, _) => ".TQ\n.B ",
            });
            page.push_str(&escaped(key));
            page.push('\n');
        }
        page.push_str(&text(&words.join("\n")));
    }
    page.push_str(TAIL);
    Ok(page)
}

fn text(comment: &str) -> String {
    comment
        .lines()
        .map(|line| line.trim_start_matches('#').trim())
        .map(|line| {
            format!(
                "{}\n",
                if line.is_empty() {
                    ".PP".into()
                } else {
                    escaped(line)
                }
            )
        })
        .collect()
}

/// Written so that roff shows it as it is.
fn escaped(line: &str) -> String {
    let line = line
        .replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('"', "\\(dq")
        .replace('\'', "\\(aq");
    match line.starts_with('.') {
        true => format!("\\&{line}"),
        false => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_become_entries_and_tables_sections() {
        let file = "# About it.\n\n# Where.\n#listen = \"a\"\n\n# Of tables.\n#[t]\n\n# Two.\n#a = 1\n#b = 2\n";
        let page = page(file).expect("a page");
        assert!(
            page.contains(".SH DESCRIPTION\nAbout it.\n.SH KEYS\n"),
            "{page}"
        );
        assert!(
            page.contains(".TP\n.B listen = \\(dqa\\(dq\nWhere.\n.SS [t]\nOf tables.\n"),
            "{page}"
        );
        assert!(
            page.contains(".TP\n.B a = 1\n.TQ\n.B b = 2\nTwo.\n"),
            "{page}"
        );
    }

    #[test]
    fn a_key_without_a_word_is_refused() {
        assert!(super::page("# x\n\n#a = 1\n").is_err());
        assert!(super::page("# x\n\n# text\na = 1\n").is_err());
    }

    #[test]
    fn lines_cannot_be_taken_for_requests() {
        assert_eq!(escaped(".so 'x' a-b \\n"), "\\&.so \\(aqx\\(aq a\\-b \\en");
    }
}
