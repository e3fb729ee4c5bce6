//! The settings file: read whole and checked before anything binds. Each message names the field and what would be right.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use pantala_wire::feed::{MeshSettings, ProxySettings};

use crate::store::{Store, StoreError};

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot read the settings file {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the settings file {} is not right: {source}", path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("settings: {field}: {value:?} is not {wanted}")]
    Field {
        field: String,
        value: String,
        wanted: &'static str,
    },
    #[error("settings: {0}")]
    Store(#[from] StoreError),
}

/// The settings with every address parsed.
#[derive(Debug)]
pub struct Settings {
    pub wire: ProxySettings,
    pub listeners: Vec<ListenAddress>,
    pub dns_listen: Vec<SocketAddr>,
    pub dns_public_listen: Vec<SocketAddr>,
    pub dns_public_names: Vec<(String, IpAddr)>,
    pub dns_forward: Vec<SocketAddr>,
    pub api_forward: Option<SocketAddr>,
    pub api_listen: Vec<SocketAddr>,
    pub admin_listen: Option<SocketAddr>,
    pub mesh_listen: Option<SocketAddr>,
    /// where files of apps may be read; none: nowhere
    pub buckets: Option<Store>,
}

#[derive(Clone, Copy, Debug)]
pub struct ListenAddress {
    pub socket: SocketAddr,
    pub expects: Expects,
}

/// What clients of a listener speak where no address says more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expects {
    Http,
    /// TLS and then, unless the app's port says otherwise, HTTP
    Tls,
    /// bytes, for apps with an address of their own
    Bytes,
    /// Every port: connections come here as the firewall decides, with the address that they were meant for. What they
    /// speak is seen in the first byte.
    Anything,
}

const API_PORT: u16 = 4280;
/// Below it a host of another region could refuse a request whose body is lost already.
const STREAM_WINDOW: usize = 512 * 1024;

pub fn read(path: &Path) -> Result<Settings, SettingsError> {
    let text = std::fs::read(path).map_err(|source| SettingsError::Read {
        path: path.to_owned(),
        source,
    })?;
    let wire: ProxySettings = serde_json::from_slice(&text).map_err(|source| SettingsError::Parse {
        path: path.to_owned(),
        source,
    })?;
    check(wire)
}

fn check(wire: ProxySettings) -> Result<Settings, SettingsError> {
    let mut listeners = Vec::new();
    for (index, listener) in wire.listeners.iter().enumerate() {
        let ip = ip(&format!("listeners[{index}].address"), &listener.address)?;
        if listener.port == 0 {
            return Err(wrong(
                &format!("listeners[{index}].port"),
                "0",
                "a port from 1 to 65535",
            ));
        }
        let socket = SocketAddr::new(ip, listener.port);
        let expects = match (listener.tls, listener.http) {
            (true, _) => Expects::Tls,
            (false, true) => Expects::Http,
            (false, false) => Expects::Bytes,
        };
        listeners.push(ListenAddress { socket, expects });
    }
    for (index, address) in wire.entry_listen.iter().enumerate() {
        let socket = address.parse();
        let socket = socket.map_err(|_| wrong(&format!("entry_listen[{index}]"), address, "ip:port"))?;
        let expects = Expects::Anything;
        listeners.push(ListenAddress { socket, expects });
    }
    let dns = &wire.dns;
    let dns_listen = sockets("dns.listen", &dns.listen, dns.port)?;
    let dns_public_listen = sockets("dns.public_listen", &dns.public_listen, dns.port)?;
    let dns_forward = sockets("dns.forward", &dns.forward, 53)?;
    let mut dns_public_names = Vec::new();
    for (name, address) in &dns.public_names {
        let address = ip(&format!("dns.public_names[{name}]"), address)?;
        dns_public_names.push((name.trim_matches('.').to_ascii_lowercase(), address));
    }
    let api_listen = sockets("api_listen", &wire.api_listen, API_PORT)?;
    let api_forward = optional("api_forward", &wire.api_forward)?;
    if !api_listen.is_empty() && api_forward.is_none() {
        return Err(wrong("api_forward", "", "ip:port, which api_listen needs"));
    }
    if wire.replay_body_bytes_max < STREAM_WINDOW {
        let given = wire.replay_body_bytes_max.to_string();
        return Err(wrong(
            "replay_body_bytes_max",
            &given,
            "at least 524288, what is under way to a machine",
        ));
    }
    for (field, ms) in [
        ("client_ping_after_ms", wire.client_ping_after_ms),
        ("client_ping_timeout_ms", wire.client_ping_timeout_ms),
    ] {
        if ms == 0 {
            return Err(wrong(field, "0", "at least 1"));
        }
    }
    let admin_listen = optional("admin_listen", &wire.admin_listen)?;
    let mesh_listen = wire.mesh.as_ref().map(mesh).transpose()?;
    for (field, value) in [
        ("node", &wire.node),
        ("region", &wire.region),
        ("state_dir", &wire.state_dir),
    ] {
        if value.is_empty() {
            return Err(wrong(field, "", "set"));
        }
    }
    if !wire.region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(wrong("region", &wire.region, "a region code such as iad"));
    }
    Ok(Settings {
        listeners,
        dns_listen,
        dns_public_listen,
        dns_public_names,
        dns_forward,
        api_forward,
        api_listen,
        admin_listen,
        mesh_listen,
        buckets: wire.buckets.as_ref().map(Store::open).transpose()?,
        wire,
    })
}

