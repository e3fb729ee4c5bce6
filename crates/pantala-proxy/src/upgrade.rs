//! Phase 7 for connections that become something else (WebSocket): bytes both ways until one side ends, or until a drain or
//! the end of this process closes them.

use std::sync::Arc;

use http_body_util::Full;
use hyper::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, UPGRADE};
use hyper::upgrade::OnUpgrade;
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::sync::{oneshot, watch};

use crate::body::{Coming, OutBody};
use crate::http2::tunnel::Tunnel;
use crate::shared::Shared;
use crate::slot::Slot;
use crate::trace::Answering;
use crate::tunnels::Open;
use crate::websocket::{Frames, close_frame};

const BUFFER: usize = 16 * 1024;

/// Platform services have no machine; their tunnels end with the process.
const NO_MACHINE: &str = "";

/// One side of what may become a tunnel once it is answered.
pub enum Upgrade {
    /// of HTTP/1
    OfConnection(OnUpgrade),
    /// of HTTP/2
    OfStream(oneshot::Receiver<Tunnel>),
    /// of another host that has answered
    Made(Tunnel),
}

/// Bytes both ways.
pub trait TwoWay: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> TwoWay for T {}

impl Upgrade {
    /// None: it never came to it.
    pub async fn made(self) -> Option<Box<dyn TwoWay>> {
        match self {
            Upgrade::OfConnection(connection) => Some(Box::new(TokioIo::new(connection.await.ok()?))),
            Upgrade::OfStream(stream) => Some(Box::new(stream.await.ok()?)),
            Upgrade::Made(tunnel) => Some(Box::new(tunnel)),
        }
    }
}

/// What a tunnel keeps until it ends.
pub struct Held {
    pub slot: Option<Slot>,
    pub answering: Answering,
}

/// Answers 101 and couples both sides once hyper has let go of them.
pub fn switch(
    shared: &Arc<Shared>,
    response: Response<Coming>,
    client: Upgrade,
    upstream: Upgrade,
    held: Held,
) -> Response<OutBody> {
    let token = response
        .headers()
        .get(UPGRADE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let websocket = token.eq_ignore_ascii_case("websocket");
    let machine: Arc<str> = held
        .slot
        .as_ref()
        .map_or(NO_MACHINE.into(), |slot| slot.target.machine.id.clone());
    let ends = shared.tunnels.join(&machine);
    let open = Open::new(shared);
    let mut held = held;
    tokio::task::spawn_local(async move {
        if couple(client, upstream, ends, websocket).await.is_some() {
            held.answering.over(true); // a tunnel has no other end than this
        }
        drop((held, open));
    });
    let (parts, _) = response.into_parts();
    Response::from_parts(parts, OutBody::Full(Full::default()))
}

/// To a client of HTTP/2 the same is a 200, without what is about one connection (RFC 8441).
pub fn as_extended_connect(response: &mut Response<OutBody>) {
    *response.status_mut() = StatusCode::OK;
    for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_ACCEPT] {
        response.headers_mut().remove(name);
    }
}

/// None: one of them never came to it.
async fn couple(client: Upgrade, upstream: Upgrade, ends: watch::Receiver<Option<u16>>, websocket: bool) -> Option<()> {
    let (client_read, client_write) = split(client.made().await?);
    let (upstream_read, upstream_write) = split(upstream.made().await?);
    let frames = websocket.then(Frames::default);
    let mut down = std::pin::pin!(downstream(upstream_read, client_write, ends.clone(), frames));
    let mut up = std::pin::pin!(upstream_copy(client_read, upstream_write, ends));
    // When the app's side ends there is nobody left to talk to; when the client's ends the app may still say something.
    tokio::select! {
        () = &mut down => {}
        () = &mut up => down.await,
    }
    Some(())
}

async fn upstream_copy<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    mut from: R,
    mut to: W,
    ends: watch::Receiver<Option<u16>>,
) {
    let mut buffer = vec![0; BUFFER];
    loop {
        tokio::select! {
            _ = ended(ends.clone()) => return,
            read = from.read(&mut buffer) => match read {
                Ok(n) if n > 0 => if to.write_all(&buffer[..n]).await.is_err() { return },
                _ => break,
            }
        }
    }
    // The other side sees the end; whether it could be told makes no difference here.
    let _ = to.shutdown().await;
}

async fn downstream<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    mut from: R,
    mut to: W,
    ends: watch::Receiver<Option<u16>>,
    mut frames: Option<Frames>,
) {
    let mut buffer = vec![0; BUFFER];
    let mut ending = None;
    loop {
        // A close frame fits only between two others.
        if let (Some(code), true) = (ending, frames.as_ref().is_none_or(Frames::between)) {
            if frames.is_some() && to.write_all(&close_frame(code)).await.is_err() {
                return;
            }
            break;
        }
        tokio::select! {
            code = ended(ends.clone()), if ending.is_none() => ending = Some(code),
            read = from.read(&mut buffer) => match read {
                Ok(n) if n > 0 => {
                    let boundary = frames.as_mut().map_or(n, |frames| frames.see(&buffer[..n]));
                    let n = if ending.is_some() && boundary > 0 { boundary } else { n };
                    if to.write_all(&buffer[..n]).await.is_err() { return }
                    if ending.is_some() && boundary > 0
                        && let Some(frames) = &mut frames { frames.reset(); }
                }
                _ => break,
            }
        }
    }
    let _ = to.shutdown().await;
}

async fn ended(mut ends: watch::Receiver<Option<u16>>) -> u16 {
    match ends.wait_for(Option::is_some).await.map(|code| *code) {
        Ok(Some(code)) => code,
        // The registry dropped its end after sending; without a code nothing was asked.
        _ => std::future::pending().await,
    }
}
