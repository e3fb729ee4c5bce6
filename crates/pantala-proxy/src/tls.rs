//! How TLS ends here: versions, suites and protocols of each kind of port. The certificate is chosen by SNI from the rows at
//! hand at that moment, so a new one is in use with the next handshake; without one the handshake is refused.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pantala_route::entry::Speech;
use pantala_wire::feed::TLSOptions;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::crypto::ring::{self, cipher_suite as suite};
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{self, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion};

use crate::certificates::{ACME, Certificates};
use crate::tickets::Tickets;

/// Fly Proxy's list, and for RSA certificates of users the same three: which of both is spoken follows from the certificate.
const SUITES: [SupportedCipherSuite; 9] = [
    suite::TLS13_AES_128_GCM_SHA256,
    suite::TLS13_AES_256_GCM_SHA384,
    suite::TLS13_CHACHA20_POLY1305_SHA256,
    suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];
/// Distinct options of apps; beyond, all but the usual ones are made anew.
const OPTIONS_MAX: usize = 256;
const HTTP: [&str; 2] = ["h2", "http/1.1"];
/// What newer clients of Postgres offer.
const POSTGRES: [&str; 1] = ["postgresql"];

pub struct Tls {
    pub certificates: Arc<Certificates>,
    pub tickets: Arc<Tickets>,
    provider: Arc<CryptoProvider>,
    https: Arc<ServerConfig>,
    bytes: Arc<ServerConfig>,
    pub challenge: Arc<ServerConfig>,
    others: Mutex<HashMap<Options, Arc<ServerConfig>>>,
}

/// What tells one configuration from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Options {
    alpn: Vec<String>,
    only: Option<Only>,
    self_signed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Only {
    Tls12,
    Tls13,
}

impl Options {
    /// Without `alpn` a port that ends only TLS offers no protocol: the app would get what it never agreed to.
    fn of(speech: Speech, given: Option<&TLSOptions>) -> Options {
        let usual: &[&str] = match speech {
            Speech::Https => &HTTP,
            Speech::Postgres => &POSTGRES,
            _ => &[],
        };
        let usual = || usual.iter().map(|name| (*name).to_owned()).collect();
        let alpn = given.and_then(|options| options.alpn.clone()).unwrap_or_else(usual);
        let versions = given
            .and_then(|options| options.versions.as_deref())
            .unwrap_or_default();
        let has = |version: &str| versions.iter().any(|one| one == version);
        Options {
            alpn,
            only: match (has("TLSv1.2"), has("TLSv1.3")) {
                (true, false) => Some(Only::Tls12),
                (false, true) => Some(Only::Tls13),
                _ => None,
            },
            self_signed: given.and_then(|options| options.default_self_signed) == Some(true),
        }
    }
}

impl Tls {
    pub fn new() -> Result<Tls, rustls::Error> {
        let provider = CryptoProvider {
            cipher_suites: SUITES.to_vec(),
            ..ring::default_provider()
        };
        let (certificates, tickets) = (Arc::<Certificates>::default(), Arc::new(Tickets::new()?));
        let provider = Arc::new(provider);
        let make = |options: &Options, resolver| config(&provider, &tickets, options, resolver);
        let by_name: Arc<dyn ResolvesServerCert> = Arc::new(ByName(certificates.clone()));
        let challenge = Options {
            alpn: vec![ACME.to_owned()],
            only: None,
            self_signed: false,
        };
        Ok(Tls {
            https: make(&Options::of(Speech::Https, None), by_name.clone())?,
            bytes: make(&Options::of(Speech::Tls, None), by_name)?,
            challenge: make(&challenge, Arc::new(ForValidation(certificates.clone())))?,
            others: Mutex::default(),
            provider,
            certificates,
            tickets,
        })
    }

    /// The same for the same options, so that what most ports use is made once.
    pub fn config(&self, speech: Speech, given: Option<&TLSOptions>) -> Result<Arc<ServerConfig>, rustls::Error> {
        match (given, speech) {
            (None, Speech::Https) => return Ok(self.https.clone()),
            (None, Speech::Tls) => return Ok(self.bytes.clone()),
            _ => {}
        }
        let options = Options::of(speech, given);
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = others.get(&options) {
            return Ok(made.clone());
        }
        let resolver: Arc<dyn ResolvesServerCert> = match options.self_signed {
            true => Arc::new(OrSelfSigned(self.certificates.clone())),
            false => Arc::new(ByName(self.certificates.clone())),
        };
        let made = config(&self.provider, &self.tickets, &options, resolver)?;
        if others.len() >= OPTIONS_MAX {
            others.clear();
        }
        others.insert(options, made.clone());
        Ok(made)
    }
}

