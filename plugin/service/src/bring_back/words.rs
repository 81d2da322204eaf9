//! What two vmgangd say to each other about members that are to come back: lines of JSON, see docs/protocol.md.
//! Must not: do any of it.

use std::collections::HashMap;
use std::io;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use uuid::Uuid;
use zbus::{OwnedVariant, Variant};

use crate::error::ServiceError;
use crate::job::JobView;
use crate::report::Report;

/// Names of 1024 members and some options.
pub(super) const REQUEST_BYTES_MAX: u64 = 256 * 1024;
/// The state of 1024 members.
pub(super) const ANSWER_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// These are to come back.
    Return {
        /// What had brought them, for the log.
        job: String,
        gang: Option<String>,
        members: Vec<Wanted>,
        /// The host that asks, as the other one reaches it.
        destination: String,
        options: HashMap<String, Choice>,
    },
    Abort,
    SetBandwidth(Option<u64>),
}

/// A member as it was when it left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wanted {
    pub uuid: Uuid,
    pub name: String,
}

/// The value of an option.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Choice {
    Flag(bool),
    Number(u64),
    Text(String),
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// Nothing has changed. A sentence for the person who asked.
    Refused(String),
    Started {
        job: Uuid,
        /// What is not as it was when the members left.
        changes: Vec<String>,
    },
    View(Box<JobView>),
    Ended(Box<Report>),
}

impl Choice {
    pub(super) fn read(name: &str, value: &OwnedVariant) -> Result<Choice, ServiceError> {
        let value: &Variant<'_> = value;
        let value = value.clone();
        if let Ok(flag) = bool::try_from(value.clone()) {
            return Ok(Choice::Flag(flag));
        }
        if let Ok(number) = u64::try_from(value.clone()) {
            return Ok(Choice::Number(number));
        }
        String::try_from(value).map(Choice::Text).map_err(|_| {
            ServiceError::InvalidOption(format!(
                "the option {name} is neither a flag (b), a number (t) nor a text (s)"
            ))
        })
    }

    pub(super) fn into_variant(self) -> Result<OwnedVariant, ServiceError> {
        let value = match self {
            Choice::Flag(flag) => Variant::from(flag),
            Choice::Number(number) => Variant::from(number),
            Choice::Text(text) => Variant::from(text),
        };
        OwnedVariant::try_from(value)
            .map_err(|error| ServiceError::InvalidOption(error.to_string()))
    }
}

pub(super) async fn say(
    writer: &mut (impl AsyncWrite + Unpin),
    what: &impl Serialize,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    writer.flush().await
}

/// The next line, of so many bytes at most; `None` at the end. Not cancel-safe.
pub(super) async fn hear<T: DeserializeOwned>(
    reader: &mut (impl AsyncBufRead + Unpin),
    bytes_max: u64,
) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    let mut bounded = (&mut *reader).take(bytes_max);
    if bounded.read_until(b'\n', &mut line).await? == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        return Err(io::Error::other("a line is cut off or too long"));
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_bounded_and_whole() {
        let said = Order::SetBandwidth(Some(5));
        let mut bytes = Vec::new();
        say(&mut bytes, &said).await.expect("written");
        let read = hear::<Order>(&mut &*bytes, 100).await.expect("read");
        assert_eq!(read, Some(said));
        assert!(hear::<Order>(&mut &*bytes, 5).await.is_err(), "too long");
        assert!(
            hear::<Order>(&mut &bytes[..5], 100).await.is_err(),
            "cut off"
        );
        assert!(
            hear::<Order>(&mut &b"{}\n"[..], 100).await.is_err(),
            "nothing"
        );
        assert_eq!(
            hear::<Order>(&mut &b""[..], 100).await.expect("the end"),
            None
        );
    }
}
