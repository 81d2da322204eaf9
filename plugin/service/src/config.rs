//! `/etc/vmgang/vmgang.toml`: every key, its default, and errors that name file, line and key.
//! Reads the file; loading what it points to (certificates) is the daemon's business.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use vmgang_engine::{PeerAddress, TlsFiles};

/// Where the configuration is looked for when no file is named.
pub const DEFAULT_PATH: &str = "/etc/vmgang/vmgang.toml";

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the peer listener waits for other hosts.
    pub listen: SocketAddr,
    pub runtime_dir: PathBuf,
    pub state_dir: PathBuf,
    pub libvirt_uri: String,
    pub tls: TlsConfig,
    /// Certificate names, with `*` as a wildcard; empty means any our authority signed.
    pub allow_peers: Vec<String>,
    /// Certificate names of peers that may use this host's libvirt; empty means none.
    pub allow_libvirt: Vec<String>,
    /// Where this host's libvirt listens for them; the first one that takes a connection.
    pub libvirt_sockets: Vec<PathBuf>,
    pub window_budget: WindowBudget,
    pub workers: WorkerCount,
    pub connections: Connections,
    pub scan: ScanConfig,
    pub recall: RecallConfig,
    pub metrics_file: MetricsFile,
    pub ambient: AmbientConfig,
}

/// Migrations that are started by clients which know nothing of vmgang.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AmbientConfig {
    /// Where they may go from here. None: ambient mode is off, also for what comes.
    #[serde(deserialize_with = "peers")]
    pub peers: Vec<PeerAddress>,
    /// What other hosts call this one. None: its host name, also without its domain.
    pub names: Vec<String>,
    /// How long a session waits for the next migration to the same peer.
    pub linger_s: u64,
}

impl Default for AmbientConfig {
    fn default() -> Self {
        AmbientConfig {
            peers: Vec::new(),
            names: Vec::new(),
            linger_s: 60,
        }
    }
}

impl AmbientConfig {
    pub fn is_on(&self) -> bool {
        !self.peers.is_empty()
    }

    /// At least a second: a connection that was just handed over is to be seen.
    pub fn linger(&self) -> Duration {
        Duration::from_secs(self.linger_s.max(1))
    }

    /// What other hosts may call this one.
    pub fn names(&self) -> Vec<String> {
        if !self.names.is_empty() {
            return self.names.clone();
        }
        let system = rustix::system::uname();
        let whole = system.nodename().to_string_lossy().into_owned();
        match whole.split_once('.') {
            Some((short, _)) => vec![short.to_owned(), whole],
            None => vec![whole],
        }
    }
}

fn peers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PeerAddress>, D::Error> {
    let peers = Vec::<String>::deserialize(deserializer)?;
    let read = peers.iter().map(|peer| peer.parse());
    read.collect::<Result<_, _>>().map_err(de::Error::custom)
}

/// Where figures for monitoring are written; an empty path is nowhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MetricsFile(pub Option<PathBuf>);

impl<'de> Deserialize<'de> for MetricsFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = PathBuf::deserialize(deserializer)?;
        if path.as_os_str().is_empty() {
            return Ok(MetricsFile(None));
        }
        if !path.is_absolute() || path.extension().is_none_or(|ending| ending != "prom") {
            return Err(de::Error::custom(format!(
                "metrics_file '{}' is not an absolute path that ends in .prom, which is what node_exporter reads",
                path.display()
            )));
        }
        Ok(MetricsFile(Some(path)))
    }
}

/// How the members of gangs are scanned from time to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScanConfig {
    /// From the end of one scan to the next; 0 is never.
    pub interval_s: u64,
    /// Of one processor.
    #[serde(deserialize_with = "percent")]
    pub processor_percent: u8,
}

impl Default for ScanConfig {
    fn default() -> Self {
        ScanConfig {
            interval_s: 300,
            processor_percent: 10,
        }
    }
}

impl ScanConfig {
    /// `None` for never.
    pub fn interval(&self) -> Option<Duration> {
        (self.interval_s > 0).then(|| Duration::from_secs(self.interval_s))
    }
}

fn percent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    let percent = i64::deserialize(deserializer)?;
    u8::try_from(percent)
        .ok()
        .filter(|percent| (1..=100).contains(percent))
        .ok_or_else(|| {
            de::Error::invalid_value(
                de::Unexpected::Signed(percent),
                &"a share of one processor from 1 to 100 percent",
            )
        })
}

/// Which contents are looked for here when a gang arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecallConfig {
    /// Those of members of the same gang that run here.
    pub residents: bool,
    /// Those of members that left this host.
    pub checkpoints: bool,
    /// Memory that these may take. Never more than a quarter of what is available.
    pub checkpoint_budget: WindowBudget,
    /// How long they are kept.
    pub checkpoint_s: u64,
}

