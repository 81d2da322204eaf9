//! The part of redis's protocol (RESP 2) that SET and GET need, over any byte stream.

use std::io::{self, BufRead, Write};

/// The longest value that is accepted from a server.
const VALUE_BYTES_MAX: usize = 1 << 20;

/// What a server answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// A status such as `OK`.
    Status,
    /// A value; its bytes are in the buffer that was given.
    Value,
    /// There is no such key.
    Nil,
}

/// Writes one command of any number of words.
pub fn write_command(out: &mut impl Write, words: &[&[u8]]) -> io::Result<()> {
    write!(out, "*{}\r\n", words.len())?;
    for word in words {
        write!(out, "${}\r\n", word.len())?;
        out.write_all(word)?;
        out.write_all(b"\r\n")?;
    }
    Ok(())
}

/// Reads one reply; a value's bytes go into `value`.
pub fn read_reply(input: &mut impl BufRead, value: &mut Vec<u8>) -> io::Result<Reply> {
    let mut line = String::new();
    input.read_line(&mut line)?;
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let text = line
        .strip_suffix("\r\n")
        .ok_or_else(|| bad("the server closed the connection"))?;
    match text.split_at_checked(1) {
        Some(("+", _)) => Ok(Reply::Status),
        Some(("$", "-1")) => Ok(Reply::Nil),
        Some(("$", length)) => {
            let length = length
                .parse::<usize>()
                .ok()
                .filter(|length| *length <= VALUE_BYTES_MAX)
                .ok_or_else(|| bad("a value of no sensible length"))?;
            value.resize(length, 0);
            input.read_exact(value)?;
            let mut end = [0; 2];
            input.read_exact(&mut end)?;
            if end == *b"\r\n" {
                Ok(Reply::Value)
            } else {
                Err(bad("a value without an end"))
            }
        }
        _ => Err(bad(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_written_with_its_lengths() {
        let mut out = Vec::new();
        write_command(&mut out, &[b"SET", b"k", b"a\r\nb"]).expect("a vector");
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\na\r\nb\r\n");
    }

    #[test]
    fn replies_are_read_one_after_the_other() {
        let mut input: &[u8] = b"+OK\r\n$4\r\na\r\nb\r\n$-1\r\n";
        let mut value = Vec::new();
        let mut next = || read_reply(&mut input, &mut value).expect("a reply");
        assert_eq!(
            (next(), next(), next()),
            (Reply::Status, Reply::Value, Reply::Nil)
        );
        assert_eq!(value, b"a\r\nb");
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for wrong in [
            "",
            "+OK",
            "-ERR no\r\n",
            "$9999999999\r\n",
            "$1\r\nabc",
            ":1\r\n",
        ] {
            let reply = read_reply(&mut wrong.as_bytes(), &mut Vec::new());
            assert!(reply.is_err(), "{wrong:?}");
        }
    }
}
