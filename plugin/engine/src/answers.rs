//! Answering OFFERs: contents that this host has already, put into the session's window.
//!
//! Owns: the order of the answers, and the check that a copy is what was asked for.
//! Must not: believe the [`Recall`]: memory of running guests changes at any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::sync::mpsc;
use vmgang_dedup::{DigestKey, PAGE_BYTES, Page, PageDigest, PageWindow, Slot, WindowError};
use vmgang_wire::{Frame, Have, OFFERS_MAX, Offer, Offered};

use crate::connection::FrameQueue;
use crate::decode_pipeline::DecodePipeline;

/// Contents that are copied together: no more memory than this is taken for an OFFER.
const COPIED_PAGES: usize = 256;

/// Where contents may be found on this host. Calls may block.
pub trait Recall: Send + Sync {
    /// About how many there are to be found.
    fn contents(&self) -> u64;

    /// Copies what it has of these contents, each to `found` with its place in `digests`. What is
    /// not what it should be any more does no harm.
    fn find(&self, digests: &[PageDigest], found: &mut dyn FnMut(usize, &Page));

    /// Copies what will surely be asked for to `found`, each once, with the digest it should have;
    /// at most `most`.
    fn likely(&self, most: usize, found: &mut dyn FnMut(&PageDigest, &Page));
}

/// Puts what will surely be asked for into the first slots of an empty window. Returns what is
/// there, slot by slot.
pub(crate) fn announce(
    recall: &dyn Recall,
    key: &DigestKey,
    window: &mut PageWindow,
) -> Result<Vec<PageDigest>, WindowError> {
    // Something is to be left for what nobody has had.
    let most = window.slots() as usize / 8 * 7;
    let mut announced = Vec::new();
    let mut result = Ok(());
    let mut batch: (Vec<PageDigest>, Vec<u8>) = Default::default();
    let mut put = |batch: &mut (Vec<PageDigest>, Vec<u8>)| {
        let (wanted, pages) = std::mem::take(batch);
        let pages: Vec<&Page> = pages
            .chunks_exact(PAGE_BYTES)
            .filter_map(<[u8]>::first_chunk)
            .collect();
        let mut digests = Vec::with_capacity(pages.len());
        PageDigest::of_many(key, &pages, &mut digests);
        for ((page, digest), wanted) in pages.into_iter().zip(digests).zip(wanted) {
            if digest == wanted && announced.len() < most && result.is_ok() {
                result = window.define(Slot(announced.len() as u32), page);
                announced.push(digest);
            }
        }
    };
    recall.likely(most, &mut |digest, page| {
        batch.0.push(*digest);
        batch.1.extend_from_slice(page);
        if batch.0.len() == COPIED_PAGES {
            put(&mut batch);
        }
    });
    put(&mut batch);
    result.map(|()| announced)
}

/// Found contents on their way into the window.
pub(crate) struct Found {
    pub slots: Vec<Slot>,
    /// As many.
    pub pages: Vec<u8>,
}

/// The OFFERs of one session.
pub(crate) struct Answers {
    offers: mpsc::UnboundedSender<Offer>,
    unanswered: Arc<AtomicUsize>,
}

/// What answers them; to be run as a task.
pub(crate) struct Answering {
    pub recall: Option<Arc<dyn Recall>>,
    pub key: DigestKey,
    pub pipeline: Arc<DecodePipeline>,
    pub queue: FrameQueue,
    /// Told what was found in each.
    pub found: Box<dyn Fn(usize) + Send + Sync>,
    offers: mpsc::UnboundedReceiver<Offer>,
    unanswered: Arc<AtomicUsize>,
}

impl Answers {
    pub(crate) fn new(
        recall: Option<Arc<dyn Recall>>,
        key: DigestKey,
        pipeline: Arc<DecodePipeline>,
        queue: FrameQueue,
        found: Box<dyn Fn(usize) + Send + Sync>,
    ) -> (Answers, Answering) {
        let (sender, offers) = mpsc::unbounded_channel();
        let unanswered = Arc::new(AtomicUsize::new(0));
        let answers = Answers {
            offers: sender,
            unanswered: unanswered.clone(),
        };
        let answering = Answering {
            recall,
            key,
            pipeline,
            queue,
            found,
            offers,
            unanswered,
        };
        (answers, answering)
    }

    /// Takes an OFFER.
    pub(crate) fn offer(&self, offer: Offer) -> Result<(), String> {
        if self.unanswered.fetch_add(1, Relaxed) >= OFFERS_MAX {
            return Err("the source makes too many offers at once".to_owned());
        }
        let _ = self.offers.send(offer);
        Ok(())
    }
}

