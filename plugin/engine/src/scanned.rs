//! What is known of the members' pages before they are sent: their snapshots, and the census of
//! these.
//!
//! Must not: be believed: guests go on writing. A page is what it was while its fingerprint is.

use std::sync::Arc;

use vmgang_dedup::{Census, Fingerprinter, Member, PageDigest, Snapshot};

use crate::PageKey;

/// Scans of a job's members, made with one page key; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Scanned {
    key_id: u64,
    /// By member; `None` for one that was not scanned.
    snapshots: Arc<[Option<Arc<Snapshot>>]>,
    /// Of all members, if all were scanned.
    census: Option<Arc<Census>>,
    fingerprinter: Option<Fingerprinter>,
}

impl Scanned {
    /// Snapshots by member. Takes time in proportion to their pages.
    pub fn new(key: &PageKey, snapshots: Vec<Option<Arc<Snapshot>>>) -> Self {
        let all: Option<Vec<&Snapshot>> = snapshots.iter().map(Option::as_deref).collect();
        Self {
            key_id: key.id(),
            census: all.map(|all| Arc::new(Census::of(&all))),
            snapshots: snapshots.into(),
            fingerprinter: Some(key.fingerprinter()),
        }
    }

    /// Their contents, if all members were scanned.
    pub fn census(&self) -> Option<&Arc<Census>> {
        self.census.as_ref()
    }

    /// By member.
    pub fn snapshots(&self) -> &[Option<Arc<Snapshot>>] {
        &self.snapshots
    }

    /// The same, or nothing if digests of this key mean nothing there.
    pub(crate) fn with_key(self, key: &PageKey) -> Self {
        match self.key_id == key.id() {
            true => self,
            false => Self::default(),
        }
    }

    pub(crate) fn of(&self, member: Member) -> Option<ScannedPages> {
        let snapshot = self.snapshots.get(usize::from(member.0))?.clone()?;
        let fingerprinter = self.fingerprinter.clone()?;
        Some(ScannedPages {
            snapshot,
            fingerprinter,
        })
    }
}

/// One member's pages as they were scanned.
#[derive(Debug)]
pub(crate) struct ScannedPages {
    snapshot: Arc<Snapshot>,
    fingerprinter: Fingerprinter,
}

/// What a scan tells of a page at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// It is still this one.
    Same(PageDigest),
    /// It was that one, and is not any more.
    Was(PageDigest),
    Nothing,
}

impl ScannedPages {
    /// The stream does not say which RAM block a page is of. The largest one is first, and with
    /// another one's fingerprint nothing is told.
    pub(crate) fn tell(&self, page_number: u64, page: &vmgang_dedup::Page) -> Told {
        let Ok(number) = usize::try_from(page_number) else {
            return Told::Nothing;
        };
        let fingerprint = self.fingerprinter.of(page);
        let blocks = self.snapshot.blocks();
        if let Some(digest) = blocks
            .iter()
            .find_map(|block| block.known(number, fingerprint))
        {
            return Told::Same(digest);
        }
        match blocks {
            [only] => match only.state(number) {
                vmgang_dedup::PageState::Content(digest) => Told::Was(digest),
                _ => Told::Nothing,
            },
            _ => Told::Nothing,
        }
    }
}
