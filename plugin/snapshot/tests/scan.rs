//! Scans of real memory of another process, which writes to it meanwhile. `examples/guest.rs` is
//! that process.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use uuid::Uuid;
use vmgang_dedup::{DigestKey, Fingerprinter, PageDigest, PageState, Snapshot};
use vmgang_snapshot::{
    GuestMemory, Pace, QemuProcess, ScanReport, Scanner, SnapshotError, Unpaced,
};

const KEY: DigestKey = DigestKey([5; 32]);
const PAGES: usize = 2048;

struct Guest {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    uuid: Uuid,
}

impl Guest {
    fn start(kind: &str) -> Guest {
        Self::with(kind, true)
    }

    fn with(kind: &str, seal: bool) -> Guest {
        Self::of(kind, seal, false)
    }

    fn of(kind: &str, seal: bool, hugetlb: bool) -> Guest {
        let uuid = Uuid::from_u128(rand_like(kind));
        let object = format!(
            r#"{{"qom-type":"{kind}","id":"pc.ram","share":{},"seal":{seal},"hugetlb":{hugetlb},"size":{},"x-use-canonical-path-for-ramblock-id":false}}"#,
            kind == "memory-backend-memfd",
            PAGES * 4096
        );
        let mut child = Command::new(example())
            .args(["-uuid", &uuid.to_string(), "-object", &object])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("examples/guest runs");
        let mut guest = Guest {
            input: child.stdin.take(),
            output: BufReader::new(child.stdout.take().expect("its output")),
            child,
            uuid,
        };
        guest.answer();
        guest
    }

    fn answer(&mut self) {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("an answer");
        assert_eq!(line, "ok\n");
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.input.as_mut().expect("its input"), "{command}").expect("told");
        self.answer();
    }

    fn process(&self) -> QemuProcess {
        let mut found = QemuProcess::find(&[self.uuid]).expect("proc");
        let process = found.remove(&self.uuid).expect("it is found");
        assert_eq!(process.pid(), self.child.id());
        process
    }

    fn memory(&self) -> GuestMemory {
        GuestMemory::open(&self.process()).expect("its memory is found")
    }

    fn end(&mut self) {
        drop(self.input.take());
        self.child.wait().expect("it has ended");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn example() -> PathBuf {
    let mut path = std::env::current_exe().expect("this test");
    path.pop();
    path.pop();
    path.join("examples/guest")
}

/// No two guests of these tests have the same.
fn rand_like(kind: &str) -> u128 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    (u128::from(std::process::id()) << 64) | u128::from(number << 8) | kind.len() as u128
}

fn scan(memory: &GuestMemory, snapshot: &mut Snapshot) -> ScanReport {
    Scanner::new(&KEY)
        .scan(memory, snapshot, &mut Unpaced)
        .expect("scanned")
}

