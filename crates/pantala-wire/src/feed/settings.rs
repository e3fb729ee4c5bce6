//! Settings of a proxy: a file that its agent's host wrote, read once at its start.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::yes;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listener {
    pub address: String,
    pub port: u16,
    pub tls: bool,
    #[serde(default = "yes")]
    pub http: bool,
}

fn dns_port() -> u16 {
    53
}

fn queries_per_s_max() -> u32 {
    200
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DNSSettings {
    pub listen: Vec<String>,
    pub public_listen: Vec<String>,
    pub public_names: BTreeMap<String, String>,
    pub forward: Vec<String>,
    #[serde(default = "dns_port")]
    pub port: u16,
    #[serde(default = "queries_per_s_max")]
    pub queries_per_s_max: u32,
}

fn ms_10_000() -> u64 {
    10_000
}

fn ms_30_000() -> u64 {
    30_000
}

fn queue_per_app_max() -> usize {
    1_000
}

fn connections_per_app_max() -> usize {
    2_048
}

fn handshakes_max() -> usize {
    4_096
}

fn handshakes_per_range_per_s_max() -> u32 {
    500
}

fn handshakes_per_name_per_s_max() -> u32 {
    1_000
}

fn waiting_max() -> usize {
    10_000
}

fn replay_body_bytes_max() -> usize {
    1024 * 1024
}

fn trace_mib_max() -> usize {
    32
}

fn client_ping_after_ms() -> u64 {
    40_000
}

fn client_ping_timeout_ms() -> u64 {
    20_000
}

fn drain_max_ms() -> u64 {
    3_600_000
}

fn ping_interval_ms() -> u64 {
    250
}

fn ping_timeout_ms() -> u64 {
    750
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeshSettings {
    pub listen: String,
    pub certificate: String,
    pub key: String,
    pub authority: String,
    #[serde(default = "ping_interval_ms")]
    pub ping_interval_ms: u64,
    #[serde(default = "ping_timeout_ms")]
    pub ping_timeout_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BucketSettings {
    pub endpoint: String,
    #[serde(default = "us_east_1")]
    pub region: String,
    #[serde(default)]
    pub virtual_host: bool,
    #[serde(default)]
    pub ca_file: String,
    #[serde(default)]
    pub credentials_file: String,
    #[serde(default)]
    pub readers: BTreeMap<String, Vec<String>>,
    /// of deploys, which the server alone carries out
    #[serde(default)]
    pub writers: BTreeMap<String, Vec<String>>,
    #[serde(default = "ms_10_000")]
    pub answer_timeout_ms: u64,
    #[serde(default = "ms_30_000")]
    pub silence_timeout_ms: u64,
}

fn us_east_1() -> String {
    "us-east-1".to_owned()
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProxySettings {
    pub node: String,
    pub region: String,
    pub state_dir: String,
    pub agent_socket: String,
    pub listeners: Vec<Listener>,
    pub dns: DNSSettings,
    #[serde(default)]
    pub entry_listen: Vec<String>,
    #[serde(default)]
    pub mesh: Option<MeshSettings>,
    #[serde(default)]
    pub api_forward: String,
    #[serde(default)]
    pub api_listen: Vec<String>,
    #[serde(default)]
    pub admin_listen: String,
    #[serde(default = "ms_10_000")]
    pub wake_hold_ms: u64,
    #[serde(default = "ms_30_000")]
    pub wake_timeout_ms: u64,
    #[serde(default = "ms_10_000")]
    pub queue_timeout_ms: u64,
    #[serde(default = "queue_per_app_max")]
    pub queue_per_app_max: usize,
    #[serde(default = "waiting_max")]
    pub waiting_max: usize,
    #[serde(default = "drain_max_ms")]
    pub drain_max_ms: u64,
    #[serde(default)]
    pub lame_duck_ms: u64,
    #[serde(default)]
    pub app_domain: String,
    #[serde(default)]
    pub buckets: Option<BucketSettings>,
    #[serde(default = "connections_per_app_max")]
    pub connections_per_app_max: usize,
    #[serde(default = "handshakes_max")]
    pub handshakes_max: usize,
    #[serde(default = "handshakes_per_range_per_s_max")]
    pub handshakes_per_range_per_s_max: u32,
    #[serde(default = "handshakes_per_name_per_s_max")]
    pub handshakes_per_name_per_s_max: u32,
    #[serde(default = "replay_body_bytes_max")]
    pub replay_body_bytes_max: usize,
    #[serde(default = "trace_mib_max")]
    pub trace_mib_max: usize,
    #[serde(default = "client_ping_after_ms")]
    pub client_ping_after_ms: u64,
    #[serde(default = "client_ping_timeout_ms")]
    pub client_ping_timeout_ms: u64,
}
