//! Phase 1: connections are accepted by one thread per core, each with its own listening sockets, connections to machines
//! and runtime, and handed to [`crate::connection`].

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::TcpListener;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{interval, sleep};

use crate::handover::sockets::{Key, Kind, Sockets};
use crate::mesh::listen;
use crate::mesh::pool::MeshPool;
use crate::objects;
use crate::pool::Pool;
use crate::service::Worker;
use crate::settings::{Expects, ListenAddress};
use crate::shared::{Life, Shared};
use crate::{connection, log};

/// Connections may be silent for ever; ends that are no longer there are found within two minutes.
pub const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(60))
    .with_interval(Duration::from_secs(15))
    .with_retries(4);
const BACKLOG: i32 = 4096;
const CONNECTIONS_MAX: u64 = 100_000;
/// Accepting fails when descriptors run out; connections that end give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Listening sockets of one worker, bound but not yet served.
pub type Bound = Vec<(ListenAddress, std::net::TcpListener)>;

/// Binds everything for all workers, so that a taken port is known before the first request is answered.
pub fn bind(listeners: &[ListenAddress], workers: usize, sockets: &mut Sockets) -> std::io::Result<Vec<Bound>> {
    let mut bound: Vec<Bound> = (0..workers).map(|_| Bound::new()).collect();
    for listener in listeners {
        let kind = match listener.expects {
            Expects::Anything => Kind::Entry,
            _ => Kind::Public,
        };
        let address = listener.socket;
        let listen = |shared_port| listen_as(listener, shared_port).map_err(|e| named(e, address));
        // The probe is without SO_REUSEPORT, which would share the port with a stranger of the same user.
        let all = sockets.of_workers(Key { kind, address }, workers, || listen(false), || listen(true))?;
        for (bound, mine) in bound.iter_mut().zip(all) {
            bound.extend(mine.into_iter().map(|socket| (*listener, socket)));
        }
    }
    Ok(bound)
}

pub fn named(error: std::io::Error, socket: SocketAddr) -> std::io::Error {
    std::io::Error::new(error.kind(), format!("cannot listen on {socket}: {error}"))
}

fn listen_as(address: &ListenAddress, shared_port: bool) -> std::io::Result<std::net::TcpListener> {
    let socket = unbound(address.socket, shared_port)?;
    if address.expects == Expects::Anything {
        // The option is one and the same for both families.
        socket.set_ip_transparent_v4(true)?;
    }
    bound(socket, address.socket)
}

/// `early`: the address may be added to an interface a moment later.
pub fn listen(address: SocketAddr, shared_port: bool, early: bool) -> std::io::Result<std::net::TcpListener> {
    let socket = unbound(address, shared_port)?;
    match (early, address.is_ipv6()) {
        (true, true) => socket.set_freebind_v6(true)?,
        (true, false) => socket.set_freebind_v4(true)?,
        (false, _) => {}
    }
    bound(socket, address)
}

/// Accepted connections inherit what is set here, so that none pays for it.
fn unbound(address: SocketAddr, shared_port: bool) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared_port)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn bound(socket: Socket, address: SocketAddr) -> std::io::Result<std::net::TcpListener> {
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// The whole life of one worker thread.
pub fn work(
    shared: Arc<Shared>,
    index: usize,
    bound: Bound,
    mesh_bound: Vec<std::net::TcpListener>,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = LocalSet::new();
    local.block_on(&runtime, async {
        let worker = Rc::new(Worker {
            shared: shared.clone(),
            pool: Rc::new(Pool::default()),
            mesh: shared.mesh.clone().map(|mesh| Rc::new(MeshPool::new(mesh))),
            recorder: shared.traces.recorder(index),
            objects: objects::Pool::default(),
        });
        spawn_local(sweep(worker.clone()));
        shared.serving().await;
        if let Some(mesh) = &shared.mesh {
            for socket in mesh_bound {
                let listener = TcpListener::from_std(socket)?;
                spawn_local(listen::accept(worker.clone(), mesh.clone(), listener));
            }
        }
        for (address, socket) in bound {
            let listener = TcpListener::from_std(socket)?;
            spawn_local(accept(worker.clone(), address, listener));
        }
        let mut life = shared.life.subscribe();
        // The sender is in shared, so this ends only with the life of the process.
        let _ = life.wait_for(|life| *life == Life::Ending).await;
        Ok(())
    })
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

async fn accept(worker: Rc<Worker>, address: ListenAddress, listener: TcpListener) {
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
                spawn_local(connection::serve(worker.clone(), address.expects, stream, peer));
            }
            Ok(_) => {} // over the bound: closed at once
            Err(error) => {
                log::warning("accept failed", &[("address", &address.socket), ("reason", &error)]);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
