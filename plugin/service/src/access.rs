//! What peers may do here: the names in their certificates against lists in the configuration, which
//! can be replaced while the daemon runs.
//!
//! Must not: read files, or judge certificates; the engine's TLS has done that.

use std::sync::{PoisonError, RwLock};

use vmgang_engine::PeerName;
use wildmatch::WildMatch;

use crate::peers::describe;

/// Names in certificates, with `*` as a wildcard; case does not matter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowLists {
    /// Who may send guests here; empty is everybody whom our authority signed.
    pub peers: Vec<String>,
    /// Who of them may use this host's libvirt; empty is nobody.
    pub libvirt: Vec<String>,
}

/// The lists as they are now.
#[derive(Debug, Default)]
pub struct Access {
    lists: RwLock<AllowLists>,
}

impl Access {
    pub fn new(lists: AllowLists) -> Self {
        Self {
            lists: RwLock::new(lists),
        }
    }

    /// From now on these. Returns whether that changes anything.
    pub fn replace(&self, lists: AllowLists) -> bool {
        let mut now = self.lists.write().unwrap_or_else(PoisonError::into_inner);
        let changes = *now != lists;
        *now = lists;
        changes
    }

    /// Whether a peer may come at all. The error is a sentence for the person who sent it.
    pub fn check_peer(&self, peer: &PeerName) -> Result<(), String> {
        let lists = self.lists.read().unwrap_or_else(PoisonError::into_inner);
        if lists.peers.is_empty() || has_name(&lists.peers, peer) {
            return Ok(());
        }
        Err(format!(
            "the peer {} is not allowed here; add a name of its certificate to allow_peers in the destination's vmgang.toml",
            describe(peer)
        ))
    }

    /// Whether a peer may have this host do something, likewise: who may use its libvirt could do as much.
    pub fn check_control(&self, peer: &PeerName) -> Result<(), String> {
        self.check_peer(peer)?;
        let lists = self.lists.read().unwrap_or_else(PoisonError::into_inner);
        if has_name(&lists.libvirt, peer) {
            return Ok(());
        }
        Err(format!(
            "the peer {} may not ask for that; add a name of its certificate to allow_libvirt in vmgang.toml there, or run `vmgang migrate` there",
            describe(peer)
        ))
    }

    /// Whether a peer may use this host's libvirt, likewise.
    pub fn check_libvirt(&self, peer: &PeerName) -> Result<(), String> {
        self.check_peer(peer)?;
        let lists = self.lists.read().unwrap_or_else(PoisonError::into_inner);
        if has_name(&lists.libvirt, peer) {
            return Ok(());
        }
        let what = match peer.certificate_names.is_empty() {
            true => "it has shown no certificate, because tls = false",
            false => {
                "add a name of its certificate to allow_libvirt in the destination's vmgang.toml, which gives it full control of the libvirt there"
            }
        };
        Err(format!(
            "the peer {} may not use the destination's libvirt; {what}; or name a libvirt URI such as qemu+tls://HOST/system instead of a host",
            describe(peer)
        ))
    }
}

fn has_name(patterns: &[String], peer: &PeerName) -> bool {
    peer.certificate_names.iter().any(|name| {
        let name = name.to_ascii_lowercase();
        patterns
            .iter()
            .any(|pattern| WildMatch::new(&pattern.to_ascii_lowercase()).matches(&name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(names: &[&str]) -> PeerName {
        PeerName {
            address: "[::ffff:10.0.0.1]:5000".parse().expect("an address"),
            certificate_names: names.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    fn access(peers: &[&str], libvirt: &[&str]) -> Access {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Access::new(AllowLists {
            peers: owned(peers),
            libvirt: owned(libvirt),
        })
    }

    #[test]
    fn names_and_globs() {
        let all = access(&[], &[]);
        assert!(all.check_peer(&peer(&[])).is_ok());
        let some = access(&["*.rack1.example", "host-b"], &[]);
        assert!(some.check_peer(&peer(&["Host-B"])).is_ok());
        assert!(some.check_peer(&peer(&["x", "a.rack1.example"])).is_ok());
        let error = some.check_peer(&peer(&["host-bb"])).expect_err("refused");
        assert!(
            error.contains("10.0.0.1 (host-bb)") && error.contains("allow_peers"),
            "{error}"
        );
        assert!(
            some.check_peer(&peer(&[])).is_err(),
            "no certificate, no name"
        );
    }

    #[test]
    fn libvirt_is_for_those_who_are_named_twice() {
        let a = peer(&["a"]);
        let error = access(&[], &[]).check_libvirt(&a).expect_err("nobody");
        assert!(
            error.contains("10.0.0.1 (a)") && error.contains("allow_libvirt"),
            "{error}"
        );
        assert!(access(&[], &["*"]).check_libvirt(&a).is_ok());
        let error = access(&["b"], &["*"]).check_libvirt(&a).expect_err("not a");
        assert!(error.contains("allow_peers"), "{error}");
        let plain = access(&[], &["*"]).check_libvirt(&peer(&[]));
        let error = plain.expect_err("whoever that is");
        assert!(error.contains("tls = false"), "{error}");
    }

    #[test]
    fn a_name_that_is_taken_away_is_refused_from_then_on() {
        let access = access(&["a", "b"], &["a"]);
        assert!(access.check_libvirt(&peer(&["a"])).is_ok());
        let lists = AllowLists {
            peers: vec!["b".into()],
            libvirt: vec!["a".into()],
        };
        assert!(access.replace(lists.clone()));
        assert!(access.check_peer(&peer(&["a"])).is_err());
        assert!(!access.replace(lists), "the same again");
    }
}
