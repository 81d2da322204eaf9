//! A client for one kind of request, GET of a file over a kept connection, over any byte stream.

use std::io::{self, BufRead, Write};

/// The longest file that is accepted from a server.
const BODY_BYTES_MAX: usize = 16 << 20;

/// What a server answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// The server will close the connection.
    pub closes: bool,
}

pub fn write_get(out: &mut impl Write, path: &str) -> io::Result<()> {
    // One write, so that it is one packet.
    out.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes())
}

/// Reads one answer with a Content-Length; the file goes into `body`.
pub fn read_answer(input: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<Answer> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut line = String::new();
    input.read_line(&mut line)?;
    let status = line
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3))
        .and_then(|status| status.parse().ok())
        .ok_or_else(|| bad("no HTTP answer"))?;
    let (mut length, mut closes) = (None, false);
    loop {
        line.clear();
        if input.read_line(&mut line)? == 0 {
            return Err(bad("the server closed the connection inside an answer"));
        }
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.parse::<usize>().ok();
        } else if name.eq_ignore_ascii_case("connection") {
            closes = value.eq_ignore_ascii_case("close");
        }
    }
    let length = length
        .filter(|length| *length <= BODY_BYTES_MAX)
        .ok_or_else(|| bad("an answer of no sensible length"))?;
    body.resize(length, 0);
    input.read_exact(body)?;
    Ok(Answer { status, closes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_to_its_end_and_no_further() {
        let mut input: &[u8] = b"HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Length: 3\r\n\
                                 Connection: close\r\n\r\nabcHTTP";
        let mut body = Vec::new();
        let answer = read_answer(&mut input, &mut body).expect("an answer");
        assert_eq!((answer.status, answer.closes), (200, true));
        assert_eq!((body.as_slice(), input), (&b"abc"[..], &b"HTTP"[..]));
    }

    #[test]
    fn what_is_cut_or_unbounded_is_an_error() {
        for wrong in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab",
        ] {
            let answer = read_answer(&mut wrong.as_bytes(), &mut Vec::new());
            assert!(answer.is_err(), "{wrong:?}");
        }
    }
}
