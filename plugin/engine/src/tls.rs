//! Mutual TLS 1.3 between peers, from the certificate files that libvirt uses.
//!
//! Owns: loading the files into client and server configurations, and the names in a
//! peer's certificate.
//! Must not: decide which names are welcome; the service does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::PageKey;
use crate::tls_refusal::Noting;

/// Where the certificates are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub server_certificate: PathBuf,
    pub server_key: PathBuf,
    pub client_certificate: PathBuf,
    pub client_key: PathBuf,
}

/// Why certificates could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {what} {}: {error}; check the file or set its path in the [tls] table of vmgang.toml", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        error: rustls::pki_types::pem::Error,
    },
    #[error("{} holds no certificate", path.display())]
    Empty { path: PathBuf },
    #[error("cannot use the certificates ({what}): {error}")]
    Config {
        what: &'static str,
        error: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// This host's certificates, ready for connecting and for listening.
pub struct TlsIdentity {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) files: TlsFiles,
    pub(crate) page_key: PageKey,
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsIdentity(..)")
    }
}

/// How peers talk.
#[derive(Debug, Clone)]
pub enum Transport {
    /// Without encryption or authentication: for tests, or a network that gives both.
    Plain,
    Tls(Arc<TlsIdentity>),
}

/// How peers are talked to from now on: asked once for each connection, so that certificates can be
/// replaced while others go on.
pub trait Transports: Send + Sync + 'static {
    fn current(&self) -> Transport;
}

/// For ever the same.
impl Transports for Transport {
    fn current(&self) -> Transport {
        self.clone()
    }
}

impl Transport {
    /// The key of page digests between hosts that talk like this.
    pub fn page_key(&self) -> PageKey {
        match self {
            Transport::Plain => PageKey::of_authorities::<&[u8]>(&[]),
            Transport::Tls(identity) => identity.page_key.clone(),
        }
    }
}

impl TlsIdentity {
    /// Loads and checks the files.
    pub fn load(files: &TlsFiles) -> Result<Arc<Self>, TlsError> {
        let mut roots = RootCertStore::empty();
        let authorities = certificates("CA certificate", &files.ca)?;
        let page_key = PageKey::of_authorities(&authorities);
        for certificate in authorities {
            roots.add(certificate).map_err(config("CA certificate"))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = &[&rustls::version::TLS13];

        let judge = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(config("CA certificate"))?;
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(config("client"))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Noting(judge)))
            .with_client_auth_cert(
                certificates("client certificate", &files.client_certificate)?,
                key("client key", &files.client_key)?,
            )
            .map_err(config("client certificate and key"))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(config("CA certificate"))?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(config("server"))?
            .with_client_cert_verifier(Arc::new(Noting(verifier)))
            .with_single_cert(
                certificates("server certificate", &files.server_certificate)?,
                key("server key", &files.server_key)?,
            )
            .map_err(config("server certificate and key"))?;
        Ok(Arc::new(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            files: files.clone(),
            page_key,
        }))
    }
}

fn config<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    what: &'static str,
) -> impl Fn(E) -> TlsError {
    // `Fn` with a by-value argument: each call converts its own error.
    move |error| TlsError::Config {
        what,
        error: error.into(),
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let error = |error| TlsError::File {
        what,
        path: path.to_owned(),
        error,
    };
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(error)?
        .collect::<Result<_, _>>()
        .map_err(error)?;
    if certificates.is_empty() {
        return Err(TlsError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(certificates)
}

fn key(what: &'static str, path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::File {
        what,
        path: path.to_owned(),
        error,
    })
}

/// Common name and subject alternative names of a certificate.
pub(crate) fn certificate_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let mut names: Vec<String> = certificate
        .subject()
        .iter_common_name()
        .filter_map(|name| name.as_str().ok().map(str::to_owned))
        .collect();
    if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
        for name in &alternatives.value.general_names {
            if let GeneralName::DNSName(name) = name
                && !names.iter().any(|known| known == name)
            {
                names.push((*name).to_owned());
            }
        }
    }
    names
}
