//! How long it takes to empty a host with many guests, and what that waits for: computed from what was
//! measured with a few.
//!
//! Owns: the model. An evacuation takes as long as whatever it keeps busy the longest, and a fixed time.
//! What it is fed with is made from measurements elsewhere ([`derive`]), and so is what is told about it
//! ([`check`], [`report`], [`picture`]).
//! Must not: read or write files, or know a figure without saying where it is from.

pub mod check;
pub mod derive;
mod fit;
pub mod picture;
pub mod report;
#[cfg(test)]
mod testing;

use vmgang_dedup::{PAGE_BYTES, slots_in};

use crate::contender::Contender;

/// The ways to move guests that are compared.
pub const WAYS: [Contender; 3] = [
    Contender::StockParallel,
    Contender::StockParallelZstd,
    Contender::Vmgang,
];

/// Members under way at once, as `--concurrency` has it unless said.
pub const UNDER_WAY: f64 = 12.0;
/// From a member's beginning to its first bytes, and from its last ones to its end, in which only that
/// member waits: 0.55 s and 0.35 s in docs/benchmarks.md, "Where the time goes".
pub const MEMBER_SECONDS: f64 = 0.9;
/// Under the session's lock, for a page that was sent before: found in the map 169 ns, history 56 ns
/// (docs/benchmarks.md, "The inner parts").
pub const ORDER_REPEATED_NS: f64 = 225.0;
/// The same for a new one: 251 and 56 ns, its similar ones looked up and itself put there 198 and 96 ns;
/// and copied into the window, 400 ns (assumed: 10 GB/s).
pub const ORDER_NEW_NS: f64 = 1001.0;
/// What looking up takes on the source for each slot of its window, in bytes: the map 40 at most, a
/// page's own earlier content 16, similar pages 16 (docs/operations.md, plugin/dedup).
pub const TABLES_BYTES_A_SLOT: f64 = 72.0;
/// Of GB/s of one core, where a KVM host's QEMU looks whether pages are zero. Assumed.
pub const ZERO_SCAN_GB_PER_SECOND: f64 = 10.0;

/// What QEMU costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qemu {
    /// As measured here, under software emulation.
    Measured,
    /// As QEMU's documentation has it for KVM.
    Published,
}

impl Qemu {
    pub const ALL: [Qemu; 2] = [Qemu::Published, Qemu::Measured];
}

/// Seconds of a processor for each GB of QEMU's stream, source and destination, by QEMU's
/// docs/devel/migration/qatzip-compression.rst: 54 GB over 10 Gbit/s by eight channels of multifd in
/// 46.063 s with 45 % and 85 % of a processor, and with zstd in 20.165 s with 810 % and 340 %.
pub fn published(way: Contender) -> [f64; 2] {
    let (seconds, shares) = match way {
        Contender::StockParallelZstd => (20.165, [8.10, 3.40]),
        _ => (46.063, [0.45, 0.85]),
    };
    shares.map(|share| seconds * share / 54.0)
}

/// What is moved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    pub guests: f64,
    /// Memory of each, in GiB.
    pub guest_gib: f64,
    /// What QEMU writes, and what crosses the link, in GB.
    pub stream_gb: f64,
    pub wire_gb: f64,
    /// Contents that differ, each once, in GB.
    pub distinct_gb: f64,
}

/// What that costs, by one way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// Seconds of a processor for each GB of the stream, on source and destination.
    pub vmgangd: [f64; 2],
    pub qemu: [f64; 2],
    /// Seconds of a processor of the source for each GiB of guests' memory.
    pub scan: f64,
    /// Seconds of a processor for each guest, both hosts together.
    pub libvirtd: f64,
    /// Of a job, whatever it moves.
    pub fixed_seconds: f64,
    /// How often each byte of the stream crosses the bus to memory, on the busier of the hosts.
    pub memory_traffic: f64,
    /// Threads of QEMU that a member's stream is spread over.
    pub threads: f64,
    /// Pages are looked up in the one order that a session has.
    pub is_ordered: bool,
}

