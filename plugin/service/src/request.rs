//! What a caller asks of `Migrate`: the gang, the destination and the options, checked.
//! Pure: the D-Bus dictionary in, a typed request or a refusal by name out.

use std::collections::HashMap;
use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use vmgang_engine::{PeerAddress, Techniques};
use vmgang_libvirt::{DomainInfo, Membership};
use zbus::{OwnedVariant, Variant};

use crate::destination::Destination;
use crate::error::ServiceError;
use crate::policy::{CONCURRENCY, OnFailure, OnStall, OnTimeout, Policy, Switchover};

const MIB: u64 = 1 << 20;
/// libvirtd serves 20 calls at a time unless it is told otherwise, a migration is one to its end,
/// and without room for others even an abort hangs.
const CONCURRENCY_MAX: usize = 16;
/// More connections than this help no guest.
const PARALLEL_MAX: u8 = 32;

/// Which domains are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    Gang(String),
    Domains(Vec<String>),
    All,
}

/// How many connections of QEMU carry a member's pages, beside its main one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parallel {
    /// As it suits this host's QEMU.
    AsSuits,
    /// Pages go through the main connection.
    No,
    Connections(NonZeroU8),
}

/// A checked request to migrate.
#[derive(Debug, Clone)]
pub struct MigrateRequest {
    pub selection: Selection,
    pub destination: Destination,
    pub peer: PeerAddress,
    pub bandwidth_bytes_per_s: Option<u64>,
    /// From the start to the release.
    pub timeout: Option<Duration>,
    pub persistent: bool,
    pub undefine_source: bool,
    /// Who is persistent here becomes so there, and is undefined here. No option: those who come back do.
    pub as_they_are: bool,
    pub suspend: bool,
    pub policy: Policy,
    /// How members are let go was said, and not only taken for granted.
    pub switchover_asked: bool,
    /// QEMU may slow all guests down from the start.
    pub auto_converge: bool,
    pub parallel: Parallel,
    /// Guests give up what memory they do not need before they move.
    pub balloon: bool,
    /// Also where libvirt cannot tell that disks are safe.
    pub unsafe_disks: bool,
    /// Go on where a broken post-copy has stopped.
    pub post_copy_resume: bool,
    /// Not at all unless the peer is talked to over TLS.
    pub tls: bool,
    pub techniques: Techniques,
}

impl MigrateRequest {
    /// The gang's name, when a gang was meant.
    pub fn gang(&self) -> Option<&str> {
        match &self.selection {
            Selection::Gang(gang) => Some(gang),
            Selection::Domains(_) | Selection::All => None,
        }
    }

    pub fn parse(
        gang: &str,
        destination: &str,
        options: HashMap<String, OwnedVariant>,
    ) -> Result<MigrateRequest, ServiceError> {
        let mut options = Options(options);
        let domains: Option<Vec<String>> = options.take("domains", "an array of strings (as)")?;
        let all = options.flag("all")?;
        let selection = selection(gang, domains, all)?;
        let destination =
            Destination::parse(destination).map_err(ServiceError::InvalidDestination)?;
        let peer = peer(&mut options, &destination)?;
        refuse_storage(&mut options)?;
        let timeout = options.number("timeout")?;
        if timeout == Some(0) {
            return Err(ServiceError::InvalidOption(
                "the option timeout must be at least 1 second".into(),
            ));
        }
        let switchover = options.choice("switchover", &SWITCHOVERS)?;
        let post_copy_resume = options.flag("postcopy-resume")?;
        let policy = Policy {
            on_failure: options
                .choice("on-failure", &ON_FAILURES)?
                .unwrap_or_default(),
            on_stall: options.choice("on-stall", &ON_STALLS)?.unwrap_or_default(),
            on_timeout: on_timeout(&mut options, timeout.is_some())?,
            switchover: match post_copy_resume {
                // They have switched over long ago.
                true => Switchover::Free,
                false => switchover.unwrap_or_default(),
            },
            concurrency: concurrency(&mut options)?,
            post_copy: options.flag("postcopy")?,
        };
        if post_copy_resume && policy.can_post_copy() {
            return Err(ServiceError::InvalidOption(
                "the option postcopy-resume goes on with a post-copy; it does not go with postcopy, timeout-postcopy, or on-stall=postcopy".into(),
            ));
        }
        let techniques = match options.text("technique")? {
            Some(text) => text.parse().map_err(|error| {
                ServiceError::InvalidOption(format!(
                    "the option technique '{text}' is not valid: {error}"
                ))
            })?,
            None => Techniques::default(),
        };
        let request = MigrateRequest {
            selection,
            destination,
            peer,
            bandwidth_bytes_per_s: bandwidth(options.number("bandwidth")?.unwrap_or(0))?,
            timeout: timeout.map(Duration::from_secs),
            persistent: options.flag("persistent")?,
            undefine_source: options.flag("undefinesource")?,
            as_they_are: false,
            suspend: options.flag("suspend")?,
            policy,
            switchover_asked: switchover.is_some(),
            auto_converge: options.flag("auto-converge")?,
            parallel: parallel(&mut options)?,
            balloon: options.flag("balloon")?,
            unsafe_disks: options.flag("unsafe")?,
            post_copy_resume,
            tls: options.flag("tls")?,
            techniques,
        };
        options.finish(&MIGRATE_OPTIONS)?;
        Ok(request)
    }

