//! A host's emulator for guests of QEMU before 9: gives each a little more memory than libvirt says.
//!
//! Those QEMUs lose writes of emulated guests while they migrate: taking over the dirty pages of a
//! block of RAM that is a multiple of 64 pages, they do not have the emulator watch these pages
//! again. For any other block they do (`cpu_physical_memory_sync_dirty_bitmap` in QEMU's
//! `ram_addr.h`). libvirt rounds memory to MiB, so the size is changed between libvirt and QEMU.
//! Must not: change anything else about QEMU, which stays Debian's own.

use crate::error::Result;
use crate::host::Host;

const EMULATOR: &str = "/usr/bin/qemu-system-x86_64";
const REAL: &str = "/usr/libexec/qemu-system-x86_64.real";

/// Replaces QEMU by a script that changes two numbers and becomes QEMU.
const SCRIPT: &str = r#"#!/bin/sh
# Adds 64 KiB to the guest's memory; otherwise the QEMU that is named below.
for argument; do
    shift
    case $before:$argument in
    -object:*'"qom-type":"memory-backend-'*'"size":'*)
        head=${argument%\"size\":*}
        rest=${argument##*\"size\":}
        size=${rest%%[!0-9]*}
        argument="$head\"size\":$((size + 65536))${rest#$size}" ;;
    -m:size=*k*)
        rest=${argument#size=}
        size=${rest%%[!0-9]*}
        argument="size=$((size + 64))${rest#$size}" ;;
    -m:*[0-9])
        argument="size=$((argument * 1024 + 64))k" ;;
    esac
    before=$argument
    set -- "$@" "$argument"
done
exec /usr/libexec/qemu-system-x86_64.real "$@"
"#;

/// Before libvirtd starts.
pub(crate) fn replace(host: &Host) -> Result<()> {
    host.run(&["mkdir", "-p", "/usr/libexec"])?;
    host.run(&["mv", EMULATOR, REAL])?;
    host.write_file_mode(EMULATOR, SCRIPT, 0o755)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn only_the_sizes_of_memory_change() {
        let script = SCRIPT.replace(
            "exec /usr/libexec/qemu-system-x86_64.real",
            "printf '%s\\n'",
        );
        let changed = |arguments: &[&str]| -> Vec<String> {
            let output = Command::new("sh")
                .args(["-c", &script, "qemu"])
                .args(arguments)
                .output()
                .expect("a shell");
            let text = String::from_utf8(output.stdout).expect("text");
            text.lines().map(str::to_owned).collect()
        };
        let object = r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","size":134217728}"#;
        let larger = r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","size":134283264}"#;
        let other = r#"{"qom-type":"secret","size":134217728}"#;
        assert_eq!(
            changed(&[
                "-m", "128", "-object", object, "-object", other, "-smp", "1"
            ]),
            [
                "-m",
                "size=131136k",
                "-object",
                larger,
                "-object",
                other,
                "-smp",
                "1"
            ]
        );
        assert_eq!(
            changed(&["-m", "size=131072k,slots=4,maxmem=262144k", "-name", "a b"]),
            ["-m", "size=131136k,slots=4,maxmem=262144k", "-name", "a b"]
        );
    }
}
