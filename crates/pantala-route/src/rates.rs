//! How often something may happen for each of many: a token bucket for each key, as many keys as there is room for.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Keys remembered at once. Beyond, those at rest are forgotten; while none is, new ones are refused.
const KEYS_MAX: usize = 65_536;
/// What may come at once, in seconds of the rate.
const BURST_S: f64 = 2.0;

/// `per_s` 0: no limit.
#[derive(Debug)]
pub struct Rates<K> {
    per_s: f64,
    taken: HashMap<K, Taken>,
}

#[derive(Clone, Copy, Debug)]
struct Taken {
    /// how much of the burst is used up
    level: f64,
    at_ms: u64,
}

impl<K: Hash + Eq> Rates<K> {
    pub fn new(per_s: u32) -> Rates<K> {
        Rates {
            per_s: f64::from(per_s),
            taken: HashMap::new(),
        }
    }

    pub fn allow(&mut self, key: K, now_ms: u64) -> bool {
        if self.per_s == 0.0 {
            return true;
        }
        let (per_s, burst) = (self.per_s, self.per_s * BURST_S);
        let left = |taken: &Taken| {
            let passed = now_ms.saturating_sub(taken.at_ms) as f64 / 1000.0;
            (taken.level - passed * per_s).max(0.0)
        };
        if self.taken.len() >= KEYS_MAX && !self.taken.contains_key(&key) {
            self.taken.retain(|_, taken| left(taken) > 0.0);
            if self.taken.len() >= KEYS_MAX {
                return false;
            }
        }
        let taken = self.taken.entry(key).or_insert(Taken {
            level: 0.0,
            at_ms: now_ms,
        });
        let level = left(taken) + 1.0;
        let allowed = level <= burst;
        // A refusal takes nothing: who waits gets in again, however often he knocked.
        *taken = Taken {
            level: if allowed { level } else { level - 1.0 },
            at_ms: now_ms,
        };
        allowed
    }
}

/// Whom addresses are counted with: a client has a /24 or a /64 to itself or shares it with its neighbours.
pub fn range_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [a, b, c, _] = ip.octets();
            Ipv4Addr::new(a, b, c, 0).into()
        }
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

/// 1, 10, 100, …: which of many like events are worth a line.
pub fn is_power_of_ten(mut count: u64) -> bool {
    while count >= 10 && count.is_multiple_of(10) {
        count /= 10;
    }
    count == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_key_has_its_own_rate() {
        let mut rates = Rates::new(2);
        let mut allowed = |key: &'static str, now_ms| (0..10).filter(|_| rates.allow(key, now_ms)).count();
        assert_eq!(allowed("a", 0), 4);
        assert_eq!(allowed("b", 0), 4);
        assert_eq!(allowed("a", 500), 1);
        assert_eq!(allowed("a", 10_000), 4);
    }

    #[test]
    fn zero_is_no_limit() {
        let mut rates = Rates::new(0);
        assert!((0..10_000).all(|_| rates.allow(1, 0)));
    }

    #[test]
    fn ranges() {
        for (ip, range) in [
            ("192.0.2.77", "192.0.2.0"),
            ("::ffff:192.0.2.77", "192.0.2.0"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ] {
            assert_eq!(range_of(ip.parse().unwrap()), range.parse::<IpAddr>().unwrap());
        }
    }

    #[test]
    fn tens() {
        let told: Vec<u64> = (0..2000).filter(|n| is_power_of_ten(*n)).collect();
        assert_eq!(told, [1, 10, 100, 1000]);
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_the_burst(
            per_s in 1u32..50, steps in proptest::collection::vec(0u64..400, 1..200),
        ) {
            let (mut rates, mut now, mut allowed) = (Rates::new(per_s), 0, 0.0);
            for step in steps {
                now += step;
                allowed += f64::from(u8::from(rates.allow((), now)));
                let most = f64::from(per_s) * (BURST_S + now as f64 / 1000.0);
                prop_assert!(allowed <= most + 1e-6, "{allowed} > {most}");
            }
        }
    }
}
