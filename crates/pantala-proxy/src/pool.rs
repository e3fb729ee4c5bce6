//! Phase 6: a connection to a machine. Each worker keeps its own for about 4 s; none is used again once the machine's epoch
//! has moved on (another version, stopped, another address) or while it drains. Those of HTTP/2 are in [`crate::h2c`].

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hyper::client::conn::http1;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use pantala_route::gauge::Gauge;
use pantala_route::retry::Fault;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::body::{AttemptBody, Coming};
use crate::expect::Asked;
use crate::gather::Gathering;
use crate::h2c;
use crate::hints::Ears;
use crate::http2::client::{self, Share};

pub const KEPT_FOR: Duration = Duration::from_secs(4);
const KEPT_PER_TARGET_MAX: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub struct Route {
    pub socket: SocketAddr,
    /// none for a platform backend, which has no epochs
    pub gauge: Option<Arc<Gauge>>,
    pub epoch: u32,
    pub pooled: bool,
    /// the app speaks HTTP/2 there
    pub h2: bool,
}

impl Route {
    pub fn current(&self) -> bool {
        self.gauge
            .as_ref()
            .is_none_or(|gauge| gauge.epoch() == self.epoch && !gauge.read().draining)
    }
}

enum Sender {
    Alone(http1::SendRequest<AttemptBody>),
    /// none once the request is on its way
    Shared(Option<Share>),
}

struct Idle {
    sender: http1::SendRequest<AttemptBody>,
    route: Route,
    since: Instant,
}

impl Idle {
    fn usable(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) < KEPT_FOR && !self.sender.is_closed() && self.route.current()
    }
}

#[derive(Default)]
pub struct Pool {
    idle: RefCell<HashMap<(SocketAddr, u32), VecDeque<Idle>>>,
    h2c: h2c::Pool,
}

/// A connection in use by one request.
pub struct Lease {
    sender: Sender,
    pub reused: bool,
    route: Route,
    pool: Rc<Pool>,
    /// of a request whose body waits for the app's word
    asked: Option<Asked>,
}

/// An attempt that had no answer.
pub struct Unanswered {
    pub fault: Fault,
    /// what came was no HTTP
    pub malformed: bool,
}

impl Lease {
    pub async fn send(
        &mut self,
        mut request: Request<AttemptBody>,
        ears: Ears,
    ) -> Result<Response<Coming>, Unanswered> {
        match &mut self.sender {
            Sender::Alone(sender) => {
                ears.listen(&mut request);
                self.asked = ears.asked;
                let answered = sender.try_send_request(request).await;
                answered
                    .map(|answer| answer.map(Coming::OnConnection))
                    .map_err(|mut error| {
                        let unsent = error.take_message().is_some();
                        let malformed = error.error().is_parse();
                        let fault = match self.reused {
                            false if unsent => Fault::NotSent,
                            true if !malformed => Fault::Stale,
                            _ => Fault::Died,
                        };
                        Unanswered { fault, malformed }
                    })
            }
            Sender::Shared(share) => {
                let (head, body) = request.into_parts();
                let Some(share) = share.take() else {
                    let fault = Fault::NotSent; // one lease is for one request
                    return Err(Unanswered {
                        fault,
                        malformed: false,
                    });
                };
                let answered = client::ask(share, Request::from_parts(head, ()), Some(body), ears).await;
                answered.map(|answer| answer.response).map_err(|why| Unanswered {
                    fault: match why.unsent && self.reused {
                        true => Fault::Stale,
                        false => why.fault(),
                    },
                    malformed: false,
                })
            }
        }
    }

    /// Its answer has been read to the end.
    pub fn give_back(self, now: Instant) {
        let Sender::Alone(sender) = self.sender else { return };
        // The body that nobody asked for would come next on this connection.
        if self.asked.as_ref().is_some_and(|asked| !asked.was_open()) {
            return;
        }
        if self.route.pooled && !sender.is_closed() && self.route.current() {
            let mut idle = self.pool.idle.borrow_mut();
            let kept = idle.entry((self.route.socket, self.route.epoch)).or_default();
            if kept.len() < KEPT_PER_TARGET_MAX {
                kept.push_back(Idle {
                    sender,
                    route: self.route,
                    since: now,
                });
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{0}")]
    Socket(#[from] std::io::Error),
    #[error("no answer in time")]
    Timeout,
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    HTTP2(#[from] h2::Error),
    #[error("it does not speak HTTP/2 there, which h2_backend asks of it")]
    NotHTTP2,
}

impl ConnectError {
    /// One of Fly Proxy's error codes.
    pub fn code(&self) -> &'static str {
        use std::io::ErrorKind::{
            ConnectionAborted, ConnectionRefused, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut,
        };
        match self {
            ConnectError::Timeout => "PC05",
            ConnectError::Http(_) | ConnectError::HTTP2(_) => "PC06",
            ConnectError::NotHTTP2 => "PU01",
            ConnectError::Socket(error) => match error.kind() {
                ConnectionRefused => "PC01",
                ConnectionReset => "PC03",
                ConnectionAborted => "PC04",
                TimedOut => "PC05",
                HostUnreachable | NetworkUnreachable => "PU03",
                _ => "PC06",
            },
        }
    }
}

impl Pool {
    /// A kept connection if there is one that still stands, else a new one. `fresh` never takes a kept one; `by` ends a
    /// new one's attempt early.
    pub async fn connect(
        self: &Rc<Self>,
        route: &Route,
        fresh: bool,
        now: Instant,
        by: Option<Instant>,
    ) -> Result<Lease, ConnectError> {
        let limit = now + CONNECT_TIMEOUT;
        let limit = by.map_or(limit, |by| by.min(limit));
        if route.h2 {
            let (share, reused) = self.h2c.share(route, fresh, limit).await?;
            return Ok(self.lease(Sender::Shared(Some(share)), reused, route));
        }
        while let Some(mut idle) = (!fresh && route.pooled).then(|| self.take(route)).flatten() {
            if idle.usable(now) && idle.sender.ready().await.is_ok() {
                return Ok(self.lease(Sender::Alone(idle.sender), true, route));
            }
        }
        let sender = Box::pin(open(route.socket, limit)).await?; // most requests find one
        Ok(self.lease(Sender::Alone(sender), false, route))
    }

    fn lease(self: &Rc<Self>, sender: Sender, reused: bool, route: &Route) -> Lease {
        Lease {
            sender,
            reused,
            route: route.clone(),
            pool: self.clone(),
            asked: None,
        }
    }

    fn take(&self, route: &Route) -> Option<Idle> {
        // The youngest is the least likely to be closed by the other side at this moment.
        self.idle.borrow_mut().get_mut(&(route.socket, route.epoch))?.pop_back()
    }

    /// Closes what is old or leads to a machine that moved on or drains.
    pub fn sweep(&self) {
        let now = Instant::now();
        self.idle.borrow_mut().retain(|_, kept| {
            kept.retain(|idle| idle.usable(now));
            !kept.is_empty()
        });
        self.h2c.sweep();
    }
}

async fn open(socket: SocketAddr, by: Instant) -> Result<http1::SendRequest<AttemptBody>, ConnectError> {
    let connecting = timeout_at(by, TcpStream::connect(socket));
    let stream = connecting.await.map_err(|_| ConnectError::Timeout)??;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(Gathering(stream))).await?;
    tokio::task::spawn_local(async move {
        // Its errors reach the request that uses it; an idle one that ends needs no word.
        let _ = connection.with_upgrades().await;
    });
    Ok(sender)
}
