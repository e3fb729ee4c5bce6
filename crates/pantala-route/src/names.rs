//! Host names: one spelling, and the certificate that serves one.

use std::collections::HashMap;
use std::net::IpAddr;

/// Lower case, without port and trailing dot; none if it is no host name (an address counts as one).
pub fn normalise(host: &str) -> Option<String> {
    let name = match host.strip_prefix('[') {
        Some(rest) => {
            let (inner, port) = rest.split_once(']')?;
            valid_port(port)?;
            return inner.parse::<IpAddr>().ok().map(|ip| ip.to_string());
        }
        None => match host.split_once(':') {
            Some((name, _)) => {
                valid_port(&host[name.len()..])?;
                name
            }
            None => host,
        },
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let label = |l: &str| !l.is_empty() && l.len() <= 63 && l.bytes().all(plain);
    (name.len() <= 253 && name.split('.').all(label)).then(|| name.to_ascii_lowercase())
}

fn valid_port(port: &str) -> Option<()> {
    match port.strip_prefix(':') {
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) && digits.len() <= 5 => Some(()),
        None if port.is_empty() => Some(()),
        _ => None,
    }
}

/// Values by certificate name; `*.` stands for exactly one label.
#[derive(Clone, Debug)]
pub struct Names<T> {
    exact: HashMap<String, (i64, T)>,
    wildcard: HashMap<String, (i64, T)>,
}

impl<T> Default for Names<T> {
    fn default() -> Self {
        Names {
            exact: HashMap::new(),
            wildcard: HashMap::new(),
        }
    }
}

impl<T> Names<T> {
    /// Of two values for one name the one with the higher rank (that lives longer) stays.
    pub fn insert(&mut self, name: &str, rank: i64, value: T) {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let (map, name) = match name.strip_prefix("*.") {
            Some(parent) => (&mut self.wildcard, parent.to_owned()),
            None => (&mut self.exact, name),
        };
        if map.get(&name).is_none_or(|(known, _)| *known <= rank) {
            map.insert(name, (rank, value));
        }
    }

    /// An exact name before a wildcard.
    pub fn find(&self, name: &str) -> Option<&T> {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        let parent = || name.split_once('.').and_then(|(_, parent)| self.wildcard.get(parent));
        self.exact.get(&name).or_else(parent).map(|(_, value)| value)
    }

    pub fn len(&self) -> usize {
        self.exact.len() + self.wildcard.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_spelling() {
        for (given, wanted) in [
            ("Web.Test", Some("web.test")),
            ("web.test.:8443", Some("web.test")),
            ("web.test:", Some("web.test")),
            ("127.0.0.1:80", Some("127.0.0.1")),
            ("[fdaa::3]:80", Some("fdaa::3")),
            ("[fdaa::3", None),
            ("web..test", None),
            ("web test", None),
            ("web.test:80:90", None),
            ("web.test:x", None),
            ("a@b", None),
            ("", None),
        ] {
            assert_eq!(normalise(given).as_deref(), wanted, "{given}");
        }
    }

    #[test]
    fn certificates_by_name() {
        let mut names = Names::default();
        names.insert("*.Test", 1, "wildcard");
        names.insert("web.test", 1, "exact");
        names.insert("web.test", 0, "older");
        assert_eq!(names.find("WEB.test."), Some(&"exact"));
        assert_eq!(names.find("api.test"), Some(&"wildcard"));
        assert_eq!(names.find("a.b.test"), None);
        assert_eq!(names.find("test"), None);
        names.insert("web.test", 2, "newer");
        assert_eq!(names.find("web.test"), Some(&"newer"));
    }

    proptest! {
        #[test]
        fn normalising_twice_changes_nothing(host in "\\PC{0,40}") {
            if let Some(once) = normalise(&host).filter(|once| !once.contains(':')) {
                prop_assert_eq!(normalise(&once), Some(once));
            }
        }
    }
}
