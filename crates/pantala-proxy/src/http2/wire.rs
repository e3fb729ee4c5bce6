//! The client's end of a connection of HTTP/2, which outlives the [`h2`] connection that uses it: what is read and written is
//! read along by [`Past`], and can be told to the next one.

use std::cell::{RefCell, RefMut};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::past::{Past, Told};
use crate::park::Park;

pub struct Wire<S>(Rc<RefCell<Line<S>>>);

struct Line<S> {
    stream: S,
    past: Past,
    /// what a new connection is told of the past, and its answers go nowhere
    told: Option<Bytes>,
    heard: bool,
    /// not all that was written is on its way
    unflushed: bool,
}

impl<S> Clone for Wire<S> {
    fn clone(&self) -> Wire<S> {
        Wire(self.0.clone())
    }
}

impl<S: Park> Wire<S> {
    pub fn new(stream: S) -> Wire<S> {
        Wire(Rc::new(RefCell::new(Line {
            stream,
            past: Past::new(),
            told: None,
            heard: false,
            unflushed: false,
        })))
    }

    fn line(&self) -> RefMut<'_, Line<S>> {
        self.0.borrow_mut()
    }

    /// Whether anything came since this was last asked.
    pub fn heard(&self) -> bool {
        std::mem::take(&mut self.line().heard)
    }

    /// The connection that uses this can be given up: another one may take its place.
    pub fn rests(&self) -> bool {
        let line = self.0.borrow();
        !line.unflushed && line.past.rests()
    }

    /// Before it is given up: the client may send as much as to a connection that is new.
    pub async fn settle(&self, window: u32) -> io::Result<()> {
        let Some(dues) = self.line().past.dues(window) else {
            return Ok(());
        };
        self.clone().write_all(&dues).await?;
        self.clone().flush().await
    }

    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.borrow().stream.poll_readable(cx)
    }

    /// From now on what is told is read, and nothing written. None: it cannot be told.
    pub fn recall(&self) -> Option<Told> {
        let mut line = self.line();
        let told = line.past.tell()?;
        line.told = Some(told.first.clone());
        Some(told)
    }

    /// None: what was told before was not read to its end.
    pub fn tell(&self, more: Bytes) -> Option<()> {
        let before = self.line().told.replace(more)?;
        before.is_empty().then_some(())
    }

    /// The past is over. None: it was not read to its end.
    pub fn resume(&self) -> Option<()> {
        self.line().told.take()?.is_empty().then_some(())
    }
}

impl<S: Park> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let line = &mut *self.line();
        if let Some(told) = &mut line.told {
            if told.is_empty() {
                return Poll::Pending; // whoever recalls goes on
            }
            let taken = told.len().min(buf.remaining());
            buf.put_slice(&told[..taken]);
            told.advance(taken);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut line.stream).poll_read(cx, buf));
        line.heard = true;
        line.past.came(&buf.filled()[before..]);
        Poll::Ready(read)
    }
}

impl<S: Park> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let line = &mut *self.line();
        if line.told.is_some() {
            return Poll::Ready(Ok(buf.len()));
        }
        line.unflushed = true;
        let written = ready!(Pin::new(&mut line.stream).poll_write(cx, buf))?;
        line.past.went(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let line = &mut *self.line();
        if line.told.is_some() {
            return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
        }
        line.unflushed = true;
        let written = ready!(Pin::new(&mut line.stream).poll_write_vectored(cx, bufs))?;
        let mut left = written;
        for buf in bufs {
            let taken = left.min(buf.len());
            line.past.went(&buf[..taken]);
            left -= taken;
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.borrow().stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let line = &mut *self.line();
        if line.told.is_none() {
            ready!(Pin::new(&mut line.stream).poll_flush(cx))?;
            line.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.line().stream).poll_shutdown(cx)
    }
}
