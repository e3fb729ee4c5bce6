//! The receiving end's connections: every worker thread accepts on the mesh address. A peer shows a certificate of the
//! cluster's authority and is a member in the view, at the handshake and as long as it stays.

use std::cell::Cell;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use h2::server;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{
    CONNECTION_WINDOW, FRAME_BYTES_MAX, HEAD_BYTES_MAX, Mesh, STREAM_WINDOW, STREAMS_MAX, is_member, serve, tls,
};
use crate::accept;
use crate::handover::sockets::{Key, Kind, Sockets};
use crate::http::closing;
use crate::http2::alive::lost;
use crate::http2::stream;
use crate::log;
use crate::service::Worker;
use crate::shared::Life;
use crate::watched::Watched;

const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How soon a connection ends whose node was removed from the cluster.
const MEMBER_LOOK: Duration = Duration::from_secs(1);
/// Above what a peer opens on one connection: a stream that it gave up may still be on its way out here.
const STREAMS_TAKEN_MAX: u32 = STREAMS_MAX * 2;

const RESETS_MAX: usize = 10_000;

/// A host that says nothing for the first is asked for a sign, which the second is waited for.
const ALIVE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(10));

pub fn bind(address: SocketAddr, workers: usize, sockets: &mut Sockets) -> std::io::Result<Vec<Vec<StdListener>>> {
    let listen = |shared_port| accept::listen(address, shared_port, false).map_err(|e| accept::named(e, address));
    let kind = Kind::Mesh;
    // The probe is without SO_REUSEPORT, which would share the port with a stranger of the same user.
    sockets.of_workers(Key { kind, address }, workers, || listen(false), || listen(true))
}

pub async fn accept(worker: Rc<Worker>, mesh: Arc<Mesh>, listener: TcpListener) {
    let mut life = worker.shared.life.subscribe();
    loop {
        let accepted = tokio::select! {
            _ = life.wait_for(|life| *life > Life::Serving) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, from)) => drop(spawn_local(connection(worker.clone(), mesh.clone(), stream, from))),
            Err(error) => {
                log::warning("accept failed", &[("address", &mesh.listen), ("reason", &error)]);
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(worker: Rc<Worker>, mesh: Arc<Mesh>, stream: TcpStream, from: SocketAddr) {
    let open = &worker.shared.metrics.connections_open;
    open.fetch_add(1, Relaxed);
    match handshake(&worker, &mesh, stream).await {
        Ok((node, stream)) => {
            mesh.metrics.handshakes.fetch_add(1, Relaxed);
            converse(&worker, &mesh, node, stream).await;
        }
        Err(why) => {
            mesh.metrics.handshakes_refused.fetch_add(1, Relaxed);
            log::warning("mesh connection refused", &[("from", &from), ("reason", &why)]);
        }
    }
    open.fetch_sub(1, Relaxed);
}

async fn handshake(
    worker: &Worker,
    mesh: &Mesh,
    stream: TcpStream,
) -> Result<(Arc<str>, TlsStream<TcpStream>), String> {
    let credentials = mesh.files.current().ok_or("this host has no certificate yet")?;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let accepting = TlsAcceptor::from(credentials.server.clone()).accept(stream);
    let accepted = timeout(HANDSHAKE_MAX, accepting).await;
    let stream = accepted
        .map_err(|_| "no handshake in time")?
        .map_err(|e| e.to_string())?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let node = tls::node_of(chain).ok_or("its certificate names no node")?;
    if !is_member(&worker.shared.view().snapshot, &node) {
        return Err(format!("{node} is no member of the cluster"));
    }
    Ok((node.into(), stream))
}

async fn converse(worker: &Rc<Worker>, mesh: &Arc<Mesh>, node: Arc<str>, stream: TlsStream<TcpStream>) {
    let heard = Cell::new(false);
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS_TAKEN_MAX)
        .max_header_list_size(HEAD_BYTES_MAX)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_send_buffer_size(STREAM_WINDOW as usize)
        // Clients that leave by the dozen are no attack by the host that they came through.
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(Some(RESETS_MAX));
    let greeting = builder.handshake(Watched::new(stream, |_: &[u8]| heard.set(true)));
    let Ok(Ok(mut connection)) = timeout(HANDSHAKE_MAX, greeting).await else {
        return;
    };
    let mut lost = std::pin::pin!(lost(connection.ping_pong(), &heard, ALIVE, || true));
    let mut closing = std::pin::pin!(closing(&worker.shared));
    let mut removed = std::pin::pin!(removed(worker, &node));
    let mut leaving = false;
    loop {
        tokio::select! {
            biased;
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let (worker, mesh, node) = (worker.clone(), mesh.clone(), node.clone());
                    let serve = |request, upgrade| serve::serve(worker, mesh, node, request, upgrade);
                    spawn_local(stream::carry(request, respond, None, serve));
                }
                Some(Err(_)) | None => return,
            },
            () = closing.as_mut(), if !leaving => {
                connection.graceful_shutdown();
                leaving = true;
            }
            () = lost.as_mut() => return,
            () = removed.as_mut() => {
                log::warning("mesh connection cut", &[("node", &node), ("reason", &"no member of the cluster any more")]);
                return;
            }
        }
    }
}

async fn removed(worker: &Worker, node: &str) {
    while is_member(&worker.shared.view().snapshot, node) {
        sleep(MEMBER_LOOK).await;
    }
}
