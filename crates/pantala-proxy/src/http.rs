//! Phases 2 and 3 of connections that carry HTTP: requests are parsed by hyper within our bounds, each handed to
//! [`crate::service`]. A connection that stays idle, or whose next head does not end, is closed here. One of HTTP/1 that is quiet
//! is taken back from hyper, whose buffers are most of its weight, until the client speaks again ([`crate::park`]).

use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::header::ACCEPT;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use pantala_route::matching::Matched;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use crate::body::Tracked;
use crate::conversation::{Conversation, Hints, Limits, Look, Noted};
use crate::headers::Client;
use crate::park::{Park, Parked, park};
use crate::service::{self, Worker};
use crate::shared::{Life, Shared};

const HEADERS_MAX: usize = 128;
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Of what was read ahead; a body is slowed down by it.
const BUFFER_BYTES_MAX: usize = 2 * HEAD_BYTES_MAX;
const STREAMS_MAX: u32 = 250;
const PING_INTERVAL: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// For the last words on a connection that is idle anyway.
pub const GOODBYE_MAX: Duration = Duration::from_secs(5);

pub async fn http_1<S: Park>(worker: &Rc<Worker>, client: Client, mut stream: S) {
    let conversation = begin(worker, &client);
    let mut before = Bytes::new();
    loop {
        // With room of its own, which is given back when the connection is parked.
        match Box::pin(speak(worker, client, &conversation, stream, before)).await {
            Some(quiet) => (stream, before) = quiet,
            None => return,
        }
        if before.is_empty() && park(&worker.shared, &conversation, &mut stream).await == Parked::Over {
            return;
        }
    }
}

/// Requests and answers, until the connection is quiet: then it is given back, with what was read ahead.
async fn speak<S: Park>(
    worker: &Rc<Worker>,
    client: Client,
    conversation: &Arc<Conversation>,
    stream: S,
    before: Bytes,
) -> Option<(S, Bytes)> {
    let mut builder = http1::Builder::new();
    builder
        .header_read_timeout(None)
        .max_headers(HEADERS_MAX)
        .max_header_size(HEAD_BYTES_MAX)
        .max_buf_size(BUFFER_BYTES_MAX);
    let service = service_fn(|request| handle(worker.clone(), client, conversation.clone(), request));
    let stream = TokioIo::new(Noted::new(stream, before, conversation.clone()));
    let mut connection = builder.serve_connection(stream, service).with_upgrades();
    tokio::select! {
        biased; // hyper has done all that it can before the connection is judged
        _ = &mut connection => return None,
        () = closing(&worker.shared) => Pin::new(&mut connection).graceful_shutdown(),
        silence = silent(conversation, true) => match silence {
            Look::Quiet => {
                let parts = connection.into_parts()?;
                let before = Some(parts.read_buf).filter(|read| !read.is_empty()); // an empty one has its room still
                return Some((parts.io.into_inner().into_stream(), before.unwrap_or_default()));
            }
            Look::Slow => return None,
            _ => {
                Pin::new(&mut connection).graceful_shutdown();
                let _ = timeout(GOODBYE_MAX, connection).await;
                return None;
            }
        }
    }
    let _ = connection.await;
    None
}

pub async fn http_2<S: AsyncRead + AsyncWrite + Unpin + 'static>(worker: &Rc<Worker>, client: Client, stream: S) {
    let conversation = begin(worker, &client);
    let mut builder = http2::Builder::new(Local);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .enable_connect_protocol() // WebSocket over HTTP/2 (RFC 8441)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let service = service_fn(|request| handle(worker.clone(), client, conversation.clone(), request));
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = closing(&worker.shared) => connection.as_mut().graceful_shutdown(),
        // What was opened as a tunnel goes on; new streams go to another connection.
        _ = silent(&conversation, false) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

/// On an address of one app its limits hold from the first byte, on a shared one from the first request.
fn begin(worker: &Worker, client: &Client) -> Arc<Conversation> {
    let conversation = Conversation::new();
    if let Matched::App(app) = worker.shared.view().snapshot.find(client.local.ip(), None) {
        let options = app.offer(client.local.port()).and_then(|offer| offer.http.as_deref());
        if let Some(limits) = options.and_then(Limits::of) {
            conversation.limit(limits);
        }
    }
    conversation
}

/// Returns once the connection has been idle, or slow with a head, for too long; or quiet, if it `parks`.
pub async fn silent(conversation: &Conversation, parks: bool) -> Look {
    loop {
        match conversation.look(parks) {
            Look::In(pause) => tokio::select! {
                () = sleep(pause) => {}
                () = conversation.limited.notified() => {}
            },
            over => return over,
        }
    }
}

async fn handle(
    worker: Rc<Worker>,
    client: Client,
    conversation: Arc<Conversation>,
    mut request: Request<Incoming>,
) -> Result<Response<Tracked>, Infallible> {
    let busy = conversation.request();
    let hinted = takes_hints(&request);
    if hinted {
        request.extensions_mut().insert(Hints(conversation.clone()));
    }
    let by_host = client.by_host.then(|| conversation.clone());
    if !request.body().is_end_stream() && request.version() != Version::HTTP_2 {
        request.extensions_mut().insert(conversation.body());
    }
    // hyper keeps room for what this function holds as long as the connection lives; the request brings its own.
    let mut served = Box::pin(service::serve(worker, client, by_host, request));
    let mut response = if hinted {
        tokio::select! {
            biased;
            response = served.as_mut() => response,
            never = conversation.hand_on_hints() => match never {},
        }
    } else {
        served.await
    };
    if let Some(limits) = response.extensions_mut().remove::<Limits>() {
        conversation.limit(limits);
    }
    Ok(response.map(|body| Tracked::new(body, busy)))
}

/// Early hints are for pages; requests of other kinds need not pay for listening. Over HTTP/2 hyper has no way to send them.
fn takes_hints(request: &Request<Incoming>) -> bool {
    let accepts = || request.headers().get(ACCEPT).map_or(&b""[..], |value| value.as_bytes());
    request.version() == Version::HTTP_11
        && request.method() == Method::GET
        && accepts().windows(9).any(|part| part == b"text/html")
}

pub async fn closing(shared: &Shared) {
    let _ = shared.life.subscribe().wait_for(|life| *life >= Life::Closing).await;
}

/// hyper's HTTP/2 spawns a task per stream; they stay on this thread.
#[derive(Clone)]
pub struct Local;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, task: F) {
        let task: Pin<Box<dyn Future<Output = ()>>> = Box::pin(task);
        spawn_local(task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpStream;
    use tokio_rustls::server::TlsStream;

    fn room<A, B, C, D, F>(_: impl FnOnce(A, B, C, D) -> F) -> usize {
        std::mem::size_of::<F>()
    }

    /// Ten thousand idle connections hold ten thousand of each.
    #[test]
    fn an_idle_connection_holds_no_room_for_a_request() {
        assert!(room(handle) <= 1024, "{}", room(handle));
        assert!(
            room(crate::connection::serve) <= 1024,
            "{}",
            room(crate::connection::serve)
        );
        let kept = |worker: &'static Rc<Worker>, client, stream: Box<TlsStream<TcpStream>>, (): ()| {
            http_1(worker, client, stream)
        };
        assert!(room(kept) <= 1024, "{}", room(kept));
    }
}
