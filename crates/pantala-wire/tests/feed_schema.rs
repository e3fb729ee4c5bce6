//! The serde mirror against `schemas/feed.json`. For every type: a full sample carries exactly the schema's properties with
//! values that the schema admits; a sample of the required fields alone can be read and takes the schema's defaults. A
//! field added, renamed or retyped on either side fails here.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use pantala_wire::feed::*;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

fn schema() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../schemas/feed.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The subset of JSON Schema that msgspec writes.
fn admits(defs: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        let name = reference.rsplit('/').next().unwrap();
        return admits(defs, &defs[name], value);
    }
    if let Some(any) = schema.get("anyOf").and_then(Value::as_array) {
        let ok = any.iter().any(|one| admits(defs, one, value).is_ok());
        return if ok {
            Ok(())
        } else {
            Err(format!("{value} fits none of {any:?}"))
        };
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
        return if allowed.contains(value) {
            Ok(())
        } else {
            Err(format!("{value} is not in {allowed:?}"))
        };
    }
    let fits = match schema.get("type").and_then(Value::as_str) {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        None => true,
        Some(other) => return Err(format!("unknown schema type {other}")),
    };
    if !fits {
        return Err(format!("{value} is no {}", schema["type"]));
    }
    if let (Some(items), Some(values)) = (schema.get("items"), value.as_array()) {
        for one in values {
            admits(defs, items, one)?;
        }
    }
    if let (Some(properties), Some(fields)) = (schema.get("properties").and_then(Value::as_object), value.as_object()) {
        for (name, one) in fields {
            let wanted = properties
                .get(name)
                .ok_or_else(|| format!("the schema has no field {name}"))?;
            admits(defs, wanted, one).map_err(|e| format!("{name}: {e}"))?;
        }
        for name in schema["required"].as_array().into_iter().flatten() {
            if !fields.contains_key(name.as_str().unwrap()) {
                return Err(format!("required field {name} is missing"));
            }
        }
    }
    Ok(())
}

