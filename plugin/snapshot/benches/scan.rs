//! How fast guests are scanned, out of a process of their own: `cargo bench -p vmgang-snapshot`.
//!
//! GB/s of memory that is not zero, on one processor.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use vmgang_dedup::DigestKey;
use vmgang_snapshot::{GuestMemory, QemuProcess, Scanner, Unpaced};

const PAGES: usize = 1 << 16;
const KEY: DigestKey = DigestKey([5; 32]);

struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(kind: &str) -> (Guest, GuestMemory) {
    // Built by `cargo bench` beside this.
    let mut path = std::env::current_exe().expect("this program");
    path.pop();
    path.pop();
    let object = format!(
        r#"{{"qom-type":"{kind}","id":"pc.ram","share":{},"size":{}}}"#,
        kind == "memory-backend-memfd",
        PAGES * 4096
    );
    let mut child = Command::new(path.join("examples/guest"))
        .args(["-object", &object])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cargo build --release -p vmgang-snapshot --examples");
    let mut output = BufReader::new(child.stdout.take().expect("output"));
    let mut line = String::new();
    output.read_line(&mut line).expect("it is there");
    let mut input = child.stdin.take().expect("input");
    writeln!(input, "fill 0 {PAGES}").expect("told");
    output.read_line(&mut line).expect("it is full");
    let process = QemuProcess::of_pid(child.id()).expect("it runs");
    let memory = GuestMemory::open(&process).expect("its memory");
    // It ends with its input.
    std::mem::forget(input);
    (Guest(child), memory)
}

fn scans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scan");
    group.sample_size(10);
    group.throughput(Throughput::Bytes((PAGES * 4096) as u64));
    for kind in ["memory-backend-memfd", "memory-backend-ram"] {
        let (_guest, memory) = start(kind);
        let mut scanner = Scanner::new(&KEY);
        group.bench_function(format!("{kind}, first"), |bench| {
            bench.iter_batched_ref(
                || memory.empty_snapshot(),
                |snapshot| {
                    scanner
                        .scan(&memory, snapshot, &mut Unpaced)
                        .expect("scanned")
                },
                BatchSize::LargeInput,
            );
        });
        let mut snapshot = memory.empty_snapshot();
        scanner
            .scan(&memory, &mut snapshot, &mut Unpaced)
            .expect("scanned");
        group.bench_function(format!("{kind}, unchanged"), |bench| {
            bench.iter(|| {
                let report = scanner.scan(&memory, &mut snapshot, &mut Unpaced);
                assert_eq!(report.expect("scanned").hashed, 0);
            });
        });
    }
}

criterion_group!(benches, scans);
criterion_main!(benches);
