//! A quiet HTTP/1 connection, between two calls of [`crate::http`]: hyper's part of it is gone, and with it most of its weight.
//! What is left waits for the client's next bytes, which nobody has read yet, or for the end.

use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use crate::conversation::Conversation;
use crate::http::{GOODBYE_MAX, closing, silent};
use crate::shared::{Metrics, Shared};

/// A client's connection that shows whether there is something to read, without reading it.
pub trait Park: AsyncRead + AsyncWrite + Unpin + Send + 'static {
    /// Whoever asks has read all that was there before.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()>;
}

impl Park for TcpStream {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_read_ready(cx).map(|_| ()) // an error is found by whoever reads
    }
}

/// Boxed: it moves between hyper and here.
impl Park for Box<TlsStream<TcpStream>> {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.get_ref().0.poll_readable(cx)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// there is something to read
    Woken,
    /// idle for too long, or this process ends: it was closed
    Over,
}

/// The time-outs of an idle connection go on.
pub async fn park<S: Park>(shared: &Shared, conversation: &Conversation, stream: &mut S) -> Parked {
    let _counted = Counted::new(&shared.metrics);
    tokio::select! {
        biased; // what came before the end is answered
        () = std::future::poll_fn(|cx| stream.poll_readable(cx)) => return Parked::Woken,
        () = closing(shared) => {}
        _ = silent(conversation, false) => {}
    }
    let _ = timeout(GOODBYE_MAX, stream.shutdown()).await; // as hyper ends an idle connection
    Parked::Over
}

pub struct Counted<'a>(&'a Metrics);

impl Counted<'_> {
    pub fn new(metrics: &Metrics) -> Counted<'_> {
        metrics.connections_parked.fetch_add(1, Relaxed);
        Counted(metrics)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.connections_parked.fetch_sub(1, Relaxed);
    }
}