/// `full` has every field set to something other than its default.
fn check<T: Serialize + DeserializeOwned + PartialEq>(name: &str, full: Value) {
    let schema = schema();
    let def = &schema["$defs"][name];
    let properties = def["properties"]
        .as_object()
        .unwrap_or_else(|| panic!("no {name} in the schema"));
    admits(&schema["$defs"], def, &full).unwrap_or_else(|e| panic!("{name}: {e}"));

    let read: T = serde_json::from_value(full.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
    let written = serde_json::to_value(&read).unwrap();
    let fields: Vec<&String> = written.as_object().unwrap().keys().collect();
    let mut wanted: Vec<&String> = properties.keys().collect();
    wanted.sort();
    assert_eq!(fields, wanted, "{name}: fields in Rust and in Python");
    assert_eq!(written, full, "{name}: what was read is written again");
    admits(&schema["$defs"], def, &written).unwrap_or_else(|e| panic!("{name} as written: {e}"));

    let required: Vec<&str> = def["required"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let least: Map<String, Value> = full
        .as_object()
        .unwrap()
        .clone()
        .into_iter()
        .filter(|(key, _)| required.contains(&key.as_str()))
        .collect();
    let read: T = serde_json::from_value(Value::Object(least)).unwrap_or_else(|e| panic!("{name}, least: {e}"));
    let written = serde_json::to_value(&read).unwrap();
    for (field, spec) in properties
        .iter()
        .filter(|(field, _)| !required.contains(&field.as_str()))
    {
        assert_eq!(written[field], spec["default"], "{name}.{field}: the default");
    }
}

fn port() -> Value {
    json!({"port": 443, "start_port": 1, "end_port": 2, "handlers": ["tls", "http"], "force_https": true,
        "http_options": http_options(), "tls_options": {"alpn": ["h2"], "versions": ["TLSv1.3"], "default_self_signed": true},
        "proxy_proto_options": {"version": "v2"}})
}

fn http_options() -> Value {
    json!({"compress": true, "h2_backend": true, "idle_timeout": 60, "headers_read_timeout": 5,
        "response": {"headers": {"X-A": "b", "Server": false}, "pristine": true}, "replay_cache": [replay_cache()]})
}

fn replay_cache() -> Value {
    json!({"path_prefix": "/", "ttl_seconds": 10, "type": "cookie", "name": "sid", "allow_bypass": true})
}

fn row() -> Value {
    json!({"stream": "routes", "key": "app/web", "value": {"app": "web"}})
}

#[test]
fn rows_match_the_schema() {
    check::<AppRow>("AppRow", json!({"app": "web", "org": "personal", "network": 24}));
    check::<OrgRow>("OrgRow", json!({"replay_from": ["partner"], "cross_network": true}));
    check::<HostRow>("HostRow", json!({"app": "web", "backend": "127.0.0.1:5000"}));
    check::<AcmeRow>("AcmeRow", json!({"authorization": "token.thumbprint"}));
    check::<TextRow>("TextRow", json!({"values": ["digest"]}));
    for kind in ["shared", "dedicated", "private"] {
        check::<AddressRow>("AddressRow", json!({"kind": kind, "app": "web", "network": 7}));
    }
    for autostop in ["stop", "suspend"] {
        check::<ServiceRow>(
            "ServiceRow",
            json!({"app": "web", "protocol": "tcp", "internal_port": 8080, "ports": [port()],
                "concurrency": {"type": "requests", "soft_limit": 20, "hard_limit": 25},
                "autostart": true, "autostop": autostop, "min_machines_running": 1, "checked": true,
                "statics": [{"guest_path": "/app/public", "url_prefix": "/static", "tigris_bucket": "b",
                    "index_document": "index.html"}]}),
        );
    }
    check::<MachineRow>(
        "MachineRow",
        json!({"id": "148e", "app": "web", "region": "iad", "node": "n1", "instance_id": "01J", "generation": 2,
            "state": "started", "ip4": "172.19.0.2", "ip6": "fdaa::2", "services": ["d"], "passing": [true],
            "cordoned": true, "group": "app", "dns": false, "ready_at_ms": 5,
            "metadata": {"role": "leader"}}),
    );
    check::<NodeRow>(
        "NodeRow",
        json!({"id": "n1", "region": "iad", "zone": "a", "address": "10.0.0.1", "verify_key": "a", "sealing_key": "b",
            "cpus": 2, "memory_mib": 1024, "cpus_free": 1.5, "memory_mib_free": 512, "version": "0.1.0",
            "mesh": "10.0.0.1:4443", "wireguard_key": "k", "wireguard": "10.0.0.1:51820",
            "disk_mib_free": 2048, "driver": "container", "isolation": "container"}),
    );
    check::<MemberRow>(
        "MemberRow",
        json!({"id": "n1", "region": "iad", "zone": "a", "address": "10.0.0.1", "verify_key": "a", "sealing_key": "b",
            "edge": true, "status": "draining"}),
    );
    check::<CertRow>(
        "CertRow",
        json!({"names": ["*.test"], "chain_pem": "c", "not_after_ms": 1, "sealed_key": "s", "key_pem": "k",
            "alpn": "acme-tls/1"}),
    );
    check::<TicketRow>(
        "TicketRow",
        json!({"not_before_ms": 1, "not_after_ms": 2, "sealed_key": "s", "key": "k"}),
    );
    check::<FeedRow>("FeedRow", row());
    check::<Port>("Port", port());
    check::<HTTPOptions>("HTTPOptions", http_options());
    check::<ReplayCache>("ReplayCache", replay_cache());
    check::<Concurrency>(
        "Concurrency",
        json!({"type": "requests", "soft_limit": 1, "hard_limit": 2}),
    );
}

#[test]
fn frames_match_the_schema() {
    check::<AgentFrame>(
        "AgentHello",
        json!({"type": "hello", "protocol": 1, "node": "n1", "region": "iad"}),
    );
    check::<AgentFrame>(
        "Snapshot",
        json!({"type": "snapshot", "revision": 1, "rows": [row()], "last": true}),
    );
    check::<AgentFrame>("Delta", json!({"type": "delta", "revision": 2, "rows": [row()]}));
    check::<AgentFrame>(
        "WakeResult",
        json!({"type": "wake_result", "id": 1, "machine": "148e", "ok": false, "ip4": "1.2.3.4", "code": "PM08",
            "reason": "destroyed", "elsewhere": true}),
    );
    check::<AgentFrame>(
        "Drain",
        json!({"type": "drain", "id": 1, "machine": "148e", "deadline_ms": 5, "load_seq": 7}),
    );
    check::<AgentFrame>("Undrain", json!({"type": "undrain", "machine": "148e"}));
    check::<AgentFrame>(
        "Trace",
        json!({"type": "trace", "id": 3, "request": "01ARZ3NDEKTSV4RRFFQ69G5FAV"}),
    );
    check::<ProxyFrame>(
        "ProxyHello",
        json!({"type": "hello", "protocol": 1, "version": "0.1.0", "pid": 7}),
    );
    check::<ProxyFrame>(
        "Applied",
        json!({"type": "applied", "revision": 1, "set_aside": ["app/web"]}),
    );
    check::<ProxyFrame>(
        "Wake",
        json!({"type": "wake", "id": 1, "machine": "148e", "deadline_ms": 5}),
    );
    let load = json!({"machine": "148e", "in_flight": 1, "seq": 9, "idle_ms": 3});
    check::<MachineLoad>("MachineLoad", load.clone());
    check::<ProxyFrame>("Load", json!({"type": "load", "machines": [load]}));
    for result in ["drained", "busy", "deadline"] {
        let frame = json!({"type": "drained", "id": 1, "machine": "148e", "result": result, "in_flight": 2});
        check::<ProxyFrame>("Drained", frame);
    }
    let record = json!({"role": "worker", "outcome": "turned", "began_us": 1_732_222_222_222_000_u64, "reason": "full",
        "code": "PR04", "status": 503, "app": "web", "machine": "148e", "node": "n1", "region": "iad", "attempt": 2,
        "replays": 1, "from_us": 5, "choose_us": 6, "waited_us": {"cold": 4}, "connect_us": 7, "reused": true,
        "answer_us": 8, "body_us": 9, "cut": true});
    check::<TraceRecord>("TraceRecord", record.clone());
    check::<ProxyFrame>(
        "Traced",
        json!({"type": "traced", "id": 3, "since_ms": 7, "records": [record]}),
    );
    check::<ProxyFrame>(
        "ProxyLog",
        json!({"type": "log", "app": "web", "code": "PR01", "message": "m", "machine": "148e", "request_id": "r"}),
    );
}

#[test]
fn settings_match_the_schema() {
    let dns = json!({"listen": ["fdaa::3"], "public_listen": ["10.0.0.1"], "public_names": {"a.test": "10.0.0.2"},
        "forward": ["9.9.9.9"], "port": 5353, "queries_per_s_max": 7});
    let listener = json!({"address": "0.0.0.0", "port": 443, "tls": true, "http": false});
    check::<DNSSettings>("DNSSettings", dns.clone());
    check::<Listener>("Listener", listener.clone());
    let mesh = json!({"listen": "10.0.0.1:4443", "certificate": "/c", "key": "/k", "authority": "/a",
        "ping_interval_ms": 1, "ping_timeout_ms": 2});
    check::<MeshSettings>("MeshSettings", mesh.clone());
    let buckets = json!({"endpoint": "https://s3.test", "region": "r", "virtual_host": true, "ca_file": "/ca",
        "credentials_file": "/c", "readers": {"b": ["o"]}, "writers": {"c": ["o"]}, "answer_timeout_ms": 1, "silence_timeout_ms": 2});
    check::<BucketSettings>("BucketSettings", buckets.clone());
    check::<ProxySettings>(
        "ProxySettings",
        json!({"node": "n1", "region": "iad", "state_dir": "/s", "agent_socket": "/a", "listeners": [listener], "dns": dns,
            "mesh": mesh, "buckets": buckets, "entry_listen": ["127.0.0.1:4480"], "connections_per_app_max": 8, "handshakes_max": 9,
            "handshakes_per_range_per_s_max": 10, "handshakes_per_name_per_s_max": 11,
            "api_forward": "127.0.0.1:4280", "api_listen": ["[fdaa::3]:4280"], "admin_listen": "127.0.0.1:9",
            "wake_hold_ms": 1, "wake_timeout_ms": 2, "queue_timeout_ms": 3, "queue_per_app_max": 4, "waiting_max": 8,
            "drain_max_ms": 5, "lame_duck_ms": 6, "app_domain": "apps.test", "replay_body_bytes_max": 7,
            "trace_mib_max": 12, "client_ping_after_ms": 13, "client_ping_timeout_ms": 14}),
    );
}

#[test]
fn every_type_of_the_schema_is_mirrored() {
    let known = [
        "AcmeRow",
        "AddressRow",
        "AgentHello",
        "AppRow",
        "Applied",
        "BucketSettings",
        "CertRow",
        "Concurrency",
        "DNSSettings",
        "Delta",
        "Drain",
        "Drained",
        "FeedRow",
        "HTTPOptions",
        "HTTPResponseOptions",
        "HostRow",
        "Listener",
        "Load",
        "MachineLoad",
        "MachineRow",
        "MemberRow",
        "MeshSettings",
        "NodeRow",
        "OrgRow",
        "Port",
        "ProxyHello",
        "ProxyLog",
        "ProxyProtoOptions",
        "ProxySettings",
        "ReplayCache",
        "ServiceRow",
        "Snapshot",
        "Static",
        "TLSOptions",
        "TextRow",
        "TicketRow",
        "Trace",
        "TraceRecord",
        "Traced",
        "Undrain",
        "Wake",
        "WakeResult",
    ];
    let schema = schema();
    let names: Vec<&String> = schema["$defs"].as_object().unwrap().keys().collect();
    assert_eq!(names, known);
}
