//! Which RAM blocks a QEMU was started with.
//! Pure parsing of its command line, as libvirt writes it: JSON or commas.

/// Where a block's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// In a file or memfd that QEMU has open.
    File,
    /// In QEMU's own memory.
    Private,
}

/// One RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    /// As in the migration stream, but for machine types up to 3.1, whose names say where the object
    /// is unless they are told not to.
    pub name: String,
    pub bytes: u64,
    pub kind: Kind,
}

/// The guest's RAM, in the order of the command line.
pub(crate) fn blocks(arguments: &[String]) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut memory = None;
    for pair in arguments.windows(2) {
        match pair[0].as_str() {
            "-object" => blocks.extend(backend(&pair[1])),
            "-m" => memory = memory_bytes(&pair[1]),
            _ => {}
        }
    }
    if blocks.is_empty() {
        // Without a backend QEMU makes the machine's own.
        blocks.extend(memory.map(|bytes| Block {
            name: "pc.ram".to_owned(),
            bytes,
            kind: Kind::Private,
        }));
    }
    blocks
}

fn backend(object: &str) -> Option<Block> {
    match object.starts_with('{') {
        true => json_backend(object),
        false => plain_backend(object),
    }
}

fn json_backend(object: &str) -> Option<Block> {
    let object: serde_json::Value = serde_json::from_str(object).ok()?;
    let text = |key| object.get(key).and_then(serde_json::Value::as_str);
    let flag = |key| object.get(key).and_then(serde_json::Value::as_bool);
    Some(Block {
        kind: kind(text("qom-type")?, flag("share").unwrap_or(false))?,
        name: name(
            text("id")?,
            flag("x-use-canonical-path-for-ramblock-id").unwrap_or(false),
        ),
        bytes: object.get("size")?.as_u64()?,
    })
}

fn plain_backend(object: &str) -> Option<Block> {
    let mut parts = object.split(',');
    let kind_name = parts.next()?;
    let parts: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
    let text = |key| {
        parts
            .iter()
            .find(|(name, _)| *name == key)
            .map(|part| part.1)
    };
    let flag = |key| text(key).map(|value| matches!(value, "on" | "yes" | "true"));
    Some(Block {
        kind: kind(kind_name, flag("share").unwrap_or(false))?,
        name: name(
            text("id")?,
            flag("x-use-canonical-path-for-ramblock-id").unwrap_or(false),
        ),
        bytes: size(text("size")?, 1)?,
    })
}

fn kind(qom_type: &str, share: bool) -> Option<Kind> {
    match (qom_type, share) {
        // A private mapping of a file is not what is in the file.
        ("memory-backend-memfd" | "memory-backend-file", true) => Some(Kind::File),
        ("memory-backend-memfd" | "memory-backend-file" | "memory-backend-ram", _) => {
            Some(Kind::Private)
        }
        _ => None,
    }
}

fn name(id: &str, canonical: bool) -> String {
    match canonical {
        true => format!("/objects/{id}"),
        false => id.to_owned(),
    }
}

/// The value of `-m`: `1024`, `size=1048576k,slots=2,maxmem=...`.
fn memory_bytes(value: &str) -> Option<u64> {
    let first = value.split(',').next()?;
    size(first.strip_prefix("size=").unwrap_or(first), 1 << 20)
}

fn size(text: &str, unit: u64) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => unit,
        "b" => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str]) -> Vec<(String, u64, Kind)> {
        let arguments: Vec<String> = line.iter().map(|part| (*part).to_owned()).collect();
        blocks(&arguments)
            .into_iter()
            .map(|block| (block.name, block.bytes, block.kind))
            .collect()
    }

    #[test]
    fn what_libvirt_writes() {
        let memfd = r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","x-use-canonical-path-for-ramblock-id":false,"share":true,"size":167772160}"#;
        let found = parse(&["qemu", "-m", "size=163840k", "-object", memfd, "-uuid", "x"]);
        assert_eq!(found, [("pc.ram".to_owned(), 160 << 20, Kind::File)]);
        let private = r#"{"qom-type":"memory-backend-ram","id":"ram-node0","size":1024}"#;
        let secret = r#"{"qom-type":"secret","id":"masterKey0","format":"raw"}"#;
        let found = parse(&["qemu", "-object", secret, "-object", private]);
        assert_eq!(found, [("ram-node0".to_owned(), 1024, Kind::Private)]);
        let named = r#"{"qom-type":"memory-backend-memfd","id":"r","x-use-canonical-path-for-ramblock-id":true,"share":true,"size":1}"#;
        let found = parse(&["qemu", "-object", named]);
        assert_eq!(found, [("/objects/r".to_owned(), 1, Kind::File)]);
    }

    #[test]
    fn what_people_and_older_versions_write() {
        let old = "memory-backend-file,id=ram,mem-path=/dev/hugepages,share=yes,size=2G,\
                   x-use-canonical-path-for-ramblock-id=off";
        assert_eq!(
            parse(&["-object", old]),
            [("ram".to_owned(), 2 << 30, Kind::File)]
        );
        assert_eq!(
            parse(&["-m", "512", "-smp", "1"]),
            [("pc.ram".to_owned(), 512 << 20, Kind::Private)]
        );
        assert_eq!(parse(&["-object", "{", "-m", "1x"]), []);
        assert_eq!(parse(&["-object"]), []);
    }
}