fn config(
    provider: &Arc<CryptoProvider>,
    tickets: &Arc<Tickets>,
    options: &Options,
    resolver: Arc<dyn ResolvesServerCert>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let versions: &[&'static SupportedProtocolVersion] = match options.only {
        Some(Only::Tls12) => &[&TLS12],
        Some(Only::Tls13) => &[&TLS13],
        None => &[&TLS13, &TLS12],
    };
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions)?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
    config.ticketer = tickets.clone();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.alpn_protocols = options.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct ByName(Arc<Certificates>);

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.find(hello.server_name()?)
    }
}

#[derive(Debug)]
struct ForValidation(Arc<Certificates>);

impl ResolvesServerCert for ForValidation {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.challenge(hello.server_name()?)
    }
}

struct OrSelfSigned(Arc<Certificates>);

impl fmt::Debug for OrSelfSigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OrSelfSigned")
    }
}

impl ResolvesServerCert for OrSelfSigned {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let known = hello.server_name().and_then(|name| self.0.find(name));
        known.or_else(|| self_signed().clone())
    }
}

/// One for this process: who takes a certificate that nobody signed does not look at its name.
fn self_signed() -> &'static Option<Arc<CertifiedKey>> {
    static MADE: OnceLock<Option<Arc<CertifiedKey>>> = OnceLock::new();
    MADE.get_or_init(|| {
        let made = rcgen::generate_simple_self_signed(["self-signed.invalid".to_owned()]).ok()?;
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).ok()?;
        let chain = vec![made.cert.der().clone()];
        CertifiedKey::from_der(chain, key, &ring::default_provider())
            .ok()
            .map(Arc::new)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(alpn: Option<&[&str]>, versions: Option<&[&str]>) -> TLSOptions {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        TLSOptions {
            alpn: alpn.map(list),
            versions: versions.map(list),
            default_self_signed: None,
        }
    }

    #[test]
    fn one_configuration_for_the_same_options() {
        let tls = Tls::new().unwrap();
        let mqtt = options(Some(&["mqtt"]), None);
        let made = tls.config(Speech::Tls, Some(&mqtt)).unwrap();
        assert!(Arc::ptr_eq(&made, &tls.config(Speech::Tls, Some(&mqtt)).unwrap()));
        assert_eq!(made.alpn_protocols, [b"mqtt".to_vec()]);
        assert!(Arc::ptr_eq(&tls.https, &tls.config(Speech::Https, None).unwrap()));
        assert!(!Arc::ptr_eq(&tls.https, &tls.config(Speech::Postgres, None).unwrap()));
    }

    #[test]
    fn what_is_offered() {
        for (speech, given, alpn, only) in [
            (Speech::Https, None, &["h2", "http/1.1"][..], None),
            (Speech::Tls, None, &[], None),
            (Speech::Postgres, None, &["postgresql"], None),
            (
                Speech::Https,
                Some(options(Some(&["http/1.1"]), None)),
                &["http/1.1"],
                None,
            ),
            (
                Speech::Https,
                Some(options(None, Some(&["TLSv1.3"]))),
                &["h2", "http/1.1"],
                Some(Only::Tls13),
            ),
            (
                Speech::Tls,
                Some(options(None, Some(&["TLSv1.2", "TLSv1.0"]))),
                &[],
                Some(Only::Tls12),
            ),
            (
                Speech::Tls,
                Some(options(None, Some(&["TLSv1.2", "TLSv1.3"]))),
                &[],
                None,
            ),
            (Speech::Tls, Some(options(None, Some(&["SSLv3"]))), &[], None),
        ] {
            let found = Options::of(speech, given.as_ref());
            assert_eq!(
                (found.alpn.iter().map(String::as_str).collect::<Vec<_>>(), found.only),
                (alpn.to_vec(), only)
            );
        }
    }
}
