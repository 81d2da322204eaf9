//! `make record`: keeps the migration streams of real guests, for `replay`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use vmgang_bench::gang::{Mix, RedisData, RedisValues};
use vmgang_bench::recorder::{RecordOptions, record};
use vmgang_lab::{Lab, LabOptions};

#[derive(Parser)]
#[command(about = "Records the migration streams of a lab's guests")]
struct Arguments {
    /// Which guests.
    #[arg(long, value_enum, default_value_t = Mix::Demo)]
    mix: Mix,
    /// Memory of each guest in MiB; 512, or 1024 of the Debian mix, when not given.
    #[arg(long)]
    memory: Option<u64>,
    /// What redis holds in the Debian mix.
    #[arg(long, value_enum, default_value_t = RedisData::default().values)]
    redis_values: RedisValues,
    /// How much of it, in MiB.
    #[arg(long, default_value_t = RedisData::default().mib)]
    redis_data: u64,
    /// What each migration may send, in MiB/s; guests that write make several passes then.
    #[arg(long, default_value_t = 30)]
    bandwidth: u64,
    /// Seconds the guests work before they migrate.
    #[arg(long, default_value_t = 5)]
    settle: u64,
    /// Where the streams go: one file a guest, and record.json.
    #[arg(long)]
    dir: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = RecordOptions {
        mix: arguments.mix,
        mix_name: arguments
            .mix
            .to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default(),
        memory_mib: arguments
            .memory
            .unwrap_or(arguments.mix.default_memory_mib()),
        redis: RedisData {
            values: arguments.redis_values,
            mib: arguments.redis_data,
        },
        bandwidth_mib: arguments.bandwidth,
        settle: Duration::from_secs(arguments.settle),
    };
    let recording = Lab::scope(&LabOptions::default(), |lab| {
        record(lab, &options, &arguments.dir)
    })?;
    for member in &recording.members {
        println!(
            "{}: {} MiB guest, {:.1} MB of stream in {:.1} s and {} passes",
            member.guest,
            member.memory_mib,
            member.stream_bytes as f64 / 1e6,
            member.seconds,
            member.passes
        );
    }
    println!("{} in {}", recording.qemu, arguments.dir.display());
    Ok(())
}
