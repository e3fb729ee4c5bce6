//! The operator's S3-compatible store, as the settings name it: which request reads an object, and by whose right.
//!
//! The store knows one account for all apps, so its credentials are used only for buckets that the operator has opened to
//! the app's org. Every other bucket is asked without any, as a stranger would: nobody reads a bucket by naming it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper::Method;
use pantala_route::buckets::Object;
use pantala_wire::feed::BucketSettings;
use rusty_s3::{Bucket, BucketError, Credentials, S3Action, UrlStyle};
use serde::Deserialize;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};
use url::Url;

/// Debian's, and what its `update-ca-certificates` writes a company's own into.
const USUAL_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// How long a signature is good for: one request, and clocks that differ.
const SIGNED_FOR: Duration = Duration::from_secs(300);

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("buckets.endpoint: {value:?} is not a URL such as https://s3.example.com: {why}")]
    Endpoint { value: String, why: String },
    #[error("buckets.{field}: cannot read {path}: {source}")]
    Read {
        field: &'static str,
        path: String,
        source: std::io::Error,
    },
    /// What the parser says about a secret is not repeated.
    #[error("buckets.credentials_file: {0} is not JSON with access_key_id and secret_access_key")]
    Credentials(String),
    #[error("buckets.ca_file: {0} has no PEM certificates")]
    Authorities(String),
    #[error("buckets.{0} must be at least 1")]
    Zero(&'static str),
    #[error(
        "buckets.readers and writers need credentials_file: without it every bucket is read as a stranger reads it"
    )]
    Readers,
}

#[derive(Deserialize)]
struct Kept {
    access_key_id: String,
    secret_access_key: String,
    #[serde(default)]
    session_token: Option<String>,
}

pub struct Store {
    endpoint: Url,
    region: String,
    style: UrlStyle,
    credentials: Option<Credentials>,
    readers: BTreeMap<String, Vec<String>>,
    /// Whose deploys put files there: they are read too.
    writers: BTreeMap<String, Vec<String>>,
    authorities: Vec<CertificateDer<'static>>,
    tls: OnceLock<Result<TlsConnector, rustls::Error>>,
    pub answer_timeout: Duration,
    pub silence_timeout: Duration,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.endpoint)
    }
}

impl Store {
    pub fn open(settings: &BucketSettings) -> Result<Store, StoreError> {
        let endpoint = |why: &dyn fmt::Display| StoreError::Endpoint {
            value: settings.endpoint.clone(),
            why: why.to_string(),
        };
        let url: Url = settings.endpoint.parse().map_err(|why| endpoint(&why))?;
        if !["http", "https"].contains(&url.scheme()) || url.host().is_none() {
            return Err(endpoint(&"it has to begin with http:// or https:// and a host"));
        }
        let opened = !settings.readers.is_empty() || !settings.writers.is_empty();
        if settings.credentials_file.is_empty() && opened {
            return Err(StoreError::Readers);
        }
        for (field, ms) in [
            ("answer_timeout_ms", settings.answer_timeout_ms),
            ("silence_timeout_ms", settings.silence_timeout_ms),
        ] {
            if ms == 0 {
                return Err(StoreError::Zero(field));
            }
        }
        let secure = url.scheme() == "https";
        Ok(Store {
            endpoint: url,
            region: settings.region.clone(),
            style: match settings.virtual_host {
                true => UrlStyle::VirtualHost,
                false => UrlStyle::Path,
            },
            credentials: credentials(&settings.credentials_file)?,
            readers: settings.readers.clone(),
            writers: settings.writers.clone(),
            authorities: match secure {
                true => authorities(&settings.ca_file)?,
                false => Vec::new(),
            },
            tls: OnceLock::new(),
            answer_timeout: Duration::from_millis(settings.answer_timeout_ms),
            silence_timeout: Duration::from_millis(settings.silence_timeout_ms),
        })
    }

    /// Where the object is, signed if the org may read the bucket by the operator's right.
    pub fn url(&self, object: &Object, org: Option<&str>, method: &Method) -> Result<Url, BucketError> {
        let bucket = Bucket::new(
            self.endpoint.clone(),
            self.style,
            object.bucket.to_owned(),
            self.region.clone(),
        )?;
        let open = |orgs: &Vec<String>| org.is_some_and(|org| orgs.iter().any(|one| one == org));
        let named = |orgs: &BTreeMap<String, Vec<String>>| orgs.get(object.bucket).is_some_and(open);
        let signs = named(&self.readers) || named(&self.writers);
        let credentials = self.credentials.as_ref().filter(|_| signs);
        Ok(match (credentials, *method == Method::HEAD) {
            (None, _) => bucket.object_url(&object.key),
            (signed, true) => bucket.head_object(signed, &object.key).sign(SIGNED_FOR),
            (signed, false) => bucket.get_object(signed, &object.key).sign(SIGNED_FOR),
        })
    }

    /// Made with the first request.
    pub fn tls(&self) -> Result<&TlsConnector, &rustls::Error> {
        self.tls.get_or_init(|| self.connector()).as_ref()
    }

    fn connector(&self) -> Result<TlsConnector, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.authorities.iter().cloned());
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

fn credentials(path: &str) -> Result<Option<Credentials>, StoreError> {
    if path.is_empty() {
        return Ok(None);
    }
    let kept: Kept = serde_json::from_slice(&read("credentials_file", path)?)
        .map_err(|_| StoreError::Credentials(path.to_owned()))?;
    let (id, secret) = (kept.access_key_id, kept.secret_access_key);
    if id.is_empty() || secret.is_empty() {
        return Err(StoreError::Credentials(path.to_owned()));
    }
    Ok(Some(match kept.session_token {
        Some(token) => Credentials::new_with_token(id, secret, token),
        None => Credentials::new(id, secret),
    }))
}

fn authorities(path: &str) -> Result<Vec<CertificateDer<'static>>, StoreError> {
    let path = if path.is_empty() { USUAL_AUTHORITIES } else { path };
    let text = read("ca_file", path)?;
    let found: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text).flatten().collect();
    if found.is_empty() {
        return Err(StoreError::Authorities(path.to_owned()));
    }
    Ok(found)
}

fn read(field: &'static str, path: &str) -> Result<Vec<u8>, StoreError> {
    fs::read(Path::new(path)).map_err(|source| StoreError::Read {
        field,
        path: path.to_owned(),
        source,
    })
}
