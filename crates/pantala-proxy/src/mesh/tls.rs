//! Mutual TLS between proxies. Both sides show a certificate of the cluster's authority whose only DNS name is that of their
//! node. The files are looked at again when they change; new connections take the new ones, older ones end by themselves.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;
use pantala_wire::feed::MeshSettings;
use tokio_rustls::rustls::client::Resumption;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, ServerConfig};
use webpki::EndEntityCert;

use crate::log;

const NAME_OF_NODES: &str = ".node.pantala.internal";
/// HTTP/2 as well, whose calls may have the brief form: what both ends read decides the handshake. Earlier proxies know `h2` alone.
pub const BRIEF: &[u8] = b"pantala-brief/1";

#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: no PEM {what}", path.display())]
    Pem { path: PathBuf, what: &'static str },
    #[error("certificate and key: {0}")]
    Own(#[from] rustls::Error),
    #[error("authority: {0}")]
    Authority(#[from] VerifierBuilderError),
}

/// What one set of files gave; `generation` grows with each.
pub struct Credentials {
    pub generation: u64,
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
}

/// Device, inode, size and time of change of each file: whether it is worth reading again.
type Stamp = [(u64, u64, u64, i64, i64); 3];

struct Looked {
    stamp: Option<Stamp>,
    told: String,
}

pub struct Files {
    certificate: PathBuf,
    key: PathBuf,
    authority: PathBuf,
    current: ArcSwapOption<Credentials>,
    looked: Mutex<Looked>,
}

impl Files {
    /// Files that are not there yet, or not right, come into force as soon as they are.
    pub fn new(settings: &MeshSettings) -> Files {
        let files = Files {
            certificate: settings.certificate.as_str().into(),
            key: settings.key.as_str().into(),
            authority: settings.authority.as_str().into(),
            current: ArcSwapOption::empty(),
            looked: Mutex::new(Looked {
                stamp: None,
                told: String::new(),
            }),
        };
        files.look();
        files
    }

    pub fn current(&self) -> Option<Arc<Credentials>> {
        self.current.load_full()
    }

    /// Reads the files if they changed, or could not be used when last read.
    pub fn look(&self) {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = self.stamp();
        if stamp.is_some() && stamp == looked.stamp {
            return;
        }
        let generation = self.current().map_or(1, |now| now.generation + 1);
        match self.read(generation) {
            Ok(credentials) => {
                looked.stamp = stamp;
                looked.told.clear();
                self.current.store(Some(Arc::new(credentials)));
                log::info("mesh certificate in use", &[("generation", &generation)]);
            }
            Err(error) => {
                // The files are written one after the other: the next look finds them whole.
                let why = error.to_string();
                if why != looked.told {
                    log::warning("mesh certificate not usable", &[("reason", &why)]);
                    looked.told = why;
                }
            }
        }
    }

    fn stamp(&self) -> Option<Stamp> {
        let one = |path: &Path| {
            let meta = fs::metadata(path).ok()?;
            Some((meta.dev(), meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
        };
        Some([one(&self.certificate)?, one(&self.key)?, one(&self.authority)?])
    }

    fn read(&self, generation: u64) -> Result<Credentials, CredentialsError> {
        let chain = certificates(&self.certificate)?;
        let text = bytes(&self.key)?;
        let key = || {
            // What the parser says about a key is not repeated.
            PrivateKeyDer::from_pem_slice(&text).map_err(|_| CredentialsError::Pem {
                path: self.key.clone(),
                what: "private key",
            })
        };
        let mut roots = RootCertStore::empty();
        for one in certificates(&self.authority)? {
            roots.add(one)?;
        }
        let (roots, provider) = (Arc::new(roots), Arc::new(ring::default_provider()));
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key()?)?;
        // Connections last; a resumed one would only be another road past the certificate.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let protocols = vec![BRIEF.to_vec(), b"h2".to_vec()];
        server.alpn_protocols.clone_from(&protocols);
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key()?)?;
        client.resumption = Resumption::disabled();
        client.alpn_protocols = protocols;
        Ok(Credentials {
            generation,
            server: Arc::new(server),
            client: Arc::new(client),
        })
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    fs::read(path).map_err(|source| CredentialsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let unusable = || CredentialsError::Pem {
        path: path.to_owned(),
        what: "certificates",
    };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&bytes(path)?)
        .collect::<Result<_, _>>()
        .map_err(|_| unusable())?;
    if chain.is_empty() { Err(unusable()) } else { Ok(chain) }
}

/// None for a node whose id is no DNS label.
pub fn name_of(node: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(format!("{node}{NAME_OF_NODES}")).ok()
}

/// The node whose certificate this is: its only DNS name says so.
pub fn node_of(chain: &[CertificateDer<'_>]) -> Option<String> {
    let certificate = EndEntityCert::try_from(chain.first()?).ok()?;
    let mut names = certificate.valid_dns_names();
    let (name, another) = (names.next()?, names.next());
    let node = name.strip_suffix(NAME_OF_NODES)?;
    (another.is_none() && !node.is_empty() && !node.contains(['.', '*'])).then(|| node.to_owned())
}
