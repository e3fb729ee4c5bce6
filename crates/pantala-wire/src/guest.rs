//! The guest API between agent and init: `src/pantala/wire/guest.py`, which documents every field.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub const GUEST_PROTOCOL: u32 = 1;
pub const RING_HEADER_BYTES: usize = 4096;
pub const RING_MAGIC: [u8; 8] = *b"PNTLRING";
pub const RING_VERSION: u32 = 1;
pub const RING_LINE_BYTES_MAX: usize = 16 * 1024;

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFile {
    pub path: String,
    pub content_base64: String,
    #[serde(default = "default_mode")]
    pub mode: u32,
}

fn default_mode() -> u32 {
    0o644
}

/// Where a machine's file server listens on its IPv4.
pub const STATICS_PORT: u16 = 4282;
/// Header of its word that it has no such file, and the app is to be asked.
pub const STATICS_MISSING: &str = "pantala-statics-missing";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaticPath {
    pub url_prefix: String,
    pub guest_path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statics {
    pub listen: String,
    pub paths: Vec<StaticPath>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub user: String,
    #[serde(default = "default_cwd")]
    pub cwd: String,
    #[serde(default)]
    pub hostname: String,
    #[serde(default)]
    pub files: Vec<GuestFile>,
    #[serde(default)]
    pub statics: Option<Statics>,
    #[serde(default)]
    pub processes: Vec<GuestProcess>,
    #[serde(default)]
    pub api_socket: String,
    #[serde(default)]
    pub ssh: Option<Ssh>,
    #[serde(default)]
    pub containers: Vec<GuestContainer>,
    #[serde(default)]
    pub cpus: Vec<usize>,
}

/// Who may log in; see `wire/guest.py`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ssh {
    pub listen: String,
    pub authorities: Vec<String>,
    pub principals: Vec<String>,
    pub host_key: String,
}

/// The host key is private.
impl fmt::Debug for Ssh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ssh")
            .field("listen", &self.listen)
            .field("principals", &self.principals)
            .finish_non_exhaustive()
    }
}

/// Another process beside the app; see `wire/guest.py`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestProcess {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub user: String,
    #[serde(default = "default_cwd")]
    pub cwd: String,
}

/// A program with a root of its own; see `wire/guest.py`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestContainer {
    pub name: String,
    pub root: String,
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub user: String,
    #[serde(default = "default_cwd")]
    pub cwd: String,
    #[serde(default)]
    pub files: Vec<GuestFile>,
    #[serde(default)]
    pub depends_on: Vec<GuestDependency>,
    #[serde(default)]
    pub healthchecks: Vec<GuestHealthcheck>,
    #[serde(default)]
    pub restart: RestartPolicy,
    #[serde(default = "default_max_retries")]
    pub max_retries: u32,
    #[serde(default = "default_stop_signal")]
    pub stop_signal: i32,
    #[serde(default = "default_stop_grace_ms")]
    pub stop_grace_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDependency {
    pub name: String,
    #[serde(default)]
    pub condition: Condition,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    #[default]
    Started,
    Healthy,
    ExitedSuccessfully,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    No,
    #[default]
    Always,
    OnFailure,
}

/// Whether a question over HTTP goes through TLS, and whether the certificate has to be good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tls {
    #[default]
    Off,
    Unverified,
    Verified,
}

/// One of `http_port`, `tcp_port`, `argv`; see `wire/guest.py`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestHealthcheck {
    pub name: String,
    #[serde(default = "default_kind")]
    pub kind: String,
    #[serde(default = "default_interval_ms")]
    pub interval_ms: u64,
    #[serde(default = "default_check_timeout_ms")]
    pub timeout_ms: u64,
    #[serde(default)]
    pub grace_ms: u64,
    #[serde(default = "default_success_threshold")]
    pub success_threshold: u32,
    #[serde(default = "default_failure_threshold")]
    pub failure_threshold: u32,
    #[serde(default)]
    pub stops: bool,
    #[serde(default)]
    pub http_port: u16,
    #[serde(default = "default_http_method")]
    pub http_method: String,
    #[serde(default = "default_cwd")]
    pub http_path: String,
    #[serde(default)]
    pub http_headers: Vec<(String, String)>,
    #[serde(default)]
    pub tls: Tls,
    #[serde(default)]
    pub tls_server_name: String,
    #[serde(default)]
    pub tcp_port: u16,
    #[serde(default)]
    pub argv: Vec<String>,
}

fn default_max_retries() -> u32 {
    10
}

fn default_stop_signal() -> i32 {
    2
}

fn default_stop_grace_ms() -> u64 {
    5_000
}

fn default_kind() -> String {
    "readiness".to_owned()
}

