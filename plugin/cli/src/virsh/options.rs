//! Every option of virsh's `migrate` (of libvirt 9.0 to 11.3), and what becomes of it with `--gang`.
//! Pure tables. An option that is in none of them is unknown, and refused as such.

/// What an option is followed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    Nothing,
    Text,
    Number,
}
use Takes::{Nothing, Number, Text};

impl Takes {
    /// As virsh's help writes it behind the option.
    pub fn placeholder(self) -> &'static str {
        match self {
            Nothing => "",
            Text => " <string>",
            Number => " <number>",
        }
    }
}

/// An option that is honoured.
pub struct Honoured {
    pub name: &'static str,
    pub takes: Takes,
    /// For the help.
    pub what: &'static str,
}

const fn honoured(name: &'static str, takes: Takes, what: &'static str) -> Honoured {
    Honoured { name, takes, what }
}

/// In virsh's order.
pub const HONOURED: &[Honoured] = &[
    honoured(
        "domain",
        Text,
        "domain name, id or uuid; all running members of its gang are migrated",
    ),
    honoured(
        "desturi",
        Text,
        "connection URI of the destination host as seen from this host, or its name alone, whose libvirt is then reached over its vmgangd",
    ),
    honoured("gang", Nothing, "migrate the whole gang"),
    honoured(
        "live",
        Nothing,
        "live migration; a gang is always migrated live",
    ),
    honoured("p2p", Nothing, "peer-2-peer migration; a gang always is"),
    honoured("persistent", Nothing, "persist VMs on destination"),
    honoured("undefinesource", Nothing, "undefine VMs on source"),
    honoured(
        "suspend",
        Nothing,
        "do not restart the domains on the destination host",
    ),
    honoured(
        "change-protection",
        Nothing,
        "prevent any configuration changes to domains until migration ends; libvirt always does",
    ),
    honoured(
        "unsafe",
        Nothing,
        "force migration even if it may be unsafe",
    ),
    honoured(
        "verbose",
        Nothing,
        "display the progress of migration, of the gang as a whole",
    ),
    honoured(
        "auto-converge",
        Nothing,
        "force convergence during live migration",
    ),
    honoured(
        "postcopy",
        Nothing,
        "enable post-copy migration; the gang goes to it if a member does not converge, or by `vmgang postcopy JOB`",
    ),
    honoured(
        "postcopy-after-precopy",
        Nothing,
        "automatically switch to post-copy migration after one pass of pre-copy",
    ),
    honoured(
        "postcopy-resume",
        Nothing,
        "resume failed post-copy migration",
    ),
    honoured(
        "migrateuri",
        Text,
        "tcp://HOST[:PORT], where the destination's vmgangd listens; usually can be omitted",
    ),
    honoured(
        "timeout",
        Number,
        "run action specified by --timeout-* option (suspend by default) if the gang is not ready to switch over by then (in seconds)",
    ),
    honoured(
        "timeout-suspend",
        Nothing,
        "suspend the guests after timeout",
    ),
    honoured(
        "timeout-postcopy",
        Nothing,
        "switch to post-copy after timeout",
    ),
    honoured(
        "tls",
        Nothing,
        "refuse to migrate unless the connection to the destination's vmgangd uses TLS",
    ),
    honoured(
        "parallel",
        Nothing,
        "enable parallel migration of each member's memory",
    ),
    honoured(
        "parallel-connections",
        Number,
        "number of connections of each member for parallel migration",
    ),
    honoured(
        "bandwidth",
        Number,
        "migration bandwidth limit in MiB/s, of the gang as a whole",
    ),
    honoured("help", Nothing, "this help"),
];

/// Options without a dash before them fill these, in order.
pub const POSITIONAL: [&str; 6] = [
    "domain",
    "desturi",
    "migrateuri",
    "graphicsuri",
    "listen-address",
    "dname",
];

/// Options that are refused, and why.
pub struct Refused {
    pub why: &'static str,
    pub options: &'static [(&'static str, Takes)],
}

