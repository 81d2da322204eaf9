//! The passes of one member over its dirty pages, timed: what tells whether it converges.
//!
//! Owns: where a pass ends and how long it took. Must not: judge it.

use std::time::Duration;

use tokio::time::Instant;

use vmgang_stream::{PAGE_BYTES, Progress};

/// What a look at the stream has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    Nothing,
    /// So many pages of the first pass were sent, of so many.
    FirstPass {
        pages: u64,
        of: u64,
    },
    /// A pass after the first has ended.
    Passed {
        sent_bytes: u64,
        took: Duration,
    },
}

/// The passes of one stream.
#[derive(Debug, Default)]
pub(crate) struct Passes {
    seen: u64,
    /// The end of the last one that was seen.
    ended: Option<Instant>,
    /// Pages that other connections had had by then.
    elsewhere: u64,
}

impl Passes {
    /// Pages that other connections have had since the end of the last pass that was seen.
    pub(crate) fn since(&self, elsewhere: u64) -> u64 {
        elsewhere.saturating_sub(self.elsewhere)
    }

    /// Looks at what has been read by now; `elsewhere`: pages that other connections of the member
    /// have had. Of several passes that have ended since the last look only the last one is told.
    pub(crate) fn look(&mut self, progress: &Progress, elsewhere: u64, now: Instant) -> Seen {
        let passes = progress.passes();
        if passes == 0 {
            if progress.first_pass_done() || progress.total_bytes() == 0 {
                return Seen::Nothing;
            }
            return Seen::FirstPass {
                pages: progress.zero_records() + progress.page_records() + elsewhere,
                of: progress.total_bytes() / PAGE_BYTES as u64,
            };
        }
        if passes == self.seen {
            return Seen::Nothing;
        }
        self.seen = passes;
        let before = self.ended.replace(now);
        let elsewhere_before = std::mem::replace(&mut self.elsewhere, elsewhere);
        if passes == 1 {
            return Seen::Nothing;
        }
        Seen::Passed {
            sent_bytes: (progress.last_pass_pages() + elsewhere.saturating_sub(elsewhere_before))
                * PAGE_BYTES as u64,
            took: before.map_or(Duration::ZERO, |before| {
                now.saturating_duration_since(before)
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmgang_stream::Tokenizer;
    use vmgang_stream::synthetic::StreamBuilder;

    use super::*;

    #[test]
    fn each_pass_is_told_with_what_it_sent() {
        let start = Instant::now();
        let mut tokenizer = Tokenizer::new();
        let mut passes = Passes::default();
        let mut seconds = 0;
        let mut look = |builder: &StreamBuilder, from: usize| {
            tokenizer.push(&builder.bytes()[from..], true, |_| {});
            seconds += 1;
            let now = start + Duration::from_secs(seconds);
            (
                passes.look(tokenizer.progress(), 0, now),
                builder.bytes().len(),
            )
        };
        let page = [1; PAGE_BYTES];
        let passed = |pages: u64, seconds| Seen::Passed {
            sent_bytes: pages * PAGE_BYTES as u64,
            took: Duration::from_secs(seconds),
        };
        let mut builder = StreamBuilder::new(8 * PAGE_BYTES as u64);
        builder.begin_part();
        for number in 0..6 {
            builder.page(number * PAGE_BYTES as u64, &page);
        }
        builder.end_ram_section();
        let (seen, at) = look(&builder, 0);
        // The builder announces 32 pages of firmware, too.
        let of = 8 + 32;
        assert_eq!(seen, Seen::FirstPass { pages: 6, of });
        // The second pass begins with page 1.
        builder.begin_part();
        for number in [6, 7, 1, 2] {
            builder.page(number * PAGE_BYTES as u64, &page);
        }
        builder.end_ram_section();
        let (seen, at) = look(&builder, at);
        assert_eq!(seen, Seen::Nothing, "the first one has ended");
        builder.begin_part().page(0, &page).end_ram_section();
        let (seen, at) = look(&builder, at);
        assert_eq!(seen, passed(2, 1));
        builder.begin_part().end_ram_section();
        let (seen, at) = look(&builder, at);
        assert_eq!(seen, passed(0, 1), "and nothing was written to since");
        builder.begin_part().end_ram_section();
        let (seen, at) = look(&builder, at);
        assert_eq!(seen, Seen::Nothing, "still nothing");
        builder.begin_part().page(0, &page).end_ram_section();
        builder.begin_part().end_ram_section();
        let (seen, _) = look(&builder, at);
        assert_eq!(seen, passed(0, 2));
    }
}
