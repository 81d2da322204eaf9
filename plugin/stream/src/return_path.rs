//! The return path (destination QEMU to source QEMU), read for two purposes: to withhold
//! SWITCHOVER_ACK, without which the source cannot switch over; and to know when the destination has said
//! that it has all of the guest, after which that may run there.
//!
//! Owns: the message boundaries of one connection's return path.
//! Must not: change, drop or reorder a byte. Withholding is a prefix hold: the message and
//! everything behind it waits, so the order on the wire stays the order written.
//!
//! Format: be16 type, be16 length, data (QEMU `migration/migration.c`).

const MESSAGE_SHUT: u16 = 1;
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
    /// The beginning of a header that has been passed on.
    torn: [u8; 4],
    torn_len: usize,
    /// The message at hand is a SHUT; whether its value so far is 0.
    shut: Option<bool>,
    arrived: bool,
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

    /// Whether the destination's "I have it all" (SHUT with 0) is among what may pass: the source is done
    /// when it reads that.
    pub fn arrived(&self) -> bool {
        self.arrived
    }

    /// Takes the bytes that have not been passed on yet, oldest first, and returns how many
    /// of them may pass now. The rest must be given again, with more behind it or after a
    /// release. At a withheld message the four header bytes wait too.
    pub fn passable(&mut self, buf: &[u8]) -> usize {
        let mut at = 0;
        while at < buf.len() {
            if self.opaque {
                return buf.len();
            }
            if self.data_left > 0 {
                let data = &buf[at..][..self.data_left.min(buf.len() - at)];
                self.data(data);
                at += data.len();
                continue;
            }
            if self.released {
                self.torn[self.torn_len] = buf[at];
                at += 1;
                self.torn_len = (self.torn_len + 1) % 4;
                if self.torn_len == 0 {
                    self.header(self.torn);
                }
                continue;
            }
            // A header that may be an ACK is not passed in part: all four bytes or none.
            let Some(header) = buf[at..].first_chunk() else {
                return at;
            };
            if u16::from_be_bytes([header[0], header[1]]) == MESSAGE_SWITCHOVER_ACK {
                self.ack_withheld = true;
                return at;
            }
            self.header(*header);
            at += 4;
        }
        at
    }

    fn header(&mut self, [k0, k1, l0, l1]: [u8; 4]) {
        let kind = u16::from_be_bytes([k0, k1]);
        self.data_left = usize::from(u16::from_be_bytes([l0, l1]));
        // A bitmap follows outside the message's length.
        self.opaque |= kind == MESSAGE_RECV_BITMAP;
        self.shut = (kind == MESSAGE_SHUT).then_some(true);
    }

    fn data(&mut self, data: &[u8]) {
        self.data_left -= data.len();
        if let Some(zero) = &mut self.shut {
            *zero &= data.iter().all(|byte| *byte == 0);
            self.arrived |= *zero && self.data_left == 0;
        }
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
    fn the_destinations_last_word_is_heard_however_it_is_cut() {
        const SHUT: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
        const FAILED: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 1];
        for (last, arrives) in [(SHUT, true), (FAILED, false), (PONG, false)] {
            let bytes = [&PONG[..], &ACK[..], &PONG[..], &last[..]].concat();
            for cut in 0..=bytes.len() {
                let mut path = ReturnPath::new(true);
                let held = path.passable(&bytes);
                assert_eq!((held, path.arrived()), (8, false));
                path.release();
                let (first, second) = bytes[held..].split_at(cut.min(bytes.len() - held));
                assert_eq!(path.passable(first), first.len(), "cut at {cut}");
                assert_eq!(path.passable(second), second.len(), "cut at {cut}");
                assert_eq!(path.arrived(), arrives, "cut at {cut}");
            }
        }
        // One that was never held.
        let mut path = ReturnPath::new(false);
        path.passable(&[&ACK[..], &SHUT[..7]].concat());
        assert!(!path.arrived());
        path.passable(&SHUT[7..]);
        assert!(path.arrived());
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
