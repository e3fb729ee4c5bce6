//! Kept connections to other hosts' proxies: each worker thread has its own, one for each peer and more only when so many
//! streams are open. Concurrent requests share a connection on its way; a peer that refuses is left alone for a growing
//! pause, in which requests for it fail at once and go elsewhere.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Mutex;
use tokio::task::spawn_local;
use tokio::time::Instant;

use super::peers::Peer;
use super::tls::Credentials;
use super::{CONNECTION_WINDOW, ConnectError, HEAD_BYTES_MAX, KEEP_ALIVE, Mesh, STREAM_WINDOW, STREAMS_MAX};
use crate::body::AttemptBody;
use crate::http::Local;

const IDLE_MAX: Duration = Duration::from_secs(300);
const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What goes up a stream.
pub enum UpBody {
    Request(AttemptBody),
    /// of a CONNECT, whose bytes come later
    Empty,
}

impl Body for UpBody {
    type Data = Bytes;
    type Error = <AttemptBody as Body>::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match &mut *self {
            UpBody::Request(body) => Pin::new(body).poll_frame(cx),
            UpBody::Empty => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            UpBody::Request(body) => body.is_end_stream(),
            UpBody::Empty => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            UpBody::Request(body) => body.size_hint(),
            UpBody::Empty => SizeHint::with_exact(0),
        }
    }
}

struct Connection {
    sender: SendRequest<UpBody>,
    generation: u64,
    /// of the peer when this was opened
    silences: u64,
    peer: Arc<Peer>,
    streams: Cell<u32>,
    used: Cell<Instant>,
}

/// One stream's share of a connection; counts as open until dropped.
pub struct Stream(Rc<Connection>);

impl Stream {
    fn new(connection: &Rc<Connection>) -> Stream {
        connection.streams.set(connection.streams.get() + 1);
        Stream(connection.clone())
    }

    pub fn sender(&self) -> SendRequest<UpBody> {
        self.0.sender.clone()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.used.set(Instant::now());
    }
}

#[derive(Default)]
struct Kept {
    connections: RefCell<Vec<Rc<Connection>>>,
    /// held while connecting; the others find what came of it
    gate: Mutex<Refused>,
}

#[derive(Default)]
struct Refused {
    until: Option<Instant>,
    pause: Duration,
    why: String,
}

pub struct MeshPool {
    pub mesh: Arc<Mesh>,
    peers: RefCell<HashMap<Arc<str>, Rc<Kept>>>,
}

impl MeshPool {
    pub fn new(mesh: Arc<Mesh>) -> MeshPool {
        MeshPool {
            mesh,
            peers: RefCell::default(),
        }
    }

    pub async fn stream(&self, peer: &Arc<Peer>) -> Result<Stream, ConnectError> {
        let credentials = self.mesh.files.current().ok_or(ConnectError::NoCertificate)?;
        let kept = self.peers.borrow_mut().entry(peer.node.clone()).or_default().clone();
        if let Some(connection) = kept.usable(peer, &credentials) {
            return Ok(Stream::new(&connection));
        }
        tokio::select! {
            biased;
            () = peer.down() => Err(ConnectError::Down),
            connected = self.connect(&kept, peer, &credentials) => connected,
        }
    }

    async fn connect(&self, kept: &Kept, peer: &Arc<Peer>, credentials: &Credentials) -> Result<Stream, ConnectError> {
        let mut refused = kept.gate.lock().await;
        if let Some(connection) = kept.usable(peer, credentials) {
            return Ok(Stream::new(&connection));
        }
        if refused.until.is_some_and(|until| Instant::now() < until) {
            return Err(ConnectError::Lately(refused.why.clone()));
        }
        match self.open(peer, credentials).await {
            Ok(connection) => {
                *refused = Refused::default();
                kept.connections.borrow_mut().push(connection.clone());
                Ok(Stream::new(&connection))
            }
            Err(error) => {
                refused.pause = (refused.pause * 2).clamp(PAUSE_FIRST, PAUSE_MAX);
                refused.until = Some(Instant::now() + refused.pause);
                refused.why = error.to_string();
                Err(error)
            }
        }
    }

    async fn open(&self, peer: &Arc<Peer>, credentials: &Credentials) -> Result<Rc<Connection>, ConnectError> {
        let silences = peer.silences();
        let stream = self.mesh.connect(peer, credentials).await?;
        let mut builder = http2::Builder::new(Local);
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(HEAD_BYTES_MAX)
            .keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        let gone = peer.gone();
        spawn_local(async move {
            tokio::select! {
                // Its errors reach the streams that it carries.
                _ = connection => {}
                () = gone => {}
            }
        });
        Ok(Rc::new(Connection {
            sender,
            generation: credentials.generation,
            silences,
            peer: peer.clone(),
            streams: Cell::new(0),
            used: Cell::new(Instant::now()),
        }))
    }

    /// Forgets connections that ended, and lets go of idle ones and of those with an older certificate.
    pub fn sweep(&self) {
        let generation = self.mesh.files.current().map(|now| now.generation);
        let fine = |connection: &Rc<Connection>| {
            let idle = connection.streams.get() == 0;
            let left = Some(connection.generation) != generation || connection.silences != connection.peer.silences();
            let old = left || connection.used.get().elapsed() >= IDLE_MAX;
            !(connection.sender.is_closed() || idle && old)
        };
        self.peers.borrow_mut().retain(|_, kept| {
            kept.connections.borrow_mut().retain(fine);
            Rc::strong_count(kept) > 1 || !kept.connections.borrow().is_empty() || kept.refuses()
        });
    }
}

impl Kept {
    fn usable(&self, peer: &Arc<Peer>, credentials: &Credentials) -> Option<Rc<Connection>> {
        let fits = |connection: &&Rc<Connection>| {
            !connection.sender.is_closed()
                && connection.generation == credentials.generation
                && connection.silences == peer.silences()
                && Arc::ptr_eq(&connection.peer, peer)
                && connection.streams.get() < STREAMS_MAX
        };
        self.connections.borrow().iter().find(fits).cloned()
    }

    fn refuses(&self) -> bool {
        self.gate
            .try_lock()
            .is_ok_and(|refused| refused.until.is_some_and(|until| until.elapsed() < PAUSE_MAX))
    }
}
