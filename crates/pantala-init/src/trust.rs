//! TLS for the question of a health check (`probe`), in the short-lived process that asks it: PID 1 itself speaks none.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme, StreamOwned};

/// Whose certificates are good.
pub enum Trust {
    By(RootCertStore),
    Anyone,
}

impl Trust {
    pub fn public() -> Self {
        Trust::By(webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect())
    }
}

/// A stream through TLS, its handshake done. Without a `name` the server is asked as localhost.
pub fn secure(mut stream: TcpStream, name: &str, trust: Trust) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let config = match trust {
        Trust::By(roots) => builder.with_root_certificates(roots).with_no_client_auth(),
        Trust::Anyone => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Unverified(provider)))
            .with_no_client_auth(),
    };
    let name = if name.is_empty() { "localhost" } else { name };
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    while connection.is_handshaking() {
        connection
            .complete_io(&mut stream)
            .map_err(|error| io::Error::new(error.kind(), format!("TLS: {error}")))?;
    }
    Ok(StreamOwned::new(connection, stream))
}

/// Whoever holds the key of the certificate that is shown. For `tls_skip_verify`.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use rustls::pki_types::PrivatePkcs8KeyDer;
    use rustls::{ServerConfig, ServerConnection};

    use super::*;

    /// A server for `name` that answers once, and its certificate.
    fn server(name: &str) -> (TcpStream, CertificateDer<'static>) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let certificate = made.cert.der().clone();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key.into())
            .unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = StreamOwned::new(ServerConnection::new(Arc::new(config)).unwrap(), stream);
            let _ = stream.write_all(b"hello");
        });
        (TcpStream::connect(("127.0.0.1", port)).unwrap(), certificate)
    }

    fn said(stream: TcpStream, name: &str, trust: Trust) -> Result<String, String> {
        let mut stream = secure(stream, name, trust).map_err(|error| error.to_string())?;
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).map_err(|error| error.to_string())?;
        Ok(String::from_utf8_lossy(&hello).into_owned())
    }

    fn by(certificate: CertificateDer<'static>) -> Trust {
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        Trust::By(roots)
    }

    #[test]
    fn a_certificate_is_good_for_its_name_by_whom_is_trusted() {
        let (stream, certificate) = server("app.example.com");
        assert_eq!(said(stream, "app.example.com", by(certificate)), Ok("hello".to_owned()));
        let (stream, certificate) = server("app.example.com");
        let refused = said(stream, "other.example.com", by(certificate)).unwrap_err();
        assert!(refused.contains("not valid for name"), "{refused}");
        let (stream, _) = server("app.example.com");
        let refused = said(stream, "app.example.com", Trust::public()).unwrap_err();
        assert!(refused.contains("invalid peer certificate"), "{refused}");
    }

    #[test]
    fn anyone_may_be_trusted() {
        let (stream, _) = server("app.example.com");
        assert_eq!(said(stream, "", Trust::Anyone), Ok("hello".to_owned()));
    }
}