    /// What can be told of the request only with its members.
    pub fn check_members(&self, members: usize) -> Result<(), ServiceError> {
        let concurrency = self.policy.concurrency.get();
        let held = self.policy.switchover != Switchover::Free && self.switchover_asked;
        if held && members > concurrency {
            return Err(ServiceError::InvalidOption(format!(
                "{members} members cannot switch over together or staggered while at most {concurrency} are under way at once (option concurrency, up to {CONCURRENCY_MAX}); leave the option switchover out, and each goes when it is ready"
            )));
        }
        Ok(())
    }
}

const SWITCHOVERS: [(&str, Switchover); 3] = [
    ("together", Switchover::Together),
    ("staggered", Switchover::Staggered),
    ("free", Switchover::Free),
];
const ON_FAILURES: [(&str, OnFailure); 2] = [
    ("abort", OnFailure::Abort),
    ("continue", OnFailure::Continue),
];
const ON_STALLS: [(&str, OnStall); 4] = [
    ("throttle", OnStall::Throttle),
    ("postcopy", OnStall::PostCopy),
    ("leave", OnStall::Leave),
    ("abort", OnStall::Abort),
];
/// All there are, to be named where another one is given.
const MIGRATE_OPTIONS: [&str; 24] = [
    "domains",
    "all",
    "peer",
    "bandwidth",
    "timeout",
    "timeout-suspend",
    "timeout-postcopy",
    "persistent",
    "undefinesource",
    "suspend",
    "on-failure",
    "on-stall",
    "switchover",
    "concurrency",
    "postcopy",
    "postcopy-resume",
    "parallel",
    "auto-converge",
    "balloon",
    "unsafe",
    "copy-storage-all",
    "copy-storage-inc",
    "tls",
    "technique",
];

/// Disks are not moved.
fn refuse_storage(options: &mut Options) -> Result<(), ServiceError> {
    for name in ["copy-storage-all", "copy-storage-inc"] {
        if options.flag(name)? {
            return Err(ServiceError::InvalidOption(format!(
                "the option {name} is refused: disks would go beside the tunnel, uncounted and not held for the gang; put them on storage that both hosts share, or copy them beforehand"
            )));
        }
    }
    Ok(())
}

fn on_timeout(options: &mut Options, timeout: bool) -> Result<OnTimeout, ServiceError> {
    let suspend = options.flag("timeout-suspend")?;
    let post_copy = options.flag("timeout-postcopy")?;
    let refuse = |text: &str| Err(ServiceError::InvalidOption(text.into()));
    match (suspend, post_copy) {
        (true, true) => refuse("give only one of the options timeout-suspend and timeout-postcopy"),
        (true, _) | (_, true) if !timeout => refuse(
            "the options timeout-suspend and timeout-postcopy say what the option timeout does; give that one, too",
        ),
        (true, false) => Ok(OnTimeout::Suspend),
        (false, true) => Ok(OnTimeout::PostCopy),
        (false, false) => Ok(OnTimeout::Abort),
    }
}

