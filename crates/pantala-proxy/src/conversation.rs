//! What one client's connection is doing, beside what hyper knows: whether it is idle or slow with a head and for how long
//! that may go on, whether it is quiet enough to be parked, and early hints on their way to it. [`crate::http`] looks here when
//! its timer fires, so that a request costs two clock readings and no timer.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use hyper::HeaderMap;
use pantala_wire::feed::HTTPOptions;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use crate::gather;
use crate::hints::{HINTS_BYTES_MAX, for_client};
use crate::limits::Place;

/// Fly Proxy's documented keep-alive, and its time for the head of a request.
pub const IDLE_MAX: Duration = Duration::from_secs(60);
pub const HEAD_MAX: Duration = Duration::from_secs(60);
/// An HTTP/1 connection that was idle for so long is parked (`crate::park`); until then it is looked at as often.
pub const QUIET_AFTER: Duration = Duration::from_secs(2);

/// `idle_timeout` and `headers_read_timeout` of a port, where it has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    idle: Option<Duration>,
    head: Option<Duration>,
}

impl Limits {
    pub fn of(options: &HTTPOptions) -> Option<Limits> {
        let seconds = |s: Option<i64>| s.filter(|s| *s > 0).map(|s| Duration::from_secs(s.unsigned_abs()));
        let limits = Limits {
            idle: seconds(options.idle_timeout),
            head: seconds(options.headers_read_timeout),
        };
        (limits.idle.is_some() || limits.head.is_some()).then_some(limits)
    }
}

/// When to look at a connection again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    In(Duration),
    /// idle for [`QUIET_AFTER`] with nothing left to do: hyper's part of the connection may go
    Quiet,
    /// nothing is under way and nothing came for too long
    Idle,
    /// the head of a request began and does not end
    Slow,
}

pub struct Conversation {
    began: Instant,
    /// requests whose answer is not over
    busy: AtomicU32,
    /// bodies of requests that may not be over, though their answer is
    reading: AtomicU32,
    /// of the silence or of the head, in ms after `began`
    since_ms: AtomicU64,
    /// bytes came since the last answer
    head: AtomicBool,
    idle_ms: AtomicU64,
    head_ms: AtomicU64,
    pub limited: Notify,
    hints: Mutex<Vec<u8>>,
    hinted: AtomicBool,
    hints_came: Notify,
    /// bytes of an answer are on their way, so that nothing may come between
    unflushed: AtomicBool,
    /// where only `Host` says whose connection this is: among those of the app that its latest request was for
    place: Mutex<Option<Place>>,
    /// nothing more is to be written
    shut: AtomicBool,
}

impl Conversation {
    pub fn new() -> Arc<Conversation> {
        Arc::new(Conversation {
            began: Instant::now(),
            busy: AtomicU32::new(0),
            reading: AtomicU32::new(0),
            since_ms: AtomicU64::new(0),
            head: AtomicBool::new(false),
            idle_ms: AtomicU64::new(IDLE_MAX.as_millis() as u64),
            head_ms: AtomicU64::new(HEAD_MAX.as_millis() as u64),
            limited: Notify::new(),
            hints: Mutex::default(),
            hinted: AtomicBool::new(false),
            hints_came: Notify::new(),
            unflushed: AtomicBool::new(false),
            place: Mutex::default(),
            shut: AtomicBool::new(false),
        })
    }

    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// A request is under way until the answer is dropped.
    pub fn request(self: &Arc<Conversation>) -> Busy {
        self.busy.fetch_add(1, Relaxed);
        self.head.store(false, Relaxed);
        Busy(self.clone())
    }

    /// From now on it counts as a connection of that app, unless `enter` finds no place there.
    pub fn belong(&self, app: &str, enter: impl FnOnce() -> Option<Place>) -> bool {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if place.as_ref().is_some_and(|place| place.app() == app) {
            return true;
        }
        let entered = enter();
        let belongs = entered.is_some();
        *place = entered;
        belongs
    }

    /// The body of a request may come until this is dropped.
    pub fn body(self: &Arc<Conversation>) -> Reading {
        self.reading.fetch_add(1, Relaxed);
        Reading(self.clone())
    }

