//! The ways to move a gang: vmgang, and what administrators use without it.

use anyhow::{Result, ensure};
use vmgang_e2e::{uri, vmgang};
use vmgang_lab::Host;

use crate::gang::GANG;

/// A way to move the gang.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// `virsh migrate`, one guest after the other.
    StockSequential,
    /// `virsh migrate`, all at once.
    StockParallel,
    /// `virsh migrate --parallel --compressed --comp-methods zstd`, all at once.
    StockParallelZstd,
    Vmgang,
}

impl Contender {
    /// All of them.
    pub const ALL: [Contender; 4] = [
        Contender::StockSequential,
        Contender::StockParallel,
        Contender::StockParallelZstd,
        Contender::Vmgang,
    ];

    /// How tables call it.
    pub fn title(self) -> &'static str {
        match self {
            Contender::StockSequential => "virsh, one by one",
            Contender::StockParallel => "virsh, in parallel",
            Contender::StockParallelZstd => "virsh, in parallel, multifd + zstd",
            Contender::Vmgang => "vmgang",
        }
    }

    /// Moves the gang of these guests and returns when every one runs on the other host.
    pub fn migrate(self, guests: &[&str], from: &Host, to: &Host) -> Result<()> {
        match self {
            Contender::StockSequential => {
                for guest in guests {
                    from.run(&virsh(guest, &uri(to), &[]))?;
                }
                Ok(())
            }
            Contender::StockParallel => parallel(guests, from, to, &[]),
            Contender::StockParallelZstd => parallel(
                guests,
                from,
                to,
                &["--parallel", "--compressed", "--comp-methods", "zstd"],
            ),
            Contender::Vmgang => {
                let job = vmgang(from, &["migrate", "--json", GANG, &uri(to)])?
                    .expect(0)?
                    .job()?;
                ensure!(job.state == "completed", "{job:?}");
                Ok(())
            }
        }
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