fn concurrency(options: &mut Options) -> Result<NonZeroUsize, ServiceError> {
    let Some(number) = options.number("concurrency")? else {
        return Ok(CONCURRENCY);
    };
    let members = usize::try_from(number).ok().and_then(NonZeroUsize::new);
    members
        .filter(|members| members.get() <= CONCURRENCY_MAX)
        .ok_or_else(|| {
            ServiceError::InvalidOption(format!(
                "the option concurrency is 1 to {CONCURRENCY_MAX}, not {number}: libvirtd serves 20 calls at a time, and an abort needs one, too"
            ))
        })
}

fn parallel(options: &mut Options) -> Result<Parallel, ServiceError> {
    match options.number("parallel")? {
        None => Ok(Parallel::AsSuits),
        Some(0) => Ok(Parallel::No),
        Some(number) => u8::try_from(number)
            .ok()
            .and_then(NonZeroU8::new)
            .filter(|connections| connections.get() <= PARALLEL_MAX)
            .map(Parallel::Connections)
            .ok_or_else(|| {
                ServiceError::InvalidOption(format!(
                    "the option parallel is 0 to {PARALLEL_MAX} connections, not {number}"
                ))
            }),
    }
}

/// How long a stage is kept unless it is said.
const STAGE_SECONDS: u64 = 3600;
/// Less is gone before anybody migrates, more is a mistake in writing.
const STAGE_SECONDS_ALLOWED: std::ops::RangeInclusive<u64> = 10..=7 * 24 * 3600;

/// A checked request to stage a gang's contents.
#[derive(Debug, Clone)]
pub struct PrepareRequest {
    pub gang: String,
    pub destination: Destination,
    pub peer: PeerAddress,
    pub bandwidth_bytes_per_s: Option<u64>,
    /// How long the stage is kept.
    pub time: Duration,
}

impl PrepareRequest {
    pub fn parse(
        gang: &str,
        destination: &str,
        options: HashMap<String, OwnedVariant>,
    ) -> Result<PrepareRequest, ServiceError> {
        let mut options = Options(options);
        Membership::check_gang_name(gang).map_err(ServiceError::InvalidOption)?;
        let destination =
            Destination::parse(destination).map_err(ServiceError::InvalidDestination)?;
        let peer = peer(&mut options, &destination)?;
        let seconds = options.number("for")?.unwrap_or(STAGE_SECONDS);
        if !STAGE_SECONDS_ALLOWED.contains(&seconds) {
            return Err(ServiceError::InvalidOption(format!(
                "the option for is from {} seconds to 7 days, not {seconds} seconds",
                STAGE_SECONDS_ALLOWED.start()
            )));
        }
        let request = PrepareRequest {
            gang: gang.to_owned(),
            destination,
            peer,
            bandwidth_bytes_per_s: bandwidth(options.number("bandwidth")?.unwrap_or(0))?,
            time: Duration::from_secs(seconds),
        };
        options.finish(&["for", "bandwidth", "peer"])?;
        Ok(request)
    }
}

/// A checked request to the doctor.
#[derive(Debug, Clone)]
pub struct DiagnoseRequest {
    /// `None`: all gangs.
    pub gang: Option<String>,
    /// `None`: this host alone is looked at.
    pub target: Option<Target>,
}

/// The other host of a pair, as it was named.
#[derive(Debug, Clone)]
pub struct Target {
    text: String,
    peer_text: Option<String>,
    pub destination: Destination,
    pub peer: PeerAddress,
}

