//! Phase 2: what a connection speaks. TLS is ended, the protocol chosen, and the rest left to [`crate::http`] or [`crate::raw`].

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::accept::Tls;
use crate::headers::Client;
use crate::http::{http_1, http_2};
use crate::raw;
use crate::service::Worker;
use crate::settings::ListenAddress;

const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

pub async fn serve(worker: Rc<Worker>, address: ListenAddress, stream: TcpStream, peer: SocketAddr, tls: Tls) {
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