fn mesh(mesh: &MeshSettings) -> Result<SocketAddr, SettingsError> {
    for (field, value) in [
        ("mesh.certificate", &mesh.certificate),
        ("mesh.key", &mesh.key),
        ("mesh.authority", &mesh.authority),
    ] {
        if value.is_empty() {
            return Err(wrong(field, "", "the path of a PEM file"));
        }
    }
    let (interval, timeout) = (mesh.ping_interval_ms, mesh.ping_timeout_ms);
    if interval == 0 {
        return Err(wrong("mesh.ping_interval_ms", "0", "at least 1"));
    }
    if timeout < interval {
        let wanted = "at least mesh.ping_interval_ms";
        return Err(wrong("mesh.ping_timeout_ms", &timeout.to_string(), wanted));
    }
    let listen = mesh.listen.parse();
    listen.map_err(|_| wrong("mesh.listen", &mesh.listen, "ip:port"))
}

fn wrong(field: &str, value: &str, wanted: &'static str) -> SettingsError {
    SettingsError::Field {
        field: field.to_owned(),
        value: value.to_owned(),
        wanted,
    }
}

fn ip(field: &str, value: &str) -> Result<IpAddr, SettingsError> {
    value.parse().map_err(|_| wrong(field, value, "an IP address"))
}

/// `ip:port`, `[ip6]:port` or a bare address with the usual port.
fn sockets(field: &str, values: &[String], port: u16) -> Result<Vec<SocketAddr>, SettingsError> {
    let one = |(index, value): (usize, &String)| {
        let bare = value.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port));
        bare.or_else(|_| value.parse())
            .map_err(|_| wrong(&format!("{field}[{index}]"), value, "ip:port or an IP address"))
    };
    values.iter().enumerate().map(one).collect()
}

fn optional(field: &str, value: &str) -> Result<Option<SocketAddr>, SettingsError> {
    if value.is_empty() {
        return Ok(None);
    }
    value.parse().map(Some).map_err(|_| wrong(field, value, "ip:port"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn settings(change: serde_json::Value) -> Result<Settings, SettingsError> {
        let mut value = json!({"node": "n1", "region": "iad", "state_dir": "/s", "agent_socket": "/a", "listeners": [],
            "dns": {"listen": ["fdaa::3"], "public_listen": [], "public_names": {"Apps.Test.": "10.0.0.1"}, "forward": []}});
        value
            .as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        check(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn addresses_are_parsed() {
        let read = settings(json!({"api_forward": "127.0.0.1:1", "api_listen": ["fdaa::3"]})).unwrap();
        assert_eq!(read.dns_listen, ["[fdaa::3]:53".parse().unwrap()]);
        assert_eq!(read.api_listen, ["[fdaa::3]:4280".parse().unwrap()]);
        assert_eq!(
            read.dns_public_names,
            [("apps.test".to_owned(), "10.0.0.1".parse().unwrap())]
        );
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (change, named) in [
            (
                json!({"listeners": [{"address": "x", "port": 1, "tls": false}]}),
                "listeners[0].address",
            ),
            (
                json!({"listeners": [{"address": "::", "port": 0, "tls": false}]}),
                "listeners[0].port",
            ),
            (json!({"entry_listen": ["127.0.0.1"]}), "entry_listen[0]"),
            (json!({"api_listen": ["fdaa::3"]}), "api_forward"),
            (json!({"admin_listen": "here"}), "admin_listen"),
            (json!({"replay_body_bytes_max": 1000}), "replay_body_bytes_max"),
            (json!({"client_ping_after_ms": 0}), "client_ping_after_ms"),
            (json!({"region": "i d"}), "region"),
            (
                json!({"mesh": {"listen": "x", "certificate": "/c", "key": "/k", "authority": "/a"}}),
                "mesh.listen",
            ),
            (
                json!({"mesh": {"listen": "10.0.0.1:1", "certificate": "/c", "key": "", "authority": "/a"}}),
                "mesh.key",
            ),
            (
                json!({"mesh": {"listen": "10.0.0.1:1", "certificate": "/c", "key": "/k", "authority": "/a",
                    "ping_interval_ms": 900, "ping_timeout_ms": 800}}),
                "mesh.ping_timeout_ms",
            ),
        ] {
            let message = settings(change).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