pub const REFUSED: &[Refused] = &[
    Refused {
        why: "running guests are migrated; members that are shut off stay where they are",
        options: &[("offline", Nothing)],
    },
    Refused {
        why: "the memory always goes from one vmgangd to the other, and libvirt's control peer to peer",
        options: &[("direct", Nothing), ("tunnelled", Nothing)],
    },
    Refused {
        why: "disks are not moved; use storage that both hosts share",
        options: &[
            ("copy-storage-all", Nothing),
            ("copy-storage-inc", Nothing),
            ("copy-storage-synchronous-writes", Nothing),
            ("migrate-disks", Text),
            ("migrate-disks-detect-zeroes", Text),
            ("disks-port", Number),
            ("disks-uri", Text),
        ],
    },
    Refused {
        why: "vmgang compresses by itself, and could not find equal pages in what QEMU has compressed",
        options: &[
            ("compressed", Nothing),
            ("comp-methods", Text),
            ("comp-mt-level", Number),
            ("comp-mt-threads", Number),
            ("comp-mt-dthreads", Number),
            ("comp-xbzrle-cache", Number),
            ("comp-zlib-level", Number),
            ("comp-zstd-level", Number),
        ],
    },
    Refused {
        why: "QEMU sends to vmgangd over a unix socket, which has neither",
        options: &[("rdma-pin-all", Nothing), ("zerocopy", Nothing)],
    },
    Refused {
        why: "libvirt is not asked to abort at errors of the guests' disks",
        options: &[("abort-on-error", Nothing)],
    },
    Refused {
        why: "it is about one domain, and a gang has several",
        options: &[
            ("graphicsuri", Text),
            ("dname", Text),
            ("xml", Text),
            ("persistent-xml", Text),
        ],
    },
    Refused {
        why: "the destination QEMU listens on a unix socket of vmgang; --migrateuri says where vmgangd is",
        options: &[("listen-address", Text)],
    },
    Refused {
        why: "how strongly guests are slowed down is left to QEMU",
        options: &[
            ("auto-converge-initial", Number),
            ("auto-converge-increment", Number),
        ],
    },
    Refused {
        why: "--bandwidth is the limit of the whole job, post-copy included",
        options: &[("postcopy-bandwidth", Number)],
    },
    Refused {
        why: "the certificate has to have the name that --migrateuri or the destination's URI has",
        options: &[("tls-destination", Text)],
    },
    Refused {
        why: "vmgang measures it, and tells QEMU",
        options: &[("available-switchover-bandwidth", Number)],
    },
];

/// An option by its name, and why it is refused if it is.
pub fn find(name: &str) -> Option<(&'static str, Takes, Option<&'static str>)> {
    let honoured = HONOURED.iter().find(|option| option.name == name);
    if let Some(option) = honoured {
        return Some((option.name, option.takes, None));
    }
    REFUSED.iter().find_map(|refused| {
        let (name, takes) = refused
            .options
            .iter()
            .find(|(refused, _)| *refused == name)?;
        Some((*name, *takes, Some(refused.why)))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What virsh says of itself: `virsh help migrate`.
    const HELP: [&str; 2] = [
        include_str!("../../tests/virsh/help-migrate-9.0.txt"),
        include_str!("../../tests/virsh/help-migrate-11.3.txt"),
    ];

    fn virshs_own(help: &str) -> Vec<(String, Takes)> {
        let (_, options) = help.split_once("OPTIONS").expect("a list of options");
        let option = |line: &str| {
            let mut words = line.split_whitespace();
            let name = words.next()?.trim_matches(['[', ']']).strip_prefix("--")?;
            let takes = match words.next() {
                Some("<string>") => Text,
                Some("<number>") => Number,
                _ => Nothing,
            };
            Some((name.to_owned(), takes))
        };
        options.lines().filter_map(option).collect()
    }

    #[test]
    fn every_option_of_virsh_is_known() {
        let mut all = BTreeSet::new();
        for help in HELP {
            let options = virshs_own(help);
            assert!(options.len() > 45, "{options:?}");
            for (name, takes) in options {
                let found = find(&name).map(|(_, takes, _)| takes);
                assert_eq!(found, Some(takes), "{name}");
                all.insert(name);
            }
        }
        // And no other one, but for what virsh has with every command, and what this is about.
        let ours = HONOURED.iter().map(|option| option.name);
        let refused = REFUSED.iter().flat_map(|refused| refused.options);
        let more: Vec<&str> = ours
            .chain(refused.map(|(name, _)| *name))
            .filter(|name| !all.contains(*name))
            .collect();
        assert_eq!(more, ["gang", "help"]);
    }

    #[test]
    fn no_option_is_in_two_places() {
        let mut seen = BTreeSet::new();
        let honoured = HONOURED.iter().map(|option| option.name);
        let refused = REFUSED.iter().flat_map(|refused| refused.options);
        for name in honoured.chain(refused.map(|(name, _)| *name)) {
            assert!(seen.insert(name), "{name}");
        }
        assert!(POSITIONAL.iter().all(|name| seen.contains(name)));
    }
}