impl DiagnoseRequest {
    /// An empty destination is none.
    pub fn parse(
        destination: &str,
        options: HashMap<String, OwnedVariant>,
    ) -> Result<DiagnoseRequest, ServiceError> {
        let mut options = Options(options);
        let gang = options.text("gang")?;
        if let Some(gang) = &gang {
            Membership::check_gang_name(gang).map_err(ServiceError::UnknownGang)?;
        }
        let peer_text = options.text("peer")?;
        options.finish(&["gang", "peer"])?;
        if destination.is_empty() {
            return match peer_text {
                None => Ok(DiagnoseRequest { gang, target: None }),
                Some(_) => Err(ServiceError::InvalidOption(
                    "the option peer says where the destination's vmgangd listens; name a destination, too".into(),
                )),
            };
        }
        let mut target = Target {
            text: destination.to_owned(),
            peer_text,
            destination: Destination::parse(destination)
                .map_err(ServiceError::InvalidDestination)?,
            peer: PeerAddress {
                host: String::new(),
                port: 0,
            },
        };
        let request = target.request_for(&[])?;
        target.destination = request.destination;
        target.peer = request.peer;
        Ok(DiagnoseRequest {
            gang,
            target: Some(target),
        })
    }
}

impl Target {
    /// The request that would migrate these domains to there; without any, all that run.
    pub fn request_for(&self, members: &[DomainInfo]) -> Result<MigrateRequest, ServiceError> {
        let uuids: Vec<String> = members
            .iter()
            .map(|member| member.uuid.to_string())
            .collect();
        let mut options = vec![match uuids.is_empty() {
            true => ("all", Variant::from(true)),
            false => ("domains", Variant::from(uuids)),
        }];
        if let Some(peer) = &self.peer_text {
            options.push(("peer", Variant::from(peer.as_str())));
        }
        let mut owned = HashMap::new();
        for (name, value) in options {
            let value = OwnedVariant::try_from(value)
                .map_err(|error| ServiceError::Internal(format!("an option is lost: {error}")))?;
            owned.insert(name.to_owned(), value);
        }
        MigrateRequest::parse("", &self.text, owned)
    }
}

fn peer(options: &mut Options, destination: &Destination) -> Result<PeerAddress, ServiceError> {
    match options.text("peer")? {
        Some(text) => text.parse().map_err(|error| {
            ServiceError::InvalidOption(format!("the option peer '{text}' is not valid: {error}"))
        }),
        None => Ok(destination.peer()),
    }
}

/// MiB/s as users give it to bytes per second; 0 takes the cap off.
pub fn bandwidth(mib_per_s: u64) -> Result<Option<u64>, ServiceError> {
    if mib_per_s == 0 {
        return Ok(None);
    }
    mib_per_s.checked_mul(MIB).map(Some).ok_or_else(|| {
        ServiceError::InvalidOption(format!("a bandwidth of {mib_per_s} MiB/s is too large"))
    })
}

fn selection(
    gang: &str,
    domains: Option<Vec<String>>,
    all: bool,
) -> Result<Selection, ServiceError> {
    let refuse = |text: &str| Err(ServiceError::InvalidOption(text.into()));
    match (gang, domains, all) {
        ("", None, true) => Ok(Selection::All),
        ("", Some(domains), false) => {
            if domains.is_empty() {
                return refuse("the option domains names no domain");
            }
            let mut sorted = domains.clone();
            sorted.sort();
            if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return refuse(&format!("the option domains names {} twice", pair[0]));
            }
            Ok(Selection::Domains(domains))
        }
        ("", None, false) => refuse(
            "nothing to migrate was named; give a gang, the option domains, or the option all",
        ),
        (gang, None, false) => {
            Membership::check_gang_name(gang).map_err(ServiceError::UnknownGang)?;
            Ok(Selection::Gang(gang.to_owned()))
        }
        _ => refuse("give only one of: a gang, the option domains, the option all"),
    }
}

/// The dictionary of options; what is left at the end is unknown.
struct Options(HashMap<String, OwnedVariant>);

