//! Phase 6 for apps that speak HTTP/2 on their port without TLS (`h2_backend`: gRPC): one connection of each worker carries
//! many requests. It counts as made once the app's first frame shows that it speaks HTTP/2 at all.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::error::Error;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::client::conn::http2::{self, SendRequest};
use hyper::header::{CONNECTION, HOST, TRANSFER_ENCODING, UPGRADE};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use pantala_route::retry::Fault;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, oneshot};
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout_at};

use crate::body::AttemptBody;
use crate::http::Local;
use crate::pool::{ConnectError, KEPT_FOR, Route};

/// Beyond it another connection is opened; the app may allow fewer.
const STREAMS_MAX: usize = 100;
const HEAD_BYTES_MAX: u32 = 64 * 1024;
const WINDOW: u32 = 256 * 1024;
/// A connection with open streams that hears nothing for as long is dead.
const PING_INTERVAL: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

pub struct Connection {
    sender: SendRequest<AttemptBody>,
    route: Route,
    streams: Cell<usize>,
    /// what the app allows
    streams_max: Rc<Cell<usize>>,
    idle_since: Cell<Instant>,
}

impl Connection {
    fn usable(&self) -> bool {
        let fresh = self.streams.get() > 0 || self.idle_since.get().elapsed() < KEPT_FOR;
        fresh && !self.sender.is_closed() && self.route.current()
    }

    fn has_room(&self) -> bool {
        self.streams.get() < STREAMS_MAX.min(self.streams_max.get())
    }
}

/// One request's share of a connection.
pub struct Stream(Rc<Connection>);

impl Stream {
    fn new(connection: &Rc<Connection>) -> Stream {
        connection.streams.set(connection.streams.get() + 1);
        Stream(connection.clone())
    }

    pub fn sender(&self) -> SendRequest<AttemptBody> {
        self.0.sender.clone()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.idle_since.set(Instant::now());
    }
}

#[derive(Default)]
struct Kept {
    connections: RefCell<Vec<Rc<Connection>>>,
    /// held while connecting, so that a burst of first requests makes one connection
    gate: Mutex<()>,
}

impl Kept {
    fn usable(&self) -> Option<Rc<Connection>> {
        let connections = self.connections.borrow();
        connections.iter().find(|c| c.usable() && c.has_room()).cloned()
    }
}

#[derive(Default)]
pub struct Pool {
    targets: RefCell<HashMap<(SocketAddr, u32), Rc<Kept>>>,
}

impl Pool {
    /// Answers whether the connection had carried requests before. `fresh`: it has not; without `pooled` it carries no
    /// others.
    pub async fn stream(&self, route: &Route, fresh: bool, by: Instant) -> Result<(Stream, bool), ConnectError> {
        if !route.pooled {
            return Ok((Stream::new(&Rc::new(open(route, by).await?)), false));
        }
        let key = (route.socket, route.epoch);
        let kept = self.targets.borrow_mut().entry(key).or_default().clone();
        if let Some(connection) = kept.usable().filter(|_| !fresh) {
            return Ok((Stream::new(&connection), true));
        }
        let gate = timeout_at(by, kept.gate.lock()).await;
        let _gate = gate.map_err(|_| ConnectError::Timeout)?;
        if let Some(connection) = kept.usable().filter(|_| !fresh) {
            return Ok((Stream::new(&connection), true));
        }
        let connection = Rc::new(open(route, by).await?);
        let stream = Stream::new(&connection);
        kept.connections.borrow_mut().push(connection);
        Ok((stream, false))
    }

    pub fn sweep(&self) {
        self.targets.borrow_mut().retain(|_, kept| {
            kept.connections.borrow_mut().retain(|connection| connection.usable());
            Rc::strong_count(kept) > 1 || !kept.connections.borrow().is_empty()
        });
    }
}

async fn open(route: &Route, by: Instant) -> Result<Connection, ConnectError> {
    let connecting = timeout_at(by, TcpStream::connect(route.socket));
    let stream = connecting.await.map_err(|_| ConnectError::Timeout)??;
    stream.set_nodelay(true)?;
    let (greeted, greeting) = oneshot::channel();
    let stream = Greeted {
        stream,
        seen: Vec::with_capacity(FRAME_HEAD),
        greeted: Some(greeted),
    };
    let mut builder = http2::Builder::new(Local);
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW * 16)
        .max_header_list_size(HEAD_BYTES_MAX)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let (sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
    let streams_max = Rc::new(Cell::new(STREAMS_MAX));
    let allowed = streams_max.clone();
    let mut connection = Box::pin(connection);
    let carry = poll_fn(move |cx| {
        // Its errors reach the requests that it carries.
        let over = connection.as_mut().poll(cx).map(drop);
        allowed.set(connection.current_max_send_streams());
        over
    });
    spawn_local(carry);
    match timeout_at(by, greeting).await {
        Ok(Ok(true)) => {}
        _ => return Err(ConnectError::NotHTTP2),
    }
    Ok(Connection {
        sender,
        route: route.clone(),
        streams: Cell::new(0),
        streams_max,
        idle_since: Cell::new(Instant::now()),
    })
}

/// An HTTP/1.1 request as HTTP/2 says it: the name is part of the address, nothing is about the connection.
pub fn translate(path: Option<&PathAndQuery>, headers: &mut HeaderMap) -> Uri {
    let host = headers.remove(HOST);
    let authority = host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    let path = path.map_or("/", PathAndQuery::as_str);
    let uri = Uri::builder().scheme("http").authority(authority).path_and_query(path);
    for name in [CONNECTION, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    // Host and path were parsed before.
    uri.build().unwrap_or_default()
}

/// What the end of a connection, or of one stream, says of the request: `REFUSED_STREAM`, and a goodbye in good order, mean
/// that the app has not looked at it.
pub fn fault(error: &hyper::Error) -> Fault {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<h2::Error>());
    match cause {
        Some(h2) if h2.reason() == Some(h2::Reason::REFUSED_STREAM) => Fault::NotSent,
        Some(h2) if h2.is_go_away() && h2.is_remote() && h2.reason() == Some(h2::Reason::NO_ERROR) => Fault::Stale,
        _ => Fault::Died,
    }
}

const FRAME_HEAD: usize = 9;
const SETTINGS: u8 = 4;

/// Looks at the first frame of the app: it must be SETTINGS (RFC 9113, 3.4).
struct Greeted {
    stream: TcpStream,
    seen: Vec<u8>,
    greeted: Option<oneshot::Sender<bool>>,
}

impl Greeted {
    fn see(&mut self, bytes: &[u8]) {
        let wanted = FRAME_HEAD - self.seen.len();
        self.seen.extend_from_slice(&bytes[..wanted.min(bytes.len())]);
        if (bytes.is_empty() || self.seen.len() == FRAME_HEAD)
            && let Some(greeted) = self.greeted.take()
        {
            let settings = self.seen.len() == FRAME_HEAD && self.seen[3] == SETTINGS && self.seen[5..] == [0; 4];
            // Whoever waited may have given up.
            let _ = greeted.send(settings);
        }
    }
}

impl AsyncRead for Greeted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if self.greeted.is_some() {
            let this = &mut *self;
            this.see(&buf.filled()[before..]);
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Greeted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