impl Default for RecallConfig {
    fn default() -> Self {
        RecallConfig {
            residents: true,
            checkpoints: true,
            checkpoint_budget: WindowBudget::Auto,
            checkpoint_s: 900,
        }
    }
}

impl RecallConfig {
    pub fn checkpoint_time(&self) -> Duration {
        Duration::from_secs(self.checkpoint_s)
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([0u16; 8], vmgang_engine::DEFAULT_PORT)),
            runtime_dir: "/run/vmgang".into(),
            state_dir: "/var/lib/vmgang".into(),
            libvirt_uri: "qemu:///system".into(),
            tls: TlsConfig::default(),
            allow_peers: Vec::new(),
            allow_libvirt: Vec::new(),
            libvirt_sockets: vec![
                "/run/libvirt/virtqemud-sock".into(),
                "/run/libvirt/libvirt-sock".into(),
            ],
            window_budget: WindowBudget::Auto,
            workers: WorkerCount::Auto,
            connections: Connections::default(),
            scan: ScanConfig::default(),
            recall: RecallConfig::default(),
            metrics_file: MetricsFile::default(),
            ambient: AmbientConfig::default(),
        }
    }
}

/// `tls = true` (libvirt's own certificates), `tls = false`, or a table of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsConfig {
    Off,
    On(TlsPaths),
}

impl Default for TlsConfig {
    fn default() -> Self {
        TlsConfig::On(TlsPaths::default())
    }
}

/// Threads that hash, compress and verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerCount {
    /// One for each processor.
    Auto,
    Threads(NonZeroUsize),
}

/// More are a mistake in writing.
const WORKERS_MAX: i64 = 1024;

impl<'de> Deserialize<'de> for WorkerCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WorkerVisitor;
        impl Visitor<'_> for WorkerVisitor {
            type Value = WorkerCount;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "\"auto\" or a number of threads from 1 to {WORKERS_MAX}")
            }
            fn visit_i64<E: de::Error>(self, threads: i64) -> Result<WorkerCount, E> {
                Some(threads)
                    .filter(|threads| *threads <= WORKERS_MAX)
                    .and_then(|threads| NonZeroUsize::new(usize::try_from(threads).ok()?))
                    .map(WorkerCount::Threads)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(threads), &self))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<WorkerCount, E> {
                match text {
                    "auto" => Ok(WorkerCount::Auto),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }
        deserializer.deserialize_any(WorkerVisitor)
    }
}

/// TCP connections of a session at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connections(pub NonZeroUsize);

impl Default for Connections {
    fn default() -> Self {
        Connections(NonZeroUsize::MIN)
    }
}

impl<'de> Deserialize<'de> for Connections {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        usize::try_from(number)
            .ok()
            .filter(|number| *number <= vmgang_engine::CONNECTIONS_MAX)
            .and_then(NonZeroUsize::new)
            .map(Connections)
            .ok_or_else(|| {
                let expected = format!(
                    "a number of connections from 1 to {}",
                    vmgang_engine::CONNECTIONS_MAX
                );
                de::Error::invalid_value(de::Unexpected::Signed(number), &expected.as_str())
            })
    }
}

/// The certificates that `qemu+tls` uses, unless other files are named.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsPaths {
    pub ca: PathBuf,
    pub server_certificate: PathBuf,
    pub server_key: PathBuf,
    pub client_certificate: PathBuf,
    pub client_key: PathBuf,
}

impl Default for TlsPaths {
    fn default() -> Self {
        TlsPaths {
            ca: "/etc/pki/CA/cacert.pem".into(),
            server_certificate: "/etc/pki/libvirt/servercert.pem".into(),
            server_key: "/etc/pki/libvirt/private/serverkey.pem".into(),
            client_certificate: "/etc/pki/libvirt/clientcert.pem".into(),
            client_key: "/etc/pki/libvirt/private/clientkey.pem".into(),
        }
    }
}

impl TlsPaths {
    pub fn files(&self) -> TlsFiles {
        TlsFiles {
            ca: self.ca.clone(),
            server_certificate: self.server_certificate.clone(),
            server_key: self.server_key.clone(),
            client_certificate: self.client_certificate.clone(),
            client_key: self.client_key.clone(),
        }
    }

    pub fn all(&self) -> [&Path; 5] {
        [
            &self.ca,
            &self.server_certificate,
            &self.server_key,
            &self.client_certificate,
            &self.client_key,
        ]
    }

