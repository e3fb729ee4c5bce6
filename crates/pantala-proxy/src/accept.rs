//! Phases 1 and 2: connections are accepted by one thread per core, each with its own listening sockets, connections to
//! machines and runtime. TLS is ended, the protocol chosen, and each request handed to [`crate::service`].

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

use crate::body::OutBody;
use crate::headers::Client;
use crate::mesh::listen;
use crate::mesh::pool::MeshPool;
use crate::pool::Pool;
use crate::service::{self, Worker};
use crate::settings::ListenAddress;
use crate::shared::{Life, Shared};
use crate::{log, raw};

const BACKLOG: i32 = 4096;
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Time for the head of a request, and so also for an idle kept connection (Fly Proxy's documented limit).
const HEAD_MAX: Duration = Duration::from_secs(60);
const HEADERS_MAX: usize = 128;
const HEAD_BYTES_MAX: usize = 64 * 1024;
const STREAMS_MAX: u32 = 250;
const CONNECTIONS_MAX: u64 = 100_000;
/// Accepting fails when descriptors run out; connections that end give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listening sockets of one worker, bound but not yet served.
pub type Bound = Vec<(ListenAddress, std::net::TcpListener)>;

/// Binds everything for all workers, so that a taken port is known before the first request is answered.
pub fn bind(listeners: &[ListenAddress], workers: usize) -> std::io::Result<Vec<Bound>> {
    for listener in listeners {
        // Without SO_REUSEPORT, which would share the port with a stranger of the same user.
        listen(listener.socket, false, false).map_err(|e| named(e, listener.socket))?;
    }
    (0..workers)
        .map(|_| {
            let one = |l: &ListenAddress| {
                listen(l.socket, true, false)
                    .map(|s| (*l, s))
                    .map_err(|e| named(e, l.socket))
            };
            listeners.iter().map(one).collect()
        })
        .collect()
}

pub fn named(error: std::io::Error, socket: SocketAddr) -> std::io::Error {
    std::io::Error::new(error.kind(), format!("cannot listen on {socket}: {error}"))
}

/// `early`: the address may be added to an interface a moment later.
pub fn listen(address: SocketAddr, shared_port: bool, early: bool) -> std::io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared_port)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    match (early, address.is_ipv6()) {
        (true, true) => socket.set_freebind_v6(true)?,
        (true, false) => socket.set_freebind_v4(true)?,
        (false, _) => {}
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The whole life of one worker thread.
pub fn work(
    shared: Arc<Shared>,
    bound: Bound,
    mesh_bound: Option<std::net::TcpListener>,
    tls: &Tls,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let worker = Rc::new(Worker {
            shared: shared.clone(),
            pool: Rc::new(Pool::default()),
            mesh: shared.mesh.clone().map(|mesh| Rc::new(MeshPool::new(mesh))),
        });
        spawn_local(sweep(worker.clone()));
        if let (Some(mesh), Some(socket)) = (&shared.mesh, mesh_bound) {
            let listener = TcpListener::from_std(socket)?;
            spawn_local(listen::accept(worker.clone(), mesh.clone(), listener));
        }
        for (address, socket) in bound {
            let listener = TcpListener::from_std(socket)?;
            spawn_local(accept(worker.clone(), address, listener, tls.clone()));
        }
        let mut life = shared.life.subscribe();
        // The sender is in shared, so this ends only with the life of the process.
        let _ = life.wait_for(|life| *life == Life::Ending).await;
        Ok(())
    })
}

#[derive(Clone)]
pub struct Tls {
    pub http: Arc<ServerConfig>,
    pub raw: Arc<ServerConfig>,
}

async fn sweep(worker: Rc<Worker>) {
    let mut ticks = interval(Duration::from_millis(500));
    loop {
        ticks.tick().await;
        worker.pool.sweep();
        if let Some(mesh) = &worker.mesh {
            mesh.sweep();
        }
    }
}

async fn accept(worker: Rc<Worker>, address: ListenAddress, listener: TcpListener, tls: Tls) {
    let mut life = worker.shared.life.subscribe();
    loop {
        let accepted = tokio::select! {
            _ = life.wait_for(|life| *life > Life::Serving) => return,
            accepted = listener.accept() => accepted,
        };
        let metrics = &worker.shared.metrics;
        match accepted {
            Ok((stream, peer)) if metrics.connections_open.load(Relaxed) < CONNECTIONS_MAX => {
                metrics.connections.fetch_add(1, Relaxed);
                spawn_local(connection(worker.clone(), address, stream, peer, tls.clone()));
            }
            Ok(_) => {} // over the bound: closed at once
            Err(error) => {
                log::warning("accept failed", &[("address", &address.socket), ("reason", &error)]);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(worker: Rc<Worker>, address: ListenAddress, stream: TcpStream, peer: SocketAddr, tls: Tls) {
    worker.shared.metrics.connections_open.fetch_add(1, Relaxed);
    converse(&worker, address, stream, peer, tls).await;
    worker.shared.metrics.connections_open.fetch_sub(1, Relaxed);
}

/// Errors end the connection and concern nobody but its client, who sees it end.
async fn converse(worker: &Rc<Worker>, address: ListenAddress, stream: TcpStream, peer: SocketAddr, tls: Tls) {
    let Ok(local) = stream.local_addr() else { return };
    if stream.set_nodelay(true).is_err() || SockRef::from(&stream).set_keepalive(true).is_err() {
        return;
    }
    let client = Client {
        peer,
        local,
        tls: address.tls,
    };
    match (address.tls, address.http) {
        (false, true) => http_1(worker, client, stream).await,
        (false, false) => raw::carry(worker, client, stream, None).await,
        (true, http) => {
            let config = if http { tls.http } else { tls.raw };
            let Ok(Ok(stream)) = timeout(HANDSHAKE_MAX, TlsAcceptor::from(config).accept(stream)).await else {
                worker.shared.metrics.handshakes_failed.fetch_add(1, Relaxed);
                return;
            };
            let session = stream.get_ref().1;
            if !http {
                let name = session.server_name().map(str::to_owned);
                raw::carry(worker, client, stream, name).await;
            } else if session.alpn_protocol() == Some(b"h2") {
                http_2(worker, client, stream).await;
            } else {
                http_1(worker, client, stream).await;
            }
        }
    }
}

async fn http_1<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(worker: &Rc<Worker>, client: Client, stream: S) {
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

async fn http_2<S: AsyncRead + AsyncWrite + Unpin + 'static>(worker: &Rc<Worker>, client: Client, stream: S) {
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
