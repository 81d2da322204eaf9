//! Which ways of saving bytes are on.

use std::fmt;
use std::str::FromStr;

use crate::compression::Rung;

/// What becomes of bytes that nothing else has saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zstd {
    /// They are sent as they are.
    Off,
    /// They are compressed as hard as link and processor make worthwhile, by measurement.
    Adaptive,
    /// They are compressed in one way, whatever it costs.
    Fixed(Rung),
}

impl Zstd {
    /// Technique names.
    const NAMES: [(&'static str, Zstd); 5] = [
        ("zstd", Zstd::Adaptive),
        ("zstd-quick", Zstd::Fixed(Rung::Quick)),
        ("zstd-frame", Zstd::Fixed(Rung::Frame)),
        ("zstd-long", Zstd::Fixed(Rung::Long)),
        ("zstd-hard", Zstd::Fixed(Rung::Hard)),
    ];
}

/// The techniques of a session. What is off costs bytes, never correctness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Techniques {
    /// Pages of one repeated byte are sent as that byte. (Zero records, which QEMU writes
    /// itself, always collapse.)
    pub uniform: bool,
    /// Pages the gang has sent before are sent as references.
    pub page: bool,
    pub zstd: Zstd,
}

impl Techniques {
    /// Everything there is.
    pub const ALL: Self = Self {
        uniform: true,
        page: true,
        zstd: Zstd::Adaptive,
    };
    /// A plain relay.
    pub const NONE: Self = Self {
        uniform: false,
        page: false,
        zstd: Zstd::Off,
    };
}

impl Default for Techniques {
    fn default() -> Self {
        Self::ALL
    }
}

/// A technique list that names something unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown technique `{0}`; known are uniform, page, zstd (adaptive) or one of zstd-quick, zstd-frame, zstd-long, zstd-hard; or all, or none"
)]
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
                other => match Zstd::NAMES.iter().find(|(name, _)| *name == other) {
                    Some((_, zstd)) => techniques.zstd = *zstd,
                    None => return Err(UnknownTechnique(other.to_owned())),
                },
            }
        }
        Ok(techniques)
    }
}

impl fmt::Display for Techniques {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zstd = Zstd::NAMES.iter().find(|(_, zstd)| *zstd == self.zstd);
        let names: Vec<_> = [(self.uniform, "uniform"), (self.page, "page")]
            .into_iter()
            .filter_map(|(on, name)| on.then_some(name))
            .chain(zstd.map(|(name, _)| *name))
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
        for text in [
            "none",
            "uniform",
            "page,zstd",
            "uniform,page,zstd",
            "page,zstd-hard",
            "zstd-quick",
        ] {
            assert_eq!(text.parse::<Techniques>().unwrap().to_string(), text);
        }
        assert_eq!("all".parse(), Ok(Techniques::ALL));
        assert!("page,magic".parse::<Techniques>().is_err());
        assert!("".parse::<Techniques>().is_err());
    }
}
