//! How many connections and handshakes one app, one name or one part of the internet may have, and which of many like failures
//! are worth a line in the app's log. Asked once for each connection, never for a request.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pantala_route::rates::{Rates, is_power_of_ten, range_of};
use pantala_wire::feed::ProxySettings;
use tokio::sync::Semaphore;

/// Failures of one kind begin anew after so long.
const LIKE_FOR: Duration = Duration::from_secs(60);
const KINDS_MAX: usize = 10_000;

pub struct Limits {
    per_app_max: usize,
    apps: Mutex<HashMap<Arc<str>, Held>>,
    /// whose turn it is to shake hands; others wait in order
    pub handshakes: Semaphore,
    ranges: Mutex<Rates<IpAddr>>,
    names: Mutex<Rates<u64>>,
    hasher: RandomState,
    failures: Mutex<HashMap<Kind, (Instant, u64)>>,
}

/// An app and the code of a failure.
type Kind = (Arc<str>, &'static str);

#[derive(Default)]
struct Held {
    connections: usize,
    dropped: u64,
}

/// A connection's place among those of its app.
pub struct Place {
    limits: Arc<Limits>,
    app: Arc<str>,
}

impl Place {
    pub fn app(&self) -> &str {
        &self.app
    }
}

impl Limits {
    pub fn new(settings: &ProxySettings) -> Arc<Limits> {
        Arc::new(Limits {
            per_app_max: settings.connections_per_app_max,
            apps: Mutex::default(),
            handshakes: Semaphore::new(settings.handshakes_max),
            ranges: Mutex::new(Rates::new(settings.handshakes_per_range_per_s_max)),
            names: Mutex::new(Rates::new(settings.handshakes_per_name_per_s_max)),
            hasher: RandomState::new(),
            failures: Mutex::default(),
        })
    }

    /// Refused with how many were before it.
    pub fn enter(self: &Arc<Self>, app: &Arc<str>) -> Result<Place, u64> {
        let mut apps = held(&self.apps);
        let here = match apps.get_mut(app) {
            Some(here) => here,
            None => apps.entry(app.clone()).or_default(),
        };
        if here.connections >= self.per_app_max {
            here.dropped += 1;
            return Err(here.dropped);
        }
        here.connections += 1;
        Ok(Place {
            limits: self.clone(),
            app: app.clone(),
        })
    }

    pub fn allows_range(&self, client: IpAddr, now_ms: u64) -> bool {
        held(&self.ranges).allow(range_of(client), now_ms)
    }

    /// Names are kept as numbers: what a client makes up takes no room to speak of.
    pub fn allows_name(&self, name: &str, now_ms: u64) -> bool {
        held(&self.names).allow(self.hasher.hash_one(name), now_ms)
    }

    /// How many there were of this kind lately, when that is worth a line.
    pub fn worth_telling(&self, app: &Arc<str>, code: &'static str) -> Option<u64> {
        let mut failures = held(&self.failures);
        let now = Instant::now();
        if failures.len() >= KINDS_MAX {
            failures.retain(|_, (since, _)| now.duration_since(*since) < LIKE_FOR);
            if failures.len() >= KINDS_MAX {
                return None;
            }
        }
        let (since, count) = failures.entry((app.clone(), code)).or_insert((now, 0));
        if now.duration_since(*since) >= LIKE_FOR {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        is_power_of_ten(*count).then_some(*count)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut apps = held(&self.limits.apps);
        if let Some(here) = apps.get_mut(&self.app) {
            here.connections -= 1;
            if here.connections == 0 {
                apps.remove(&self.app);
            }
        }
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn limits(per_app: usize) -> Arc<Limits> {
        let settings = json!({"node": "n1", "region": "iad", "state_dir": "/s", "agent_socket": "/a", "listeners": [],
            "dns": {"listen": [], "public_listen": [], "public_names": {}, "forward": []},
            "connections_per_app_max": per_app});
        Limits::new(&serde_json::from_value(settings).unwrap())
    }

    #[test]
    fn each_app_has_its_own_places() {
        let limits = limits(2);
        let (web, api): (Arc<str>, Arc<str>) = ("web".into(), "api".into());
        let (one, _two) = (limits.enter(&web).ok().unwrap(), limits.enter(&web).ok().unwrap());
        assert_eq!(limits.enter(&web).err(), Some(1));
        assert_eq!(limits.enter(&web).err(), Some(2));
        assert!(limits.enter(&api).is_ok());
        drop(one);
        assert!(limits.enter(&web).is_ok());
        assert_eq!(limits.apps.lock().unwrap().len(), 1);
    }

    #[test]
    fn failures_are_told_at_powers_of_ten() {
        let (limits, web) = (limits(1), Arc::<str>::from("web"));
        let told: Vec<u64> = (0..100).filter_map(|_| limits.worth_telling(&web, "PT04")).collect();
        assert_eq!(told, [1, 10, 100]);
        assert_eq!(limits.worth_telling(&web, "PT05"), Some(1));
    }
}
