//! Phase 2: TLS ends here. The certificate is chosen by SNI from the rows at hand at that moment, so a new one is in use
//! with the next handshake; without one the handshake is refused.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use pantala_route::names::Names;
use pantala_wire::feed::CertRow;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, ServerConfig};

#[derive(Default)]
pub struct Certificates {
    names: ArcSwap<Names<Arc<CertifiedKey>>>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Certificates({} names)", self.len())
    }
}

impl Certificates {
    pub fn len(&self) -> usize {
        self.names.load().len()
    }

    /// Puts all rows in force that can be used; the others are named with the reason.
    pub fn replace<'a>(&self, rows: impl Iterator<Item = (&'a String, &'a CertRow)>) -> Vec<(String, String)> {
        let mut names = Names::default();
        let mut unusable = Vec::new();
        for (key, row) in rows {
            match read(row) {
                Ok(certified) => {
                    row.names
                        .iter()
                        .for_each(|name| names.insert(name, row.not_after_ms, certified.clone()));
                }
                Err(why) => unusable.push((key.clone(), why)),
            }
        }
        self.names.store(Arc::new(names));
        unusable
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.names.load().find(hello.server_name()?).cloned()
    }
}

fn read(row: &CertRow) -> Result<Arc<CertifiedKey>, String> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(row.chain_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| "chain_pem: no PEM certificates".to_owned())?;
    if chain.is_empty() {
        return Err("chain_pem: no PEM certificates".to_owned());
    }
    // What the parser says about a key is not repeated.
    let key =
        PrivateKeyDer::from_pem_slice(row.key_pem.as_bytes()).map_err(|_| "key_pem: no PEM private key".to_owned())?;
    let certified = CertifiedKey::from_der(chain, key, &ring::default_provider())
        .map_err(|e| format!("chain_pem and key_pem do not go together: {e}"))?;
    Ok(Arc::new(certified))
}

pub fn server_config(certificates: Arc<Certificates>, http: bool) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(certificates);
    config.ticketer = ring::Ticketer::new()?;
    if http {
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    }
    Ok(Arc::new(config))
}