impl Answering {
    /// Answers until the session ends. An error ends it.
    pub(crate) async fn run(mut self) -> Result<(), String> {
        while let Some(offer) = self.offers.recv().await {
            let mut contents = Vec::with_capacity(offer.contents.len());
            for some in offer.contents.chunks(COPIED_PAGES) {
                let has = self.answer(some).await?;
                contents.extend(has);
            }
            (self.found)(contents.iter().filter(|has| **has).count());
            // Before the source can send the next one.
            self.unanswered.fetch_sub(1, Relaxed);
            self.queue.send(&Frame::Have(Have { contents }));
        }
        Ok(())
    }

    async fn answer(&self, offered: &[Offered]) -> Result<Vec<bool>, String> {
        let mut has = vec![false; offered.len()];
        let Some(recall) = self.recall.clone() else {
            return Ok(has);
        };
        let (offered, key) = (offered.to_vec(), self.key.clone());
        let looked = self
            .pipeline
            .workers()
            .blocking(move || look(&*recall, &key, &offered));
        let (found, places) = looked
            .await
            .map_err(|_| "looking for offered contents failed; see the log".to_owned())?;
        if !places.is_empty() {
            self.pipeline.fill(found).await?;
        }
        for place in places {
            has[place] = true;
        }
        Ok(has)
    }
}

/// Copies what is there of the offered contents, and keeps the copies that are what they should
/// be; also returns their places among the offered.
fn look(recall: &dyn Recall, key: &DigestKey, offered: &[Offered]) -> (Found, Vec<usize>) {
    let digests: Vec<PageDigest> = offered.iter().map(|one| PageDigest(one.digest)).collect();
    let mut pages = Vec::new();
    let mut places = Vec::new();
    recall.find(&digests, &mut |place, page| {
        if place < digests.len() && places.len() < digests.len() {
            places.push(place);
            pages.extend_from_slice(page);
        }
    });
    let copies: Vec<&Page> = pages
        .chunks_exact(PAGE_BYTES)
        .filter_map(<[u8]>::first_chunk)
        .collect();
    let mut found = Vec::with_capacity(copies.len());
    PageDigest::of_many(key, &copies, &mut found);
    let mut kept = Found {
        slots: Vec::new(),
        pages: Vec::with_capacity(pages.len()),
    };
    let mut right = Vec::new();
    for ((place, copy), digest) in places.into_iter().zip(copies).zip(found) {
        if digest == digests[place] && !right.contains(&place) {
            right.push(place);
            kept.slots.push(Slot(offered[place].slot));
            kept.pages.extend_from_slice(copy);
        }
    }
    (kept, right)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: DigestKey = DigestKey([1; 32]);

    fn page(content: u8) -> Page {
        let mut page = [content; PAGE_BYTES];
        page[0] = 0xff;
        page
    }

    /// Says it has everything, and gives another page for some.
    struct Liar;

    impl Recall for Liar {
        fn contents(&self) -> u64 {
            1
        }

        fn find(&self, digests: &[PageDigest], found: &mut dyn FnMut(usize, &Page)) {
            for place in 0..digests.len() + 3 {
                let content = if place % 2 == 0 { place as u8 } else { 200 };
                found(place, &page(content));
                found(place, &page(content));
            }
        }

        fn likely(&self, most: usize, found: &mut dyn FnMut(&PageDigest, &Page)) {
            for content in 0..most as u8 + 9 {
                let digest = PageDigest::of(&KEY, &page(content));
                found(&digest, &page(content | 1));
            }
        }
    }

    #[test]
    fn only_what_is_right_is_announced_and_no_more_than_fits() {
        let mut window = PageWindow::new(16);
        let announced = announce(&Liar, &KEY, &mut window).expect("memory");
        // Every other one is another page.
        let right: Vec<u8> = (0..23).filter(|content| content % 2 == 1).collect();
        assert_eq!(announced.len(), right.len());
        for (slot, content) in right.into_iter().enumerate() {
            assert_eq!(window.get(Slot(slot as u32)), Ok(&page(content)));
            assert_eq!(announced[slot], PageDigest::of(&KEY, &page(content)));
        }
        let mut small = PageWindow::new(8);
        assert_eq!(announce(&Liar, &KEY, &mut small).expect("memory").len(), 7);
    }

    #[test]
    fn only_what_is_right_is_kept() {
        let offered: Vec<Offered> = (0..6)
            .map(|content| Offered {
                slot: 10 + u32::from(content),
                digest: PageDigest::of(&KEY, &page(content)).0,
            })
            .collect();
        let (found, places) = look(&Liar, &KEY, &offered);
        assert_eq!(places, [0, 2]);
        assert_eq!(found.slots, [Slot(10), Slot(12)]);
        assert_eq!(found.pages, [page(0), page(2)].concat());
    }
}
