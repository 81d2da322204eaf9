//! The destination a user names: a libvirt URI with a host part, or a bare host name.
//! Pure parsing; reaching it is preflight's business.

use std::fmt;

use vmgang_engine::{DEFAULT_PORT, PeerAddress};

/// Where a gang is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// As it was asked for, and is reported.
    pub name: String,
    /// The libvirt URI, as the source's libvirtd will open it. Without one its libvirt is reached over
    /// the peer, see `libvirt_access.rs`.
    pub uri: Option<String>,
    /// The host part, without brackets.
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
                Some((host, None)) => Destination::at(text, None, host),
                _ => bad("is neither a URI nor a host name"),
            };
        };
        // libvirtd, which is root, would run these programs for whoever may migrate.
        let query = rest.split_once('?').map_or("", |(_, query)| query);
        let runs = |name: &str| ["command", "netcat"].contains(&name);
        let names = query
            .split(['&', ';', '#'])
            .filter_map(|one| one.split('=').next());
        if scheme.ends_with("+ext") || names.map(decoded).any(|name| runs(&name)) {
            return bad("names a program to run");
        }
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
            Some((host, _)) => Destination::at(text, Some(text.to_owned()), host),
            None => bad("has an invalid host part"),
        }
    }

    fn at(name: &str, uri: Option<String>, host: &str) -> Result<Destination, String> {
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
            name: name.to_owned(),
            uri,
            host: host.to_owned(),
        })
    }

    /// How that host names a host from which this destination is named: the same words with that host in the place
    /// of the other.
    pub fn seen_from_there(&self, host: &str) -> String {
        let Some((scheme, rest)) = self.uri.as_deref().and_then(|uri| uri.split_once("://")) else {
            return host.to_owned();
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (format!("{user}@"), address),
            None => (String::new(), authority),
        };
        let port = match host_and_port(address) {
            Some((_, Some(port))) => format!(":{port}"),
            _ => String::new(),
        };
        let host = match host.contains(':') {
            true => format!("[{host}]"),
            false => host.to_owned(),
        };
        format!("{scheme}://{user}{host}{port}{path}")
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
        f.write_str(&self.name)
    }
}

/// A part of a query without its escapes. In lower case: who reads it may not mind.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        let escaped = match more {
            [high, low, ..] if *first == b'%' => std::str::from_utf8(&[*high, *low])
                .ok()
                .and_then(|hex| u8::from_str_radix(hex, 16).ok()),
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = &more[if escaped.is_some() { 2 } else { 0 }..];
    }
    String::from_utf8_lossy(&bytes).to_ascii_lowercase()
}

/// How a person asks where a domain is at a destination of that name.
pub(crate) fn domstate_there(destination: &str, domain: &str) -> String {
    match destination.contains("://") {
        true => format!("`virsh -c {destination} domstate {domain}`"),
        false => format!("`virsh domstate {domain}` on {destination}"),
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
    fn the_way_back_is_named_like_the_way_there() {
        for (there, back) in [
            ("b", "a"),
            ("qemu+tls://b/system", "qemu+tls://a/system"),
            (
                "qemu+ssh://root@b:2222/system?no_verify=1",
                "qemu+ssh://root@a:2222/system?no_verify=1",
            ),
            ("qemu+tls://[fd00::2]/system", "qemu+tls://a/system"),
        ] {
            let there = Destination::parse(there).expect(there);
            assert_eq!(there.seen_from_there("a"), back);
        }
        let there = Destination::parse("qemu+tls://b/system").expect("a destination");
        assert_eq!(
            there.seen_from_there("fd00::1"),
            "qemu+tls://[fd00::1]/system"
        );
    }

    #[test]
    fn uris_and_host_names() {
        let cases = [
            ("qemu+tls://b/system", true, "b"),
            (
                "qemu+ssh://root@b.example.org:22/system",
                true,
                "b.example.org",
            ),
            ("qemu+tcp://10.0.0.2/system?x=1", true, "10.0.0.2"),
            ("qemu+tls://[fd00::2]:16514/system", true, "fd00::2"),
            ("qemu://b", true, "b"),
            ("host-b", false, "host-b"),
            ("[fd00::2]", false, "fd00::2"),
        ];
        for (text, is_uri, host) in cases {
            let destination = Destination::parse(text).expect(text);
            assert_eq!(destination.uri.as_deref(), is_uri.then_some(text));
            assert_eq!((&*destination.name, &*destination.host), (text, host));
            assert_eq!(destination.peer().port, 16520);
        }
    }

    #[test]
    fn what_to_ask_there_fits_the_destination() {
        assert_eq!(
            domstate_there("qemu+ssh://b/system", "vm"),
            "`virsh -c qemu+ssh://b/system domstate vm`"
        );
        assert_eq!(domstate_there("b", "vm"), "`virsh domstate vm` on b");
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
            ("qemu+ext://b/system?command=/tmp/x", "program"),
            ("qemu+ssh://b/system?no_tty=1&command=/tmp/x", "program"),
            ("qemu+ssh://b/system?c%6Fmmand=/tmp/x", "program"),
            ("qemu+ssh://b/system?x=1;netcat=/tmp/x", "program"),
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
