//! `make demo`: four guests move together from one host to another over a 1 Gbit/s link, with
//! progress, and beside it what stock virsh does with the same guests.

use std::process::Stdio;

use anyhow::{Result, ensure};
use vmgang_bench::contender::Contender;
use vmgang_bench::gang::{self, GANG, Mix};
use vmgang_bench::measure::{Circumstances, Move, there_and_back};
use vmgang_bench::table::markdown;
use vmgang_e2e::{expect_running, install_tree, uri, verify_all};
use vmgang_lab::{Lab, LabOptions};

const LINK: u64 = 1_000_000_000;
const MEMORY_MIB: u64 = 512;

fn main() -> Result<()> {
    let options = LabOptions {
        link_bits_per_second: Some(LINK),
        install_tree: Some(install_tree()?),
        ..LabOptions::default()
    };
    say("two hosts, a and b, each with libvirt, QEMU and vmgangd of its own");
    Lab::scope(&options, |lab| {
        let (a, b) = (lab.host("a")?, lab.host("b")?);
        say(&format!(
            "four guests of {MEMORY_MIB} MiB on host a: one idle, one reading, two writing"
        ));
        gang::boot(a, Mix::Demo, MEMORY_MIB)?;
        let guests = Mix::Demo.names();

        let circumstances = Circumstances {
            link: Some(LINK),
            ..Circumstances::default()
        };
        let mut moves: Vec<Move> = Vec::new();
        for stock in [Contender::StockSequential, Contender::StockParallelZstd] {
            say(&format!("for comparison: {}", stock.title()));
            moves.push(there_and_back(lab, &guests, stock, circumstances, false)?);
        }
        moves.push(there_and_back(
            lab,
            &guests,
            Contender::Vmgang,
            circumstances,
            false,
        )?);

        lab.shape(Some(LINK))?;
        say(&format!("a$ vmgang migrate {GANG} {}", uri(b)));
        let status = a
            .command(&["vmgang", "migrate", GANG, &uri(b)])
            .stdin(Stdio::inherit())
            .stdout(Stdio::inherit())
            .stderr(Stdio::inherit())
            .spawn()?
            .wait()?;
        ensure!(status.success(), "vmgang migrate ended with {status}");
        expect_running(b, &guests)?;
        verify_all(b, &guests)?;
        say("all four run on b, and each has checked every page of its memory there");
        println!("\n{}", markdown(&moves));
        Ok(())
    })
}

fn say(line: &str) {
    println!("==> {line}");
}
