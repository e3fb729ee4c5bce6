//! Ports that carry no HTTP: the app is found by address or SNI, and bytes pass both ways. A connection counts as one
//! request until it ends. A machine of another host is reached through that host's proxy.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use pantala_route::matching::Matched;
use pantala_wire::feed::ProxyLog;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::headers::Client;
use crate::mesh::edge;
use crate::mesh::pool::Stream;
use crate::respond::Refusal;
use crate::select::Selection;
use crate::service::Worker;
use crate::shared::Shared;
use crate::slot::Slot;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ATTEMPTS_MAX: u32 = pantala_route::retry::ATTEMPTS_MAX;

pub async fn carry<S: AsyncRead + AsyncWrite + Unpin>(
    worker: &Rc<Worker>,
    client: Client,
    mut stream: S,
    name: Option<String>,
) {
    let shared = &worker.shared;
    let name = name.as_deref().and_then(pantala_route::names::normalise);
    // A port that no app offers is closed after the accept.
    let Matched::App(app) = shared.view().snapshot.find(client.local.ip(), name.as_deref()) else {
        return;
    };
    let port = client.local.port();
    if app.offer(port).is_none() {
        return;
    }
    let mut selection = Selection::new(shared, &app.name, port);
    match connect(worker, &mut selection, &client).await {
        Ok((slot, mut upstream)) => couple(shared, &slot, &mut stream, &mut upstream).await,
        Err(refusal) => {
            shared.metrics.failed.fetch_add(1, Relaxed);
            shared.tell_agent(ProxyLog {
                app: app.name.to_string(),
                code: refusal.code.to_owned(),
                message: refusal.happened,
                machine: refusal.machine,
                request_id: String::new(),
            });
        }
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
        let (attempt, call) = (slot.attempt, selection.call(&slot, client.peer));
        let pool = worker.mesh.as_ref().ok_or_else(|| selection.unmeshed())?;
        match edge::tunnel(pool, &worker.shared, slot, &call).await {
            Ok(coupled) => return Ok(coupled),
            // The connection carries nothing yet, so another machine may take it whatever happened.
            Err(failed) => selection.turned(&machine, attempt, failed.reason, failed.refusal)?,
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
    let why = match slot.target.socket() {
        None => "the machine has no address".to_owned(),
        Some(socket) => match timeout(CONNECT_TIMEOUT, TcpStream::connect(socket)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer in time".to_owned(),
        },
    };
    let happened = format!("The app did not take the connection: {why}.");
    let refusal = Refusal::new(hyper::StatusCode::BAD_GATEWAY, "PC01", happened, "");
    Err(refusal.of_machine(&slot.target.machine.id))
}

/// A connection to a machine.
pub enum Wire {
    Here(TcpStream),
    /// with its share of the connection to the other host, open as long as it lives
    There(
        TokioIo<Upgraded>,
        #[expect(dead_code, reason = "its end is what counts")] Stream,
    ),
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Wire::Here(stream) => Pin::new(stream).poll_read(cx, buf),
            Wire::There(stream, _) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Wire::Here(stream) => Pin::new(stream).poll_write(cx, buf),
            Wire::There(stream, _) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Wire::Here(stream) => Pin::new(stream).poll_flush(cx),
            Wire::There(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Wire::Here(stream) => Pin::new(stream).poll_shutdown(cx),
            Wire::There(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
