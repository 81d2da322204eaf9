//! Why two hosts do not accept each other's certificates, in sentences that name the file and what to do.
//!
//! Owns: the words for what TLS says, and verifiers that note what those words need.
//! Must not: accept a certificate; what the verifiers inside refuse stays refused.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, DistinguishedName, Error,
    OtherError, SignatureScheme,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use x509_parser::time::ASN1Time;

use crate::tls::TlsFiles;

/// Which end of a connection this host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

impl End {
    fn own_certificate(self, files: &TlsFiles) -> String {
        let path = match self {
            End::Source => &files.client_certificate,
            End::Destination => &files.server_certificate,
        };
        path.display().to_string()
    }

    /// The key in the peer's vmgang.toml.
    fn their_certificate(self) -> &'static str {
        match self {
            End::Source => "server_certificate",
            End::Destination => "client_certificate",
        }
    }

    fn names(self) -> (&'static str, &'static str) {
        match self {
            End::Source => ("client", "server"),
            End::Destination => ("server", "client"),
        }
    }
}

const SAME_AUTHORITY: &str = "both hosts need certificates of an authority that both trust";

/// Why there is no secure connection, as a clause about the peer ("its certificate ...").
pub(crate) fn explain(error: &io::Error, end: End, files: &TlsFiles) -> String {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>());
    match tls {
        Some(Error::InvalidCertificate(error)) => theirs(error, end, files),
        Some(Error::NoCertificatesPresented) => format!(
            "it shows no certificate; set {} in its vmgang.toml",
            end.their_certificate()
        ),
        Some(Error::AlertReceived(alert)) => ours(*alert, end, files),
        Some(Error::InvalidMessage(_)) => {
            "what it sends is not TLS; `tls` in vmgang.toml must be the same on both hosts"
                .to_owned()
        }
        Some(error) => error.to_string(),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "it hung up during the TLS handshake; its log says why, and `tls` in vmgang.toml must be the same on both hosts".to_owned()
        }
        None => error.to_string(),
    }
}

/// What is wrong with the peer's certificate.
fn theirs(error: &CertificateError, end: End, files: &TlsFiles) -> String {
    use CertificateError::{
        Expired, ExpiredContext, InvalidPurpose, InvalidPurposeContext, NotValidForName,
        NotValidForNameContext, NotValidYet, NotValidYetContext, Other,
    };
    let file = end.their_certificate();
    match error {
        ExpiredContext { not_after, .. } => {
            format!(
                "its certificate has expired on {}; renew its {file}",
                date(*not_after)
            )
        }
        Expired => format!("its certificate has expired; renew its {file}"),
        NotValidYetContext { not_before, .. } => format!(
            "its certificate is not valid before {}; set the clocks of both hosts, or issue its {file} anew",
            date(*not_before)
        ),
        NotValidYet => format!(
            "its certificate is not valid yet; set the clocks of both hosts, or issue its {file} anew"
        ),
        NotValidForNameContext {
            expected,
            presented,
        } => {
            let expected = expected.to_str();
            let names = match presented.is_empty() {
                true => "no host at all".to_owned(),
                false => presented.join(", "),
            };
            format!(
                "its certificate is for {names}, not for {expected}; name the host as its certificate does, or issue its {file} with the subjectAltName {expected}"
            )
        }
        NotValidForName => format!(
            "its certificate is for another host; name the host as its certificate does, or issue its {file} with that subjectAltName"
        ),
        InvalidPurpose | InvalidPurposeContext { .. } => {
            let (_, they) = end.names();
            format!(
                "its certificate is not meant for a {they} (extended key usage); issue its {file} for both ends of connections"
            )
        }
        Other(OtherError(other)) => match other.downcast_ref::<Untrusted>() {
            Some(untrusted) => format!(
                "{untrusted}, and {} does not vouch for it; {SAME_AUTHORITY}",
                files.ca.display()
            ),
            None => format!("its certificate cannot be used ({other})"),
        },
        error => format!("its certificate cannot be used ({error})"),
    }
}

