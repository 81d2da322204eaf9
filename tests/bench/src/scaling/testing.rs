//! Documents in which the model's figures are known, as if moves took exactly what it says.

use crate::contender::Contender;
use crate::cost::Cost;
use crate::measure::{Move, Told};
use crate::scaling::{MEMBER_SECONDS, UNDER_WAY, WAYS};
use crate::suite::shape::Shape;
use crate::suite::testing::{document, moved};
use crate::suite::{Document, GuestText};

const PROCESSORS: f64 = 2.0;

/// Guests of half a GiB: 0.2 GB of stream each, of which 0.1 GB is common to all and 0.01 GB its own.
pub fn idle(counts: &[usize]) -> Document {
    let legs: Vec<(String, Vec<Move>)> = counts
        .iter()
        .map(|count| (format!("{count} guests"), idle_moves(*count)))
        .collect();
    let legs: Vec<(&str, &str, Vec<Move>)> = legs
        .iter()
        .map(|(name, moves)| (name.as_str(), "1gbit", moves.clone()))
        .collect();
    let mut made = document(Shape::Idle, &legs);
    for (leg, count) in made.legs.iter_mut().zip(counts) {
        leg.guests = names(*count);
    }
    made.guests = recipes(24, 512);
    made
}

fn idle_moves(count: usize) -> Vec<Move> {
    let guests = count as f64;
    let stream = 0.2 * guests;
    let distinct = 0.1 + 0.01 * guests;
    let made = |contender| {
        let is_ours = contender == Contender::Vmgang;
        let wire = match contender {
            Contender::StockParallel => stream,
            Contender::StockParallelZstd => 0.07 * guests,
            _ => 0.058 + 0.002 * guests,
        };
        let cost = Cost {
            vmgangd_seconds: if is_ours { 1.9 * stream } else { 0.0 },
            libvirtd_seconds: 0.06 * guests,
            qemu_seconds: 1.5 * stream,
            vmgangd_peak_bytes: [
                0,
                ((distinct + 0.02 + 0.005 * guests.min(UNDER_WAY)) * 1e9) as u64,
            ],
        };
        let all = cost.vmgangd_seconds + cost.libvirtd_seconds + cost.qemu_seconds;
        let turns = guests / UNDER_WAY;
        let members = (turns - 1.0).max(0.0) * MEMBER_SECONDS;
        let seconds = 0.8 + (wire * 8.0).max(all / PROCESSORS).max(members);
        with(
            contender,
            seconds,
            wire,
            cost,
            stream,
            distinct,
            0.1 * (guests - 1.0),
        )
    };
    WAYS.map(made).to_vec()
}

/// Four guests of 1 GiB over two links: 1.2 GB of stream, 0.15 GB common to all and 0.05 GB each's own.
pub fn mixed() -> Document {
    let moves = |slower: f64| {
        let made = |contender| {
            let wire = match contender {
                Contender::StockParallel => 1.2,
                Contender::StockParallelZstd => 0.25,
                _ => 0.08,
            };
            let seconds = 2.0 + slower * wire * 8.0;
            let cost = Cost {
                qemu_seconds: 0.4 * seconds + 2.0 * 1.2,
                vmgangd_seconds: 2.0,
                ..Cost::default()
            };
            with(contender, seconds, wire, cost, 1.2, 0.35, 0.45)
        };
        WAYS.map(made).to_vec()
    };
    let legs = [
        ("1 Gbit/s", "1gbit", moves(1.0)),
        ("10 Gbit/s", "10gbit", moves(0.1)),
    ];
    let mut made = document(Shape::Mixed, &legs);
    for leg in &mut made.legs {
        leg.guests = names(4);
    }
    made.guests = recipes(4, 1024);
    made
}

fn with(
    contender: Contender,
    seconds: f64,
    wire_gb: f64,
    cost: Cost,
    stream_gb: f64,
    distinct_gb: f64,
    shared_gb: f64,
) -> Move {
    let bytes = |gb: f64| (gb * 1e9).round() as u64;
    let told = Told {
        qemu_stream: bytes(stream_gb),
        wire: bytes(wire_gb),
        saved_zero: 0,
        saved_uniform: bytes(stream_gb - distinct_gb - shared_gb) as i64,
        saved_intra_vm: 0,
        saved_cross_vm: bytes(shared_gb) as i64,
        saved_other: bytes(distinct_gb - wire_gb) as i64,
    };
    Move {
        cost,
        job: (contender == Contender::Vmgang).then_some(told),
        ..moved(contender, seconds, bytes(wire_gb), 30)
    }
}

fn names(count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("guest{number}")).collect()
}

fn recipes(count: usize, mib: u64) -> Vec<GuestText> {
    let text = |name| GuestText {
        name,
        recipe: format!("{mib} MiB role=idle"),
    };
    names(count).into_iter().map(text).collect()
}
