//! The certificates of the view, by name. Rows are kept as they came and their keys read when a handshake first asks, so that
//! ten thousand of them cost nothing but room until then; what was read is kept for as many as are in use.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use arc_swap::{ArcSwap, ArcSwapOption};
use pantala_route::names::Names;
use pantala_wire::feed::CertRow;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::sign::CertifiedKey;

use crate::log;

pub const ACME: &str = "acme-tls/1";
/// Keys read and kept at once; the first to be read is the first to be forgotten.
const READ_MAX: usize = 4_096;
/// Of so few new rows each is read at once, so that an unusable one is named in the answer to the agent.
const READ_NOW_MAX: usize = 64;

#[derive(Default)]
pub struct Certificates {
    names: ArcSwap<Names<Arc<Entry>>>,
    /// for `acme-tls/1` and nothing else
    challenges: ArcSwap<Names<Arc<Entry>>>,
    /// by key of their row; only the control thread looks here
    known: Mutex<HashMap<String, Arc<Entry>>>,
    read: Mutex<VecDeque<Weak<Entry>>>,
}

struct Entry {
    row: Arc<CertRow>,
    certified: ArcSwapOption<CertifiedKey>,
    unusable: AtomicBool,
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
    pub fn replace<'a>(&self, rows: impl Iterator<Item = (&'a String, &'a Arc<CertRow>)>) -> Vec<(String, String)> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = HashMap::new();
        let mut fresh = Vec::new();
        let (mut names, mut challenges, mut unusable) = (Names::default(), Names::default(), Vec::new());
        for (key, row) in rows {
            let entry = match known.get(key) {
                Some(entry) if Arc::ptr_eq(&entry.row, row) => entry.clone(),
                _ => {
                    let entry = Arc::new(Entry::new(row.clone()));
                    fresh.push(entry.clone());
                    entry
                }
            };
            next.insert(key.clone(), entry);
        }
        if fresh.len() <= READ_NOW_MAX {
            for entry in &fresh {
                entry.unusable.store(self.certified(entry).is_err(), Relaxed);
            }
        }
        for (key, entry) in &next {
            let judged = if entry.unusable.load(Relaxed) {
                self.certified(entry).map(drop)
            } else {
                entry.looks_right()
            };
            match judged {
                Ok(()) => {
                    let map = if entry.row.alpn == ACME {
                        &mut challenges
                    } else {
                        &mut names
                    };
                    let row = &entry.row;
                    row.names
                        .iter()
                        .for_each(|name| map.insert(name, row.not_after_ms, entry.clone()));
                }
                Err(why) => unusable.push((key.clone(), why)),
            }
        }
        *known = next;
        self.names.store(Arc::new(names));
        self.challenges.store(Arc::new(challenges));
        unusable
    }

    pub fn find(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        self.usable(self.names.load().find(name)?)
    }

    /// For the validation of `name`.
    pub fn challenge(&self, name: &str) -> Option<Arc<CertifiedKey>> {
        self.usable(self.challenges.load().find(name)?)
    }

    fn usable(&self, entry: &Arc<Entry>) -> Option<Arc<CertifiedKey>> {
        match self.certified(entry) {
            Ok(certified) => Some(certified),
            Err(why) => {
                if !entry.unusable.swap(true, Relaxed) {
                    let names = entry.row.names.join(" ");
                    log::warning("certificate cannot be used", &[("names", &names), ("reason", &why)]);
                }
                None
            }
        }
    }

    fn certified(&self, entry: &Arc<Entry>) -> Result<Arc<CertifiedKey>, String> {
        if let Some(certified) = entry.certified.load_full() {
            return Ok(certified);
        }
        let certified = read(&entry.row)?;
        if entry.certified.swap(Some(certified.clone())).is_none() {
            let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
            read.push_back(Arc::downgrade(entry));
            if read.len() > READ_MAX
                && let Some(oldest) = read.pop_front().and_then(|weak| weak.upgrade())
            {
                oldest.certified.store(None);
            }
        }
        Ok(certified)
    }
}

impl Entry {
    fn new(row: Arc<CertRow>) -> Entry {
        Entry {
            row,
            certified: ArcSwapOption::empty(),
            unusable: AtomicBool::new(false),
        }
    }

