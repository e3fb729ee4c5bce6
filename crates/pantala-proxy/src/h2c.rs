//! Phase 6 for apps that speak HTTP/2 on their port without TLS (`h2_backend`: gRPC): one connection of each worker carries
//! many requests. It counts as made once the app's first frame shows that it speaks HTTP/2 at all.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use hyper::header::{CONNECTION, HOST, TRANSFER_ENCODING, UPGRADE};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Uri};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::http2::client::{self, Connection, Manner, Share};
use crate::pool::{ConnectError, KEPT_FOR, Route};
use crate::watched::Watched;

/// Beyond it another connection is opened; the app may allow fewer.
const STREAMS_MAX: u32 = 100;
const HEAD_BYTES_MAX: u32 = 64 * 1024;
/// The least that HTTP/2 knows.
const FRAME_BYTES_MAX: u32 = 16 * 1024;
const WINDOW: u32 = 256 * 1024;
/// A connection with open streams that hears nothing for as long is dead.
const PING_INTERVAL: Duration = Duration::from_secs(60);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

const MANNER: Manner = Manner {
    window: WINDOW,
    connection_window: WINDOW * 16,
    head_bytes_max: HEAD_BYTES_MAX,
    frame_bytes_max: FRAME_BYTES_MAX,
    streams_max: STREAMS_MAX,
    alive: (PING_INTERVAL, PING_TIMEOUT),
};

struct Open {
    connection: Rc<Connection>,
    route: Route,
}

impl Open {
    fn usable(&self) -> bool {
        self.connection.idle() < KEPT_FOR && !self.connection.is_closed() && self.route.current()
    }
}

#[derive(Default)]
struct Kept {
    connections: RefCell<Vec<Open>>,
    /// held while connecting, so that a burst of first requests makes one connection
    gate: Mutex<()>,
}

impl Kept {
    fn usable(&self) -> Option<Share> {
        let connections = self.connections.borrow();
        let fit = connections
            .iter()
            .find(|open| open.usable() && open.connection.has_room());
        fit.map(|open| Share::new(&open.connection))
    }
}

#[derive(Default)]
pub struct Pool {
    targets: RefCell<HashMap<(SocketAddr, u32), Rc<Kept>>>,
}

impl Pool {
    /// Answers whether the connection had carried requests before. `fresh`: it has not; without `pooled` it carries no
    /// others.
    pub async fn share(&self, route: &Route, fresh: bool, by: Instant) -> Result<(Share, bool), ConnectError> {
        if !route.pooled {
            return Ok((Share::new(&open(route, by).await?), false));
        }
        let key = (route.socket, route.epoch);
        let kept = self.targets.borrow_mut().entry(key).or_default().clone();
        if let Some(share) = kept.usable().filter(|_| !fresh) {
            return Ok((share, true));
        }
        let gate = timeout_at(by, kept.gate.lock()).await;
        let _gate = gate.map_err(|_| ConnectError::Timeout)?;
        if let Some(share) = kept.usable().filter(|_| !fresh) {
            return Ok((share, true));
        }
        let connection = open(route, by).await?;
        let share = Share::new(&connection);
        let route = route.clone();
        kept.connections.borrow_mut().push(Open { connection, route });
        Ok((share, false))
    }

    pub fn sweep(&self) {
        self.targets.borrow_mut().retain(|_, kept| {
            kept.connections.borrow_mut().retain(Open::usable);
            Rc::strong_count(kept) > 1 || !kept.connections.borrow().is_empty()
        });
    }
}

async fn open(route: &Route, by: Instant) -> Result<Rc<Connection>, ConnectError> {
    let connecting = timeout_at(by, TcpStream::connect(route.socket));
    let stream = connecting.await.map_err(|_| ConnectError::Timeout)??;
    stream.set_nodelay(true)?;
    let (greeted, greeting) = oneshot::channel();
    let mut first = FirstFrame {
        seen: Vec::with_capacity(FRAME_HEAD),
        greeted: Some(greeted),
    };
    let stream = Watched::new(stream, move |bytes: &[u8]| first.see(bytes));
    let connection = client::open(stream, &MANNER, std::future::pending()).await?;
    match timeout_at(by, greeting).await {
        Ok(Ok(true)) => Ok(connection),
        _ => Err(ConnectError::NotHTTP2),
    }
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

const FRAME_HEAD: usize = 9;
const SETTINGS: u8 = 4;

/// Looks at the first frame of the app: it must be SETTINGS (RFC 9113, 3.4).
struct FirstFrame {
    seen: Vec<u8>,
    greeted: Option<oneshot::Sender<bool>>,
}

impl FirstFrame {
    fn see(&mut self, bytes: &[u8]) {
        if self.greeted.is_none() {
            return;
        }
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
