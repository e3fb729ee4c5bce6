//! Replays that are remembered, so that a request goes where its app would send it without asking the app (Fly.io: replay
//! cache): for a path below a host, or for the value of a cookie or header. Best effort and bounded: an entry may vanish at
//! any time, and one that leads nowhere never makes a request fail, because the app can be asked again.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use pantala_wire::feed;

use crate::names::normalise;
use crate::replay::{Invalid, Replay, invalid};

pub const TTL_S_MIN: u64 = 10;
const TTL_S_MAX: u64 = 30 * 24 * 3600;
const ENTRIES_MAX: usize = 100_000;
const ENTRIES_PER_APP_MAX: usize = 10_000;
const KEY_BYTES_MAX: usize = 2048;
/// Prefixes of a path that are looked up.
const DEPTH_MAX: usize = 64;

/// A remembered replay.
#[derive(Debug, PartialEq, Eq)]
pub struct Remembered {
    pub replay: Replay,
    /// the machine that said it, which `elsewhere` means
    pub issuer: Arc<str>,
    pub allow_bypass: bool,
}

/// What a request is looked up by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// as [`normalise`] spells it
    pub host: String,
    /// without the query
    pub path: String,
    pub session: Option<Session>,
}

/// The value by which a service's rule tells one client from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    key: String,
    pub ttl_s: u64,
    pub allow_bypass: bool,
}

/// `[host]/path/*`: the requests for which a replay is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    host: Option<String>,
    /// ends with `/`
    prefix: String,
}

impl Pattern {
    pub fn parse(text: &str) -> Result<Pattern, Invalid> {
        let wrong = |why: &str| invalid(format!("fly-replay-cache: {text:?} {why}"));
        let at = text.find('/').unwrap_or(text.len());
        let (host, path) = text.split_at(at);
        let host = match host {
            "" => None,
            host => Some(normalise(host).ok_or_else(|| wrong("does not begin with a host name or /"))?),
        };
        let path = match path.strip_suffix('*') {
            Some(path) if path.ends_with('/') => path,
            Some(_) => return Err(wrong("must end with /*")),
            None => path,
        };
        if path.contains(['*', '?', '#']) {
            return Err(wrong("is no path: only a * at the end stands for the rest"));
        }
        let prefix = format!("{}/", path.trim_end_matches('/'));
        if prefix.matches('/').count() > DEPTH_MAX {
            return Err(wrong("is too deep"));
        }
        Ok(Pattern { host, prefix })
    }

    pub fn covers(&self, host: &str, path: &str) -> bool {
        self.host.as_ref().is_none_or(|own| own == host)
            && (path.starts_with(&self.prefix) || path == &self.prefix[..self.prefix.len() - 1])
    }

    fn key(&self, host: &str) -> String {
        format!("{host}{}", self.prefix)
    }
}

/// What the rules of a service make of a request: that with the longest prefix counts, if the request carries its value.
pub fn session<'a>(
    rules: &[feed::ReplayCache],
    host: &str,
    path: &str,
    cookie: impl Fn(&str) -> Option<&'a str>,
    header: impl Fn(&str) -> Option<&'a str>,
) -> Option<Session> {
    let read = |rule: &feed::ReplayCache| Pattern::parse(rule.path_prefix.as_deref().unwrap_or("/")).ok();
    let covering = rules.iter().filter_map(|rule| Some((read(rule)?, rule)));
    let (pattern, rule) = covering
        .filter(|(pattern, _)| pattern.covers(host, path))
        .max_by_key(|(pattern, _)| pattern.prefix.len())?;
    let name = rule.name.as_deref().filter(|name| !name.is_empty())?;
    let (kind, value) = match rule.r#type.as_deref()? {
        "cookie" => ("cookie", cookie(name)?),
        "header" => ("header", header(name)?),
        _ => return None,
    };
    if value.is_empty() {
        return None;
    }
    Some(Session {
        // No host, path or name contains a line's end.
        key: format!("{}\n{kind}\n{name}\n{value}", pattern.key(host)),
        ttl_s: rule
            .ttl_seconds
            .and_then(|ttl| ttl.try_into().ok())
            .unwrap_or(TTL_S_MIN),
        allow_bypass: rule.allow_bypass.unwrap_or_default(),
    })
}

/// The value of a cookie in a `Cookie` header.
pub fn cookie<'a>(header: &'a str, name: &str) -> Option<&'a str> {
    let pairs = header.split(';').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (key.trim(), value.trim()))
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}

struct Entry {
    remembered: Arc<Remembered>,
    until_ms: u64,
    order: u64,
}

#[derive(Default)]
struct OfApp {
    entries: HashMap<Arc<str>, Entry>,
    /// oldest first; one whose number is no longer that of the entry has been replaced or removed
    order: VecDeque<(u64, Arc<str>)>,
}

/// Of one edge.
#[derive(Default)]
pub struct ReplayCache {
    apps: HashMap<Arc<str>, OfApp>,
    entries: usize,
    next: u64,
}

