//! What a caller asks of `Migrate`: the gang, the destination and the options, checked.
//! Pure: the D-Bus dictionary in, a typed request or a refusal by name out.

use std::collections::HashMap;
use std::time::Duration;

use vmgang_engine::{PeerAddress, Techniques};
use vmgang_libvirt::Membership;
use zbus::OwnedVariant;

use crate::barrier::OnFailure;
use crate::destination::Destination;
use crate::error::ServiceError;

const MIB: u64 = 1 << 20;

/// Which domains are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selection {
    Gang(String),
    Domains(Vec<String>),
    All,
}

/// A checked request to migrate.
#[derive(Debug, Clone)]
pub struct MigrateRequest {
    pub selection: Selection,
    pub destination: Destination,
    pub peer: PeerAddress,
    pub bandwidth_bytes_per_s: Option<u64>,
    /// From a wave's start to its release.
    pub timeout: Option<Duration>,
    pub persistent: bool,
    pub undefine_source: bool,
    pub suspend: bool,
    pub on_failure: OnFailure,
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
        let on_failure = match options.text("on-failure")?.as_deref() {
            None | Some("abort") => OnFailure::Abort,
            Some("continue") => OnFailure::Continue,
            Some(other) => {
                return Err(ServiceError::InvalidOption(format!(
                    "the option on-failure is 'abort' or 'continue', not '{other}'"
                )));
            }
        };
        let techniques = match options.text("technique")? {
            Some(text) => text.parse().map_err(|error| {
                ServiceError::InvalidOption(format!(
                    "the option technique '{text}' is not valid: {error}"
                ))
            })?,
            None => Techniques::default(),
        };
        let timeout = options.number("timeout")?;
        if timeout == Some(0) {
            return Err(ServiceError::InvalidOption(
                "the option timeout must be at least 1 second".into(),
            ));
        }
        let request = MigrateRequest {
            selection,
            destination,
            peer,
            bandwidth_bytes_per_s: bandwidth(options.number("bandwidth")?.unwrap_or(0))?,
            timeout: timeout.map(Duration::from_secs),
            persistent: options.flag("persistent")?,
            undefine_source: options.flag("undefinesource")?,
            suspend: options.flag("suspend")?,
            on_failure,
            techniques,
        };
        options.finish()?;
        Ok(request)
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
        options.finish()?;
        Ok(request)
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

    fn finish(self) -> Result<(), ServiceError> {
        let mut unknown: Vec<String> = self.0.into_keys().collect();
        unknown.sort();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(ServiceError::InvalidOption(format!(
            "unknown option: {}; known are domains, all, bandwidth, timeout, peer, persistent, undefinesource, suspend, on-failure and technique",
            unknown.join(", ")
        )))
    }
}

#[cfg(test)]
mod tests {
    use zbus::Variant;

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
        assert_eq!(request.on_failure, OnFailure::Abort);
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
        assert_eq!(request.on_failure, OnFailure::Continue);
    }

    #[test]
    fn refusals_name_the_option() {
        let refuse = |gang: &str, options| {
            MigrateRequest::parse(gang, URI, options)
                .expect_err("refused")
                .sentence()
                .to_owned()
        };
        let text = refuse("web", options([("postcopy", Variant::from(true))]));
        assert!(text.contains("postcopy"), "{text}");
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