fn default_interval_ms() -> u64 {
    10_000
}

fn default_check_timeout_ms() -> u64 {
    5_000
}

fn default_success_threshold() -> u32 {
    1
}

fn default_failure_threshold() -> u32 {
    3
}

fn default_http_method() -> String {
    "GET".to_owned()
}

/// How a container is; see `wire/guest.py`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerState {
    pub name: String,
    pub state: ContainerPhase,
    #[serde(default)]
    pub health: ContainerHealth,
    #[serde(default)]
    pub pid: i32,
    #[serde(default)]
    pub exit_code: Option<i32>,
    #[serde(default)]
    pub restarts: u32,
    #[serde(default)]
    pub checks: Vec<CheckState>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerPhase {
    Pending,
    Started,
    Stopping,
    Restarting,
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerHealth {
    #[default]
    None,
    Starting,
    Healthy,
    Unhealthy,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckState {
    pub name: String,
    pub kind: String,
    pub passing: bool,
    #[serde(default)]
    pub output: String,
}

fn default_cwd() -> String {
    "/".to_owned()
}

/// Environment and files carry secrets, arguments may: none is printed.
impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Start")
            .field("user", &self.user)
            .field("cwd", &self.cwd)
            .finish_non_exhaustive()
    }
}

/// A command beside the app; see `wire/guest.py`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    pub argv: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub user: String,
    #[serde(default)]
    pub cwd: String,
    #[serde(default)]
    pub stdin_base64: String,
    #[serde(default)]
    pub container: String,
    #[serde(default)]
    pub machine: bool,
    #[serde(default = "default_timeout_ms")]
    pub timeout_ms: u64,
    #[serde(default = "default_output_bytes_max")]
    pub output_bytes_max: usize,
}

fn default_timeout_ms() -> u64 {
    60_000
}

fn default_output_bytes_max() -> usize {
    256 * 1024
}

