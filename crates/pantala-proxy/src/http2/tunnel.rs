//! A stream that became a tunnel (RFC 8441): bytes both ways, each as fast as the other end takes them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::client::Share;
use super::stream::room;
use crate::conversation::Reading;

pub struct Tunnel {
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// came and was not read yet
    ahead: Bytes,
    shut: bool,
    /// of a connection to another host; its end is what counts
    _share: Option<Share>,
    /// the client's connection is not parked until this is gone
    _reading: Option<Reading>,
}

impl Tunnel {
    pub fn new(send: SendStream<Bytes>, receive: RecvStream, reading: Option<Reading>) -> Tunnel {
        Tunnel {
            send,
            receive,
            ahead: Bytes::new(),
            shut: false,
            _share: None,
            _reading: reading,
        }
    }

    pub fn on(self, share: Share) -> Tunnel {
        Tunnel {
            _share: Some(share),
            ..self
        }
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.ahead.is_empty() {
            match ready!(this.receive.poll_data(cx)) {
                Some(Ok(data)) => this.ahead = data,
                // Many clients leave by a reset.
                Some(Err(error)) if matches!(error.reason(), Some(Reason::NO_ERROR | Reason::CANCEL)) => break,
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
                None => break,
            }
        }
        let taken = this.ahead.len().min(buf.remaining());
        buf.put_slice(&this.ahead[..taken]);
        this.ahead.advance(taken);
        let _ = this.receive.flow_control().release_capacity(taken); // never more than came
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        this.send.reserve_capacity(buf.len());
        let Some(free) = ready!(room(&mut this.send, cx)) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let taken = &buf[..free.min(buf.len())];
        let sent = this.send.send_data(Bytes::copy_from_slice(taken), false);
        Poll::Ready(sent.map(|()| taken.len()).map_err(io::Error::other))
    }

    /// The connection writes what it has as soon as it can.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if std::mem::replace(&mut self.shut, true) {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(self.send.send_data(Bytes::new(), true).map_err(io::Error::other))
    }
}