    /// The files that are not there.
    pub fn missing(&self) -> Vec<&Path> {
        self.all()
            .into_iter()
            .filter(|path| !path.exists())
            .collect()
    }
}

impl<'de> Deserialize<'de> for TlsConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TlsVisitor;
        impl<'de> Visitor<'de> for TlsVisitor {
            type Value = TlsConfig;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or a table of certificate files")
            }
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<TlsConfig, E> {
                Ok(if on {
                    TlsConfig::default()
                } else {
                    TlsConfig::Off
                })
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TlsConfig, A::Error> {
                TlsPaths::deserialize(de::value::MapAccessDeserializer::new(map)).map(TlsConfig::On)
            }
        }
        deserializer.deserialize_any(TlsVisitor)
    }
}

/// The most memory a job's page window may use on this host; see `budget.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowBudget {
    /// What the guests' memory and this host's available memory allow at the time of the job.
    Auto,
    /// Never more than this either.
    Bytes(u64),
}

/// Less is of no use to a window.
pub const WINDOW_BUDGET_MIN_BYTES: u64 = 64 << 20;

impl WindowBudget {
    /// The number that the configuration sets.
    pub fn most_bytes(self) -> u64 {
        match self {
            WindowBudget::Auto => u64::MAX,
            WindowBudget::Bytes(bytes) => bytes,
        }
    }
}

impl<'de> Deserialize<'de> for WindowBudget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BudgetVisitor;
        impl Visitor<'_> for BudgetVisitor {
            type Value = WindowBudget;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "\"auto\", a number of bytes, or a size such as \"2GiB\" (at least 64MiB)",
                )
            }
            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<WindowBudget, E> {
                u64::try_from(bytes)
                    .ok()
                    .filter(|bytes| *bytes >= WINDOW_BUDGET_MIN_BYTES)
                    .map(WindowBudget::Bytes)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(bytes), &self))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<WindowBudget, E> {
                if text == "auto" {
                    return Ok(WindowBudget::Auto);
                }
                parse_size(text)
                    .filter(|bytes| *bytes >= WINDOW_BUDGET_MIN_BYTES)
                    .map(WindowBudget::Bytes)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(BudgetVisitor)
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(scale)
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {}: {error}", path.display())]
    Read {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("the configuration {} is not valid: {error}", path.display())]
    Invalid {
        path: PathBuf,
        error: toml::de::Error,
    },
}

