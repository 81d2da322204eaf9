//! The judging of facts, each rule on its own.

use super::*;

const NOW: i64 = 1_790_000_000;

fn facts(names: &[&str], days: i64) -> CertificateFacts {
    CertificateFacts {
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        valid_from_unix_s: NOW - 86_400,
        valid_to_unix_s: NOW + days * 86_400,
    }
}

fn judged(role: CertificateRole, facts: &CertificateFacts) -> Finding {
    certificate(role, Path::new("/pki/cert.pem"), facts, "a.example", NOW)
}

#[test]
fn certificates_by_their_dates() {
    use CertificateRole::{Authority, Client, Server};
    let names = ["a.example"];
    assert_eq!(judged(Client, &facts(&names, 31)).level, Level::Ok);
    let soon = judged(Client, &facts(&names, 29));
    assert_eq!(soon.level, Level::Warning);
    assert!(soon.what.contains("in 29 days"), "{soon:?}");
    assert_eq!(soon.subject, "/pki/cert.pem");
    // An expired one is refused by the peer only where the peer looks at it.
    assert_eq!(judged(Client, &facts(&names, 0)).level, Level::Refused);
    assert_eq!(judged(Server, &facts(&names, -1)).level, Level::Warning);
    assert_eq!(judged(Authority, &facts(&[], -1)).level, Level::Warning);
    let early = CertificateFacts {
        valid_from_unix_s: NOW + 1,
        ..facts(&names, 99)
    };
    let early = judged(Client, &early);
    assert!(early.level == Level::Refused && early.what.contains("valid from"));
}

#[test]
fn a_server_certificate_names_its_host() {
    let level = |names: &[&str]| judged(CertificateRole::Server, &facts(names, 99)).level;
    assert_eq!(level(&["b", "A.Example"]), Level::Ok);
    assert_eq!(level(&["*.example"]), Level::Ok);
    assert_eq!(level(&["*.a.example", "b.example"]), Level::Advice);
    assert_eq!(level(&[]), Level::Warning);
    // Who calls needs no such name.
    assert_eq!(
        judged(CertificateRole::Client, &facts(&[], 99)).level,
        Level::Ok
    );
}

#[test]
fn the_first_directory_that_is_shut_is_named() {
    let step = |path: &str, mode, uid, gid| Step {
        path: path.into(),
        mode,
        uid,
        gid,
    };
    let user = QemuUser { uid: 64055, gid: 7 };
    let steps = [
        step("/", 0o755, 0, 0),
        step("/run", 0o750, 0, 7),
        step("/run/vmgang", 0o700, 64055, 0),
        step("/run/vmgang/migrate", 0o711, 0, 0),
    ];
    assert_eq!(directory(&steps, user, "web1").level, Level::Ok);
    let stranger = QemuUser { uid: 5, gid: 5 };
    let shut = directory(&steps, stranger, "web1");
    assert_eq!(
        (shut.level, shut.subject.as_str()),
        (Level::Warning, "/run")
    );
    assert!(shut.fix.expect("a fix").contains("chmod o+x /run`"));
    let root = QemuUser { uid: 0, gid: 0 };
    assert_eq!(directory(&steps, root, "web1").level, Level::Ok);
    // The owner's own bit counts, not that of all others.
    let own = [step("/x", 0o011, 5, 5)];
    assert_eq!(directory(&own, stranger, "web1").level, Level::Warning);
}

#[test]
fn an_older_qemu_there_is_a_warning() {
    let host = |libvirt, qemu| Versions { libvirt, qemu };
    let here = host(11_003_000, 10_000_002);
    let there = |qemu| versions(here, Some(("b", host(9_000_000, qemu))));
    assert_eq!(there(10_000_002).level, Level::Ok);
    assert_eq!(there(10_000_001).level, Level::Ok, "the same minor version");
    assert_eq!(there(10_001_000).level, Level::Ok);
    let older = there(7_002_022);
    assert_eq!(older.level, Level::Warning);
    assert!(older.what.contains("QEMU 7.2.22") && older.what.contains("10.0.2"));
    assert!(
        versions(here, None)
            .what
            .contains("libvirt 11.3.0, QEMU 10.0.2")
    );
}

