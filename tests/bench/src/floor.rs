//! The floor: what the contents of a gang come to when everything is known in advance and time
//! does not matter.
//!
//! Every distinct page over all members once, in order of appearance, through one zstd stream: like
//! `zstd -19 --long` for the floor itself, and at low levels for what a migration in a hurry could
//! come to. Not counted: zero records, headers, device state, and which page goes where; no
//! migration gets quite there.
//! Must not: use the engine's own encoder.

use std::collections::HashSet;
use std::fmt;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vmgang_stream::{Token, Tokenizer};
use zstd::stream::raw::CParameter;

use crate::streams::StreamSet;

/// What `zstd --long` uses: 128 MiB.
const WINDOW_LOG: u32 = 27;

/// How the distinct pages are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Method {
    pub level: i32,
    /// Long-range matching over 128 MiB; otherwise the window of the level.
    pub long: bool,
}

impl Method {
    /// The floor.
    pub const FLOOR: Method = Method {
        level: 19,
        long: true,
    };
    /// What the floor is seen beside.
    pub const QUICK: [Method; 3] = [
        Method {
            level: 3,
            long: true,
        },
        Method {
            level: 1,
            long: true,
        },
        Method {
            level: 1,
            long: false,
        },
    ];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "zstd -{}", self.level)?;
        if self.long {
            write!(f, " --long={WINDOW_LOG}")?;
        }
        Ok(())
    }
}
/// The file beside a recorded set that keeps what was found out about it.
const CACHE: &str = "floor.json";

/// The floor of one set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// Of the set it belongs to.
    pub digest: String,
    pub method: Method,
    pub page_records: u64,
    pub distinct_pages: u64,
    pub bytes: u64,
    /// What finding it took.
    pub seconds: f64,
}

impl Floor {
    /// Reads what is kept beside a recorded set, or computes it and keeps it there.
    pub fn of(set: &StreamSet, method: Method) -> Result<Self> {
        let cache = set.dir.as_deref().map(|dir| dir.join(CACHE));
        let digest = set.digest();
        // Those of a set that is no longer there are forgotten.
        let known = || {
            let mut known = cache.as_deref().and_then(load).unwrap_or_default();
            known.retain(|floor| floor.digest == digest);
            known
        };
        if let Some(floor) = known().iter().find(|floor| floor.method == method) {
            return Ok(floor.clone());
        }
        let floor = compute(set, &digest, method)?;
        if let Some(path) = &cache {
            // Read again: it took minutes, and others may have added theirs.
            let mut known = known();
            known.push(floor.clone());
            std::fs::write(path, serde_json::to_vec_pretty(&known)?)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(floor)
    }
}

fn load(path: &Path) -> Option<Vec<Floor>> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Counts what is written to it.
struct Counting(u64);

impl Write for Counting {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn compute(set: &StreamSet, digest: &str, method: Method) -> Result<Floor> {
    let start = Instant::now();
    let mut encoder = zstd::Encoder::new(Counting(0), method.level)?;
    if method.long {
        encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
    }
    let mut seen = HashSet::new();
    let mut page_records = 0;
    for member in &set.members {
        let mut written = Ok(());
        Tokenizer::new().push(&member.bytes, true, |token| {
            let (Token::Page { body, .. } | Token::Body(body)) = token else {
                return;
            };
            page_records += 1;
            if seen.insert(*blake3::hash(body).as_bytes()) && written.is_ok() {
                written = encoder.write_all(body);
            }
        });
        written.context("compressing for the floor failed")?;
    }
    let bytes = encoder.finish()?.0;
    Ok(Floor {
        digest: digest.to_owned(),
        method,
        page_records,
        distinct_pages: seen.len() as u64,
        bytes,
        seconds: start.elapsed().as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::Kind;

    const QUICK: Method = Method {
        level: 1,
        long: true,
    };

    #[test]
    fn counts_a_content_once_however_often_it_comes() {
        let once = StreamSet::synthetic(Kind::Mixed, 1, 4);
        let mut twice = StreamSet::synthetic(Kind::Mixed, 1, 4);
        twice
            .members
            .extend(StreamSet::synthetic(Kind::Mixed, 1, 4).members);
        let (once, twice) = (
            Floor::of(&once, QUICK).expect("a floor"),
            Floor::of(&twice, QUICK).expect("a floor"),
        );
        assert_eq!(once.bytes, twice.bytes);
        assert_eq!(once.distinct_pages, twice.distinct_pages);
        assert_eq!(2 * once.page_records, twice.page_records);
        assert!(once.distinct_pages < once.page_records);
        assert_ne!(once.digest, twice.digest);
    }

    #[test]
    fn is_kept_beside_the_set_until_the_set_changes() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut set = StreamSet::synthetic(Kind::Unique, 1, 1);
        set.dir = Some(dir.path().to_owned());
        let floor = Floor::of(&set, QUICK).expect("a floor");
        let other = Method {
            long: false,
            ..QUICK
        };
        assert_eq!(Floor::of(&set, other).expect("another").method, other);
        // Kept with what finding it took, which no second search would repeat exactly.
        assert_eq!(Floor::of(&set, QUICK).expect("kept"), floor);
        let other = StreamSet::synthetic(Kind::Mixed, 1, 1);
        set.members = other.members;
        assert_ne!(Floor::of(&set, QUICK).expect("new").digest, floor.digest);
    }
}
