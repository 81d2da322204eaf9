//! Which ways of saving bytes are on.

use std::fmt;
use std::str::FromStr;

use vmgang_dedup::{BlockSize, SimilarityParameters};

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

/// Half pages: smaller blocks find little more (HPDC 2011, section 3.8).
const SUB_PAGE_DEFAULT: BlockSize = BlockSize::B2048;

/// The techniques of a session. What is off costs bytes, never correctness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Techniques {
    /// Pages of one repeated byte are sent as that byte. (Zero records, which QEMU writes
    /// itself, always collapse.)
    pub uniform: bool,
    /// Pages the gang has sent before are sent as references.
    pub page: bool,
    /// So are pages that were written to since they were sent first; otherwise these go in
    /// full. This and what follows needs `page`.
    pub rehash: bool,
    /// Pages that differ little from what they were when last sent are sent as that difference.
    pub delta: bool,
    /// So are those that differ little from a similar page.
    pub similar: Option<SimilarityParameters>,
    /// Pages that have blocks in common with one in the window are sent as their other blocks.
    pub sub_page: Option<BlockSize>,
    pub zstd: Zstd,
}

impl Techniques {
    /// What paid, at every link rate (`docs/decisions/0010`): blocks are left to those who have
    /// measured that their guests have them.
    pub const DEFAULT: Self = Self {
        sub_page: None,
        ..Self::ALL
    };
    /// Everything there is.
    pub const ALL: Self = Self {
        uniform: true,
        page: true,
        rehash: true,
        delta: true,
        similar: Some(SimilarityParameters::HPDC_2011),
        sub_page: Some(SUB_PAGE_DEFAULT),
        zstd: Zstd::Adaptive,
    };
    /// A plain relay.
    pub const NONE: Self = Self {
        uniform: false,
        page: false,
        rehash: false,
        delta: false,
        similar: None,
        sub_page: None,
        zstd: Zstd::Off,
    };
}

impl Techniques {
    /// Whether the source keeps the contents of the peer's window, too.
    pub(crate) fn needs_window(&self) -> bool {
        self.page && (self.delta || self.similar.is_some() || self.sub_page.is_some())
    }
}

impl Default for Techniques {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A technique list that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TechniqueError {
    #[error(
        "unknown technique `{0}`; known are uniform, page, rehash, delta, similar (or similar=K:S:C), sub-page (or sub-page=512, 1024 or 2048), zstd (adaptive) or one of zstd-quick, zstd-frame, zstd-long, zstd-hard; or default, all, or none"
    )]
    Unknown(String),
    #[error("technique `{0}` needs `page` beside it")]
    NeedsPage(&'static str),
}

impl FromStr for Techniques {
    type Err = TechniqueError;

    /// `default`, `all`, `none`, or a comma list.
    fn from_str(list: &str) -> Result<Self, Self::Err> {
        match list.trim() {
            "default" => return Ok(Self::DEFAULT),
            "all" => return Ok(Self::ALL),
            "none" => return Ok(Self::NONE),
            _ => {}
        }
        let mut techniques = Self::NONE;
        for name in list.split(',') {
            let name = name.trim();
            techniques
                .add(name)
                .ok_or_else(|| TechniqueError::Unknown(name.to_owned()))?;
        }
        let needy = [
            (techniques.rehash, "rehash"),
            (techniques.delta, "delta"),
            (techniques.similar.is_some(), "similar"),
            (techniques.sub_page.is_some(), "sub-page"),
        ];
        match needy.iter().find(|(on, _)| *on && !techniques.page) {
            Some((_, name)) => Err(TechniqueError::NeedsPage(name)),
            None => Ok(techniques),
        }
    }
}

impl Techniques {
    fn add(&mut self, name: &str) -> Option<()> {
        let (name, parameter) = match name.split_once('=') {
            Some((name, parameter)) => (name, Some(parameter)),
            None => (name, None),
        };
        match (name, parameter) {
            ("uniform", None) => self.uniform = true,
            ("page", None) => self.page = true,
            ("rehash", None) => self.rehash = true,
            ("delta", None) => self.delta = true,
            ("similar", None) => self.similar = Self::ALL.similar,
            ("similar", Some(text)) => self.similar = Some(similarity(text)?),
            ("sub-page", None) => self.sub_page = Self::ALL.sub_page,
            ("sub-page", Some(text)) => {
                self.sub_page = Some(BlockSize::of_bytes(text.parse().ok()?)?);
            }
            (name, None) => {
                let (_, zstd) = Zstd::NAMES.iter().find(|(known, _)| *known == name)?;
                self.zstd = *zstd;
            }
            _ => return None,
        }
        Some(())
    }
}

/// k:s:c.
fn similarity(text: &str) -> Option<SimilarityParameters> {
    let mut numbers = text.split(':').map(|number| number.parse().ok());
    let parameters =
        SimilarityParameters::new(numbers.next()??, numbers.next()??, numbers.next()??)?;
    numbers.next().is_none().then_some(parameters)
}

impl fmt::Display for Techniques {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<String> = [
            (self.uniform, "uniform"),
            (self.page, "page"),
            (self.rehash, "rehash"),
            (self.delta, "delta"),
        ]
        .into_iter()
        .filter(|(on, _)| *on)
        .map(|(_, name)| name.to_owned())
        .collect();
        if let Some(parameters) = self.similar {
            let (k, s) = (parameters.signatures(), parameters.samples());
            names.push(format!("similar={k}:{s}:{}", parameters.candidates()));
        }
        if let Some(size) = self.sub_page {
            names.push(format!("sub-page={}", size.bytes()));
        }
        if let Some((name, _)) = Zstd::NAMES.iter().find(|(_, zstd)| *zstd == self.zstd) {
            names.push((*name).to_owned());
        }
        if names.is_empty() {
            return f.write_str("none");
        }
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
            "page,rehash,delta,similar=2:1:1,sub-page=512,zstd",
        ] {
            assert_eq!(text.parse::<Techniques>().unwrap().to_string(), text);
        }
        assert_eq!("all".parse(), Ok(Techniques::ALL));
        assert_eq!("default".parse(), Ok(Techniques::default()));
        assert_eq!(
            "uniform,page,rehash,delta,similar,zstd".parse(),
            Ok(Techniques::DEFAULT)
        );
        assert!("page,magic".parse::<Techniques>().is_err());
        let all = Techniques::ALL.to_string();
        assert_eq!(all.parse(), Ok(Techniques::ALL));
        assert_eq!(
            "uniform,page,rehash,delta,similar,sub-page,zstd".parse(),
            Ok(Techniques::ALL)
        );
        for wrong in [
            "",
            "page=1",
            "page,similar=0:1:1",
            "page,similar=1:1",
            "page,similar=1:1:1:1",
            "page,sub-page=4096",
            "zstd=3",
        ] {
            assert!(
                matches!(wrong.parse::<Techniques>(), Err(TechniqueError::Unknown(_))),
                "{wrong}"
            );
        }
        assert_eq!(
            "zstd,delta".parse::<Techniques>(),
            Err(TechniqueError::NeedsPage("delta"))
        );
    }
}