#[test]
fn members_by_their_hardware() {
    let shared = Hardware {
        shared_memory: true,
        ..Hardware::default()
    };
    let private = Hardware {
        host_devices: vec!["1 pci".into()],
        ..Hardware::default()
    };
    assert_eq!(memory_backing(&[]), None);
    let all = memory_backing(&[("a".into(), shared.clone())]).expect("members");
    assert_eq!(all.level, Level::Ok);
    let one = memory_backing(&[("a".into(), shared.clone()), ("b".into(), private.clone())]);
    let one = one.expect("members");
    assert_eq!((one.level, one.subject.as_str()), (Level::Advice, "b"));
    assert!(one.fix.expect("a fix").contains("memfd"));
    assert_eq!(devices("a", &shared), None);
    let devices = devices("b", &private).expect("it has one");
    assert!(devices.level == Level::Warning && devices.what.contains("1 pci"));
}

#[test]
fn a_processor_that_is_not_there_is_refused() {
    let judge = |hardware: &Hardware, fit| cpu("a", hardware, &fit, "b").level;
    let model = Hardware {
        checked: true,
        ..Hardware::default()
    };
    let unchecked = Hardware::default();
    let missing = || Fit::Lacks("avx512f".into());
    assert_eq!(judge(&unchecked, missing()), Level::Warning);
    let no_machine = Fit::NoMachine("?".into());
    assert_eq!(judge(&unchecked, no_machine), Level::Refused);
    assert_eq!(judge(&model, missing()), Level::Refused);
    assert_eq!(judge(&model, Fit::Unknown("?".into())), Level::Advice);
    assert_eq!(judge(&model, Fit::Fits), Level::Ok);
    let passed = Hardware {
        processor: Processor::OfTheHost,
        ..Hardware::default()
    };
    assert_eq!(judge(&passed, Fit::Fits), Level::Advice);
}

#[test]
fn refusals_are_told_as_a_migration_tells_them() {
    let error = ServiceError::PeerUnreachable(
        "cannot reach vmgangd on b:1: refused; tried twice; is it running there?".into(),
    );
    let finding = refusal("b:1", &error);
    assert_eq!(
        (finding.check, finding.level),
        (Check::Peer, Level::Refused)
    );
    assert!(finding.what.ends_with("tried twice"), "{finding:?}");
    assert_eq!(finding.fix.as_deref(), Some("is it running there?"));
    let bare = refusal("b", &ServiceError::LibvirtFailed("it is broken".into()));
    assert_eq!(bare.what, "it is broken");
    assert!(bare.fix.expect("always one").contains("virsh"));
}

#[test]
fn the_verdict_is_that_of_the_worst_finding() {
    let with = |levels: &[Level]| {
        let finding = |level: &Level| Finding::new(Check::Peer, *level, "b", "what", "fix");
        let diagnosis = Diagnosis {
            ready: false,
            host: "a".into(),
            destination: None,
            peer: None,
            gangs: Vec::new(),
            findings: levels.iter().map(finding).collect(),
        };
        diagnosis.conclude()
    };
    assert!(with(&[]).ready);
    assert!(with(&[Level::Ok, Level::Advice, Level::Warning]).ready);
    assert!(!with(&[Level::Ok, Level::Refused]).ready);
    assert_eq!(with(&[Level::Ok, Level::Ok]).findings.len(), 1, "told once");
    let json = serde_json::to_string(&with(&[Level::Refused])).expect("plain");
    assert_eq!(
        json,
        r#"{"ready":false,"host":"a","destination":null,"peer":null,"gangs":[],"findings":[{"check":"peer","level":"refused","subject":"b","what":"what","fix":"fix"}]}"#
    );
}
