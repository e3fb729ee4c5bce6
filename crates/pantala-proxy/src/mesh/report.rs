//! The mesh as operators see it: lines of `/metrics` and the peers of `/snapshot`.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

use super::Mesh;
use super::peers::{Peer, State};

pub fn metrics(mesh: &Mesh, text: &mut String) {
    let m = &mesh.metrics;
    let counters = [
        ("requests", "attempts sent to machines of other hosts", &m.sent),
        ("served", "requests that came from other hosts", &m.served),
        ("connections", "connections opened to other hosts", &m.connects),
        (
            "connections_failed",
            "connections to other hosts that failed",
            &m.connects_failed,
        ),
        ("handshakes", "connections of other hosts taken", &m.handshakes),
        (
            "handshakes_refused",
            "connections refused: certificate or membership",
            &m.handshakes_refused,
        ),
        ("pings_missed", "pings without an answer in time", &m.pings_missed),
    ];
    for (name, help, value) in counters {
        let name = format!("pantala_proxy_mesh_{name}_total");
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "# HELP {name} {help}\n# TYPE {name} counter\n{name} {}",
            value.load(Relaxed)
        );
    }
    let name = "pantala_proxy_mesh_refused_total";
    let _ = writeln!(
        text,
        "# HELP {name} requests of other hosts told to retry elsewhere\n# TYPE {name} counter"
    );
    for (reason, count) in m.refusals() {
        let _ = writeln!(text, "{name}{{reason=\"{reason}\"}} {count}");
    }
    let peers = sorted(mesh);
    let (up, rtt) = ("pantala_proxy_mesh_peer_up", "pantala_proxy_mesh_peer_rtt_seconds");
    let _ = writeln!(
        text,
        "# HELP {up} whether the host's proxy answers pings\n# TYPE {up} gauge"
    );
    for peer in &peers {
        let answers = u8::from(peer.state() == State::Up);
        let _ = writeln!(
            text,
            "{up}{{node=\"{}\",region=\"{}\"}} {answers}",
            peer.node, peer.region
        );
    }
    let _ = writeln!(text, "# HELP {rtt} smoothed round trip of pings\n# TYPE {rtt} gauge");
    for (peer, us) in peers.iter().filter_map(|peer| Some((peer, peer.rtt_us()?))) {
        let seconds = f64::from(us) / 1e6;
        let _ = writeln!(
            text,
            "{rtt}{{node=\"{}\",region=\"{}\"}} {seconds}",
            peer.node, peer.region
        );
    }
}

pub fn peers(mesh: &Mesh, now_ms: u64) -> Value {
    let one = |peer: &Arc<Peer>| {
        let state = match peer.state() {
            State::New => "new",
            State::Up => "up",
            State::Down => "down",
            State::Gone => "gone",
            State::Removed => "removed",
        };
        json!({
            "node": &*peer.node,
            "region": peer.region,
            "address": peer.address.to_string(),
            "state": state,
            "rtt_us": peer.rtt_us(),
            "heard_ms_ago": peer.rtt_us().map(|_| now_ms.saturating_sub(peer.heard_ms())),
        })
    };
    sorted(mesh).iter().map(one).collect()
}

fn sorted(mesh: &Mesh) -> Vec<Arc<Peer>> {
    let mut peers = mesh.peers.all();
    peers.sort_by(|a, b| a.node.cmp(&b.node));
    peers
}