impl Config {
    /// Reads `path`, or the default file if none is named; the latter may be absent.
    pub fn load(path: Option<&Path>) -> Result<Config, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(file) {
            Ok(text) => Config::parse(&text).map_err(|error| ConfigError::Invalid {
                path: file.to_owned(),
                error,
            }),
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Config::default())
            }
            Err(error) => Err(ConfigError::Read {
                path: file.to_owned(),
                error,
            }),
        }
    }

    fn parse(text: &str) -> Result<Config, toml::de::Error> {
        toml::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(Config::parse("").expect("valid"), Config::default());
        assert_eq!(Config::default().listen.to_string(), "[::]:16520");
    }

    #[test]
    fn the_packaged_file_is_the_default() {
        let text = include_str!("../../../packaging/vmgang.toml");
        assert_eq!(Config::parse(text).expect("valid"), Config::default());
        // Each commented key must be a real one with its default.
        let uncommented: String = text
            .lines()
            .filter_map(|line| line.strip_prefix("#"))
            .filter(|line| !line.starts_with(' ') && !line.is_empty())
            .map(|line| format!("{line}\n"))
            .collect();
        assert!(uncommented.contains("listen"), "{uncommented}");
        assert_eq!(
            Config::parse(&uncommented).expect(&uncommented),
            Config::default()
        );
    }

    /// What a table may have, by the error about a key that it has not.
    fn keys_of(table: &str) -> Vec<String> {
        let header = match table {
            "" => String::new(),
            table => format!("[{table}]\n"),
        };
        let error = Config::parse(&format!("{header}no_such_key = 1\n")).expect_err("unknown");
        let (_, expected) = error.message().split_once("expected ").expect("names");
        expected
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn every_key_is_in_the_packaged_file_and_in_the_guide() {
        let file = include_str!("../../../packaging/vmgang.toml");
        let guide = include_str!("../../../docs/operations.md");
        let (mut table, mut written) = (String::new(), Vec::new());
        for line in file.lines().filter_map(|line| line.strip_prefix('#')) {
            if let Some(name) = line.strip_prefix('[') {
                table = name.trim_end_matches(']').to_owned();
            } else if !line.starts_with(' ') && !line.is_empty() {
                let (key, _) = line.split_once(" = ").expect(line);
                written.push((table.clone(), key.to_owned()));
            }
        }
        let mut known = Vec::new();
        for key in keys_of("") {
            if file.contains(&format!("#[{key}]")) {
                known.extend(keys_of(&key).into_iter().map(|inner| (key.clone(), inner)));
            } else {
                known.push((String::new(), key));
            }
        }
        written.sort();
        known.sort();
        assert_eq!(written, known, "packaging/vmgang.toml and config.rs");
        for (table, key) in known {
            assert!(
                guide.contains(&format!("`{key}`")),
                "operations.md: {table} {key}"
            );
        }
    }

    #[test]
    fn every_key_can_be_set() {
        let config = Config::parse(
            "listen = '192.0.2.1:1'\nruntime_dir = '/r'\nstate_dir = '/s'\n\
             libvirt_uri = 'qemu:///session'\nallow_peers = ['*.example.org']\n\
             allow_libvirt = ['a.example.org']\nlibvirt_sockets = ['/l']\n\
             window_budget = '2GiB'\nmetrics_file = '/m/v.prom'\nworkers = 3\nconnections = 16\n[tls]\nca = '/ca.pem'\n\
             [scan]\ninterval_s = 0\nprocessor_percent = 100\n\
             [ambient]\npeers = ['b', 'c:9']\nnames = ['a']\nlinger_s = 0\n\
             [recall]\nresidents = false\ncheckpoint_budget = '1GiB'\ncheckpoint_s = 5\n",
        )
        .expect("valid");
        assert_eq!(config.window_budget, WindowBudget::Bytes(2 << 30));
        assert_eq!(config.allow_libvirt, ["a.example.org"]);
        assert_eq!(config.libvirt_sockets, [Path::new("/l")]);
        let three = WorkerCount::Threads(NonZeroUsize::new(3).expect("three"));
        assert_eq!(config.workers, three);
        let most = Connections(NonZeroUsize::new(16).expect("sixteen"));
        assert_eq!(config.connections, most);
        assert_eq!(
            config.metrics_file.0.as_deref(),
            Some(Path::new("/m/v.prom"))
        );
        assert_eq!(config.scan.interval(), None);
        assert!(config.ambient.is_on());
        assert_eq!(config.ambient.peers[1].port, 9);
        assert_eq!(config.ambient.names(), ["a"]);
        assert_eq!(config.ambient.linger().as_secs(), 1);
        assert_eq!(config.scan.processor_percent, 100);
        assert!(!config.recall.residents && config.recall.checkpoints);
        assert_eq!(config.recall.checkpoint_budget.most_bytes(), 1 << 30);
        assert_eq!(config.recall.checkpoint_time().as_secs(), 5);
        let TlsConfig::On(paths) = config.tls else {
            panic!("tls is on");
        };
        assert_eq!(paths.ca, Path::new("/ca.pem"));
        assert_eq!(paths.client_key, TlsPaths::default().client_key);
        assert_eq!(
            Config::parse("tls = false").expect("valid").tls,
            TlsConfig::Off
        );
        assert_eq!(
            Config::parse("tls = true").expect("valid").tls,
            TlsConfig::default()
        );
        assert_eq!(
            Config::parse("window_budget = 134217728")
                .expect("valid")
                .window_budget,
            WindowBudget::Bytes(128 << 20)
        );
    }

    #[test]
    fn errors_name_line_and_key() {
        for (text, expected) in [
            ("\nlissten = 'x'", "lissten"),
            ("\nlisten = 5", "listen"),
            ("\n[tls]\ncacert = 'x'", "cacert"),
            ("\ntls = 'yes'", "table of certificate files"),
            ("\nwindow_budget = '2GB'", "2GB"),
            ("\nwindow_budget = '1MiB'", "at least 64MiB"),
            ("\nwindow_budget = -1", "at least 64MiB"),
            ("\nmetrics_file = 'v.prom'", "absolute path"),
            ("\nmetrics_file = '/m/v.txt'", "ends in .prom"),
            ("\nworkers = 0", "1 to 1024"),
            ("\nworkers = 'many'", "auto"),
            ("\nconnections = 0", "1 to 16"),
            ("\nconnections = 17", "1 to 16"),
            ("\n[scan]\nprocessor_percent = 0", "1 to 100"),
            ("\n[scan]\nevery = 5", "every"),
            ("\n[ambient]\npeers = ['b/c']", "b/c"),
            ("\n[recall]\ncheckpoint_budget = '1MB'", "1MB"),
        ] {
            let error = Config::parse(text).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
            assert!(
                error.contains("line 2") || error.contains("line 3"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = Config::load(Some(Path::new("/no/such.toml"))).expect_err("absent");
        assert!(error.to_string().contains("/no/such.toml"));
    }
}
