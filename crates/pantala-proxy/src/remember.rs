//! Phase 4b: whether this request's way is remembered from an earlier replay. Shared by all threads; while no app of this
//! edge has anything remembered it costs one load.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use hyper::HeaderMap;
use hyper::header::COOKIE;
use hyper::http::request::Parts;
use pantala_route::replay::{Invalid, Keep, Replay};
use pantala_route::replay_cache::{self, Asked, Pattern, Remembered, ReplayCache};
use pantala_route::snapshot::Offer;

const SKIP: &str = "fly-replay-cache-control";

#[derive(Default)]
pub struct Memory {
    cache: RwLock<ReplayCache>,
    entries: AtomicUsize,
}

impl Memory {
    pub fn len(&self) -> usize {
        self.entries.load(Relaxed)
    }

    pub fn find(&self, app: &str, asked: &Asked, now_ms: u64) -> Option<Arc<Remembered>> {
        let cache = self.cache.read().unwrap_or_else(PoisonError::into_inner);
        cache.find(app, asked, now_ms)
    }

    /// For the path that the app named with its answer; an error says why it cannot be.
    pub fn keep_path(
        &self,
        app: &Arc<str>,
        asked: &Asked,
        keep: &Keep,
        remembered: Remembered,
        now_ms: u64,
    ) -> Result<(), Invalid> {
        let pattern = Pattern::parse(&keep.pattern)?;
        if !pattern.covers(&asked.host, &asked.path) {
            let why = format!(
                "fly-replay-cache: {:?} does not cover the request for {}{}",
                keep.pattern, asked.host, asked.path
            );
            return Err(Invalid(why));
        }
        self.change(|cache| cache.keep_path(app, asked, &pattern, keep.ttl_s, remembered, now_ms));
        Ok(())
    }

    /// For the client's cookie or header, if a rule of the service covers the request; whether it does.
    pub fn keep_session(&self, app: &Arc<str>, asked: &Asked, replay: &Replay, issuer: &Arc<str>, now_ms: u64) -> bool {
        let Some(session) = &asked.session else { return false };
        let remembered = Remembered {
            replay: replay.clone(),
            issuer: issuer.clone(),
            allow_bypass: session.allow_bypass,
        };
        self.change(|cache| cache.keep_session(app, session, remembered, now_ms));
        true
    }

    pub fn forget(&self, app: &str, asked: &Asked, allowed: impl Fn(&Remembered) -> bool) {
        self.change(|cache| cache.forget(app, asked, allowed));
    }

    fn change<T>(&self, make: impl FnOnce(&mut ReplayCache) -> T) {
        let mut cache = self.cache.write().unwrap_or_else(PoisonError::into_inner);
        make(&mut cache);
        self.entries.store(cache.len(), Relaxed);
    }
}

/// By what a request of the service is looked up.
pub fn asked(host: &str, parts: &Parts, offer: &Offer) -> Asked {
    let path = parts.uri.path();
    let rules = offer.port.http_options.as_ref().and_then(|o| o.replay_cache.as_deref());
    let session = rules.and_then(|rules| {
        let header = |name: &str| parts.headers.get(name)?.to_str().ok();
        let cookie = |name: &str| {
            let mut lines = parts
                .headers
                .get_all(COOKIE)
                .iter()
                .filter_map(|line| line.to_str().ok());
            lines.find_map(|line| replay_cache::cookie(line, name))
        };
        replay_cache::session(rules, host, path, cookie, header)
    });
    Asked {
        host: host.to_owned(),
        path: path.to_owned(),
        session,
    }
}

/// The client asks that nothing remembered be used.
pub fn skips(headers: &HeaderMap) -> bool {
    headers
        .get(SKIP)
        .is_some_and(|value| value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"skip"))
}
