//! Which ways of saving bytes are on.

use std::fmt;
use std::str::FromStr;

/// The techniques of a session. What is off costs bytes, never correctness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Techniques {
    /// Pages of one repeated byte are sent as that byte. (Zero records, which QEMU writes
    /// itself, always collapse.)
    pub uniform: bool,
    /// Pages the gang has sent before are sent as references.
    pub page: bool,
    /// What is left is compressed with zstd.
    pub zstd: bool,
}

impl Techniques {
    /// Everything there is.
    pub const ALL: Self = Self {
        uniform: true,
        page: true,
        zstd: true,
    };
    /// A plain relay.
    pub const NONE: Self = Self {
        uniform: false,
        page: false,
        zstd: false,
    };
}

impl Default for Techniques {
    fn default() -> Self {
        Self::ALL
    }
}

/// A technique list that names something unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown technique `{0}`; known are uniform, page, zstd, or all, or none")]
pub struct UnknownTechnique(String);

impl FromStr for Techniques {
    type Err = UnknownTechnique;

    /// `all`, `none`, or a comma list.
    fn from_str(list: &str) -> Result<Self, Self::Err> {
        match list.trim() {
            "all" => return Ok(Self::ALL),
            "none" => return Ok(Self::NONE),
            _ => {}
        }
        let mut techniques = Self::NONE;
        for name in list.split(',') {
            match name.trim() {
                "uniform" => techniques.uniform = true,
                "page" => techniques.page = true,
                "zstd" => techniques.zstd = true,
                other => return Err(UnknownTechnique(other.to_owned())),
            }
        }
        Ok(techniques)
    }
}

impl fmt::Display for Techniques {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = [
            (self.uniform, "uniform"),
            (self.page, "page"),
            (self.zstd, "zstd"),
        ]
        .into_iter()
        .filter_map(|(on, name)| on.then_some(name))
        .collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_read_back() {
        for text in ["none", "uniform", "page,zstd", "uniform,page,zstd"] {
            assert_eq!(text.parse::<Techniques>().unwrap().to_string(), text);
        }
        assert_eq!("all".parse(), Ok(Techniques::ALL));
        assert!("page,magic".parse::<Techniques>().is_err());
        assert!("".parse::<Techniques>().is_err());
    }
}