/// What the guest writes; see there.
fn content(page: u64, version: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for (word, chunk) in (0u64..).zip(bytes.chunks_exact_mut(16)) {
        chunk[..8].copy_from_slice(&(page << 20 | version).to_le_bytes());
        chunk[8..].copy_from_slice(&word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    bytes
}

fn digest(page: u64, version: u64) -> PageDigest {
    PageDigest::of(&KEY, &content(page, version))
}

const KINDS: [&str; 2] = ["memory-backend-memfd", "memory-backend-ram"];

#[test]
fn a_first_scan_finds_everything_and_a_second_one_only_what_changed() {
    for kind in KINDS {
        let mut guest = Guest::start(kind);
        guest.tell("fill 100 500");
        guest.tell("uniform 50 7");
        guest.tell("uniform 51 0");
        let memory = guest.memory();
        let blocks: Vec<_> = memory.blocks().collect();
        assert_eq!(blocks, [("pc.ram", PAGES as u64 * 4096)]);
        let mut snapshot = memory.empty_snapshot();
        let first = scan(&memory, &mut snapshot);
        assert_eq!((first.pages, first.hashed), (PAGES as u64, 500), "{kind}");
        assert_eq!(
            first.uniform + first.holes,
            PAGES as u64 - 500,
            "{kind}: {first:?}"
        );
        // Holes were not read, nor made memory.
        assert_eq!(first.bytes_read, 502 * 4096, "{kind}");
        let block = &snapshot.blocks()[0];
        assert_eq!(block.state(50), PageState::Uniform(7));
        assert_eq!(block.state(51), PageState::Uniform(0));
        assert_eq!(block.state(52), PageState::Hole);
        assert_eq!(block.state(100), PageState::Content(digest(100, 0)));
        let again = scan(&memory, &mut snapshot);
        assert_eq!((again.hashed, again.unchanged), (0, 500), "{kind}");
        assert_eq!(
            again.bytes_read, first.bytes_read,
            "{kind}: the first scan touched a hole"
        );

        guest.tell("write 200 9");
        guest.tell("drop 201");
        guest.tell("write 1500 1");
        let third = scan(&memory, &mut snapshot);
        assert_eq!(
            (third.hashed, third.unchanged),
            (2, 498),
            "{kind}: {third:?}"
        );
        let block = &snapshot.blocks()[0];
        assert_eq!(block.state(200), PageState::Content(digest(200, 9)));
        assert_eq!(block.state(201), PageState::Hole);
        assert_eq!(block.state(1500), PageState::Content(digest(1500, 1)));
        assert_eq!((block.stable_scans(199), block.stable_scans(200)), (2, 0));
        assert_eq!(snapshot.scans(), 3);
    }
}

/// Each digest is of bytes that were copied once, and its fingerprint of the same bytes, whatever
/// the guest does meanwhile.
#[test]
fn digest_and_fingerprint_are_of_the_same_copy() {
    for kind in KINDS {
        let mut guest = Guest::start(kind);
        guest.tell("fill 0 300");
        guest.tell("churn 100 200");
        let memory = guest.memory();
        let mut snapshot = memory.empty_snapshot();
        let prints = Fingerprinter::new(&KEY);
        let mut whole = 0;
        let mut scanned = HashMap::new();
        for _ in 0..20 {
            scan(&memory, &mut snapshot);
            let block = &snapshot.blocks()[0];
            for page in 0..300 {
                let PageState::Content(found) = block.state(page) else {
                    panic!("{kind}: page {page} has a content");
                };
                if page < 100 {
                    assert_eq!(found, digest(page as u64, 0));
                } else {
                    scanned.insert((page, found), block.clone());
                }
            }
            // A page that is read now and not torn has its own digest, not its neighbour's in time.
            let mut copy = [0; 4096];
            for page in 100..300 {
                memory.read_page(0, page, &mut copy).expect("read");
                let version = u64::from_le_bytes(copy[..8].try_into().expect("8 bytes")) & 0xf_ffff;
                if copy == content(page as u64, version) {
                    whole += 1;
                    if let Some(known) = block.known(page, prints.of(&copy)) {
                        assert_eq!(known, digest(page as u64, version), "{kind}: page {page}");
                    }
                }
            }
        }
        assert!(whole > 0, "{kind}: every copy was torn");
        assert!(scanned.len() > 200, "{kind}: nothing changed underneath");
    }
}

/// Ends the guest after so many steps of a scan.
struct EndsIt<'a>(&'a mut Guest, u32);

impl Pace for EndsIt<'_> {
    fn pause(&mut self, _busy: Duration) -> ControlFlow<()> {
        self.1 = self.1.saturating_sub(1);
        if self.1 == 0 && self.0.input.is_some() {
            self.0.end();
        }
        ControlFlow::Continue(())
    }
}

struct Stops(u32);

