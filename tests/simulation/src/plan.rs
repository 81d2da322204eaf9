//! What happens in one run, drawn from its seed: the hosts, the guests, the network, the request,
//! and what goes wrong when.

use crate::pipe::{Fault, Shape, Trouble};
use crate::random::Random;

/// All of one run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub guests: Vec<GuestPlan>,
    pub link: Shape,
    pub socket_bytes: usize,
    /// TCP connections of a session: at most so many on either host.
    pub connections: (u64, u64),
    pub threads: usize,
    /// Work is done up to so many milliseconds later; 0 is at once.
    pub work_ms: u64,
    pub available: (u64, u64),
    pub timeout_s: Option<u64>,
    pub bandwidth_mib_s: u64,
    pub continue_on_failure: bool,
    pub techniques: &'static str,
    pub abort_ms: u64,
    pub link_faults: Vec<LinkFault>,
    pub faults: Vec<(When, Event)>,
    /// The libvirts lose each other when this guest runs at the destination and nobody at the source
    /// knows yet.
    pub verdict_lost: Option<usize>,
}

/// One guest, and its QEMUs.
#[derive(Debug, Clone)]
pub struct GuestPlan {
    pub pages: usize,
    /// Percent of pages: zero, of one byte, shared with the other guests, similar to shared ones.
    pub mix: [u64; 4],
    pub dirty_passes: u64,
    pub dirty_pages: u64,
    pub part_pages: usize,
    pub part_ms: u64,
    pub pass_ms: u64,
    pub ack_ms: u64,
    /// The destination QEMU reads so many bytes a millisecond.
    pub load_bytes_per_ms: u64,
    pub device_bytes: usize,
    pub device_ms: u64,
    pub seed: u64,
}

/// Something that goes wrong with the connections between the two daemons.
#[derive(Debug, Clone, Copy)]
pub struct LinkFault {
    /// In the order in which they were opened.
    pub connection: usize,
    pub to_destination: bool,
    pub fault: Fault,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Right after so many lines of the trace.
    Step(u64),
    Ms(u64),
}

/// What happens at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    KillSourceDaemon,
    KillDestinationDaemon,
    StopSourceDaemon,
    StopDestinationDaemon,
    SourceQemuDies(usize),
    DestinationQemuDies(usize),
    /// It reads nothing for so many milliseconds.
    DestinationQemuStops(usize, u64),
    ResetConnection(usize),
    Abort,
}

/// What the faults of a run may lead to.
impl Plan {
    pub fn corrupts(&self) -> bool {
        let flips = |fault: &LinkFault| matches!(fault.fault.trouble, Trouble::Flip(_));
        self.link_faults.iter().any(flips)
    }

    /// Nothing stands in the way of a migration.
    pub fn is_clean(&self) -> bool {
        self.link_faults.is_empty()
            && self.verdict_lost.is_none()
            && self.timeout_s.is_none()
            && self
                .faults
                .iter()
                .all(|(_, event)| matches!(event, Event::DestinationQemuStops(..)))
    }

    pub fn new(seed: u64) -> Plan {
        let mut random = Random::new(seed);
        let random = &mut random;
        let members = random.pick(&[1, 2, 2, 3, 3, 4]);
        let guests: Vec<GuestPlan> = (0..members).map(|_| guest(random)).collect();
        let bytes: u64 = guests.iter().map(|guest| guest.pages as u64 * 4096).sum();
        let wide = random.chance(40);
        let most = if wide { random.below(30) } else { 2 };
        let link = Shape {
            capacity: random.pick(&[4 << 10, 64 << 10, 256 << 10, 1 << 20]),
            delay_ms: (random.below(most + 1), most),
            bytes_per_ms: random.pick(&[0, 0, 500, 5_000, 50_000]),
        };
        let little = random.pick(&[1, 16, 64, 256, 1024]) << 10;
        let available = (
            random.pick(&[1 << 40, 1 << 40, bytes * 2, little * 4, 0]),
            match random.chance(10) {
                true => random.below(bytes * 3),
                false => 1 << 40,
            },
        );
        let mut plan = Plan {
            seed,
            link,
            socket_bytes: random.pick(&[4 << 10, 32 << 10, 208 << 10]),
            connections: (random.pick(&[1, 1, 2, 4]), random.pick(&[1, 2, 3, 8])),
            threads: random.pick(&[1, 2, 4, 8]),
            work_ms: random.pick(&[0, 1, 4]),
            available,
            timeout_s: random.chance(10).then(|| random.between(1, 4)),
            bandwidth_mib_s: random.pick(&[0, 0, 0, 1, 4]),
            continue_on_failure: random.chance(30),
            techniques: random.pick(&[
                "",
                "",
                "",
                "",
                "all",
                "none",
                "page,delta,zstd-hard",
                "page,sub-page,zstd-long",
            ]),
            abort_ms: random.pick(&[0, 1, 20, 300]),
            link_faults: Vec::new(),
            faults: Vec::new(),
            verdict_lost: None,
            guests,
        };
        let faults = random.pick(&[0, 1, 1, 1, 1, 2, 3]);
        for _ in 0..faults {
            plan.add_fault(random);
        }
        plan
    }

    fn add_fault(&mut self, random: &mut Random) {
        let when = match random.chance(75) {
            true => When::Step(random.scaled(9)),
            false => When::Ms(random.scaled(13)),
        };
        let member = random.below(self.guests.len() as u64) as usize;
        let event = match random.below(19) {
            0..=8 => {
                let to_destination = random.chance(60);
                let trouble = match random.below(9) {
                    0..=2 => Trouble::Flip(random.below(8) as u8),
                    3 | 4 => Trouble::Cut,
                    5 | 6 => Trouble::Truncate,
                    7 => Trouble::Stall(Some(random.scaled(15))),
                    _ => Trouble::Stall(None),
                };
                let at = random.scaled(if to_destination { 20 } else { 11 });
                return self.link_faults.push(LinkFault {
                    connection: random.pick(&[0, 0, 0, 1, 2]),
                    to_destination,
                    fault: Fault { at, trouble },
                });
            }
            9 | 10 => Event::KillSourceDaemon,
            11 | 12 => Event::KillDestinationDaemon,
            13 => match random.chance(50) {
                true => Event::StopSourceDaemon,
                false => Event::StopDestinationDaemon,
            },
            14 => Event::SourceQemuDies(member),
            15 => Event::DestinationQemuDies(member),
            16 => Event::DestinationQemuStops(member, random.scaled(14)),
            17 => match random.chance(20) {
                true => return self.verdict_lost = Some(member),
                false => Event::ResetConnection(random.below(3) as usize),
            },
            _ => Event::Abort,
        };
        self.faults.push((when, event));
    }
}

fn guest(random: &mut Random) -> GuestPlan {
    let busy = random.chance(50);
    GuestPlan {
        pages: random.between(1, 20) as usize * random.pick(&[1, 2, 8]),
        mix: [
            random.pick(&[0, 10, 40]),
            random.pick(&[0, 5]),
            random.pick(&[0, 20, 50]),
            random.pick(&[0, 10]),
        ],
        dirty_passes: if busy { random.below(12) } else { 0 },
        dirty_pages: random.between(1, 12),
        part_pages: random.between(1, 60) as usize,
        part_ms: random.scaled(5),
        pass_ms: random.between(1, 40),
        ack_ms: random.scaled(9),
        load_bytes_per_ms: random.pick(&[200, 2_000, 1 << 30, 1 << 30]),
        device_bytes: random.scaled(14) as usize,
        device_ms: random.scaled(7),
        seed: random.next(),
    }
}
