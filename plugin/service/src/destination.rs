//! The destination a user names: a libvirt URI with a host part, or a bare host name.
//! Pure parsing; reaching it is preflight's business.

use std::fmt;

use vmgang_engine::{DEFAULT_PORT, PeerAddress};

/// Where a gang is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The libvirt URI, as the source's libvirtd will open it.
    pub uri: String,
    /// Its host part, without brackets.
    pub host: String,
}

impl Destination {
    /// Reads a DESTURI, or says what is wrong with it.
    pub fn parse(text: &str) -> Result<Destination, String> {
        let bad = |reason: &str| {
            Err(format!(
                "the destination '{text}' {reason}; write a libvirt URI such as qemu+tls://HOST/system, or a host name"
            ))
        };
        if text.is_empty() {
            return bad("is empty");
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return bad("contains white space");
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return match host_and_port(text) {
                Some((host, None)) => {
                    Destination::at(format!("qemu+tls://{}/system", bracketed(host)), host)
                }
                _ => bad("is neither a URI nor a host name"),
            };
        };
        if scheme != "qemu" && !scheme.starts_with("qemu+") {
            return bad("is not a QEMU host");
        }
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let address = authority
            .rsplit_once('@')
            .map_or(authority, |(_, address)| address);
        if address.is_empty() {
            return bad("has no host part");
        }
        match host_and_port(address) {
            Some((host, _)) => Destination::at(text.to_owned(), host),
            None => bad("has an invalid host part"),
        }
    }

    fn at(uri: String, host: &str) -> Result<Destination, String> {
        // libvirt refuses these as well: it would migrate to itself.
        if matches!(host, "127.0.0.1" | "::1")
            || host == "localhost"
            || host.starts_with("localhost.")
        {
            return Err(format!(
                "the destination host '{host}' is this host itself; name the other host"
            ));
        }
        Ok(Destination {
            uri,
            host: host.to_owned(),
        })
    }

    /// The vmgangd to talk to, when the user names none.
    pub fn peer(&self) -> PeerAddress {
        PeerAddress {
            host: self.host.clone(),
            port: DEFAULT_PORT,
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}

/// Splits `HOST`, `HOST:PORT`, `[V6]` and `[V6]:PORT`.
fn host_and_port(address: &str) -> Option<(&str, Option<u16>)> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<std::net::Ipv6Addr>().ok()?;
            let port = if port.is_empty() {
                None
            } else {
                Some(port.strip_prefix(':')?)
            };
            (host, port)
        }
        None => {
            let (host, port) = match address.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (address, None),
            };
            let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            if host.is_empty() || host.starts_with('-') || !host.chars().all(named) {
                return None;
            }
            (host, port)
        }
    };
    match port {
        Some(port) => Some((host, Some(port.parse().ok()?))),
        None => Some((host, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_and_host_names() {
        let cases = [
            ("qemu+tls://b/system", "qemu+tls://b/system", "b"),
            (
                "qemu+ssh://root@b.example.org:22/system",
                "qemu+ssh://root@b.example.org:22/system",
                "b.example.org",
            ),
            (
                "qemu+tcp://10.0.0.2/system?x=1",
                "qemu+tcp://10.0.0.2/system?x=1",
                "10.0.0.2",
            ),
            (
                "qemu+tls://[fd00::2]:16514/system",
                "qemu+tls://[fd00::2]:16514/system",
                "fd00::2",
            ),
            ("qemu://b", "qemu://b", "b"),
            ("host-b", "qemu+tls://host-b/system", "host-b"),
            ("[fd00::2]", "qemu+tls://[fd00::2]/system", "fd00::2"),
        ];
        for (text, uri, host) in cases {
            let destination = Destination::parse(text).expect(text);
            assert_eq!(
                (destination.uri.as_str(), destination.host.as_str()),
                (uri, host)
            );
            assert_eq!(destination.peer().port, 16520);
        }
    }

    #[test]
    fn refuses_what_names_no_other_host() {
        let cases = [
            ("", "empty"),
            ("qemu:///system", "no host part"),
            ("qemu+unix:///system?socket=/run/x", "no host part"),
            ("qemu+ssh://root@/system", "no host part"),
            ("qemu+tls://localhost/system", "itself"),
            ("localhost", "itself"),
            ("qemu+tcp://[::1]/system", "itself"),
            ("xen+tls://b/system", "not a QEMU host"),
            ("test:///default", "not a QEMU host"),
            ("qemu+tls://b:port/system", "invalid host"),
            ("qemu+tls://b c/system", "white space"),
            ("b:16520", "neither"),
            ("b/system", "neither"),
            ("-oProxyCommand=x", "neither"),
            ("qemu+ssh://-oProxyCommand=x/system", "invalid host"),
        ];
        for (text, expected) in cases {
            let error = Destination::parse(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