impl Options {
    fn take<T>(&mut self, name: &str, expected: &str) -> Result<Option<T>, ServiceError>
    where
        T: TryFrom<OwnedVariant>,
    {
        let Some(value) = self.0.remove(name) else {
            return Ok(None);
        };
        let signature = value.value_signature().to_string();
        T::try_from(value).map(Some).map_err(|_| {
            ServiceError::InvalidOption(format!(
                "the option {name} must be {expected}, but its D-Bus type is {signature}"
            ))
        })
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, ServiceError> {
        self.take(name, "a string (s)")
    }

    fn flag(&mut self, name: &str) -> Result<bool, ServiceError> {
        Ok(self.take(name, "a boolean (b)")?.unwrap_or(false))
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, ServiceError> {
        self.take(name, "a number (t)")
    }

    /// One of a few words, and what it means.
    fn choice<T: Copy>(&mut self, name: &str, of: &[(&str, T)]) -> Result<Option<T>, ServiceError> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        if let Some((_, meaning)) = of.iter().find(|(word, _)| *word == text) {
            return Ok(Some(*meaning));
        }
        let words: Vec<&str> = of.iter().map(|(word, _)| *word).collect();
        Err(ServiceError::InvalidOption(format!(
            "the option {name} is one of {}, not '{text}'",
            words.join(", ")
        )))
    }

    fn finish(self, known: &[&str]) -> Result<(), ServiceError> {
        let mut unknown: Vec<String> = self.0.into_keys().collect();
        unknown.sort();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(ServiceError::InvalidOption(format!(
            "unknown option: {}; known are {}",
            unknown.join(", "),
            known.join(", ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options<const N: usize>(pairs: [(&str, Variant<'_>); N]) -> HashMap<String, OwnedVariant> {
        pairs
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.try_into().expect("no descriptors")))
            .collect()
    }

    const URI: &str = "qemu+tls://b/system";

    #[test]
    fn defaults() {
        let request = MigrateRequest::parse("web", URI, HashMap::new()).expect("valid");
        assert_eq!(request.gang(), Some("web"));
        assert_eq!(
            (request.peer.host.as_str(), request.peer.port),
            ("b", 16520)
        );
        assert_eq!(request.policy, Policy::default());
        assert_eq!(request.bandwidth_bytes_per_s, None);
        assert_eq!(request.timeout, None);
    }

    #[test]
    fn all_options() {
        let request = MigrateRequest::parse(
            "",
            URI,
            options([
                ("domains", Variant::from(vec!["a", "b"])),
                ("bandwidth", Variant::from(100u64)),
                ("timeout", Variant::from(60u64)),
                ("peer", Variant::from("10.0.0.2:1")),
                ("persistent", Variant::from(true)),
                ("undefinesource", Variant::from(true)),
                ("suspend", Variant::from(true)),
                ("on-failure", Variant::from("continue")),
                ("on-stall", Variant::from("leave")),
                ("timeout-suspend", Variant::from(true)),
                ("switchover", Variant::from("staggered")),
                ("concurrency", Variant::from(3u64)),
                ("parallel", Variant::from(4u64)),
                ("auto-converge", Variant::from(true)),
                ("unsafe", Variant::from(true)),
                ("tls", Variant::from(true)),
                ("technique", Variant::from("all")),
            ]),
        )
        .expect("valid");
        assert_eq!(
            request.selection,
            Selection::Domains(vec!["a".into(), "b".into()])
        );
        assert_eq!(request.bandwidth_bytes_per_s, Some(100 << 20));
        assert_eq!(request.timeout, Some(Duration::from_secs(60)));
        assert_eq!(request.peer.port, 1);
        assert!(request.persistent && request.undefine_source && request.suspend);
        assert_eq!(request.policy.on_failure, OnFailure::Continue);
        assert_eq!(request.policy.on_stall, OnStall::Leave);
        assert_eq!(request.policy.on_timeout, OnTimeout::Suspend);
        assert_eq!(request.policy.switchover, Switchover::Staggered);
        assert_eq!(request.policy.concurrency.get(), 3);
        let four = NonZeroU8::new(4).map(Parallel::Connections);
        assert_eq!(Some(request.parallel), four);
        assert!(request.auto_converge && request.unsafe_disks && request.tls);
        assert!(request.check_members(3).is_ok());
        let refused = request.check_members(4).expect_err("too many");
        assert!(refused.sentence().contains("together"), "{refused}");
    }

    #[test]
    fn the_doctor_asks_as_a_migration_does() {
        let alone = DiagnoseRequest::parse("", options([("gang", Variant::from("web"))]));
        let alone = alone.expect("valid");
        assert_eq!(alone.gang.as_deref(), Some("web"));
        assert!(alone.target.is_none());
        let pair = DiagnoseRequest::parse("b", options([("peer", Variant::from("c:7"))]));
        let target = pair.expect("valid").target.expect("a target");
        assert_eq!(target.destination.host, "b");
        assert_eq!((target.peer.host.as_str(), target.peer.port), ("c", 7));
        for (destination, option, named) in [
            ("", ("peer", Variant::from("c:7")), "name a destination"),
            ("b", ("peer", Variant::from("c:no")), "'c:no'"),
            ("b", ("gang", Variant::from("a b")), "a b"),
            (
                "qemu:///system",
                ("gang", Variant::from("web")),
                "host part",
            ),
            (
                "b",
                ("timeout", Variant::from(5u64)),
                "known are gang, peer",
            ),
        ] {
            let error = DiagnoseRequest::parse(destination, options([option])).expect_err(named);
            assert!(error.sentence().contains(named), "{error}");
        }
    }

    #[test]
    fn refusals_name_the_option() {
        let refuse = |gang: &str, options| {
            MigrateRequest::parse(gang, URI, options)
                .expect_err("refused")
                .sentence()
                .to_owned()
        };
        for (name, value, named) in [
            ("zerocopy", Variant::from(true), "unknown option: zerocopy"),
            ("copy-storage-all", Variant::from(true), "both hosts share"),
            (
                "switchover",
                Variant::from("soon"),
                "staggered, free, not 'soon'",
            ),
            (
                "on-stall",
                Variant::from("hope"),
                "leave, abort, not 'hope'",
            ),
            ("concurrency", Variant::from(17u64), "1 to 16, not 17"),
            ("concurrency", Variant::from(0u64), "not 0"),
            ("parallel", Variant::from(33u64), "not 33"),
            ("timeout-suspend", Variant::from(true), "the option timeout"),
        ] {
            let text = refuse("web", options([(name, value)]));
            assert!(text.contains(name) && text.contains(named), "{text}");
        }
        let text = refuse(
            "web",
            options([
                ("postcopy-resume", Variant::from(true)),
                ("postcopy", Variant::from(true)),
            ]),
        );
        assert!(text.contains("postcopy-resume"), "{text}");
        let text = refuse("web", options([("timeout", Variant::from("5"))]));
        assert!(
            text.contains("timeout") && text.contains("type is s"),
            "{text}"
        );
        let text = refuse("web", options([("timeout", Variant::from(0u64))]));
        assert!(text.contains("at least 1"), "{text}");
        let text = refuse("web", options([("on-failure", Variant::from("hope"))]));
        assert!(text.contains("'hope'"), "{text}");
        let text = refuse("web", options([("peer", Variant::from("b:no"))]));
        assert!(text.contains("'b:no'"), "{text}");
        let text = refuse("web", options([("technique", Variant::from("magic"))]));
        assert!(text.contains("magic"), "{text}");
        let text = refuse("web", options([("all", Variant::from(true))]));
        assert!(text.contains("only one of"), "{text}");
        let text = refuse("", options([]));
        assert!(text.contains("nothing to migrate"), "{text}");
        let text = refuse("", options([("domains", Variant::from(vec!["a", "a"]))]));
        assert!(text.contains("a twice"), "{text}");
        let text = refuse(
            "",
            options([("domains", Variant::from(Vec::<&str>::new()))]),
        );
        assert!(text.contains("no domain"), "{text}");
        let text = refuse("web", options([("bandwidth", Variant::from(u64::MAX))]));
        assert!(text.contains("too large"), "{text}");
        assert!(matches!(
            MigrateRequest::parse("a b", URI, HashMap::new()),
            Err(ServiceError::UnknownGang(_))
        ));
        assert!(matches!(
            MigrateRequest::parse("web", "qemu:///system", HashMap::new()),
            Err(ServiceError::InvalidDestination(_))
        ));
    }
}
