//! The fixed header in front of every frame.
//!
//! Must not: change its layout, ever: a peer of any version must be able to read it far
//! enough to refuse.

use crate::{BODY_BYTES_MAX, VERSION, WireError};

/// Bytes of a header: "vmga", u8 version, u8 kind, u16 zero, u32 channel, u32 body length.
pub const HEADER_BYTES: usize = 16;
const MAGIC: [u8; 4] = *b"vmga";

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, max $max:expr;)*) => {
        /// The kind of a frame. Numbers are never reused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// Every kind there is.
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Kind::$name),)* _ => None }
            }

            /// The longest body this kind may have.
            pub fn body_bytes_max(self) -> usize {
                match self { $(Kind::$name => $max,)* }
            }
        }
    };
}

kinds! {
    /// Source opens a session.
    Hello = 1, max BODY_BYTES_MAX;
    /// Destination accepts it.
    Welcome = 2, max 64;
    /// Either side ends the session and says why.
    Refuse = 3, max 2048;
    /// Source: QEMU has opened a connection.
    Open = 4, max 16;
    /// Source: a piece of a migration stream.
    Data = 5, max BODY_BYTES_MAX;
    /// Either: so many bytes of a channel were delivered, as many more may be sent.
    Credit = 6, max 16;
    /// Either: this direction of a channel has ended in order.
    Finish = 7, max 0;
    /// Either: a channel broke.
    Reset = 8, max 2048;
    /// Destination: a piece of a return path.
    Return = 9, max 128 * 1024;
    /// Source asks how a member's migration ended.
    OutcomeRequest = 10, max 16;
    /// Destination answers.
    Outcome = 11, max 64;
    /// Source: the job is over.
    Goodbye = 12, max 0;
    /// Either, now and then: the session is alive though nothing else is sent.
    Alive = 13, max 0;
    /// Source: this connection is one more of a session.
    Join = 14, max 64;
    /// Source: the next DATA frame is on another connection.
    Elsewhere = 15, max 16;
    /// Source: pages for the window that no stream has asked for yet.
    Stage = 16, max BODY_BYTES_MAX;
    /// Source: which of these contents are there already?
    Offer = 17, max 128 * 1024;
    /// Destination: those.
    Have = 18, max 1024;
    /// Destination: contents that are in the window from the beginning.
    Announce = 19, max 128 * 1024;
    /// Source: this connection is to go on as one to the destination's libvirt.
    Libvirt = 20, max 0;
    /// Destination: it does from here on.
    Connected = 21, max 0;
    /// Source: this connection is to go on as one to the destination's vmgangd itself.
    Control = 22, max 0;
}

/// What stands in front of a frame's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    pub kind: Kind,
    /// The channel the frame is about; 0 where it is about none.
    pub channel: u32,
    /// Bytes of body that follow.
    pub body_len: u32,
}

impl FrameHeader {
    /// The header as it is sent.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let [m0, m1, m2, m3] = MAGIC;
        let [c0, c1, c2, c3] = self.channel.to_le_bytes();
        let [l0, l1, l2, l3] = self.body_len.to_le_bytes();
        let kind = self.kind as u8;
        [
            m0, m1, m2, m3, VERSION, kind, 0, 0, c0, c1, c2, c3, l0, l1, l2, l3,
        ]
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_bytes());
    }

    /// Reads a header; the body length is checked against the kind's maximum.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let [
            m0,
            m1,
            m2,
            m3,
            version,
            kind,
            z0,
            z1,
            c0,
            c1,
            c2,
            c3,
            l0,
            l1,
            l2,
            l3,
        ] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(WireError::Magic);
        }
        if version != VERSION {
            return Err(WireError::Version { theirs: version });
        }
        if [z0, z1] != [0, 0] {
            return Err(WireError::Value("reserved"));
        }
        let kind = Kind::from_number(kind).ok_or(WireError::UnknownKind(kind))?;
        let body_len = u32::from_le_bytes([l0, l1, l2, l3]);
        if body_len as usize > kind.body_bytes_max() {
            return Err(WireError::Length {
                kind,
                len: body_len as usize,
            });
        }
        Ok(Self {
            kind,
            channel: u32::from_le_bytes([c0, c1, c2, c3]),
            body_len,
        })
    }
}
