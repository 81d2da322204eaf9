//! The real program and the real script, called as libvirt calls them: whatever is wrong with the
//! daemon, they end at once, well, and without a word that libvirt would take for XML.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use uuid::Uuid;
use vmgang_hook::{Announcement, Event, Expected, MESSAGE_BYTES_MAX, socket_path};

const UUID: Uuid = Uuid::from_u128(0x6c2e_1c9e_5f0b_4f3a_9d0c_7b4a_1f2e_3d4c);
/// Waiting for anything that does not come would take longer.
const MUCH_TOO_LONG: Duration = Duration::from_secs(20);

/// A host as the hook sees it.
struct Host {
    root: TempDir,
}

/// A daemon that has its socket and, until asked, does nothing.
struct Daemon {
    socket: UnixDatagram,
    expected: Expected,
}

impl Host {
    fn new() -> Host {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::create_dir_all(root.path().join("run/vmgang")).expect("makes");
        std::fs::create_dir_all(root.path().join("etc/vmgang")).expect("makes");
        Host { root }
    }

    fn meeting_place(&self) -> PathBuf {
        self.root.path().join("run/vmgang")
    }

    fn daemon(&self) -> Daemon {
        let expected = Expected::open(&self.meeting_place()).expect("opens");
        let path = socket_path(&self.meeting_place());
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(path).expect("binds");
        socket.set_nonblocking(true).expect("sets");
        Daemon { socket, expected }
    }

    fn policy(&self, text: &str) {
        std::fs::write(self.root.path().join("etc/vmgang/incoming.toml"), text).expect("writes");
    }

    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmgang-hook"));
        command
            .args(arguments)
            // As libvirt: nothing of its own environment, so no bus either.
            .env_clear()
            .env("LC_ALL", "C")
            .env("VMGANG_HOOK_ROOT", self.root.path());
        command
    }

    /// Calls the hook with the domain's XML; what it left unread is of no concern to libvirt.
    fn call(&self, operation: &str, suboperation: &str) -> Output {
        let child = start(&mut self.program(&["vm", operation, suboperation, "-"]));
        finish(child, &xml(UUID))
    }

    /// Fails unless the hook let libvirt go on.
    fn passes(&self, operation: &str, suboperation: &str) {
        let output = self.call(operation, suboperation);
        assert!(
            output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(),
            "{operation}: {output:?}"
        );
    }

    /// The sentence of a refusal.
    fn refuses(&self) -> String {
        let output = self.call("migrate", "begin");
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    }
}

impl Daemon {
    /// Everything in its queue.
    fn heard(&self) -> Vec<Announcement> {
        let mut heard = Vec::new();
        let mut message = [0; MESSAGE_BYTES_MAX];
        while let Ok(len) = self.socket.recv(&mut message) {
            heard.push(Announcement::parse(&message[..len]).expect("a message"));
        }
        heard
    }

