//! What a certificate file says: whom it names, and from when to when it is valid.
//!
//! Must not: judge whether that is good, or read keys.

use std::net::IpAddr;
use std::path::Path;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::TlsError;

/// The facts of one certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFacts {
    /// DNS names and addresses of its subjectAltName, as people write them. TLS goes by these, not by
    /// the common name.
    pub names: Vec<String>,
    /// Seconds since 1970.
    pub valid_from_unix_s: i64,
    pub valid_to_unix_s: i64,
}

impl CertificateFacts {
    /// Reads the first certificate of a PEM file: the one that the host shows.
    pub fn read(what: &'static str, path: &Path) -> Result<CertificateFacts, TlsError> {
        let first = CertificateDer::pem_file_iter(path)
            .map_err(|error| TlsError::File {
                what,
                path: path.to_owned(),
                error,
            })?
            .next()
            .ok_or_else(|| TlsError::Empty {
                path: path.to_owned(),
            })?
            .map_err(|error| TlsError::File {
                what,
                path: path.to_owned(),
                error,
            })?;
        CertificateFacts::parse(&first).map_err(|error| TlsError::Config {
            what,
            error: error.into(),
        })
    }

    fn parse(certificate: &[u8]) -> Result<CertificateFacts, String> {
        let (_, certificate) =
            X509Certificate::from_der(certificate).map_err(|error| error.to_string())?;
        let alternatives = certificate
            .subject_alternative_name()
            .map_err(|error| error.to_string())?;
        let names = alternatives.map_or(&[][..], |names| &names.value.general_names[..]);
        Ok(CertificateFacts {
            names: names.iter().filter_map(name).collect(),
            valid_from_unix_s: certificate.validity().not_before.timestamp(),
            valid_to_unix_s: certificate.validity().not_after.timestamp(),
        })
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let four = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let address = four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            address.ok().map(|address| address.to_string())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_dates_of_a_certificate() {
        let mut parameters = rcgen::CertificateParams::new(vec!["b.example".to_owned()]).unwrap();
        let address = "10.0.0.2".parse().unwrap();
        parameters
            .subject_alt_names
            .push(rcgen::SanType::IpAddress(address));
        parameters.not_before = rcgen::date_time_ymd(2020, 1, 1);
        parameters.not_after = rcgen::date_time_ymd(2021, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cert.pem");
        std::fs::write(&file, parameters.self_signed(&key).unwrap().pem()).unwrap();
        let facts = CertificateFacts::read("certificate", &file).unwrap();
        assert_eq!(facts.names, ["b.example", "10.0.0.2"]);
        assert_eq!(facts.valid_from_unix_s, 1_577_836_800);
        assert_eq!(facts.valid_to_unix_s, 1_609_459_200);
    }

    #[test]
    fn what_is_no_certificate_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cert.pem");
        let read = || CertificateFacts::read("server certificate", &file).unwrap_err();
        assert!(read().to_string().contains("cert.pem"));
        std::fs::write(&file, "nothing\n").unwrap();
        assert!(read().to_string().contains("holds no certificate"));
        std::fs::write(
            &file,
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        )
        .unwrap();
        assert!(read().to_string().contains("server certificate"));
    }
}