    /// What can be said without reading the key.
    fn looks_right(&self) -> Result<(), String> {
        if !self.row.chain_pem.contains("-----BEGIN CERTIFICATE-----") {
            return Err(NO_CHAIN.to_owned());
        }
        if !self.row.key_pem.contains("PRIVATE KEY-----") {
            return Err(NO_KEY.to_owned());
        }
        Ok(())
    }
}

const NO_CHAIN: &str = "chain_pem: no PEM certificates";
const NO_KEY: &str = "key_pem: no PEM private key";

fn read(row: &CertRow) -> Result<Arc<CertifiedKey>, String> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(row.chain_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| NO_CHAIN.to_owned())?;
    if chain.is_empty() {
        return Err(NO_CHAIN.to_owned());
    }
    // What the parser says about a key is not repeated.
    let key = PrivateKeyDer::from_pem_slice(row.key_pem.as_bytes()).map_err(|_| NO_KEY.to_owned())?;
    let provider = ring::default_provider();
    let certified = if row.alpn == ACME {
        // Its critical extension (RFC 8737) is unknown to the reader that would compare key and certificate.
        provider
            .key_provider
            .load_private_key(key)
            .map(|key| CertifiedKey::new(chain, key))
    } else {
        CertifiedKey::from_der(chain, key, &provider)
    };
    let certified = certified.map_err(|e| format!("chain_pem and key_pem do not go together: {e}"))?;
    Ok(Arc::new(certified))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(label: &str, der: &[u8]) -> String {
        let text = data_encoding::BASE64.encode(der);
        format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
    }

    fn row(name: &str, alpn: &str) -> Arc<CertRow> {
        let mut wanted = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
        if alpn == ACME {
            wanted.custom_extensions = vec![rcgen::CustomExtension::new_acme_identifier(&[0; 32])];
        }
        let key_pair = rcgen::KeyPair::generate().unwrap();
        let made = wanted.self_signed(&key_pair).unwrap();
        Arc::new(CertRow {
            names: vec![name.to_owned()],
            chain_pem: pem("CERTIFICATE", made.der()),
            not_after_ms: 1,
            sealed_key: String::new(),
            key_pem: pem("PRIVATE KEY", &key_pair.serialize_der()),
            alpn: alpn.to_owned(),
        })
    }

    #[test]
    fn a_key_is_read_when_it_is_asked_for_and_kept() {
        let certificates = Certificates::default();
        let rows: Vec<(String, Arc<CertRow>)> = (0..READ_NOW_MAX + 1)
            .map(|n| (format!("cert/{n}"), row(&format!("{n}.test"), "")))
            .collect();
        assert!(certificates.replace(rows.iter().map(|(k, r)| (k, r))).is_empty());
        assert_eq!(certificates.len(), rows.len());
        assert_eq!(certificates.read.lock().unwrap().len(), 0);
        let first = certificates.find("7.test").unwrap();
        assert_eq!(certificates.read.lock().unwrap().len(), 1);
        assert!(certificates.replace(rows.iter().map(|(k, r)| (k, r))).is_empty());
        assert!(Arc::ptr_eq(&first, &certificates.find("7.test").unwrap()));
    }

    #[test]
    fn an_unusable_one_of_many_serves_nobody() {
        let certificates = Certificates::default();
        let (good, other) = (row("good.test", ""), row("other.test", ""));
        let mixed = Arc::new(CertRow {
            key_pem: other.key_pem.clone(),
            ..(*good).clone()
        });
        let mut rows = vec![("cert/mixed".to_owned(), mixed.clone())];
        assert_eq!(certificates.replace(rows.iter().map(|(k, r)| (k, r))).len(), 1);
        rows.extend((0..READ_NOW_MAX).map(|n| (format!("cert/{n}"), row(&format!("{n}.test"), ""))));
        let rows: Vec<_> = rows.into_iter().map(|(k, r)| (k, Arc::new((*r).clone()))).collect();
        assert!(certificates.replace(rows.iter().map(|(k, r)| (k, r))).is_empty());
        assert!(certificates.find("good.test").is_none());
        // Known as unusable from then on.
        assert_eq!(certificates.replace(rows.iter().map(|(k, r)| (k, r))).len(), 1);
    }

    #[test]
    fn a_challenge_is_no_certificate() {
        let certificates = Certificates::default();
        let rows = [("cert/c".to_owned(), row("web.test", ACME))];
        assert!(certificates.replace(rows.iter().map(|(k, r)| (k, r))).is_empty());
        assert!(certificates.find("web.test").is_none());
        assert!(certificates.challenge("web.test").is_some());
    }
}
