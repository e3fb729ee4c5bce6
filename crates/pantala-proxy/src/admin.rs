//! For the operator, on loopback: `/healthz`, `/metrics` (Prometheus text), `/snapshot` (a summary), `/trace/<request id>`.

use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::time::sleep;

use crate::ids::RequestId;
use crate::mesh::report;
use crate::shared::Shared;

const HEAD_MAX: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub async fn run(shared: Arc<Shared>, listener: std::net::TcpListener) -> std::io::Result<()> {
    shared.serving().await;
    let listener = TcpListener::from_std(listener)?;
    loop {
        let accepted = tokio::select! {
            () = shared.replaced() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let shared = shared.clone();
                async move { Ok::<_, Infallible>(answer(&shared, &request).await) }
            });
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEAD_MAX);
            // A broken connection of an operator's tool concerns only that tool.
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if let Some(id) = request.uri().path().strip_prefix("/trace/") {
        return trace(shared, id).await;
    }
    let (content_type, text) = match request.uri().path() {
        "/healthz" if shared.leaving() => {
            return plain(StatusCode::SERVICE_UNAVAILABLE, "text/plain", "leaving\n".to_owned());
        }
        "/healthz" => ("text/plain", "ok\n".to_owned()),
        "/metrics" => ("text/plain; version=0.0.4", metrics(shared)),
        "/snapshot" => ("application/json", summary(shared)),
        _ => {
            return plain(
                StatusCode::NOT_FOUND,
                "text/plain",
                "/healthz, /metrics, /snapshot, /trace/<request id>\n".to_owned(),
            );
        }
    };
    plain(StatusCode::OK, content_type, text)
}

fn plain(status: StatusCode, content_type: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

/// As the agent is told, for when it is away.
async fn trace(shared: &Shared, id: &str) -> Response<Full<Bytes>> {
    let Some(id) = RequestId::read(id) else {
        let wrong = "a request id is 26 digits and letters, then perhaps -<region>\n";
        return plain(StatusCode::BAD_REQUEST, "text/plain", wrong.to_owned());
    };
    let traces = shared.traces.clone();
    let found = tokio::task::spawn_blocking(move || traces.find(id.ulid)).await;
    let (since_ms, records) = found.unwrap_or_default();
    let text = serde_json::json!({"since_ms": since_ms, "records": records}).to_string();
    plain(StatusCode::OK, "application/json", text)
}

fn summary(shared: &Shared) -> String {
    let view = shared.view();
    let snapshot = &view.snapshot;
    serde_json::json!({
        "revision": snapshot.revision,
        "apps": snapshot.apps.len(),
        "machines": snapshot.apps.values().map(|app| app.machines.len()).sum::<usize>(),
        "hosts": snapshot.hosts.len(),
        "addresses": snapshot.addresses.len(),
        "certificate_names": shared.tls.certificates.len(),
        "set_aside": snapshot.set_aside,
        "peers": shared.mesh.as_ref().map(|mesh| report::peers(mesh, shared.elapsed_ms())),
    })
    .to_string()
}

fn metrics(shared: &Shared) -> String {
    let m = &shared.metrics;
    let counters: [(&str, &str, &AtomicU64); 16] = [
        (
            "pantala_proxy_connections_total",
            "client connections accepted",
            &m.connections,
        ),
        (
            "pantala_proxy_handshakes_failed_total",
            "TLS handshakes that failed",
            &m.handshakes_failed,
        ),
        (
            "pantala_proxy_http2_broken_total",
            "HTTP/2 connections whose client broke the protocol or never spoke it",
            &m.http2_broken,
        ),
        ("pantala_proxy_requests_total", "requests received", &m.requests),
        (
            "pantala_proxy_requests_refused_total",
            "answered 4xx by the proxy",
            &m.refused,
        ),
        (
            "pantala_proxy_requests_failed_total",
            "answered 5xx by the proxy",
            &m.failed,
        ),
        (
            "pantala_proxy_replays_total",
            "requests sent on as an app wished",
            &m.replays,
        ),
        (
            "pantala_proxy_replay_cache_hits_total",
            "requests sent on as an app wished earlier",
            &m.replay_cache_hits,
        ),
        ("pantala_proxy_retries_total", "attempts after the first", &m.retries),
        (
            "pantala_proxy_wakes_total",
            "machines that the agent was asked to wake",
            &m.wakes,
        ),
        (
            "pantala_proxy_queued_total",
            "requests that waited at a hard limit",
            &m.queued,
        ),
        (
            "pantala_proxy_handover_asked_total",
            "places that processes which this one replaced asked for",
            &m.places_asked,
        ),
        (
            "pantala_proxy_upstream_connections_total",
            "connections opened to machines and services",
            &m.upstream_connects,
        ),
        (
            "pantala_proxy_logs_dropped_total",
            "log frames that the agent did not get",
            &m.logs_dropped,
        ),
        ("pantala_proxy_dns_queries_total", "DNS queries", &m.dns_queries),
        ("pantala_proxy_dns_refused_total", "DNS queries refused", &m.dns_refused),
    ];
    let gauges = [
        (
            "pantala_proxy_connections_open",
            "client connections at this moment",
            m.connections_open.load(Relaxed),
        ),
        (
            "pantala_proxy_connections_parked",
            "of the open ones, HTTP/1 connections that have been quiet for two seconds",
            m.connections_parked.load(Relaxed),
        ),
        (
            "pantala_proxy_queue_length",
            "requests that wait at a hard limit",
            shared.queues.len() as u64,
        ),
        (
            "pantala_proxy_waiting",
            "requests that wait for a machine, for whatever reason",
            shared.room.len() as u64,
        ),
        (
            "pantala_proxy_handover_draining",
            "processes that this one replaced and that still serve",
            m.lending.load(Relaxed),
        ),
        (
            "pantala_proxy_snapshot_revision",
            "revision of the routing view",
            shared.view().snapshot.revision,
        ),
        (
            "pantala_proxy_rows_set_aside",
            "rows that could not be read",
            shared.view().snapshot.set_aside.len() as u64,
        ),
    ];
    let mut text = String::new();
    let counters = counters
        .into_iter()
        .map(|(name, help, value)| (name, help, "counter", value.load(Relaxed)));
    for (name, help, kind, value) in counters.chain(gauges.into_iter().map(|(n, h, v)| (n, h, "gauge", v))) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    }
    if let Some(mesh) = &shared.mesh {
        report::metrics(mesh, &mut text);
    }
    text
}