    pub fn limit(&self, limits: Limits) {
        let set = |cell: &AtomicU64, limit: Option<Duration>| {
            let limit = limit.map(|limit| limit.as_millis() as u64);
            limit.is_some_and(|ms| cell.swap(ms, Relaxed) != ms)
        };
        let changed = [set(&self.idle_ms, limits.idle), set(&self.head_ms, limits.head)];
        if changed.contains(&true) {
            self.limited.notify_one();
        }
    }

    /// `parks`: it is to be told when the connection is quiet.
    pub fn look(&self, parks: bool) -> Look {
        self.look_at(self.now_ms(), parks)
    }

    fn look_at(&self, now: u64, parks: bool) -> Look {
        let (idle, head) = (self.idle_ms.load(Relaxed), self.head_ms.load(Relaxed));
        let quiet = if parks {
            QUIET_AFTER.as_millis() as u64
        } else {
            u64::MAX
        };
        // An idle connection may begin a head at any time, whose own limit must not be overslept.
        let within = |ms: u64| Look::In(Duration::from_millis(ms.min(head).min(quiet).max(1)));
        if self.busy.load(Relaxed) > 0 {
            return within(idle);
        }
        let passed = now.saturating_sub(self.since_ms.load(Relaxed));
        match self.head.load(Relaxed) {
            true if passed >= head => Look::Slow,
            true => within(head - passed),
            false if passed >= idle => Look::Idle,
            false if passed >= quiet && self.rests() => Look::Quiet,
            false if passed >= quiet => within(idle - passed),
            false => within((idle - passed).min(quiet - passed)),
        }
    }

    /// hyper holds nothing of the conversation but what it may have read ahead.
    fn rests(&self) -> bool {
        let under_way = [&self.unflushed, &self.hinted, &self.shut];
        self.reading.load(Relaxed) == 0 && under_way.into_iter().all(|flag| !flag.load(Relaxed))
    }

    /// Bytes came from the client.
    fn heard(&self) {
        if self.busy.load(Relaxed) == 0 && !self.head.swap(true, Relaxed) {
            self.since_ms.store(self.now_ms(), Relaxed);
        }
    }

    // -- early hints ------------------------------------------------------------------------------------------------

    fn hints(&self) -> MutexGuard<'_, Vec<u8>> {
        self.hints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A 103 of the app goes to the client before its answer. While an older answer is still being written it is left out:
    /// hints are worth nothing late.
    pub fn hint(&self, headers: &HeaderMap) {
        let mut hints = self.hints();
        if self.unflushed.load(Relaxed) || hints.len() >= HINTS_BYTES_MAX {
            return;
        }
        hints.extend_from_slice(b"HTTP/1.1 103 Early Hints\r\n");
        for (name, value) in &for_client(headers) {
            hints.extend_from_slice(name.as_str().as_bytes());
            hints.extend_from_slice(b": ");
            hints.extend_from_slice(value.as_bytes());
            hints.extend_from_slice(b"\r\n");
        }
        hints.extend_from_slice(b"\r\n");
        self.hinted.store(true, Relaxed);
        drop(hints);
        self.hints_came.notify_one();
    }

    /// Never ends: each hint wakes the connection that polls this, and with it the writing below.
    pub async fn hand_on_hints(&self) -> std::convert::Infallible {
        loop {
            self.hints_came.notified().await;
        }
    }

    fn write_hints<S: AsyncWrite + Unpin>(&self, stream: &mut S, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut hints = self.hints();
        while !hints.is_empty() {
            let n = ready!(Pin::new(&mut *stream).poll_write(cx, &hints))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            hints.drain(..n);
        }
        self.hinted.store(false, Relaxed);
        Poll::Ready(Ok(()))
    }
}

pub struct Busy(Arc<Conversation>);

impl Drop for Busy {
    fn drop(&mut self) {
        let conversation = &self.0;
        if conversation.busy.fetch_sub(1, Relaxed) == 1 {
            conversation.head.store(false, Relaxed);
            conversation.since_ms.store(conversation.now_ms(), Relaxed);
        }
    }
}

/// hyper waits for more of a body until whoever reads it lets go.
pub struct Reading(Arc<Conversation>);

impl Clone for Reading {
    fn clone(&self) -> Reading {
        self.0.body()
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let conversation = &self.0;
        if conversation.reading.fetch_sub(1, Relaxed) == 1 && conversation.busy.load(Relaxed) == 0 {
            conversation.since_ms.store(conversation.now_ms(), Relaxed); // what hyper does about it takes its turn
        }
    }
}