/// What the peer has against ours.
fn ours(alert: AlertDescription, end: End, files: &TlsFiles) -> String {
    let file = end.own_certificate(files);
    let refuses = format!("it does not accept this host's certificate {file}: ");
    match alert {
        AlertDescription::CertificateExpired => format!(
            "{refuses}it has expired, or is not valid yet; renew it, or set the clocks of both hosts"
        ),
        AlertDescription::UnknownCA
        | AlertDescription::CertificateUnknown
        | AlertDescription::DecryptError => format!(
            "{refuses}it is self-signed, or of an authority that is unknown there; {SAME_AUTHORITY}"
        ),
        AlertDescription::BadCertificate if end == End::Destination => format!(
            "{refuses}it is not for the name by which this host was called; issue it with that subjectAltName"
        ),
        AlertDescription::BadCertificate => format!("{refuses}it is damaged; issue it anew"),
        AlertDescription::UnsupportedCertificate => {
            let (we, _) = end.names();
            format!(
                "{refuses}it is not meant for a {we} (extended key usage); issue it for both ends of connections"
            )
        }
        AlertDescription::CertificateRequired => {
            format!("it wants a certificate, and this host has shown none; check {file}")
        }
        AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure => {
            "it does not speak TLS 1.3".to_owned()
        }
        alert => format!("it broke the TLS connection off ({alert:?}); its log says why"),
    }
}

fn date(time: UnixTime) -> String {
    i64::try_from(time.as_secs())
        .ok()
        .and_then(|seconds| ASN1Time::from_timestamp(seconds).ok())
        .map_or_else(|| "a day out of range".to_owned(), |time| time.to_string())
}

/// A certificate that no authority of ours has signed.
#[derive(Debug)]
struct Untrusted {
    subject: String,
    issuer: String,
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.subject == self.issuer {
            true => write!(f, "its certificate is self-signed (by {})", self.issuer),
            false => write!(f, "its certificate was issued by {}", self.issuer),
        }
    }
}

impl std::error::Error for Untrusted {}

/// The same refusal with what the certificate says of itself.
fn noted(error: Error, certificate: &CertificateDer<'_>) -> Error {
    let Error::InvalidCertificate(refusal) = error else {
        return error;
    };
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return Error::InvalidCertificate(refusal);
    };
    let untrusted = Untrusted {
        subject: parsed.subject().to_string(),
        issuer: parsed.issuer().to_string(),
    };
    let refusal = match refusal {
        // Two authorities of one name differ by their signatures only.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => other(untrusted),
        // What tools make for self-signing is an authority, which webpki refuses for that reason.
        CertificateError::Other(_) if untrusted.subject == untrusted.issuer => other(untrusted),
        CertificateError::NotValidForNameContext { expected, .. } => {
            CertificateError::NotValidForNameContext {
                expected,
                presented: hosts(&parsed),
            }
        }
        refusal => refusal,
    };
    Error::InvalidCertificate(refusal)
}

fn other(untrusted: Untrusted) -> CertificateError {
    CertificateError::Other(OtherError(Arc::new(untrusted)))
}

