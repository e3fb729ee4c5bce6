//! Ports that carry no HTTP: bytes pass both ways, each direction until its own end. A connection counts as one request until
//! it ends. A machine of another host is reached through that host's proxy.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use pantala_route::announce::header;
use pantala_route::entry::Way;
use pantala_wire::feed::ProxyLog;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use crate::accept::KEEPALIVE;
use crate::headers::Client;
use crate::http2::tunnel::Tunnel;
use crate::ids::RequestId;
use crate::mesh::edge;
use crate::pool::ConnectError;
use crate::respond::Refusal;
use crate::select::Selection;
use crate::service::Worker;
use crate::shared::Shared;
use crate::slot::Slot;
use crate::timing;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ATTEMPTS_MAX: u32 = pantala_route::retry::ATTEMPTS_MAX;

pub async fn carry<S: AsyncRead + AsyncWrite + Unpin>(worker: &Rc<Worker>, client: Client, way: &Way, mut stream: S) {
    let shared = &worker.shared;
    let id = RequestId::new(&shared.settings.wire.region).text();
    let mut selection = Selection::new(shared, &way.app.name, way.port, Instant::now());
    let refusal = match connect(worker, &mut selection, &client).await {
        Ok((slot, mut upstream)) => {
            timing::connected(shared, &selection.waited, &slot.target.machine, &id);
            match announce(&client, way, &mut upstream).await {
                Ok(()) => return couple(shared, &slot, &mut stream, &mut upstream).await,
                Err(error) => refused(&slot, &ConnectError::Socket(error)),
            }
        }
        Err(refusal) => refusal,
    };
    shared.metrics.failed.fetch_add(1, Relaxed);
    shared.tell_agent(ProxyLog {
        app: way.app.name.to_string(),
        code: refusal.code.to_owned(),
        message: refusal.line("connection"),
        machine: refusal.machine,
        request_id: id,
    });
}

/// Who calls, before the client's first byte. Through a tunnel it is this edge that says it, because the machine's host sees
/// only this edge.
async fn announce(client: &Client, way: &Way, upstream: &mut Wire) -> std::io::Result<()> {
    match way.announce {
        None => Ok(()),
        Some(how) => upstream.write_all(&header(how, client.peer, client.local)).await,
    }
}

/// Until one side ends, or until a drain or the end of this process.
pub async fn couple<A, B>(shared: &Shared, slot: &Slot, client: &mut A, upstream: &mut B)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut ends = shared.tunnels.join(&slot.target.machine.id);
    tokio::select! {
        // How it ended is the business of both ends.
        _ = copy_bidirectional(client, upstream) => {}
        _ = ends.wait_for(Option::is_some) => {}
    }
}

async fn connect(worker: &Rc<Worker>, selection: &mut Selection, client: &Client) -> Result<(Slot, Wire), Refusal> {
    for _ in 0..ATTEMPTS_MAX {
        let slot = selection.slot().await?;
        let machine = slot.target.machine.clone();
        if machine.local {
            match connect_here(&slot).await {
                Ok(stream) => return Ok((slot, Wire::Here(stream))),
                Err(refusal) => selection.failed(&machine.id, refusal),
            }
            continue;
        }
        let (attempt, call) = (slot.attempt, selection.call(&slot, Some(client.peer)));
        let pool = worker.mesh.as_ref().ok_or_else(|| selection.unmeshed())?;
        match edge::tunnel(pool, &worker.shared, slot, &call).await {
            Ok((slot, wire, waited)) => {
                selection.waited.merge(&waited);
                return Ok((slot, wire));
            }
            // The connection carries nothing yet, so another machine may take it whatever happened.
            Err(failed) => {
                let waited = failed.refusal.waited.as_deref();
                waited.iter().for_each(|there| selection.waited.merge(there));
                let turned = selection.turned(&machine, attempt, failed.reason, failed.refusal);
                turned.map_err(|why| why.after(selection.waited))?;
            }
        }
    }
    Err(Refusal::new(
        hyper::StatusCode::BAD_GATEWAY,
        "PR03",
        "No machine took the connection.",
        "",
    ))
}

pub async fn connect_here(slot: &Slot) -> Result<TcpStream, Refusal> {
    let Some(socket) = slot.target.socket() else {
        let happened = "The machine has no address yet.";
        let refusal = Refusal::new(hyper::StatusCode::BAD_GATEWAY, "PC02", happened, "");
        return Err(refusal.of_machine(&slot.target.machine.id));
    };
    let connected = match timeout(CONNECT_TIMEOUT, TcpStream::connect(socket)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(refused(slot, &ConnectError::Socket(error))),
        Err(_) => return Err(refused(slot, &ConnectError::Timeout)),
    };
    let unset = |code, error: std::io::Error| {
        let happened = format!("The options of a connection to the app could not be set: {error}.");
        let refusal = Refusal::new(hyper::StatusCode::BAD_GATEWAY, code, happened, "");
        refusal.of_machine(&slot.target.machine.id)
    };
    connected.set_nodelay(true).map_err(|error| unset("PP01", error))?;
    let kept = SockRef::from(&connected).set_tcp_keepalive(&KEEPALIVE);
    kept.map_err(|error| unset("PC08", error))?;
    Ok(connected)
}

fn refused(slot: &Slot, error: &ConnectError) -> Refusal {
    let port = slot.target.service.internal_port;
    let code = error.code();
    let happened = format!("The app did not take the connection on port {port}: {error}.");
    let refusal = Refusal::new(hyper::StatusCode::BAD_GATEWAY, code, happened, "");
    refusal.of_machine(&slot.target.machine.id)
}

/// A connection to a machine.
pub enum Wire {
    Here(TcpStream),
    There(Tunnel),
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Wire::Here(stream) => Pin::new(stream).poll_read(cx, buf),
            Wire::There(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Wire::Here(stream) => Pin::new(stream).poll_write(cx, buf),
            Wire::There(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Wire::Here(stream) => Pin::new(stream).poll_flush(cx),
            Wire::There(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Wire::Here(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::There(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
