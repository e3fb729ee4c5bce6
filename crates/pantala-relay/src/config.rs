//! The relay's settings: which device belongs to which region, and how far regions are from one another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fd::AsFd;
use rustix::net::{AddressFamily, SocketType, socket};
use serde::Deserialize;

use crate::delays::{Distance, Table};

/// No two places on Earth are this far apart; more would be a slip of the pen.
const RTT_MS_MAX: f64 = 10_000.0;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Number of the netlink queue that the firewall uses.
    pub queue: u16,
    /// Where questions are answered.
    pub control: PathBuf,
    /// Region of each device of the router; packets of others pass at once.
    devices: BTreeMap<String, String>,
    /// Pairs that are not listed are not apart.
    pairs: Vec<Pair>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    a: String,
    b: String,
    /// There and back.
    rtt_ms: f64,
    /// 0 to 1, of each packet in either direction.
    #[serde(default)]
    loss: f64,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{path}: cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}: {reason}")]
    Parse { path: PathBuf, reason: serde_json::Error },
    #[error("{path}: rtt_ms of {a} and {b} is 0 to {RTT_MS_MAX}, loss is 0 to 1")]
    Pair { path: PathBuf, a: String, b: String },
}

impl Config {
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Config = serde_json::from_slice(&text).map_err(|reason| ConfigError::Parse {
            path: path.to_owned(),
            reason,
        })?;
        for pair in &config.pairs {
            if !(0.0..=RTT_MS_MAX).contains(&pair.rtt_ms) || !(0.0..=1.0).contains(&pair.loss) {
                return Err(ConfigError::Pair {
                    path: path.to_owned(),
                    a: pair.a.clone(),
                    b: pair.b.clone(),
                });
            }
        }
        Ok(config)
    }

    /// By the numbers that devices have now; one that is not there (any more) has no packets either.
    pub fn table(&self) -> Table {
        let mut regions: Vec<&str> = self.devices.values().map(String::as_str).collect();
        regions.sort_unstable();
        regions.dedup();
        let place = |name: &str| regions.binary_search(&name).ok();
        let mut table = Table::new(regions.len());
        for (device, region) in &self.devices {
            if let (Some(index), Some(region)) = (device_index(device), place(region)) {
                table.add_device(index, region);
            }
        }
        for pair in &self.pairs {
            if let (Some(a), Some(b)) = (place(&pair.a), place(&pair.b)) {
                let one_way = Duration::from_secs_f64(pair.rtt_ms / 2_000.0);
                table.set(
                    a,
                    b,
                    Distance {
                        one_way,
                        loss: pair.loss,
                    },
                );
            }
        }
        table
    }
}

fn device_index(name: &str) -> Option<u32> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    rustix::net::netdevice::name_to_index(any.as_fd(), name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let path = std::env::temp_dir().join(format!("relay-{}-{}.json", std::process::id(), fastrand::u64(..)));
        std::fs::write(&path, text).unwrap();
        let config = Config::read(&path);
        std::fs::remove_file(&path).unwrap();
        config
    }

    fn with_pair(pair: &str) -> String {
        format!(r#"{{"queue": 1, "control": "/c", "devices": {{"lo": "iad", "gone": "lhr"}}, "pairs": [{pair}]}}"#)
    }

    #[test]
    fn devices_that_are_gone_are_left_out() {
        let table = read(&with_pair(r#"{"a": "iad", "b": "lhr", "rtt_ms": 75}"#))
            .unwrap()
            .table();
        assert_eq!(table.devices(), 1);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for pair in [
            r#"{"a": "iad", "b": "lhr", "rtt_ms": -1}"#,
            r#"{"a": "iad", "b": "lhr", "rtt_ms": 75, "loss": 1.5}"#,
        ] {
            let error = read(&with_pair(pair)).unwrap_err().to_string();
            assert!(error.contains("rtt_ms of iad and lhr"), "{error}");
        }
        assert!(
            read(&with_pair(r#"{"a": "iad"}"#))
                .unwrap_err()
                .to_string()
                .contains("missing field")
        );
    }
}