/// Processors that may be used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Processors {
    /// So many on each host.
    Each(f64),
    /// So many that are both hosts' at once, as in the lab; of one of them each guest takes a share for
    /// itself.
    Shared { cores: f64, a_guest: f64 },
}

/// Where it is moved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Site {
    /// Bits per second; `None` for a link that is never the limit.
    pub link: Option<f64>,
    pub processors: Processors,
    /// GB/s of each host's memory.
    pub memory_gb: f64,
    pub under_way: f64,
}

/// What an evacuation may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Term {
    Link,
    Source,
    Destination,
    /// Of both hosts.
    Processors,
    /// The order of vmgang's session.
    Order,
    /// No more members at once.
    Members,
    Libvirt,
    Memory,
}

impl Term {
    /// How tables call it.
    pub fn title(self) -> &'static str {
        match self {
            Term::Link => "link",
            Term::Source => "source",
            Term::Destination => "destination",
            Term::Processors => "processors",
            Term::Order => "order",
            Term::Members => "members",
            Term::Libvirt => "libvirt",
            Term::Memory => "memory",
        }
    }
}

/// What comes out.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// How long each would take by itself, the longest first.
    pub terms: Vec<(Term, f64)>,
    pub fixed_seconds: f64,
    /// Processors of source and destination with which neither takes longer than the link.
    pub cores: Option<[f64; 2]>,
}

impl Prediction {
    pub fn bottleneck(&self) -> (Term, f64) {
        self.terms[0]
    }

    /// What would be waited for if there were no end of the bottleneck's.
    pub fn next(&self) -> (Term, f64) {
        self.terms[1]
    }

    pub fn seconds(&self) -> f64 {
        self.fixed_seconds + self.bottleneck().1
    }
}

/// The model.
pub fn predict(work: &Work, costs: &Costs, site: &Site) -> Prediction {
    let memory_gib = work.guests * work.guest_gib;
    let host = |host: usize| {
        (costs.vmgangd[host] + costs.qemu[host]) * work.stream_gb
            + costs.libvirtd / 2.0 * work.guests
    };
    let busy = [host(0) + costs.scan * memory_gib, host(1)];
    let link = site.link.map(|bits| work.wire_gb * 8e9 / bits);
    let mut terms: Vec<(Term, f64)> = Vec::new();
    terms.extend(link.map(|seconds| (Term::Link, seconds)));
    match site.processors {
        Processors::Each(cores) => terms.extend([
            (Term::Source, busy[0] / cores),
            (Term::Destination, busy[1] / cores),
        ]),
        Processors::Shared { cores, a_guest } => {
            // However much the guests do, the others get something.
            let left = (cores - a_guest * work.guests).max(cores / 4.0);
            terms.push((Term::Processors, (busy[0] + busy[1]) / left));
        }
    }
    if costs.is_ordered {
        let repeated_gb = (work.stream_gb - work.distinct_gb).max(0.0);
        let ns = work.distinct_gb * ORDER_NEW_NS + repeated_gb * ORDER_REPEATED_NS;
        terms.push((Term::Order, ns / PAGE_BYTES as f64));
    }
    // Each place is taken by so many members one after the other.
    let turns = work.guests / site.under_way;
    let stream = work.stream_gb / work.guests * costs.qemu[0].max(costs.qemu[1]) / costs.threads;
    terms.push((
        Term::Members,
        (turns - 1.0).max(0.0) * MEMBER_SECONDS + turns.max(1.0) * stream,
    ));
    terms.push((Term::Libvirt, work.guests * costs.libvirtd / 2.0));
    let traffic = costs.memory_traffic * work.stream_gb + memory_gib * GB_A_GIB;
    terms.push((Term::Memory, traffic / site.memory_gb));
    terms.sort_by(|one, other| other.1.total_cmp(&one.1));
    Prediction {
        terms,
        fixed_seconds: costs.fixed_seconds,
        cores: link.map(|seconds| busy.map(|busy| busy / seconds)),
    }
}

