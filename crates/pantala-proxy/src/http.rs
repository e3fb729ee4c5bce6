//! Phases 2 and 3 of connections that carry HTTP: requests are parsed by hyper within our bounds, each handed to [`crate::service`].

use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_local;

use crate::body::OutBody;
use crate::headers::Client;
use crate::service::{self, Worker};
use crate::shared::{Life, Shared};

/// Time for the head of a request, and so also for an idle kept connection (Fly Proxy's documented limit).
const HEAD_MAX: Duration = Duration::from_secs(60);
const HEADERS_MAX: usize = 128;
const HEAD_BYTES_MAX: usize = 64 * 1024;
const STREAMS_MAX: u32 = 250;

pub async fn http_1<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    worker: &Rc<Worker>,
    client: Client,
    stream: S,
) {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX);
    let service = service_fn(|request| handle(worker.clone(), client, request));
    let connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = closing(&worker.shared) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

pub async fn http_2<S: AsyncRead + AsyncWrite + Unpin + 'static>(worker: &Rc<Worker>, client: Client, stream: S) {
    let mut builder = http2::Builder::new(Local);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .keep_alive_interval(HEAD_MAX)
        .keep_alive_timeout(Duration::from_secs(20));
    let service = service_fn(|request| handle(worker.clone(), client, request));
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = closing(&worker.shared) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

async fn handle(
    worker: Rc<Worker>,
    client: Client,
    request: Request<Incoming>,
) -> Result<Response<OutBody>, Infallible> {
    Ok(service::serve(worker, client, request).await)
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
