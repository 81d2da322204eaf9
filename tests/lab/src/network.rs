//! The lab's network: a bridge in a namespace of its own, a cable to each host, and what can be
//! done to a cable. Nothing of it is visible on the machine's own network.

use std::fs::{self, File};

use crate::error::{IoContext, LabError, Result};
use crate::host::Host;

/// The hosts' interface.
const INTERFACE: &str = "eth0";
/// Hosts are numbered from one inside this network.
const NETWORK_PREFIX: &str = "10.77.0.";
pub(crate) const HOSTS_MAX: usize = 200;

/// Packets that a host loses without anybody being told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// So many of a hundred, at random, in both directions.
    Percent(u8),
    /// All that it is sent.
    Incoming,
    /// All that it sends.
    Outgoing,
}

/// What has gone through an interface, seen from the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
}

impl Counters {
    /// What was added since an earlier reading.
    pub fn since(&self, earlier: &Counters) -> Counters {
        Counters {
            rx_bytes: self.rx_bytes.saturating_sub(earlier.rx_bytes),
            rx_packets: self.rx_packets.saturating_sub(earlier.rx_packets),
            tx_bytes: self.tx_bytes.saturating_sub(earlier.tx_bytes),
            tx_packets: self.tx_packets.saturating_sub(earlier.tx_packets),
        }
    }
}

/// The address of the host with this index.
pub(crate) fn address(index: usize) -> String {
    format!("{NETWORK_PREFIX}{}", index + 1)
}

/// Makes the bridge.
pub(crate) fn start_switch(switch: &Host) -> Result<()> {
    ip(switch, "link set lo up")?;
    ip(switch, "link add br0 type bridge")?;
    ip(switch, "link set br0 addrgenmode none up")
}

/// Lays the cable between the bridge and a host.
pub(crate) fn connect(switch: &Host, host: &Host) -> Result<()> {
    let port = port(host);
    // The switch sees no process of the host, so it is handed the host's network as a file.
    let path = format!("/proc/{}/ns/net", host.pid());
    let network = File::open(&path).doing(|| format!("open {path}"))?;
    let words = [
        "ip",
        "link",
        "add",
        &port,
        "type",
        "veth",
        "peer",
        "name",
        INTERFACE,
        "netns",
        "/proc/self/fd/0",
    ];
    switch.command(&words).stdin(network.into()).run()?;
    ip(switch, &format!("link set {port} master br0"))?;
    // No IPv6 chatter, so that the counters count what the hosts really said.
    ip(switch, &format!("link set {port} addrgenmode none up"))?;
    ip(host, "link set lo up")?;
    ip(
        host,
        &format!("address add {}/24 dev {INTERFACE}", host.address()),
    )?;
    ip(host, &format!("link set {INTERFACE} addrgenmode none up"))
}

/// Pulls the cable of a host out, or puts it back.
pub(crate) fn set_cable(switch: &Host, host: &Host, plugged: bool) -> Result<()> {
    let state = if plugged { "up" } else { "down" };
    ip(switch, &format!("link set {} {state}", port(host)))
}

pub(crate) fn shape(host: &Host, bits_per_second: Option<u64>) -> Result<()> {
    match bits_per_second {
        Some(rate) if rate < 8000 => Err(LabError::Request(format!(
            "a link of {rate} bits per second is too slow for anything; give at least 8000"
        ))),
        Some(rate) => {
            // At high rates a bucket must hold what goes out between two timer ticks.
            let burst_bytes = (rate / 8 / 250).max(256 * 1024);
            host.run(&[
                "tc",
                "qdisc",
                "replace",
                "dev",
                INTERFACE,
                "root",
                "tbf",
                "rate",
                &format!("{rate}bit"),
                "burst",
                &format!("{burst_bytes}b"),
                "latency",
                "50ms",
            ])
            .map(drop)
        }
        // `noqueue` is what an unshaped veth has.
        None => host
            .run(&[
                "tc", "qdisc", "replace", "dev", INTERFACE, "root", "noqueue",
            ])
            .map(drop),
    }
}

/// The table of the packet filter in which packets are lost.
const LOSS_TABLE: &str = "inet lab_loss";