// -- the stream -----------------------------------------------------------------------------------------------------

/// A client's HTTP/1 connection: what is read is noted, hints are written between two answers.
pub struct Noted<S> {
    stream: S,
    /// read earlier
    before: Bytes,
    conversation: Arc<Conversation>,
}

impl<S> Noted<S> {
    pub fn new(stream: S, before: Bytes, conversation: Arc<Conversation>) -> Noted<S> {
        Noted {
            stream,
            before,
            conversation,
        }
    }

    pub fn into_stream(self) -> S {
        self.stream
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Noted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.before.is_empty() {
            let taken = self.before.len().min(buf.remaining());
            buf.put_slice(&self.before[..taken]);
            self.before.advance(taken);
            self.conversation.heard();
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if buf.filled().len() > before {
            self.conversation.heard();
        }
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin> Noted<S> {
    fn before_writing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.conversation.hinted.load(Relaxed) {
            ready!(self.conversation.write_hints(&mut self.stream, cx))?;
        }
        self.conversation.unflushed.store(true, Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.before_writing(cx))?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.before_writing(cx))?;
        gather::poll_write(&mut self.stream, cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes once all that it has is written.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.conversation.hinted.load(Relaxed) {
            ready!(this.conversation.write_hints(&mut this.stream, cx))?;
        }
        ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
        this.conversation.unflushed.store(false, Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.conversation.shut.store(true, Relaxed);
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_ms(ms: u64) -> Look {
        Look::In(Duration::from_millis(ms))
    }

    #[test]
    fn idle_and_slow_are_told_apart() {
        let conversation = Conversation::new();
        conversation.limit(Limits {
            idle: Some(Duration::from_secs(20)),
            head: Some(Duration::from_secs(5)),
        });
        assert_eq!(conversation.look_at(1_000, false), in_ms(5_000));
        assert_eq!(conversation.look_at(19_500, false), in_ms(500));
        assert_eq!(conversation.look_at(20_000, false), Look::Idle);
        conversation.heard();
        assert_eq!(conversation.look_at(4_000, false), in_ms(1_000));
        assert_eq!(conversation.look_at(5_001, false), Look::Slow);
        let request = conversation.request();
        assert_eq!(conversation.look_at(90_000, false), in_ms(5_000));
        conversation.heard(); // of a body
        drop(request);
        assert_eq!(conversation.look_at(5_500, false), in_ms(5_000));
        assert_eq!(conversation.look_at(20_500, false), Look::Idle);
    }

    #[test]
    fn quiet_is_idle_with_nothing_left_to_do() {
        let conversation = Conversation::new();
        let look = |at| conversation.look_at(at, true);
        assert_eq!(look(500), in_ms(1_500));
        assert_eq!(look(2_000), Look::Quiet);
        assert_eq!(conversation.look_at(2_000, false), in_ms(58_000));
        for flag in [&conversation.unflushed, &conversation.hinted, &conversation.shut] {
            flag.store(true, Relaxed);
            assert_eq!(look(2_000), in_ms(2_000));
            flag.store(false, Relaxed);
        }
        let body = conversation.body();
        assert_eq!(look(2_000), in_ms(2_000));
        drop(body);
        assert_eq!(look(2_000 + conversation.since_ms.load(Relaxed)), Look::Quiet);
        let request = conversation.request();
        assert_eq!(look(50_000), in_ms(2_000));
        drop(request);
        conversation.heard();
        assert_eq!(look(4_000), in_ms(2_000));
        assert_eq!(look(61_000), Look::Slow);
    }

    #[test]
    fn a_limit_below_the_quiet_time_holds() {
        let conversation = Conversation::new();
        conversation.limit(Limits {
            idle: Some(Duration::from_secs(1)),
            head: None,
        });
        assert_eq!(conversation.look_at(1_000, true), Look::Idle);
        assert_eq!(conversation.look_at(400, true), in_ms(600));
    }

    #[test]
    fn a_port_without_limits_keeps_ours() {
        let options = |idle_timeout| HTTPOptions {
            idle_timeout,
            ..HTTPOptions::default()
        };
        assert_eq!(Limits::of(&options(None)), None);
        assert_eq!(Limits::of(&options(Some(0))), None);
        assert_eq!(
            Limits::of(&options(Some(9))).unwrap().idle,
            Some(Duration::from_secs(9))
        );
    }
}
