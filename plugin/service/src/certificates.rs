//! This host's certificates as they are now: what was made of their files is used for as long as they hold
//! the same.
//!
//! Owns: when certificates are made ready anew, and what stays in use when new ones are no good.
//! Must not: judge a peer.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use vmgang_engine::{TlsIdentity, Transport, Transports};

use crate::config::{TlsConfig, TlsPaths};

/// Files are compared so far. Nobody has more authorities.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// How peers are talked to.
pub struct Certificates {
    tls: TlsConfig,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// What the files held when they were used last, good or not; `None` for one that could not be read.
    files: Vec<Option<Vec<u8>>>,
    /// Why that is no good.
    problem: Option<String>,
    /// The last good ones.
    identity: Option<Arc<TlsIdentity>>,
}

impl Certificates {
    pub fn new(tls: TlsConfig) -> Self {
        Self {
            tls,
            known: Mutex::default(),
        }
    }

    /// How peers are talked to now, or what is wrong with the files. Once they were good, they stay
    /// in use until other good ones are in their place.
    pub fn transport(&self) -> Result<Transport, String> {
        let paths = match &self.tls {
            TlsConfig::Off => return Ok(Transport::Plain),
            TlsConfig::On(paths) => paths,
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // Before they are used: what changes meanwhile is noticed the next time. Times and sizes would not
        // do, as two changes may fall into one tick of the file system's clock.
        let files: Vec<_> = paths.all().map(read).into();
        if files != known.files {
            known.files = files;
            known.take(load(paths));
        }
        match (&known.identity, &known.problem) {
            (Some(identity), _) => Ok(Transport::Tls(identity.clone())),
            (None, problem) => Err(problem.clone().unwrap_or_default()),
        }
    }

    /// For a listener. The error is why there is no way to talk to peers yet.
    pub fn for_listener(self: &Arc<Self>) -> Result<ListenerTransports, String> {
        Ok(ListenerTransports {
            first: self.transport()?,
            certificates: self.clone(),
        })
    }
}

impl Known {
    fn take(&mut self, loaded: Result<Arc<TlsIdentity>, String>) {
        match loaded {
            Ok(identity) => {
                self.problem = None;
                if self.identity.replace(identity).is_some() {
                    tracing::info!(
                        "the certificates have changed; new connections use the new ones"
                    );
                }
            }
            Err(reason) => {
                if self.identity.is_some() {
                    tracing::error!(
                        reason,
                        "the certificates have changed and cannot be used; those from before stay in use"
                    );
                }
                self.problem = Some(reason);
            }
        }
    }
}

/// The certificates of a host that had good ones once.
pub struct ListenerTransports {
    certificates: Arc<Certificates>,
    first: Transport,
}

impl Transports for ListenerTransports {
    fn current(&self) -> Transport {
        let now = self.certificates.transport();
        now.unwrap_or_else(|_| self.first.clone())
    }
}

fn load(paths: &TlsPaths) -> Result<Arc<TlsIdentity>, String> {
    let missing: Vec<String> = paths
        .missing()
        .into_iter()
        .map(|path| path.display().to_string())
        .collect();
    if !missing.is_empty() {
        return Err(format!(
            "peers are talked to over TLS, but there is no {}; put the certificates of libvirt's qemu+tls there, or name other files under [tls] in vmgang.toml",
            missing.join(", no ")
        ));
    }
    TlsIdentity::load(&paths.files()).map_err(|error| error.to_string())
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    type Authority = CertifiedIssuer<'static, KeyPair>;

    fn authority() -> Authority {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        CertifiedIssuer::self_signed(params, key).expect("signed")
    }

    struct Host {
        directory: tempfile::TempDir,
        certificates: Arc<Certificates>,
    }

    impl Host {
        fn new() -> Host {
            let directory = tempfile::tempdir().expect("a directory");
            let path = |name: &str| directory.path().join(name);
            let certificates = Certificates::new(TlsConfig::On(TlsPaths {
                ca: path("ca.pem"),
                server_certificate: path("cert.pem"),
                server_key: path("key.pem"),
                client_certificate: path("cert.pem"),
                client_key: path("key.pem"),
            }));
            Host {
                directory,
                certificates: Arc::new(certificates),
            }
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.directory.path().join(name), text).expect("written");
        }

        /// A certificate and its key.
        fn issue(authority: &Authority) -> (String, String) {
            let key = KeyPair::generate().expect("a key");
            let params = CertificateParams::new(["a".to_owned()]).expect("a name");
            let certificate = params.signed_by(&key, authority).expect("signed");
            (certificate.pem(), key.serialize_pem())
        }

        fn now(&self) -> Arc<TlsIdentity> {
            match self.certificates.transport() {
                Ok(Transport::Tls(identity)) => identity,
                other => panic!("no certificates: {other:?}"),
            }
        }
    }

    #[test]
    fn files_that_come_late_are_found_and_files_that_stay_are_used_again() {
        let host = Host::new();
        let missing = host.certificates.transport().expect_err("no files");
        assert!(
            missing.contains("ca.pem") && missing.contains("key.pem"),
            "{missing}"
        );
        let authority = authority();
        let (certificate, key) = Host::issue(&authority);
        host.write("ca.pem", &authority.pem());
        host.write("cert.pem", &certificate);
        host.write("key.pem", "nonsense");
        let nonsense = host.certificates.transport().expect_err("a bad key");
        assert!(nonsense.contains("key.pem"), "{nonsense}");
        host.write("key.pem", &key);
        assert!(Arc::ptr_eq(&host.now(), &host.now()));
        host.write("key.pem", &key);
        assert!(Arc::ptr_eq(&host.now(), &host.now()), "the same again");
    }

    #[test]
    fn new_ones_are_used_as_soon_as_they_fit_and_until_then_the_old_ones() {
        let host = Host::new();
        let authority = authority();
        let (certificate, key) = Host::issue(&authority);
        host.write("ca.pem", &authority.pem());
        host.write("cert.pem", &certificate);
        host.write("key.pem", &key);
        let listener = host.certificates.for_listener().expect("good ones");
        let in_use = |identity: &Arc<TlsIdentity>| match listener.current() {
            Transport::Tls(current) => Arc::ptr_eq(&current, identity),
            Transport::Plain => false,
        };
        let old = host.now();
        assert!(in_use(&old));
        let (certificate, key) = Host::issue(&authority);
        host.write("cert.pem", &certificate);
        assert!(Arc::ptr_eq(&old, &host.now()), "its key is the old one");
        host.write("key.pem", &key);
        let new = host.now();
        assert!(!Arc::ptr_eq(&old, &new));
        assert!(in_use(&new));
        std::fs::remove_file(host.directory.path().join("ca.pem")).expect("removed");
        assert!(in_use(&new), "without a file the last good ones");
    }

    #[test]
    fn without_tls_no_file_is_needed() {
        let certificates = Certificates::new(TlsConfig::Off);
        assert!(matches!(certificates.transport(), Ok(Transport::Plain)));
    }
}
