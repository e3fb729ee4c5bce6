//! Phases 2 and 3 of connections that carry HTTP/1: requests are parsed by hyper within our bounds, each handed to
//! [`crate::service`]. A connection that stays idle, or whose next head does not end, is closed here. One that is quiet
//! is taken back from hyper, whose buffers are most of its weight, until the client speaks again ([`crate::park`]).

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use pantala_route::matching::Matched;
use tokio::time::{sleep, timeout};

use crate::body::{Coming, Tracked};
use crate::conversation::{Conversation, Limits, Look, Noted};
use crate::headers::Client;
use crate::hints::{self, Hints};
use crate::park::{Park, Parked, park};
use crate::service::{self, Worker};
use crate::shared::{Life, Shared};
use crate::upgrade::Upgrade;

pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Of what was read ahead; a body is slowed down by it.
const BUFFER_BYTES_MAX: usize = 2 * HEAD_BYTES_MAX;
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

/// On an address of one app its limits hold from the first byte, on a shared one from the first request.
pub fn begin(worker: &Worker, client: &Client) -> Arc<Conversation> {
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
    let hinted = hints::wanted(&request);
    if hinted {
        request
            .extensions_mut()
            .insert(Hints::OnConnection(conversation.clone()));
    }
    let by_host = client.by_host.then(|| conversation.clone());
    if !request.body().is_end_stream() {
        request.extensions_mut().insert(conversation.body());
    }
    let upgrade = request.extensions_mut().remove().map(Upgrade::OfConnection);
    let request = request.map(Coming::OnConnection);
    // hyper keeps room for what this function holds as long as the connection lives; the request brings its own.
    let mut served = Box::pin(service::serve(worker, client, by_host, request, upgrade));
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

pub async fn closing(shared: &Shared) {
    let _ = shared.life.subscribe().wait_for(|life| *life >= Life::Closing).await;
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