/// GB of a GiB.
pub const GB_A_GIB: f64 = (1_u64 << 30) as f64 / 1e9;

/// What vmgang keeps on each host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// All contents of the guests, each once, in GB.
    pub contents_gb: f64,
    /// What the window must hold for no content to be sent twice that members have in common.
    pub needed_gb: f64,
    /// What the rules of the window's budget allow.
    pub granted_gb: f64,
    pub source_gb: f64,
    pub destination_gb: f64,
}

impl Memory {
    pub fn is_enough(&self) -> bool {
        self.granted_gb >= self.needed_gb
    }
}

/// How large a window gets where so much is available on either host beside the guests
/// (docs/operations.md, "Configuration").
fn granted_bytes(guests_gib: f64, available_gib: f64) -> f64 {
    const STREAM_GIB: f64 = 0.125;
    let useful_gib = guests_gib + (guests_gib / 7.0).min(STREAM_GIB);
    useful_gib.min(available_gib / 4.0) * (1_u64 << 30) as f64
}

/// What `guests` of them take: contents that all have in common, and those that each has of its own, in
/// GB; and a fixed part and one for each that is under way, in bytes, beside them.
pub fn memory(
    guests: f64,
    guest_gib: f64,
    (common_gb, own_gb): (f64, f64),
    (fixed_bytes, member_bytes): (f64, f64),
    available_gib: f64,
) -> Memory {
    let under_way = guests.min(UNDER_WAY);
    let contents_gb = common_gb + own_gb * guests;
    let granted = granted_bytes(guests * guest_gib, available_gib);
    let slots = f64::from(slots_in(granted as u64));
    let window = (contents_gb * 1e9).min(slots * PAGE_BYTES as f64);
    let destination = window + fixed_bytes + member_bytes * under_way;
    Memory {
        contents_gb,
        // What nobody has in common with others is the least recently used soon.
        needed_gb: common_gb + own_gb * under_way,
        granted_gb: granted / 1e9,
        source_gb: (destination + window / PAGE_BYTES as f64 * TABLES_BYTES_A_SLOT) / 1e9,
        destination_gb: destination / 1e9,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> Work {
        Work {
            guests: 24.0,
            guest_gib: 4.0,
            stream_gb: 24.0,
            wire_gb: 3.0,
            distinct_gb: 6.0,
        }
    }

    fn costs() -> Costs {
        Costs {
            vmgangd: [1.0, 0.5],
            qemu: [0.5, 0.5],
            scan: 0.0,
            libvirtd: 0.1,
            fixed_seconds: 1.0,
            memory_traffic: 8.0,
            threads: 2.0,
            is_ordered: true,
        }
    }

    fn site(gigabits: f64, cores: f64) -> Site {
        Site {
            link: Some(gigabits * 1e9),
            processors: Processors::Each(cores),
            memory_gb: 100.0,
            under_way: UNDER_WAY,
        }
    }

    #[test]
    fn the_bottleneck_moves_from_the_link_to_processors_to_the_order_to_the_members() {
        let at = |gigabits, cores| predict(&work(), &costs(), &site(gigabits, cores));
        let slow = at(1.0, 8.0);
        assert_eq!(slow.bottleneck(), (Term::Link, 24.0));
        assert_eq!(slow.seconds(), 25.0);
        // Both hosts' processors for 24 s of it: 36 and 24 s, and half of libvirt's each.
        assert_eq!(slow.cores, Some([37.2 / 24.0, 25.2 / 24.0]));
        let (term, seconds) = at(10.0, 8.0).bottleneck();
        assert_eq!((term, seconds), (Term::Source, 37.2 / 8.0));
        // Ordering: 6 GB of new pages and 18 GB of others.
        let mut wide = site(100.0, 64.0);
        (wide.under_way, wide.memory_gb) = (24.0, 1000.0);
        let (term, seconds) = predict(&work(), &costs(), &wide).bottleneck();
        assert_eq!(term, Term::Order);
        assert!((seconds - (6.0 * 1001.0 + 18.0 * 225.0) / 4096.0).abs() < 1e-9);
        let mut small = work();
        (small.stream_gb, small.wire_gb, small.distinct_gb) = (1.0, 0.1, 0.1);
        small.guest_gib = 0.25;
        let (term, _) = predict(&small, &costs(), &site(10.0, 8.0)).bottleneck();
        assert_eq!(term, Term::Libvirt);
        let mut quick = costs();
        quick.libvirtd = 0.0;
        let (term, _) = predict(&small, &quick, &site(10.0, 8.0)).bottleneck();
        assert_eq!(term, Term::Members);
        let mut slow_memory = site(100.0, 64.0);
        slow_memory.memory_gb = 10.0;
        let (term, _) = predict(&work(), &costs(), &slow_memory).bottleneck();
        assert_eq!(term, Term::Memory);
    }

    #[test]
    fn in_the_lab_both_hosts_and_the_guests_share_processors() {
        let mut lab = site(10.0, 0.0);
        lab.processors = Processors::Shared {
            cores: 4.0,
            a_guest: 1.0 / 24.0,
        };
        let (term, seconds) = predict(&work(), &costs(), &lab).bottleneck();
        assert_eq!(term, Term::Processors);
        assert!((seconds - (37.2 + 25.2) / 3.0).abs() < 1e-9, "{seconds}");
        lab.link = None;
        assert_eq!(predict(&work(), &costs(), &lab).cores, None);
    }

    #[test]
    fn memory_is_what_is_kept_within_the_budget() {
        let of = |available| memory(100.0, 4.0, (1.0, 0.5), (1e8, 1e7), available);
        let roomy = of(1000.0);
        assert_eq!((roomy.contents_gb, roomy.needed_gb), (51.0, 7.0));
        assert!((roomy.destination_gb - 51.22).abs() < 1e-6, "{roomy:?}");
        let tables = 51.0 / 4096.0 * TABLES_BYTES_A_SLOT;
        assert!((roomy.source_gb - 51.22 - tables).abs() < 1e-6);
        assert!(roomy.is_enough() && of(40.0).is_enough());
        // A quarter of what is available.
        let tight = of(16.0);
        assert!((tight.granted_gb - 4.0 * GB_A_GIB).abs() < 1e-9 && !tight.is_enough());
        assert!((tight.destination_gb - tight.granted_gb - 0.22).abs() < 1e-3);
        // No more than the guests have, and what zstd may take.
        let all = of(1e6).granted_gb;
        assert!((all - 400.125 * GB_A_GIB).abs() < 1e-9, "{all}");
    }

    #[test]
    fn the_map_takes_no_more_than_is_said_of_it() {
        use vmgang_dedup::{DedupMap, Member, PageDigest, PageHistory};
        let slots = 100_000;
        let mut map = DedupMap::new(slots);
        for number in 0..slots {
            let mut digest = [0; 16];
            digest[..4].copy_from_slice(&number.to_le_bytes());
            digest[8..12].copy_from_slice(&number.wrapping_mul(0x9e37_79b9).to_le_bytes());
            map.judge(PageDigest(digest), Member(0));
        }
        let map_bytes = map.memory_bytes() as f64 / f64::from(slots);
        let history = PageHistory::new(u64::from(slots)).memory_bytes() as f64;
        let history_bytes = history / f64::from(slots);
        // And as much for similar pages as for the history.
        let all = map_bytes + 2.0 * history_bytes;
        assert!(
            map.len() == slots as usize && all <= TABLES_BYTES_A_SLOT * 1.05,
            "{all}"
        );
    }
}