/// The hosts that a certificate is for.
fn hosts(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let name = |name: &GeneralName<'_>| match *name {
        GeneralName::DNSName(name) => Some(name.to_owned()),
        GeneralName::IPAddress(bytes) => match *bytes {
            [a, b, c, d] => Some(std::net::Ipv4Addr::new(a, b, c, d).to_string()),
            _ => <[u8; 16]>::try_from(bytes)
                .ok()
                .map(|bytes| std::net::Ipv6Addr::from(bytes).to_string()),
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(name).collect()
}

/// A verifier whose refusals say more.
#[derive(Debug)]
pub(crate) struct Noting<V: ?Sized>(pub(crate) Arc<V>);

impl<V: ServerCertVerifier + ?Sized> ServerCertVerifier for Noting<V> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.0
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .map_err(|error| noted(error, end_entity))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

impl<V: ClientCertVerifier + ?Sized> ClientCertVerifier for Noting<V> {
    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.0
            .verify_client_cert(end_entity, intermediates, now)
            .map_err(|error| noted(error, end_entity))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TlsIdentity;
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose,
        IsCa, KeyPair, date_time_ymd,
    };
    use std::path::Path;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    type Authority = CertifiedIssuer<'static, KeyPair>;

    fn authority(name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }

    fn identity(
        dir: &Path,
        trusted: &Authority,
        certificate: &rcgen::Certificate,
        key: &KeyPair,
    ) -> Arc<TlsIdentity> {
        let file = |name: &str, text: String| {
            let path = dir.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let key = file("key.pem", key.serialize_pem());
        TlsIdentity::load(&TlsFiles {
            ca: file("ca.pem", trusted.pem()),
            server_certificate: file("server.pem", certificate.pem()),
            server_key: key.clone(),
            client_certificate: file("client.pem", certificate.pem()),
            client_key: key,
        })
        .unwrap()
    }

    fn issued(trusted: &Authority, by: &Authority, params: CertificateParams) -> Arc<TlsIdentity> {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, by).unwrap();
        identity(dir.path(), trusted, &certificate, &key)
    }

    fn self_signed(trusted: &Authority, params: CertificateParams) -> Arc<TlsIdentity> {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        identity(dir.path(), trusted, &certificate, &key)
    }

    /// What either end says about why there is no connection, if there is none.
    async fn said(source: &TlsIdentity, destination: &TlsIdentity) -> (String, String) {
        let (near, far) = tokio::io::duplex(1 << 16);
        let connect = async {
            let connector = tokio_rustls::TlsConnector::from(source.client.clone());
            let name = ServerName::try_from("b").unwrap();
            let mut stream = connector.connect(name, near).await?;
            stream.write_all(b"hello").await?;
            stream.read_u8().await
        };
        let accept = async {
            let acceptor = tokio_rustls::TlsAcceptor::from(destination.server.clone());
            let mut stream = acceptor.accept(far).await?;
            stream.write_all(b"h").await?;
            stream.flush().await?;
            stream.read_u8().await
        };
        let (there, here) = tokio::join!(
            async {
                let failed = connect.await.err();
                failed.map(|error| explain(&error, End::Source, &source.files))
            },
            async {
                let failed = accept.await.err();
                failed.map(|error| explain(&error, End::Destination, &destination.files))
            },
        );
        (there.unwrap_or_default(), here.unwrap_or_default())
    }

    fn has(sentence: &str, words: &[&str]) {
        for word in words {
            assert!(
                sentence.contains(word),
                "`{word}` is missing in: {sentence}"
            );
        }
    }

    struct Hosts {
        ours: Authority,
        good: Arc<TlsIdentity>,
    }

    fn hosts() -> Hosts {
        let ours = authority("ours");
        let good = issued(&ours, &ours, params("b"));
        Hosts { ours, good }
    }

    #[tokio::test]
    async fn good_certificates_say_nothing() {
        let Hosts { ours, good } = hosts();
        let source = issued(&ours, &ours, params("a"));
        assert_eq!(said(&source, &good).await, Default::default());
    }

    #[tokio::test]
    async fn expired_and_not_valid_yet() {
        let Hosts { ours, good } = hosts();
        let mut old = params("b");
        old.not_before = date_time_ymd(2020, 1, 1);
        old.not_after = date_time_ymd(2021, 2, 3);
        let old = issued(&ours, &ours, old);
        let (source, destination) = said(&good, &old).await;
        has(
            &source,
            &["expired", "Feb  3", "2021", "its server_certificate"],
        );
        has(&destination, &["does not accept", "server.pem", "expired"]);
        let (source, destination) = said(&old, &good).await;
        has(&source, &["does not accept", "client.pem", "expired"]);
        has(&destination, &["expired", "2021", "its client_certificate"]);

        let mut new = params("b");
        new.not_before = date_time_ymd(2100, 1, 1);
        new.not_after = date_time_ymd(2101, 1, 1);
        let new = issued(&ours, &ours, new);
        let (source, destination) = said(&good, &new).await;
        has(&source, &["not valid before", "2100", "clocks"]);
        has(&destination, &["not valid yet", "clocks"]);
    }

    #[tokio::test]
    async fn another_hosts() {
        let Hosts { ours, good } = hosts();
        let mut other = params("c.example");
        let address = "10.0.0.9".parse().unwrap();
        other
            .subject_alt_names
            .push(rcgen::SanType::IpAddress(address));
        let other = issued(&ours, &ours, other);
        let (source, destination) = said(&good, &other).await;
        has(
            &source,
            &["is for c.example, 10.0.0.9, not for b;", "subjectAltName b"],
        );
        has(&destination, &["server.pem", "not for the name"]);
    }

    #[tokio::test]
    async fn self_signed_ones_as_tools_make_them_and_as_others_do() {
        let Hosts { ours, good } = hosts();
        let mut authority = params("b");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        for params in [params("b"), authority] {
            let own = self_signed(&ours, params);
            let (source, destination) = said(&good, &own).await;
            has(&source, &["self-signed (by CN=b)", "ca.pem"]);
            has(&destination, &["server.pem", "self-signed"]);
            let (source, destination) = said(&own, &good).await;
            has(&source, &["client.pem", "self-signed"]);
            has(&destination, &["self-signed (by CN=b)", "ca.pem"]);
        }
    }

    #[tokio::test]
    async fn those_of_other_authorities_even_of_the_same_name() {
        let Hosts { ours, good } = hosts();
        for (name, issuer) in [("theirs", "CN=theirs"), ("ours", "CN=ours")] {
            let theirs = issued(&ours, &authority(name), params("b"));
            let (source, destination) = said(&good, &theirs).await;
            has(&source, &["issued by", issuer, "does not vouch"]);
            has(&destination, &["server.pem", "authority that is unknown"]);
            let (source, destination) = said(&theirs, &good).await;
            has(&source, &["client.pem", "authority that is unknown"]);
            has(&destination, &["issued by", issuer, "does not vouch"]);
        }
    }

    #[tokio::test]
    async fn those_that_are_for_one_end_only() {
        let Hosts { ours, good } = hosts();
        let mut client = params("b");
        client.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let client = issued(&ours, &ours, client);
        let (source, destination) = said(&good, &client).await;
        has(&source, &["not meant for a server"]);
        has(&destination, &["server.pem", "not meant for a server"]);
        let mut server = params("b");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let server = issued(&ours, &ours, server);
        let (source, destination) = said(&server, &good).await;
        has(&source, &["client.pem", "not meant for a client"]);
        has(&destination, &["not meant for a client"]);
    }

    #[tokio::test]
    async fn no_certificate_at_all_and_no_tls_at_all() {
        let Hosts { ours, good } = hosts();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ours.der().clone()).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::ring::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
        let nobody = TlsIdentity {
            client: Arc::new(client),
            server: good.server.clone(),
            files: good.files.clone(),
            page_key: good.page_key.clone(),
        };
        let (source, destination) = said(&nobody, &good).await;
        has(&source, &["wants a certificate"]);
        has(&destination, &["shows no certificate"]);

        let (mut near, far) = tokio::io::duplex(1 << 16);
        near.write_all(b"vmga\x01\x01\0\0\0\0\0\0\0\0\0\0")
            .await
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(good.server.clone());
        let error = acceptor.accept(far).await.unwrap_err();
        let sentence = explain(&error, End::Destination, &good.files);
        has(&sentence, &["not TLS", "`tls`"]);
    }
}
