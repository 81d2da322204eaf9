//! What a migration of some guests would send: their pages through the encoders of a session,
//! with nobody at the other end.
//!
//! Owns: one pass over memory as it is, in the order in which pages are given. Must not: know what
//! guests write while they migrate; that comes on top.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use vmgang_dedup::{Member, PAGE_BYTES, Page, slots_in};
use vmgang_wire::payload::Place;

use crate::buffers::Buffers;
use crate::chunk::{Chunk, Piece};
use crate::compression::{Budget, Rung};
use crate::counters::Live;
use crate::encode::{ChannelEncoder, Common, Plan};
use crate::frame_digest::FrameDigest;
use crate::gate::CHUNK_BYTES;
use crate::ladder::{Ladder, Worth};
use crate::order::SessionOrder;
use crate::pool::Pool;
use crate::seal::Sealer;
use crate::{PageKey, Scanned, SessionCounters, Techniques, Zstd};

/// Stream bytes of a page record's header.
const HEADER_BYTES: usize = 8;

/// Adds up what a migration would send.
pub struct Estimator {
    order: SessionOrder,
    encoders: Vec<ChannelEncoder>,
    sealer: Sealer,
    live: Arc<Live>,
    rung: Rung,
    chunk: Chunk,
    member: usize,
}

impl Estimator {
    /// A migration of so many members, with that window.
    pub fn new(
        key: &PageKey,
        members: usize,
        window_budget_bytes: u64,
        techniques: Techniques,
    ) -> io::Result<Self> {
        let live = Arc::new(Live::new(members));
        let rung = match techniques.zstd {
            Zstd::Off => Rung::None,
            Zstd::Adaptive => Rung::Frame,
            // Without a peer there is no stream to be compressed.
            Zstd::Fixed(rung) => Sealer::rung_without_stream(rung),
        };
        let buffers = Buffers::default();
        let common = Common {
            key: key.digest_key().clone(),
            scanned: Scanned::default(),
            digest: FrameDigest::new(key.digest_key()),
            techniques,
            buffers: buffers.clone(),
            compressors: Pool::default(),
            sharing: live.sharing.clone(),
        };
        let encoder = |member| ChannelEncoder::new(1, Member(member as u16), common.clone());
        let ladder = Arc::new(Ladder::new(rung, false, 1));
        let budget = Budget::of(window_budget_bytes);
        Ok(Self {
            order: SessionOrder::new(slots_in(budget.page_window_bytes), &techniques, false),
            encoders: (0..members).map(encoder).collect(),
            sealer: Sealer::new(None, ladder, live.clone(), buffers)?,
            live,
            rung,
            chunk: Chunk::default(),
            member: 0,
        })
    }

    /// The next pages are this member's.
    pub fn member(&mut self, member: usize) -> io::Result<()> {
        self.flush()?;
        self.member = member;
        Ok(())
    }

    /// So many zero pages from that one on.
    pub fn zeros(&mut self, page_number: u64, count: usize) {
        self.chunk.pieces.push(Piece::Zeros {
            address: page_number * PAGE_BYTES as u64,
            fill: 0,
            count,
        });
    }

    /// The next page.
    pub fn page(&mut self, page_number: u64, page: &Page) -> io::Result<()> {
        if self.chunk.bytes.len() + HEADER_BYTES + PAGE_BYTES > CHUNK_BYTES {
            self.flush()?;
        }
        let chunk = &mut self.chunk;
        chunk.bytes.extend_from_slice(&[0; HEADER_BYTES]);
        chunk.pieces.push(Piece::Page {
            start: chunk.bytes.len(),
            place: Place::Record {
                address: page_number * PAGE_BYTES as u64,
            },
            known: false,
        });
        chunk.bytes.extend_from_slice(page);
        chunk.pages += 1;
        Ok(())
    }

    /// What it all comes to.
    pub fn finish(mut self) -> io::Result<SessionCounters> {
        self.flush()?;
        Ok(self.live.snapshot())
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = &mut self.chunk;
        if chunk.pieces.is_empty() {
            return Ok(());
        }
        if let Some(encoder) = self.encoders.get(self.member) {
            chunk.first_pass = true;
            encoder.identify(chunk, false);
            let ordered = encoder.order(chunk, &mut self.order);
            let plan = match self.rung {
                Rung::None => Plan::Plain,
                rung => Plan::Compress(rung),
            };
            let worth = Worth {
                scarce: false,
                ..self.sealer.ladder().worth()
            };
            let frame = encoder.build(chunk, ordered, plan, worth);
            let sealed = self.sealer.seal(frame)?;
            self.live.wire_bytes.fetch_add(sealed.len() as u64, Relaxed);
            self.sealer.written(sealed);
        }
        let bytes = std::mem::take(&mut self.chunk.bytes);
        self.chunk = Chunk {
            bytes,
            ..Chunk::default()
        };
        self.chunk.bytes.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(content: u16) -> Page {
        let mut state = u64::from(content) | 1 << 40;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (state >> 56) as u8
        })
    }

    #[test]
    fn what_members_share_is_sent_once() {
        let key = PageKey::of_authorities::<&[u8]>(&[]);
        let mut estimator = Estimator::new(&key, 2, 64 << 20, Techniques::DEFAULT).unwrap();
        for member in 0..2 {
            estimator.member(member).unwrap();
            estimator.zeros(0, 1000);
            for number in 0..200 {
                let content = if number < 100 {
                    number
                } else {
                    number + 1000 * (member as u16 + 1)
                };
                estimator
                    .page(1000 + u64::from(number), &page(content))
                    .unwrap();
            }
            estimator.page(2000, &[7; PAGE_BYTES]).unwrap();
        }
        let counters = estimator.finish().unwrap();
        let pages = 4104;
        assert_eq!(counters.qemu_stream_bytes, 2 * (1000 * 9 + 201 * pages));
        let saved = counters.saved;
        assert_eq!(
            saved.total(),
            (counters.qemu_stream_bytes - counters.wire_bytes) as i64
        );
        assert!(
            saved.cross_vm > 100 * 4000 && saved.cross_vm < 100 * 4104,
            "{saved:?}"
        );
        assert!(saved.uniform > 8000 && saved.zero > 17_000, "{saved:?}");
        let sent = 300 * 4096;
        assert!(
            counters.wire_bytes > sent && counters.wire_bytes < sent + 20_000,
            "{counters:?}"
        );
    }
}
