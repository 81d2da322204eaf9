//! The return path (destination QEMU to source QEMU), read for one purpose: to withhold
//! SWITCHOVER_ACK, without which the source cannot switch over.
//!
//! Owns: the message boundaries of one connection's return path.
//! Must not: change, drop or reorder a byte. Withholding is a prefix hold: the message and
//! everything behind it waits, so the order on the wire stays the order written.
//!
//! Format: be16 type, be16 length, data (QEMU `migration/migration.c`).

const MESSAGE_RECV_BITMAP: u16 = 5;
const MESSAGE_SWITCHOVER_ACK: u16 = 7;

/// Reads a return path and says how much of it may be passed on.
#[derive(Debug, Default)]
pub struct ReturnPath {
    /// Data bytes of the message at hand that are still to come.
    data_left: usize,
    /// Raw data without framing follows: no longer read.
    opaque: bool,
    released: bool,
    ack_withheld: bool,
}

impl ReturnPath {
    /// `hold`: withhold SWITCHOVER_ACK until [`release`](Self::release).
    pub fn new(hold: bool) -> Self {
        Self {
            released: !hold,
            ..Self::default()
        }
    }

    /// From now on everything may pass.
    pub fn release(&mut self) {
        self.released = true;
    }

    /// Whether SWITCHOVER_ACK was withheld here, now or before the release.
    pub fn ack_withheld(&self) -> bool {
        self.ack_withheld
    }

    /// Takes the bytes that have not been passed on yet, oldest first, and returns how many
    /// of them may pass now. The rest must be given again, with more behind it or after a
    /// release. At a withheld message the four header bytes wait too.
    pub fn passable(&mut self, buf: &[u8]) -> usize {
        let mut at = 0;
        while at < buf.len() {
            if self.opaque || self.released {
                return buf.len();
            }
            if self.data_left > 0 {
                let skip = self.data_left.min(buf.len() - at);
                self.data_left -= skip;
                at += skip;
                continue;
            }
            // A header that may be an ACK is not passed in part: all four bytes or none.
            let Some(header) = buf.get(at..at + 4) else {
                return at;
            };
            let kind = u16::from_be_bytes([header[0], header[1]]);
            let len = u16::from_be_bytes([header[2], header[3]]);
            if kind == MESSAGE_SWITCHOVER_ACK {
                self.ack_withheld = true;
                return at;
            }
            if kind == MESSAGE_RECV_BITMAP {
                // Followed by a bitmap outside the message length.
                self.opaque = true;
            }
            self.data_left = usize::from(len);
            at += 4;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 1];
    const ACK: [u8; 4] = [0, 7, 0, 0];

    #[test]
    fn an_ack_and_everything_behind_it_waits_for_the_release() {
        let bytes = [&PONG[..], &ACK[..], &PONG[..]].concat();
        let mut path = ReturnPath::new(true);
        assert_eq!(path.passable(&bytes), 8);
        assert!(path.ack_withheld());
        assert_eq!(path.passable(&bytes[8..]), 0);
        path.release();
        assert_eq!(path.passable(&bytes[8..]), 12);
    }

    #[test]
    fn a_torn_ack_does_not_slip_through() {
        let bytes = [&PONG[..], &ACK[..]].concat();
        for cut in 0..bytes.len() {
            let mut path = ReturnPath::new(true);
            let first = path.passable(&bytes[..cut]);
            assert!(first <= 8.min(cut));
            let second = path.passable(&bytes[first..]);
            assert_eq!(first + second, 8, "cut at {cut}");
        }
    }

    #[test]
    fn without_hold_everything_passes() {
        let bytes = [&ACK[..], &PONG[..]].concat();
        let mut path = ReturnPath::new(false);
        assert_eq!(path.passable(&bytes), bytes.len());
        assert!(!path.ack_withheld());
    }

    #[test]
    fn an_ack_inside_message_data_is_data() {
        // A PONG whose four data bytes look like an ACK header.
        let bytes = [0, 2, 0, 4, 0, 7, 0, 0];
        let mut path = ReturnPath::new(true);
        assert_eq!(path.passable(&bytes), 8);
        assert!(!path.ack_withheld());
    }
}
