//! The ways to move a gang: what administrators use without vmgang, vmgang with the techniques of the
//! HPDC 2011 paper one after the other, and vmgang as it comes.
//!
//! Must not: measure.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use vmgang_e2e::{JobResult, uri, vmgang};
use vmgang_lab::Host;

use crate::gang::GANG;

/// A way to move the gang.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    /// `virsh migrate`, one guest after the other.
    #[value(name = "one-by-one")]
    StockSequential,
    /// `virsh migrate`, all at once.
    #[value(name = "parallel")]
    StockParallel,
    /// `virsh migrate --parallel`, all at once: QEMU's multifd.
    #[value(name = "multifd")]
    StockMultifd,
    /// `virsh migrate --parallel --compressed --comp-methods zstd`, all at once.
    #[value(name = "zstd")]
    StockParallelZstd,
    /// `virsh migrate --compressed --comp-methods xbzrle`, all at once.
    #[value(name = "xbzrle")]
    StockXbzrle,
    /// vmgang with every technique off.
    Relay,
    /// The paper's online compression: uniform pages only.
    Oc,
    /// The paper's de-duplication: pages that were seen before, the first time that each is sent.
    Ofd,
    /// The same, and dirtied pages are looked up as well.
    #[value(name = "ofd-rh")]
    OfdRh,
    /// The same, and differences to similar pages.
    #[value(name = "ofd-rh-delta")]
    OfdRhDelta,
    /// vmgang as it comes.
    Vmgang,
    /// The same, after `vmgang prepare`.
    Prepared,
}

impl Contender {
    /// What is there without vmgang.
    pub const STOCK: [Contender; 5] = [
        Contender::StockSequential,
        Contender::StockParallel,
        Contender::StockMultifd,
        Contender::StockParallelZstd,
        Contender::StockXbzrle,
    ];

    /// How tables call it.
    pub fn title(self) -> &'static str {
        match self {
            Contender::StockSequential => "virsh, one by one",
            Contender::StockParallel => "virsh, in parallel",
            Contender::StockMultifd => "virsh, in parallel, multifd",
            Contender::StockParallelZstd => "virsh, in parallel, multifd + zstd",
            Contender::StockXbzrle => "virsh, in parallel, xbzrle",
            Contender::Relay => "vmgang, every technique off",
            Contender::Oc => "vmgang as OC",
            Contender::Ofd => "vmgang as OFD",
            Contender::OfdRh => "vmgang as OFD + RH",
            Contender::OfdRhDelta => "vmgang as OFD + RH + delta",
            Contender::Vmgang => "vmgang",
            Contender::Prepared => "vmgang, prepared",
        }
    }

    /// By the title that a table has.
    pub fn by_title(title: &str) -> Option<Contender> {
        let all = Contender::value_variants().iter();
        all.copied().find(|contender| contender.title() == title)
    }

    /// Whether it is without vmgang.
    pub fn is_stock(self) -> bool {
        Contender::STOCK.contains(&self)
    }

    /// As `--technique` takes them; `None` for what vmgang does of itself, and without vmgang.
    pub fn techniques(self) -> Option<&'static str> {
        match self {
            Contender::Relay => Some("none"),
            Contender::Oc => Some("uniform"),
            Contender::Ofd => Some("uniform,page"),
            Contender::OfdRh => Some("uniform,page,rehash"),
            Contender::OfdRhDelta => Some("uniform,page,rehash,similar=1:1:1"),
            _ => None,
        }
    }

    /// Moves these guests and returns when every one runs on the other host. What vmgang tells about
    /// it, if it was vmgang.
    pub fn migrate(self, guests: &[&str], from: &Host, to: &Host) -> Result<Option<JobResult>> {
        let compressed = |method| ["--compressed", "--comp-methods", method];
        match self {
            Contender::StockSequential => {
                for guest in guests {
                    from.run(&virsh(guest, &uri(to), &[]))?;
                }
            }
            Contender::StockParallel => parallel(guests, from, to, &[])?,
            Contender::StockMultifd => parallel(guests, from, to, &["--parallel"])?,
            Contender::StockParallelZstd => {
                let more = [&["--parallel"], &compressed("zstd")[..]].concat();
                parallel(guests, from, to, &more)?;
            }
            Contender::StockXbzrle => parallel(guests, from, to, &compressed("xbzrle"))?,
            _ => {
                let (members, to) = (guests.join(","), uri(to));
                let mut words = vec!["migrate", "--json"];
                if let Some(list) = self.techniques() {
                    words.extend(["--technique", list]);
                }
                match self {
                    // What was prepared is the gang.
                    Contender::Prepared => words.extend([GANG, &to]),
                    _ => words.extend(["--domains", &members, &to]),
                }
                let job = vmgang(from, &words)?.expect(0)?.job()?;
                ensure!(job.state == "completed", "{job:?}");
                return Ok(Some(job));
            }
        }
        Ok(None)
    }
}

fn virsh(guest: &str, destination: &str, more: &[&str]) -> Vec<String> {
    let words = [
        "virsh",
        "-q",
        "migrate",
        "--live",
        "--p2p",
        guest,
        destination,
    ];
    words
        .iter()
        .chain(more)
        .map(|word| (*word).to_owned())
        .collect()
}

/// `virsh migrate` with more options, all guests at once.
pub fn parallel(guests: &[&str], from: &Host, to: &Host, more: &[&str]) -> Result<()> {
    let running = guests
        .iter()
        .map(|guest| {
            let piped = std::process::Stdio::piped;
            let command = from.command(&virsh(guest, &uri(to), more));
            Ok(command.stdout(piped()).stderr(piped()).spawn()?)
        })
        .collect::<Result<Vec<_>>>()?;
    for (guest, child) in guests.iter().zip(running) {
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "virsh migrate of {guest} failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_has_a_title_of_its_own_and_techniques_that_exist() {
        for contender in Contender::value_variants() {
            assert_eq!(Contender::by_title(contender.title()), Some(*contender));
            if let Some(list) = contender.techniques() {
                assert!(list.parse::<vmgang_engine::Techniques>().is_ok(), "{list}");
            }
        }
        assert_eq!(Contender::by_title("by hand"), None);
    }
}