impl Pace for Stops {
    fn pause(&mut self, _busy: Duration) -> ControlFlow<()> {
        self.0 = self.0.saturating_sub(1);
        match self.0 {
            0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

#[test]
fn a_guest_that_ends_and_a_scan_that_is_stopped_say_so() {
    for kind in KINDS {
        let mut guest = Guest::start(kind);
        guest.tell("fill 0 2000");
        let memory = guest.memory();
        let mut snapshot = memory.empty_snapshot();
        let stopped = Scanner::new(&KEY).scan(&memory, &mut snapshot, &mut Stops(3));
        assert!(
            matches!(stopped, Err(SnapshotError::Stopped)),
            "{stopped:?}"
        );
        assert_eq!(snapshot.scans(), 0);
        let state = snapshot.blocks()[0].state(10);
        assert_eq!(
            state,
            PageState::Content(digest(10, 0)),
            "what it has found is kept"
        );

        let ended = Scanner::new(&KEY).scan(&memory, &mut snapshot, &mut EndsIt(&mut guest, 5));
        assert!(
            matches!(ended, Err(SnapshotError::Gone { .. })),
            "{kind}: {ended:?}"
        );
        assert!(!memory.is_alive());
        let uuid = guest.uuid;
        assert!(QemuProcess::find(&[uuid]).expect("proc").is_empty());
    }
}

/// A QEMU could shorten its file at any moment; that is an error, not a signal.
#[test]
fn memory_that_is_taken_away_ends_the_scan() {
    let mut guest = Guest::with(KINDS[0], false);
    guest.tell("fill 0 2000");
    let memory = guest.memory();
    let mut snapshot = memory.empty_snapshot();
    scan(&memory, &mut snapshot);
    guest.tell("shrink 4096");
    let mut copy = [0; 4096];
    assert!(memory.read_page(0, 1000, &mut copy).is_err());
    // The rest is a hole now, as the file says.
    let report = scan(&memory, &mut snapshot);
    assert_eq!((report.unchanged, report.holes), (1, PAGES as u64 - 1));
}

#[test]
fn what_cannot_be_read_is_named() {
    let me = QemuProcess::of_pid(std::process::id()).expect("this test");
    let error = GuestMemory::open(&me).expect_err("it is no QEMU");
    assert!(matches!(error, SnapshotError::NoBlocks { .. }), "{error}");
    let guest = Guest::start(KINDS[1]);
    let memory = guest.memory();
    let mut copy = [0; 4096];
    assert!(
        memory.read_page(0, PAGES, &mut copy).is_err(),
        "beyond the block"
    );
    assert!(memory.read_page(1, 0, &mut copy).is_err(), "no such block");
}

fn number(path: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

/// Needs `vm.nr_hugepages` of 4 or more; without them there is nothing to test.
#[test]
fn huge_pages_are_scanned_and_their_holes_left_alone() {
    let free = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    if number(free) < 4 {
        eprintln!("not tested: this machine has no huge pages to spare");
        return;
    }
    let mut guest = Guest::of(KINDS[0], true, true);
    // One of four huge pages.
    guest.tell("fill 600 100");
    let taken = number(free);
    let memory = guest.memory();
    let mut snapshot = memory.empty_snapshot();
    let report = scan(&memory, &mut snapshot);
    assert_eq!(
        (report.hashed, report.holes),
        (100, PAGES as u64 - 512),
        "{report:?}"
    );
    assert_eq!(report.uniform, 412, "the rest of the huge page is zero");
    assert_eq!(
        snapshot.blocks()[0].state(650),
        PageState::Content(digest(650, 0))
    );
    assert_eq!(scan(&memory, &mut snapshot).hashed, 0);
    assert_eq!(number(free), taken, "a hole was touched");
}

/// Needs `/sys/kernel/mm/ksm/run` to be 1.
#[test]
fn merged_pages_are_hashed_once() {
    if number("/sys/kernel/mm/ksm/run") != 1 {
        eprintln!("not tested: this machine does not merge pages");
        return;
    }
    let mut guest = Guest::start(KINDS[1]);
    for page in 0..64 {
        guest.tell(&format!("same {page} 7"));
    }
    guest.tell("fill 100 50");
    let sharing = || number("/sys/kernel/mm/ksm/pages_sharing");
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while sharing() < 60 && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    let memory = guest.memory();
    let mut snapshot = memory.empty_snapshot();
    let report = scan(&memory, &mut snapshot);
    // All 64 but the one that was hashed, and what the kernel had not merged yet.
    assert!(report.same_frame >= 60, "{report:?}");
    assert_eq!(report.hashed + report.same_frame, 64 + 50);
    for page in 0..64 {
        assert_eq!(
            snapshot.blocks()[0].state(page),
            PageState::Content(digest(7, 0))
        );
    }
}