/// As with `Start`, what it is given may be secret.
impl fmt::Debug for Exec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exec")
            .field("user", &self.user)
            .field("cwd", &self.cwd)
            .field("container", &self.container)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum GuestRequest {
    Start(Box<Start>),
    Exec(Exec),
    #[serde(rename = "take_calls")]
    TakeCalls,
    Stop {
        signal: i32,
        grace_ms: u64,
    },
    Signal {
        signal: i32,
    },
    Status,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Prepared,
    Running,
    Stopping,
    Exited,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum GuestReply {
    Started {
        pid: i32,
    },
    Failed {
        reason: String,
    },
    Ok,
    Refused {
        reason: String,
    },
    Status {
        protocol: u32,
        phase: Phase,
        #[serde(default)]
        pid: i32,
        #[serde(default)]
        containers: Vec<ContainerState>,
    },
    Executed(Executed),
}

/// How a command ended and what it wrote; see `wire/guest.py`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Executed {
    pub exit_code: i32,
    #[serde(default)]
    pub signal: i32,
    #[serde(default)]
    pub stdout_base64: String,
    #[serde(default)]
    pub stderr_base64: String,
    #[serde(default)]
    pub truncated: bool,
    #[serde(default)]
    pub timed_out: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub exit_code: i32,
    pub signal: i32,
    pub requested_stop: bool,
    pub started_at_ms: u64,
    pub exited_at_ms: u64,
    #[serde(default)]
    pub reason: String,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn schema(name: &str) -> Value {
        let text = include_str!("../../../schemas/guest.json");
        let document: Value = serde_json::from_str(text).unwrap();
        document["$defs"][name].clone()
    }

    /// Our document has every required field of the schema and none that it does not know.
    fn assert_matches(name: &str, document: &Value) {
        let schema = schema(name);
        let properties = schema["properties"].as_object().unwrap();
        let fields = document.as_object().unwrap();
        for required in schema["required"].as_array().unwrap() {
            assert!(
                fields.contains_key(required.as_str().unwrap()),
                "{name} lacks {required}"
            );
        }
        for field in fields.keys() {
            assert!(
                properties.contains_key(field),
                "{name} has {field}, which the schema does not know"
            );
        }
        if let Some(tags) = schema["properties"]["type"]["enum"].as_array() {
            assert_eq!(&document["type"], &tags[0], "{name}");
        }
    }

    #[test]
    fn requests_match_the_schema_both_ways() {
        let file = GuestFile {
            path: "/a".into(),
            content_base64: String::new(),
            mode: 0o600,
        };
        let statics = Statics {
            listen: "0.0.0.0:4282".into(),
            paths: vec![StaticPath {
                url_prefix: "/static".into(),
                guest_path: "/app/static".into(),
            }],
        };
        let process = GuestProcess {
            argv: vec!["a".into()],
            env: BTreeMap::new(),
            user: "u".into(),
            cwd: "/".into(),
        };
        let ssh = Ssh {
            listen: "[::1]:22".into(),
            authorities: vec!["ssh-ed25519 AAAA".into()],
            principals: vec!["acme/web".into()],
            host_key: "k".into(),
        };
        let container: GuestContainer = serde_json::from_value(json!({
            "name": "web", "root": "/r", "argv": ["a"], "env": {},
            "depends_on": [{"name": "db", "condition": "exited_successfully"}],
            "healthchecks": [{"name": "up", "tcp_port": 1}],
            "restart": "on-failure",
        }))
        .unwrap();
        let start = Start {
            argv: vec!["a".into()],
            env: BTreeMap::new(),
            user: "u".into(),
            cwd: "/".into(),
            hostname: "h".into(),
            files: vec![file.clone()],
            statics: Some(statics.clone()),
            processes: vec![process.clone()],
            api_socket: "/.fly/api".into(),
            ssh: Some(ssh.clone()),
            cpus: Vec::new(),
            containers: vec![container.clone()],
        };
        assert_matches("SSH", &serde_json::to_value(&ssh).unwrap());
        assert_matches("GuestContainer", &serde_json::to_value(&container).unwrap());
        assert_matches(
            "GuestDependency",
            &serde_json::to_value(&container.depends_on[0]).unwrap(),
        );
        assert_matches(
            "GuestHealthcheck",
            &serde_json::to_value(&container.healthchecks[0]).unwrap(),
        );
        assert_matches("GuestProcess", &serde_json::to_value(&process).unwrap());
        assert_matches("Statics", &serde_json::to_value(&statics).unwrap());
        assert_matches("GuestFile", &serde_json::to_value(&file).unwrap());
        for (name, request) in [
            ("Start", GuestRequest::Start(Box::new(start))),
            (
                "Stop",
                GuestRequest::Stop {
                    signal: 15,
                    grace_ms: 5,
                },
            ),
            ("Signal", GuestRequest::Signal { signal: 1 }),
            (
                "Exec",
                serde_json::from_value(json!({"type": "exec", "argv": ["ls"], "user": "u"})).unwrap(),
            ),
            ("Status", GuestRequest::Status),
            ("TakeCalls", GuestRequest::TakeCalls),
        ] {
            let document = serde_json::to_value(&request).unwrap();
            assert_matches(name, &document);
            assert_eq!(serde_json::from_value::<GuestRequest>(document).unwrap(), request);
        }
    }

    #[test]
    fn replies_match_the_schema() {
        let check = json!({"name": "up", "kind": "readiness", "passing": true});
        let state: ContainerState =
            serde_json::from_value(json!({"name": "web", "state": "pending", "checks": [check]})).unwrap();
        assert_matches("ContainerState", &serde_json::to_value(&state).unwrap());
        assert_matches("CheckState", &serde_json::to_value(&state.checks[0]).unwrap());
        for (name, reply) in [
            ("Started", GuestReply::Started { pid: 2 }),
            ("Failed", GuestReply::Failed { reason: "r".into() }),
            ("Ok", GuestReply::Ok),
            ("Refused", GuestReply::Refused { reason: "r".into() }),
            (
                "StatusReply",
                GuestReply::Status {
                    protocol: 1,
                    phase: Phase::Running,
                    pid: 2,
                    containers: vec![state.clone()],
                },
            ),
        ] {
            assert_matches(name, &serde_json::to_value(&reply).unwrap());
        }
        let executed = GuestReply::Executed(serde_json::from_value(json!({"exit_code": 1})).unwrap());
        assert_matches("Executed", &serde_json::to_value(&executed).unwrap());
        let record = ExitRecord {
            exit_code: 1,
            signal: 0,
            requested_stop: false,
            started_at_ms: 1,
            exited_at_ms: 2,
            reason: String::new(),
        };
        assert_matches("ExitRecord", &serde_json::to_value(&record).unwrap());
    }

    #[test]
    fn omitted_fields_take_the_defaults_and_unknown_ones_are_skipped() {
        let request: GuestRequest =
            serde_json::from_value(json!({"type": "start", "argv": ["a"], "env": {}, "later": 1})).unwrap();
        let GuestRequest::Start(start) = request else {
            panic!("not a start")
        };
        assert_eq!(
            (start.cwd.as_str(), start.user.as_str(), start.files.len()),
            ("/", "", 0)
        );
    }

    #[test]
    fn secrets_do_not_print() {
        let start: Start = serde_json::from_value(json!({"argv": ["x", "hunter2"], "env": {"A": "hunter2"}})).unwrap();
        assert!(!format!("{:?}", GuestRequest::Start(Box::new(start))).contains("hunter2"));
    }
}
