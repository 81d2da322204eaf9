//! Who may open a session, and what everybody else is told.

use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use vmgang_engine::{SourceError, SourceSession, TlsFiles, TlsIdentity, Transport};

use crate::pair::{JOB, Pair};

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_the_user_as_it_was_written() {
    let pair = Pair::new(Transport::Plain, Some("only 3 MiB are free here"), 1).await;
    let refused = SourceSession::connect(pair.options(1, Transport::Plain))
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("only 3 MiB are free here"),
        "{refused}"
    );
    assert!(
        !pair
            .source_dir
            .path()
            .join("migrate")
            .join(JOB.simple().to_string())
            .exists()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn unreachable_peers_and_other_versions_are_named() {
    let pair = Pair::new(Transport::Plain, None, 1).await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut options = pair.options(1, Transport::Plain);
    options.peer.port = closed.local_addr().unwrap().port();
    drop(closed);
    let error = SourceSession::connect(options).await.unwrap_err();
    assert!(matches!(error, SourceError::Unreachable { .. }), "{error}");

    // A peer of version 9 refuses in its own words; ours names both versions.
    for answer in [
        "vmga\x09\x03\0\0\0\0\0\0\x05\0\0\0\x01\0\x01\x009",
        "HTTP/1.1 400 Bad Request\r\n",
    ] {
        let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut options = pair.options(1, Transport::Plain);
        options.peer.port = other.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut peer, _) = other.accept().await.unwrap();
            peer.write_all(answer.as_bytes()).await.unwrap();
            let _ = peer.read(&mut [0; 4096]).await;
        });
        let error = SourceSession::connect(options).await.unwrap_err();
        match answer.starts_with("vmga") {
            true => assert!(
                matches!(error, SourceError::VersionMismatch { .. }),
                "{error}"
            ),
            false => assert!(matches!(error, SourceError::Protocol { .. }), "{error}"),
        }
    }
    // And a destination of ours answers a source of another version with a refusal.
    let mut source = tokio::net::TcpStream::connect(("127.0.0.1", pair.port))
        .await
        .unwrap();
    source
        .write_all(b"vmga\x09\x01\0\0\0\0\0\0\0\0\0\0")
        .await
        .unwrap();
    let mut answer = Vec::new();
    source.read_to_end(&mut answer).await.unwrap();
    assert_eq!(&answer[..6], b"vmga\x01\x03");
}

/// A certificate authority and a host certificate of it, as files.
pub fn identity(ca: &rcgen::CertifiedIssuer<'_, rcgen::KeyPair>, name: &str) -> Arc<TlsIdentity> {
    let dir = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    let certificate = params.signed_by(&key, ca).unwrap();
    let file = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (cert, key) = (
        file("cert.pem", certificate.pem()),
        file("key.pem", key.serialize_pem()),
    );
    TlsIdentity::load(&TlsFiles {
        ca: file("ca.pem", ca.pem()),
        server_certificate: cert.clone(),
        server_key: key.clone(),
        client_certificate: cert,
        client_key: key,
    })
    .unwrap()
}

pub fn authority() -> rcgen::CertifiedIssuer<'static, rcgen::KeyPair> {
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_lets_in_whom_the_authority_signed_and_nobody_else() {
    let (ours, theirs) = (authority(), authority());
    let server = Transport::Tls(identity(&ours, "localhost"));
    let pair = Pair::new(server, None, 1 << 20).await;
    let connect = |transport, host: &str| {
        let mut options = pair.options(1, transport);
        options.peer.host = host.to_owned();
        SourceSession::connect(options)
    };
    let good = Transport::Tls(identity(&ours, "source.example"));
    let (session, _) = connect(good.clone(), "localhost").await.unwrap();
    session.close().await;
    assert_eq!(
        pair.host.peers.lock().unwrap()[0].certificate_names,
        ["source.example"]
    );

    let wrong_name = connect(good, "127.0.0.1").await.unwrap_err();
    assert!(
        matches!(wrong_name, SourceError::Tls { .. }),
        "{wrong_name}"
    );
    let stranger = Transport::Tls(identity(&theirs, "source.example"));
    let error = connect(stranger, "localhost").await.unwrap_err();
    assert!(matches!(error, SourceError::Tls { .. }), "{error}");
    let plain = connect(Transport::Plain, "localhost").await.unwrap_err();
    assert!(
        matches!(
            plain,
            SourceError::Protocol { .. } | SourceError::Unreachable { .. }
        ),
        "{plain}"
    );
    assert_eq!(pair.host.peers.lock().unwrap().len(), 1);
}
