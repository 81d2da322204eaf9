//! The QEMUs at both ends of a run: one that writes a member's stream, one that reads it.
//!
//! The destination answers like QEMU: SWITCHOVER_ACK at once, SHUT when it has read everything.
//! Must not: cost more processor time than they have to; they share the machine with what is
//! measured. So they compare with the original in memory instead of hashing.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::streams::MemberStream;
use crate::tap::wait_for_connection;

const BUFFER_BYTES: usize = 256 * 1024;
/// be16 type 7, be16 length 0.
const SWITCHOVER_ACK: &[u8] = &[0, 7, 0, 0];
/// be16 type 1, be16 length 4, be32 value 0: success.
const SHUT: &[u8] = &[0, 1, 0, 4, 0, 0, 0, 0];
/// A connection on which nothing moves for so long is stuck.
const STUCK: Duration = Duration::from_secs(120);

/// Plays the source QEMU; the return path must be what the destination QEMU wrote.
pub fn source(socket: &Path, member: &MemberStream) -> Result<()> {
    let name = &member.name;
    let mut connection = UnixStream::connect(socket)
        .with_context(|| format!("cannot connect to {}", socket.display()))?;
    connection.set_write_timeout(Some(STUCK))?;
    connection.set_read_timeout(Some(STUCK))?;
    connection
        .write_all(&member.bytes)
        .with_context(|| format!("writing the stream of {name} failed"))?;
    connection.shutdown(Shutdown::Write)?;
    let mut returned = Vec::new();
    connection
        .read_to_end(&mut returned)
        .with_context(|| format!("reading the return path of {name} failed"))?;
    ensure!(
        returned == [SWITCHOVER_ACK, SHUT].concat(),
        "the return path of {name} brought {returned:?}"
    );
    Ok(())
}

/// Plays the destination QEMU; returns when the last byte was there. Every byte must be as the
/// source wrote it. `called_off` ends waiting for a connection.
pub fn destination(
    listener: &UnixListener,
    member: &MemberStream,
    called_off: &AtomicBool,
) -> Result<Instant> {
    let name = &member.name;
    if !wait_for_connection(listener, called_off)? {
        bail!("nobody brought the stream of {name}");
    }
    let (mut connection, _) = listener.accept()?;
    connection.set_read_timeout(Some(STUCK))?;
    connection.write_all(SWITCHOVER_ACK)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut arrived = 0;
    loop {
        let len = connection
            .read(&mut buffer)
            .with_context(|| format!("reading the stream of {name} failed at byte {arrived}"))?;
        if len == 0 {
            break;
        }
        check(&buffer[..len], arrived, member)?;
        arrived += len;
    }
    let at = Instant::now();
    ensure!(
        arrived == member.bytes.len(),
        "the stream of {name} ended after {arrived} of {} bytes",
        member.bytes.len()
    );
    connection.write_all(SHUT)?;
    Ok(at)
}

/// Compares what arrived at an offset with the original.
fn check(bytes: &[u8], at: usize, member: &MemberStream) -> Result<()> {
    let name = &member.name;
    let Some(original) = member.bytes.get(at..at + bytes.len()) else {
        bail!("more arrived of {name} than its stream has");
    };
    if bytes == original {
        return Ok(());
    }
    let first = bytes
        .iter()
        .zip(original)
        .position(|(arrived, sent)| arrived != sent)
        .unwrap_or(0);
    bail!(
        "byte {} of the stream of {name} is {:#04x}, not {:#04x}",
        at + first,
        bytes[first],
        original[first]
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_byte_is_found_and_named() {
        let member = MemberStream {
            name: "g0".to_owned(),
            memory_bytes: 0,
            bytes: vec![5; 1000],
        };
        check(&[5; 100], 900, &member).expect("equal");
        let mut wrong = [5; 100];
        wrong[7] = 4;
        let error = check(&wrong, 100, &member).expect_err("differs");
        assert_eq!(
            error.to_string(),
            "byte 107 of the stream of g0 is 0x04, not 0x05"
        );
        assert!(check(&[5; 101], 900, &member).is_err());
    }
}
