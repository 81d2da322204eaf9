//! The guest's orders, read from the kernel command line: what to fill memory with, how fast to
//! dirty it and how fast to check it. Parsing only.

use crate::page::{Kind, mix};

/// What the guest was told to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// The name used in every report.
    pub id: String,
    /// What is this guest's own.
    pub seed: u64,
    /// What this guest shares with every guest of the same group seed.
    pub group: u64,
    pub fill: Fill,
    /// Pages rewritten per second.
    pub dirty_pages_per_second: u64,
    /// How many pages are rewritten again and again; 0 is all of them.
    pub hot_pages: u64,
    /// Milliseconds between two stamps on the console, by which others see it run; 0 is none.
    pub stamp_ms: u64,
    /// Pages checked per second.
    pub verify_pages_per_second: u64,
    /// After the first complete check: long sleeps and a slow check only.
    pub idle: bool,
    /// Milliseconds between two reports.
    pub report_ms: u64,
    /// Load the kernel's modules first: the driver of a memory balloon.
    pub modules: bool,
    /// The share of the guest's memory that is written to and freed before anything else.
    pub freed_percent: u64,
    /// The share of the guest's memory that is managed.
    pub memory_percent: u64,
}

/// The shares of the page kinds in percent; what is missing to a hundred is `unique`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fill {
    /// Kinds with the upper end of their range in `0..100`.
    ranges: Vec<(Kind, u64)>,
}

/// Pages checked per second where the recipe says nothing.
const VERIFY_PAGES_PER_SECOND: u64 = 4000;
/// The same for an idle guest after its first complete check.
const IDLE_VERIFY_PAGES_PER_SECOND: u64 = 2000;

impl Recipe {
    /// Reads every `vmgang.` word of a kernel command line.
    pub fn parse(command_line: &str) -> Result<Recipe, String> {
        let mut recipe = Recipe {
            id: "guest".to_owned(),
            seed: 1,
            group: 1,
            fill: Fill::default(),
            dirty_pages_per_second: 0,
            hot_pages: 0,
            stamp_ms: 0,
            verify_pages_per_second: 0,
            idle: false,
            report_ms: 1000,
            modules: false,
            freed_percent: 0,
            memory_percent: 75,
        };
        for word in command_line.split_whitespace() {
            let Some(option) = word.strip_prefix("vmgang.") else {
                continue;
            };
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            match key {
                "id" => recipe.id = value.to_owned(),
                "seed" => recipe.seed = number(key, value)?,
                "group" => recipe.group = number(key, value)?,
                "fill" => recipe.fill = Fill::parse(value)?,
                "dirty" => recipe.dirty_pages_per_second = number(key, value)?,
                "hot" => recipe.hot_pages = number(key, value)?,
                "stamp_ms" => recipe.stamp_ms = number(key, value)?,
                "verify" => recipe.verify_pages_per_second = number(key, value)?,
                "idle" => recipe.idle = true,
                "modules" => recipe.modules = true,
                "freed" => recipe.freed_percent = number(key, value)?.min(90),
                "report_ms" => recipe.report_ms = number(key, value)?.max(100),
                "memory" => recipe.memory_percent = number(key, value)?.clamp(1, 90),
                _ => return Err(format!("unknown option vmgang.{key}")),
            }
        }
        if recipe.verify_pages_per_second == 0 {
            recipe.verify_pages_per_second = if recipe.idle {
                IDLE_VERIFY_PAGES_PER_SECOND
            } else {
                VERIFY_PAGES_PER_SECOND
            };
        }
        Ok(recipe)
    }
}

impl Fill {
    /// Reads `kind:percent,kind:percent`.
    pub fn parse(text: &str) -> Result<Fill, String> {
        let mut ranges = Vec::new();
        let mut end = 0_u64;
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (name, percent) = part
                .split_once(':')
                .ok_or_else(|| format!("fill: {part:?} is not kind:percent"))?;
            let kind =
                Kind::from_name(name).ok_or_else(|| format!("fill: unknown kind {name:?}"))?;
            end = end.saturating_add(number(name, percent)?);
            if end > 100 {
                return Err(format!("fill: {text:?} is more than 100 percent"));
            }
            ranges.push((kind, end));
        }
        Ok(Fill { ranges })
    }

    /// The kind of one page. It depends on the index alone, so guests with the same fill have the
    /// same kind at the same index, and kinds are spread as in real memory.
    pub fn kind(&self, index: u64) -> Kind {
        let place = mix(0, index, 0) % 100;
        self.ranges
            .iter()
            .find(|(_, end)| place < *end)
            .map_or(Kind::Unique, |(kind, _)| *kind)
    }
}

impl Default for Fill {
    fn default() -> Fill {
        Fill {
            ranges: vec![
                (Kind::Zero, 20),
                (Kind::Uniform, 25),
                (Kind::Same, 65),
                (Kind::Similar, 75),
                (Kind::Compressible, 80),
                (Kind::Unique, 100),
            ],
        }
    }
}

fn number(key: &str, value: &str) -> Result<u64, String> {
    value
        .parse()
        .map_err(|_| format!("{key}: {value:?} is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own_words_and_leaves_the_kernels() {
        let recipe = Recipe::parse(
            "console=ttyS0 quiet vmgang.id=g1 vmgang.seed=9 vmgang.dirty=50 vmgang.idle \
             vmgang.fill=zero:50,same:30",
        )
        .expect("a good command line");
        assert_eq!((recipe.id.as_str(), recipe.seed), ("g1", 9));
        assert_eq!(recipe.dirty_pages_per_second, 50);
        assert!(recipe.idle);
        assert_eq!(recipe.verify_pages_per_second, IDLE_VERIFY_PAGES_PER_SECOND);
    }

    #[test]
    fn shares_are_kept() {
        let fill = Fill::parse("zero:50,same:30").expect("a good fill");
        let count = |kind| (0..100_000).filter(|i| fill.kind(*i) == kind).count();
        assert!((49_000..51_000).contains(&count(Kind::Zero)));
        assert!((29_000..31_000).contains(&count(Kind::Same)));
        assert!((19_000..21_000).contains(&count(Kind::Unique)));
    }

    #[test]
    fn the_default_fill_is_the_documented_one() {
        let text = "zero:20,uniform:5,same:40,similar:10,compressible:5,unique:20";
        assert_eq!(Fill::parse(text).expect("a good fill"), Fill::default());
    }

    #[test]
    fn refuses_nonsense_by_name() {
        for (line, word) in [
            ("vmgang.fill=zero:80,same:30", "100 percent"),
            ("vmgang.fill=blue:10", "blue"),
            ("vmgang.fill=zero", "kind:percent"),
            ("vmgang.dirty=fast", "fast"),
            ("vmgang.colour=red", "vmgang.colour"),
        ] {
            let error = Recipe::parse(line).expect_err(line);
            assert!(error.contains(word), "{error}");
        }
    }
}
