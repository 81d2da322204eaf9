//! The lab's own certificate authority, and certificates that are right or wrong on purpose.
//!
//! Certificates go to libvirt's default paths, which vmgangd uses as well.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};

use crate::error::{LabError, Result};
use crate::host::Host;

const CA_PATH: &str = "/etc/pki/CA/cacert.pem";

/// A certificate authority.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate with its key, both as PEM.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub certificate: String,
    pub key: String,
}

/// What a certificate says.
#[derive(Clone, Debug)]
pub struct CertificateRequest {
    /// The common name, and a subject alternative name.
    pub host_name: String,
    /// An IP address as a subject alternative name.
    pub address: Option<String>,
    /// Valid in the past only.
    pub expired: bool,
    /// Expires so many days from now, and not in a hundred years.
    pub days_left: Option<u32>,
}

impl Authority {
    /// A new authority; two of them never trust each other.
    pub fn new(name: &str) -> Result<Authority> {
        let mut parameters = CertificateParams::default();
        parameters
            .distinguished_name
            .push(DnType::CommonName, name.to_owned());
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        parameters.not_before = date_time_ymd(2020, 1, 1);
        parameters.not_after = date_time_ymd(2120, 1, 1);
        Ok(Authority {
            issuer: CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?,
        })
    }

    /// The authority's own certificate.
    pub fn certificate(&self) -> String {
        self.issuer.pem()
    }

    /// Issues a certificate for both ends of a connection.
    pub fn issue(&self, request: &CertificateRequest) -> Result<Credentials> {
        let mut parameters = CertificateParams::new(vec![request.host_name.clone()])?;
        parameters
            .distinguished_name
            .push(DnType::CommonName, request.host_name.clone());
        if let Some(address) = &request.address {
            let address = address
                .parse()
                .map_err(|_| LabError::Request(format!("{address:?} is not an IP address")))?;
            parameters
                .subject_alt_names
                .push(SanType::IpAddress(address));
        }
        parameters.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        parameters.not_before = date_time_ymd(2020, 1, 1);
        parameters.not_after = match request.days_left {
            _ if request.expired => date_time_ymd(2021, 1, 1),
            Some(days) => {
                (SystemTime::now() + Duration::from_secs(u64::from(days) * 86_400)).into()
            }
            None => date_time_ymd(2120, 1, 1),
        };
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        Ok(Credentials {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

impl CertificateRequest {
    /// The right certificate for a host.
    pub fn for_host(host: &Host) -> CertificateRequest {
        CertificateRequest {
            host_name: host.name().to_owned(),
            address: Some(host.address().to_owned()),
            expired: false,
            days_left: None,
        }
    }
}

/// Puts the authority and the host's server and client certificate where libvirt looks for them.
/// A daemon that runs keeps what it has read; restart it.
pub fn install(host: &Host, authority: &str, credentials: &Credentials) -> Result<()> {
    host.write_file(CA_PATH, authority)?;
    for role in ["server", "client"] {
        host.write_file(
            format!("/etc/pki/libvirt/{role}cert.pem"),
            &credentials.certificate,
        )?;
        host.write_file_mode(
            format!("/etc/pki/libvirt/private/{role}key.pem"),
            &credentials.key,
            0o600,
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn issues_pem_for_names_and_addresses_and_refuses_nonsense() {
        let authority = Authority::new("test authority").expect("an authority");
        let mut request = CertificateRequest {
            host_name: "a".to_owned(),
            address: Some("10.77.0.1".to_owned()),
            expired: true,
            days_left: None,
        };
        let issued = authority.issue(&request).expect("a certificate");
        assert!(issued.certificate.starts_with("-----BEGIN CERTIFICATE"));
        assert!(issued.key.contains("PRIVATE KEY"));
        request.address = Some("a.b.c.d".to_owned());
        assert!(authority.issue(&request).is_err());
    }
}