impl ReplayCache {
    pub fn len(&self) -> usize {
        self.entries
    }

    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// By the client's own value before the path, and of paths the longest.
    pub fn find(&self, app: &str, asked: &Asked, now_ms: u64) -> Option<Arc<Remembered>> {
        let of_app = self.apps.get(app)?;
        let alive = |entry: &&Entry| now_ms < entry.until_ms;
        let found = of_app.keys(asked, |key| of_app.entries.get(key).filter(alive).is_some())?;
        of_app.entries.get(&*found).map(|entry| entry.remembered.clone())
    }

    /// For the path that the app named.
    pub fn keep_path(
        &mut self,
        app: &Arc<str>,
        asked: &Asked,
        pattern: &Pattern,
        ttl_s: Option<u64>,
        remembered: Remembered,
        now_ms: u64,
    ) {
        let key = pattern.key(&asked.host);
        self.keep(app, key, ttl_s.unwrap_or(TTL_S_MIN), remembered, now_ms);
    }

    pub fn keep_session(&mut self, app: &Arc<str>, session: &Session, remembered: Remembered, now_ms: u64) {
        self.keep(app, session.key.clone(), session.ttl_s, remembered, now_ms);
    }

    /// Forgets what [`Self::find`] would answer, if `allowed` by the one who wants it forgotten.
    pub fn forget(&mut self, app: &str, asked: &Asked, allowed: impl Fn(&Remembered) -> bool) -> bool {
        let Some(of_app) = self.apps.get_mut(app) else {
            return false;
        };
        let fit = |key: &str| of_app.entries.get(key).is_some_and(|entry| allowed(&entry.remembered));
        let Some(key) = of_app.keys(asked, fit) else {
            return false;
        };
        of_app.entries.remove(&*key);
        self.entries -= 1;
        self.drop_if_empty(app);
        true
    }

    fn keep(&mut self, app: &Arc<str>, key: String, ttl_s: u64, remembered: Remembered, now_ms: u64) {
        if key.len() > KEY_BYTES_MAX {
            return;
        }
        self.make_room(app, &key);
        self.next += 1;
        let (key, order): (Arc<str>, u64) = (key.into(), self.next);
        let entry = Entry {
            remembered: Arc::new(remembered),
            until_ms: now_ms.saturating_add(ttl_s.clamp(TTL_S_MIN, TTL_S_MAX) * 1000),
            order,
        };
        let of_app = self.apps.entry(app.clone()).or_default();
        of_app.order.push_back((order, key.clone()));
        self.entries += usize::from(of_app.entries.insert(key, entry).is_none());
        of_app.tidy();
    }

    fn make_room(&mut self, app: &Arc<str>, key: &str) {
        let own = self.apps.get(app);
        if own.is_some_and(|of_app| of_app.entries.contains_key(key)) {
            return;
        }
        let full = own.is_some_and(|of_app| of_app.entries.len() >= ENTRIES_PER_APP_MAX);
        if !full && self.entries < ENTRIES_MAX {
            return;
        }
        let from = match own.filter(|of_app| !of_app.entries.is_empty()) {
            Some(_) => Some(app.clone()),
            // A newcomer takes the place of whoever has the most.
            None => self
                .apps
                .iter()
                .max_by_key(|(_, of_app)| of_app.entries.len())
                .map(|(name, _)| name.clone()),
        };
        let Some(from) = from else { return };
        if self.apps.get_mut(&from).is_some_and(OfApp::drop_oldest) {
            self.entries -= 1;
        }
        self.drop_if_empty(&from);
    }

    fn drop_if_empty(&mut self, app: &str) {
        if self.apps.get(app).is_some_and(|of_app| of_app.entries.is_empty()) {
            self.apps.remove(app);
        }
    }
}

impl OfApp {
    /// The first key of a request that fits, from the most particular on.
    fn keys(&self, asked: &Asked, fits: impl Fn(&str) -> bool) -> Option<String> {
        if let Some(session) = asked.session.as_ref().filter(|session| fits(&session.key)) {
            return Some(session.key.clone());
        }
        let mut key = format!("{}{}/", asked.host, asked.path.trim_end_matches('/'));
        let ends: Vec<usize> = key.match_indices('/').map(|(at, _)| at + 1).take(DEPTH_MAX).collect();
        for end in ends.into_iter().rev() {
            key.truncate(end);
            if fits(&key) {
                return Some(key);
            }
        }
        None
    }

    fn drop_oldest(&mut self) -> bool {
        while let Some((order, key)) = self.order.pop_front() {
            if self.entries.get(&key).is_some_and(|entry| entry.order == order) {
                return self.entries.remove(&key).is_some();
            }
        }
        false
    }

    /// Entries that are renewed again and again leave numbers behind.
    fn tidy(&mut self) {
        if self.order.len() > 2 * self.entries.len() + 16 {
            let entries = &self.entries;
            self.order
                .retain(|(order, key)| entries.get(key).is_some_and(|entry| entry.order == *order));
        }
    }
}