    /// Fills its queue, as a daemon that hangs has it filled.
    fn hang(&self, host: &Host) -> usize {
        let sender = UnixDatagram::unbound().expect("a socket");
        sender.set_nonblocking(true).expect("sets");
        sender
            .connect(socket_path(&host.meeting_place()))
            .expect("connects");
        let mut queued = 0;
        loop {
            match sender.send(b"fill") {
                Ok(_) => queued += 1,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return queued,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn xml(uuid: Uuid) -> String {
    format!("<domain type='kvm'>\n  <name>vm</name>\n  <uuid>{uuid}</uuid>\n</domain>\n")
}

fn start(command: &mut Command) -> Child {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts")
}

fn finish(mut child: Child, xml: &str) -> Output {
    use std::io::Write;
    let mut stdin = child.stdin.take().expect("piped");
    let _ = stdin.write_all(xml.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("ends")
}

const EVENTS: [(&str, &str, Event); 3] = [
    ("migrate", "begin", Event::Incoming),
    ("started", "begin", Event::Started),
    ("release", "end", Event::Stopped),
];
const OTHERS: [(&str, &str); 6] = [
    ("prepare", "begin"),
    ("start", "begin"),
    ("stopped", "end"),
    ("reconnect", "begin"),
    ("attach", "begin"),
    ("restore", "begin"),
];

#[test]
fn a_daemon_that_reads_hears_each_event_once() {
    let host = Host::new();
    let daemon = host.daemon();
    for (operation, suboperation) in OTHERS {
        host.passes(operation, suboperation);
    }
    assert_eq!(daemon.heard(), [], "nobody needs to know");
    for (operation, suboperation, event) in EVENTS {
        host.passes(operation, suboperation);
        let told = Announcement {
            event,
            uuid: UUID,
            name: "vm".into(),
        };
        assert_eq!(daemon.heard(), [told]);
    }
}

#[test]
fn a_daemon_that_is_down_is_no_trouble() {
    let host = Host::new();
    let everything = || {
        for (operation, suboperation, _) in EVENTS {
            host.passes(operation, suboperation);
        }
        for (operation, suboperation) in OTHERS {
            host.passes(operation, suboperation);
        }
    };
    // Never started; killed, its socket left behind; and not even its directories there.
    everything();
    drop(host.daemon());
    assert!(socket_path(&host.meeting_place()).exists());
    everything();
    std::fs::remove_dir_all(host.root.path().join("run")).expect("removes");
    std::fs::remove_dir_all(host.root.path().join("etc")).expect("removes");
    everything();
}

#[test]
fn a_daemon_that_hangs_is_not_waited_for() {
    let host = Host::new();
    let daemon = host.daemon();
    let queued = daemon.hang(&host);
    assert!(queued > 0);
    for (operation, suboperation, _) in EVENTS {
        host.passes(operation, suboperation);
    }
    let mut message = [0; 16];
    let mut left = 0;
    while daemon.socket.recv(&mut message).is_ok() {
        left += 1;
    }
    assert_eq!(left, queued, "what was said is lost");
    host.passes("release", "end");
    assert_eq!(daemon.heard().len(), 1, "and the next one is not");
}

#[test]
fn something_else_in_the_sockets_place_is_no_trouble() {
    let host = Host::new();
    let path = socket_path(&host.meeting_place());
    std::fs::write(&path, "").expect("writes");
    host.passes("migrate", "begin");
    std::fs::remove_file(&path).expect("removes");
    std::fs::create_dir(&path).expect("makes");
    host.passes("migrate", "begin");
    std::fs::remove_dir(&path).expect("removes");
    let _stream = std::os::unix::net::UnixListener::bind(&path).expect("binds");
    host.passes("migrate", "begin");
}

#[test]
fn a_libvirt_that_says_nothing_is_not_waited_for() {
    let host = Host::new();
    let daemon = host.daemon();
    let began = Instant::now();
    // The pipe stays open, and empty.
    let child = start(&mut host.program(&["vm", "started", "begin", "-"]));
    let mut child = child;
    let stdin = child.stdin.take();
    let output = child.wait_with_output().expect("ends");
    assert!(output.status.success(), "{output:?}");
    assert!(began.elapsed() < MUCH_TOO_LONG);
    drop(stdin);
    assert_eq!(daemon.heard(), [], "it does not know whom it is about");
    // Closed, absent, or no XML.
    for input in ["", "<domain/>", "\0\u{fffd}<uuid>x</uuid>"] {
        let output = finish(
            start(&mut host.program(&["vm", "started", "begin", "-"])),
            input,
        );
        assert!(
            output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
    }
    let mut closed = host.program(&["vm", "started", "begin", "-"]);
    assert!(
        closed
            .stdin(Stdio::null())
            .status()
            .expect("runs")
            .success()
    );
}

#[test]
fn odd_arguments_are_no_trouble() {
    use std::os::unix::ffi::OsStrExt;
    let host = Host::new();
    let daemon = host.daemon();
    for arguments in [&[][..], &["vm"], &["vm", "migrate"], &["", "", "", ""]] {
        let output = finish(start(&mut host.program(arguments)), &xml(UUID));
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
    }
    let mut command = host.program(&[]);
    command.arg(std::ffi::OsStr::from_bytes(b"v\xffm"));
    command.args(["migrate", "begin", "-"]);
    assert!(finish(start(&mut command), &xml(UUID)).status.success());
    assert_eq!(daemon.heard().len(), 1);
}

#[test]
fn a_policy_lets_in_what_comes_through_vmgang_and_nothing_else() {
    let host = Host::new();
    host.policy("require_vmgang = true\nexcept = ['router-*']\n");
    let refusal = host.refuses();
    assert!(
        refusal.contains("domain vm") && refusal.contains("etc/vmgang/incoming.toml"),
        "{refusal}"
    );
    // A daemon alone is no reason.
    let daemon = host.daemon();
    host.refuses();
    assert_eq!(daemon.heard(), [], "what is refused does not come");
    let job = Uuid::from_u128(9);
    daemon.expected.expect(job, &[UUID]).expect("expects");
    host.passes("migrate", "begin");
    assert_eq!(daemon.heard().len(), 1);
    // Also one that has no time: it has its socket.
    daemon.hang(&host);
    host.passes("migrate", "begin");
    daemon.expected.forget(job);
    host.refuses();
    // One that was killed while it expected something is not a way in.
    daemon.expected.expect(job, &[UUID]).expect("expects");
    drop(daemon);
    host.refuses();
    // Other operations are none of the policy's business.
    for (operation, suboperation) in OTHERS {
        host.passes(operation, suboperation);
    }
    host.passes("started", "begin");
    host.passes("release", "end");
    let excepted = &mut host.program(&["router-1", "migrate", "begin", "-"]);
    assert!(finish(start(excepted), &xml(UUID)).status.success());
}

#[test]
fn a_policy_that_cannot_be_used_is_the_strictest() {
    let host = Host::new();
    let daemon = host.daemon();
    host.policy("require_vmgang = false\nexcept = router\n");
    let refusal = host.refuses();
    assert!(
        refusal.contains("incoming.toml") && refusal.contains("line 2"),
        "{refusal}"
    );
    daemon
        .expected
        .expect(Uuid::nil(), &[UUID])
        .expect("expects");
    host.passes("migrate", "begin");
    host.passes("started", "begin");
}

/// The script as it is installed, with the program in some place.
fn script(host: &Host, program: &str) -> PathBuf {
    let directory = host.root.path().join("sbin");
    std::fs::create_dir_all(&directory).expect("makes");
    let text = include_str!("../../../hooks/qemu");
    let directory_text = directory.to_str().expect("text");
    let script = host.root.path().join("vmgang");
    std::fs::write(&script, text.replace("@sbindir@", directory_text)).expect("writes");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&script, executable.clone()).expect("sets");
    let installed = directory.join("vmgang-hook");
    std::fs::write(&installed, program).expect("writes");
    std::fs::set_permissions(&installed, executable).expect("sets");
    script
}

fn run_script(host: &Host, script: &Path) -> Output {
    let mut command = Command::new(script);
    command
        .args(["vm", "migrate", "begin", "-"])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("VMGANG_HOOK_ROOT", host.root.path());
    finish(start(&mut command), &xml(UUID))
}

#[test]
fn the_script_passes_on_a_refusal_and_no_other_failure() {
    let host = Host::new();
    let program = env!("CARGO_BIN_EXE_vmgang-hook");
    let real = format!("#!/bin/sh\nexec {program} \"$@\"\n");
    let installed = script(&host, &real);
    assert!(run_script(&host, &installed).status.success());
    host.policy("require_vmgang = true\n");
    let refused = run_script(&host, &installed);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(refused.stdout.is_empty());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("incoming.toml"));
    let daemon = host.daemon();
    daemon
        .expected
        .expect(Uuid::nil(), &[UUID])
        .expect("expects");
    assert!(run_script(&host, &installed).status.success());
    assert_eq!(daemon.heard().len(), 1);

    // Killed, of another architecture, panicking, gone: libvirt goes on.
    for broken in [
        "#!/bin/sh\nkill -SEGV $$\n",
        "\x7fELF nothing",
        "#!/bin/sh\nexit 101\n",
    ] {
        let installed = script(&host, broken);
        let output = run_script(&host, &installed);
        assert!(output.status.success(), "{broken:?}: {output:?}");
    }
    std::fs::remove_file(host.root.path().join("sbin/vmgang-hook")).expect("removes");
    let output = run_script(&host, &installed);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
}