/// Has a host lose packets; `None` takes that back.
pub(crate) fn lose(host: &Host, loss: Option<Loss>) -> Result<()> {
    let chain = |hook: &str, interface: &str, which: &str| {
        format!(
            "add chain {LOSS_TABLE} {hook} {{ type filter hook {hook} priority 0; }}\n\
             add rule {LOSS_TABLE} {hook} {interface} {INTERFACE} {which} drop\n"
        )
    };
    let incoming = |which: &str| chain("input", "iifname", which);
    let outgoing = |which: &str| chain("output", "oifname", which);
    // Made before it is deleted, so that it need not be there.
    let mut rules = format!("add table {LOSS_TABLE}\ndelete table {LOSS_TABLE}\n");
    if let Some(loss) = loss {
        rules += &format!("add table {LOSS_TABLE}\n");
        rules += &match loss {
            Loss::Percent(percent) => {
                let some = format!("numgen random mod 100 < {percent}");
                incoming(&some) + &outgoing(&some)
            }
            Loss::Incoming => incoming(""),
            Loss::Outgoing => outgoing(""),
        };
    }
    host.run(&["sh", "-c", "printf '%s' \"$0\" | nft -f -", &rules])
        .map(drop)
}

pub(crate) fn counters(host: &Host) -> Result<Counters> {
    let path = format!("/proc/{}/net/dev", host.pid());
    let text = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
    parse_counters(&text).ok_or_else(|| LabError::Broken {
        who: format!("host {}", host.name()),
        what: format!("{path} does not show {INTERFACE}"),
    })
}

fn parse_counters(text: &str) -> Option<Counters> {
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(INTERFACE)?.strip_prefix(':'))?;
    let numbers: Vec<u64> = line
        .split_whitespace()
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()
        .ok()?;
    Some(Counters {
        rx_bytes: *numbers.first()?,
        rx_packets: *numbers.get(1)?,
        tx_bytes: *numbers.get(8)?,
        tx_packets: *numbers.get(9)?,
    })
}

/// Reads a rate as people write it: `1gbit`, `100mbit`, `8000`, or `none`.
pub fn parse_rate(text: &str) -> Result<Option<u64>> {
    let lower = text.trim().to_ascii_lowercase();
    if lower == "none" {
        return Ok(None);
    }
    let digits = lower.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let factor = match &lower[digits.len()..] {
        "" | "bit" => Some(1_u64),
        "k" | "kbit" => Some(1000),
        "m" | "mbit" => Some(1_000_000),
        "g" | "gbit" => Some(1_000_000_000),
        _ => None,
    };
    factor
        .zip(digits.parse::<u64>().ok())
        .and_then(|(factor, number)| number.checked_mul(factor))
        .map(Some)
        .ok_or_else(|| {
            LabError::Request(format!(
                "{text:?} is not a rate; write for example 1gbit, 100mbit or none"
            ))
        })
}

fn port(host: &Host) -> String {
    format!("to-{}", host.name())
}

fn ip(host: &Host, arguments: &str) -> Result<()> {
    let words: Vec<&str> = std::iter::once("ip")
        .chain(arguments.split_whitespace())
        .collect();
    host.run(&words).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_counters() {
        let text = "Inter-|   Receive  | Transmit\n face |bytes packets\n\
                    \x20   lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n\
                    \x20 eth0: 1000 10 0 0 0 0 0 0 2000 20 0 0 0 0 0 0\n";
        let counters = parse_counters(text).expect("eth0 is there");
        assert_eq!((counters.rx_bytes, counters.tx_bytes), (1000, 2000));
        assert_eq!((counters.rx_packets, counters.tx_packets), (10, 20));
        assert_eq!(counters.since(&counters), Counters::default());
        assert_eq!(parse_counters("lo: 1 2"), None);
        assert_eq!(parse_counters("eth0: 1 2"), None);
    }

    #[test]
    fn reads_rates_as_people_write_them() {
        assert_eq!(parse_rate("1gbit").expect("a rate"), Some(1_000_000_000));
        assert_eq!(parse_rate("100Mbit").expect("a rate"), Some(100_000_000));
        assert_eq!(parse_rate("9000").expect("a rate"), Some(9000));
        assert_eq!(parse_rate("none").expect("no rate"), None);
        for wrong in ["", "fast", "1gib", "-1", "99999999999gbit", "1é"] {
            assert!(parse_rate(wrong).is_err(), "{wrong}");
        }
    }
}
