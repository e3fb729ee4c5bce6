//! Queries per second for each asker.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Askers remembered at once; new ones are refused when even forgetting quiet ones makes no room.
const ASKERS_MAX: usize = 16_384;
const WINDOW: Duration = Duration::from_secs(1);

pub struct Rates {
    per_s: u32,
    askers: Mutex<HashMap<IpAddr, (Instant, u32)>>,
}

impl Rates {
    pub fn new(per_s: u32) -> Rates {
        Rates {
            per_s,
            askers: Mutex::default(),
        }
    }

    pub fn allow(&self, asker: IpAddr) -> bool {
        let mut askers = self.askers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if askers.len() >= ASKERS_MAX && !askers.contains_key(&asker) {
            askers.retain(|_, (since, _)| now.duration_since(*since) < WINDOW);
            if askers.len() >= ASKERS_MAX {
                return false;
            }
        }
        let (since, count) = askers.entry(asker).or_insert((now, 0));
        if now.duration_since(*since) >= WINDOW {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        *count <= self.per_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_asker_has_its_own_rate() {
        let rates = Rates::new(2);
        let (one, two) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        assert!(rates.allow(one) && rates.allow(one) && !rates.allow(one));
        assert!(rates.allow(two));
    }
}
