//! The feed between agent and proxy: `src/pantala/wire/feed.py`, which says what each field means. Used by
//! `pantala-route` (rows) and `pantala-proxy` (frames, settings). Unknown fields are skipped, absent ones take Python's
//! default; `tests/feed_schema.rs` holds every type against `schemas/feed.json`.

use std::collections::BTreeMap;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

mod settings;

pub use settings::{BucketSettings, DNSSettings, Listener, MeshSettings, ProxySettings};

pub const FEED_PROTOCOL: u32 = 1;

// -- parts of a machine config that services carry ----------------------------------------------------------------

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HTTPResponseOptions {
    pub headers: Option<BTreeMap<String, Value>>,
    pub pristine: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplayCache {
    pub path_prefix: Option<String>,
    pub ttl_seconds: Option<i64>,
    pub r#type: Option<String>,
    pub name: Option<String>,
    pub allow_bypass: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HTTPOptions {
    pub compress: Option<bool>,
    pub h2_backend: Option<bool>,
    pub idle_timeout: Option<i64>,
    pub headers_read_timeout: Option<i64>,
    pub response: Option<HTTPResponseOptions>,
    pub replay_cache: Option<Vec<ReplayCache>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TLSOptions {
    pub alpn: Option<Vec<String>>,
    pub versions: Option<Vec<String>>,
    pub default_self_signed: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProxyProtoOptions {
    pub version: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Port {
    pub port: Option<u16>,
    pub start_port: Option<u16>,
    pub end_port: Option<u16>,
    pub handlers: Option<Vec<String>>,
    pub force_https: Option<bool>,
    pub http_options: Option<HTTPOptions>,
    pub tls_options: Option<TLSOptions>,
    pub proxy_proto_options: Option<ProxyProtoOptions>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Static {
    pub guest_path: String,
    pub url_prefix: String,
    pub tigris_bucket: Option<String>,
    pub index_document: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Concurrency {
    pub r#type: Option<String>,
    pub soft_limit: Option<u32>,
    pub hard_limit: Option<u32>,
}

// -- rows -----------------------------------------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AppRow {
    pub app: String,
    pub org: String,
    pub network: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OrgRow {
    pub replay_from: Vec<String>,
    pub cross_network: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostRow {
    pub app: Option<String>,
    pub backend: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcmeRow {
    pub authorization: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextRow {
    pub values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AddressKind {
    Shared,
    Dedicated,
    Private,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddressRow {
    pub kind: AddressKind,
    #[serde(default)]
    pub app: Option<String>,
    #[serde(default)]
    pub network: Option<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Autostop {
    #[default]
    Off,
    Stop,
    Suspend,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceRow {
    pub app: String,
    pub protocol: String,
    pub internal_port: u16,
    pub ports: Vec<Port>,
    pub concurrency: Concurrency,
    #[serde(default)]
    pub autostart: bool,
    #[serde(default)]
    pub autostop: Autostop,
    #[serde(default)]
    pub min_machines_running: u32,
    #[serde(default)]
    pub checked: bool,
    #[serde(default)]
    pub statics: Vec<Static>,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineRow {
    pub id: String,
    pub app: String,
    pub region: String,
    pub node: String,
    pub instance_id: String,
    pub generation: u64,
    pub state: String,
    pub ip4: String,
    pub ip6: String,
    pub services: Vec<String>,
    pub passing: Vec<bool>,
    #[serde(default)]
    pub cordoned: bool,
    #[serde(default)]
    pub group: String,
    #[serde(default = "yes")]
    pub dns: bool,
    #[serde(default)]
    pub ready_at_ms: i64,
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeRow {
    pub id: String,
    pub region: String,
    pub zone: String,
    pub address: String,
    pub verify_key: String,
    pub sealing_key: String,
    pub cpus: u32,
    pub memory_mib: u64,
    pub cpus_free: f64,
    pub memory_mib_free: u64,
    pub version: String,
    #[serde(default)]
    pub mesh: String,
    #[serde(default)]
    pub wireguard_key: String,
    #[serde(default)]
    pub wireguard: String,
    #[serde(default)]
    pub disk_mib_free: u64,
    #[serde(default)]
    pub driver: String,
    #[serde(default)]
    pub isolation: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberStatus {
    #[default]
    Active,
    Draining,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberRow {
    pub id: String,
    pub region: String,
    pub zone: String,
    pub address: String,
    pub verify_key: String,
    pub sealing_key: String,
    pub edge: bool,
    #[serde(default)]
    pub status: MemberStatus,
}

/// Holds a private key: not printable.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct CertRow {
    pub names: Vec<String>,
    pub chain_pem: String,
    pub not_after_ms: i64,
    #[serde(default)]
    pub sealed_key: String,
    #[serde(default)]
    pub key_pem: String,
    #[serde(default)]
    pub alpn: String,
}

/// Holds a secret key: not printable.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct TicketRow {
    pub not_before_ms: i64,
    pub not_after_ms: i64,
    #[serde(default)]
    pub sealed_key: String,
    #[serde(default)]
    pub key: String,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct FeedRow {
    pub stream: String,
    pub key: String,
    pub value: Option<Text>,
}

/// A JSON value as it came. It is read later, row by row, so that one unreadable row spoils no frame and a view of many rows
/// never lies about parsed twice.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Text(Box<RawValue>);

impl Text {
    pub fn as_str(&self) -> &str {
        self.0.get()
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Text) -> bool {
        self.as_str() == other.as_str()
    }
}

impl From<&Value> for Text {
    fn from(value: &Value) -> Text {
        Text(RawValue::from_string(value.to_string()).expect("a value is written as JSON"))
    }
}

// -- agent to proxy -------------------------------------------------------------------------------------------------

#[derive(Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum AgentFrame {
    Hello {
        protocol: u32,
        node: String,
        region: String,
    },
    Snapshot {
        revision: u64,
        rows: Vec<FeedRow>,
        last: bool,
    },
    Delta {
        revision: u64,
        rows: Vec<FeedRow>,
    },
    WakeResult(WakeResult),
    Drain(Drain),
    Undrain {
        machine: String,
    },
    Trace {
        id: u64,
        request: String,
    },
}

/// By hand, because a derived one would take every value of a tagged frame apart before it knows the frame's type.
impl<'de> Deserialize<'de> for AgentFrame {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<AgentFrame, D::Error> {
        #[derive(Deserialize)]
        struct Tag {
            r#type: String,
        }
        #[derive(Deserialize)]
        struct Rows {
            revision: u64,
            rows: Vec<FeedRow>,
            #[serde(default)]
            last: bool,
        }
        #[derive(Deserialize)]
        #[serde(tag = "type", rename_all = "snake_case")]
        enum Small {
            Hello {
                protocol: u32,
                node: String,
                region: String,
            },
            WakeResult(WakeResult),
            Drain(Drain),
            Undrain {
                machine: String,
            },
            Trace {
                id: u64,
                request: String,
            },
        }
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        let read = || -> serde_json::Result<AgentFrame> {
            let tag: Tag = serde_json::from_str(raw.get())?;
            if matches!(tag.r#type.as_str(), "snapshot" | "delta") {
                let Rows { revision, rows, last } = serde_json::from_str(raw.get())?;
                return Ok(match tag.r#type.as_str() {
                    "delta" => AgentFrame::Delta { revision, rows },
                    _ => AgentFrame::Snapshot { revision, rows, last },
                });
            }
            Ok(match serde_json::from_str(raw.get())? {
                Small::Hello { protocol, node, region } => AgentFrame::Hello { protocol, node, region },
                Small::WakeResult(result) => AgentFrame::WakeResult(result),
                Small::Drain(drain) => AgentFrame::Drain(drain),
                Small::Undrain { machine } => AgentFrame::Undrain { machine },
                Small::Trace { id, request } => AgentFrame::Trace { id, request },
            })
        };
        read().map_err(D::Error::custom)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WakeResult {
    pub id: u64,
    pub machine: String,
    pub ok: bool,
    #[serde(default)]
    pub ip4: String,
    #[serde(default)]
    pub code: String,
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub elsewhere: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    pub id: u64,
    pub machine: String,
    pub deadline_ms: u64,
    #[serde(default)]
    pub load_seq: Option<u64>,
}

// -- proxy to agent -------------------------------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ProxyFrame {
    Hello {
        protocol: u32,
        version: String,
        pid: u32,
    },
    Applied {
        revision: u64,
        #[serde(default)]
        set_aside: Vec<String>,
    },
    Wake {
        id: u64,
        machine: String,
        deadline_ms: u64,
    },
    Load {
        machines: Vec<MachineLoad>,
    },
    Drained {
        id: u64,
        machine: String,
        result: DrainResult,
        #[serde(default)]
        in_flight: u64,
    },
    Log(ProxyLog),
    Traced {
        id: u64,
        since_ms: u64,
        #[serde(default)]
        records: Vec<TraceRecord>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TraceRole {
    Edge,
    Worker,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceRecord {
    pub role: TraceRole,
    pub outcome: String,
    pub began_us: u64,
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub code: String,
    #[serde(default)]
    pub status: u16,
    #[serde(default)]
    pub app: String,
    #[serde(default)]
    pub machine: String,
    #[serde(default)]
    pub node: String,
    #[serde(default)]
    pub region: String,
    #[serde(default)]
    pub attempt: u8,
    #[serde(default)]
    pub replays: u8,
    #[serde(default)]
    pub from_us: u32,
    #[serde(default)]
    pub choose_us: u32,
    #[serde(default)]
    pub waited_us: BTreeMap<String, u32>,
    #[serde(default)]
    pub connect_us: u32,
    #[serde(default)]
    pub reused: bool,
    #[serde(default)]
    pub answer_us: u32,
    #[serde(default)]
    pub body_us: Option<u32>,
    #[serde(default)]
    pub cut: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineLoad {
    pub machine: String,
    pub in_flight: u64,
    pub seq: u64,
    pub idle_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainResult {
    Drained,
    Busy,
    Deadline,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProxyLog {
    pub app: String,
    pub code: String,
    pub message: String,
    #[serde(default)]
    pub machine: String,
    #[serde(default)]
    pub request_id: String,
}
