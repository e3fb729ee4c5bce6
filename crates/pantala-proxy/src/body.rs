//! Bodies on their way. What came from the client is kept up to a limit (1 MiB), so that an attempt which failed before an
//! answer can be followed by another, and a request be replayed; what comes from a machine holds its slot until the last byte.

use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body_util::Full;
use hyper::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use pantala_route::retry;

use crate::compress::Compressed;
use crate::conversation::{Busy, Reading};
use crate::expect::Held;
use crate::http2::received::Received;
use crate::objects::Streamed;
use crate::pool::Lease;
use crate::slot::Slot;
use crate::trace::Answering;

pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

// -- from the client ------------------------------------------------------------------------------------------------

/// As it comes on a connection: of a request, or of an answer.
pub enum Coming {
    Nothing,
    /// by HTTP/1
    OnConnection(Incoming),
    /// by HTTP/2
    OnStream(Received),
}

impl Body for Coming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Coming::Nothing => Poll::Ready(None),
            Coming::OnConnection(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            Coming::OnStream(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Coming::Nothing => true,
            Coming::OnConnection(body) => body.is_end_stream(),
            Coming::OnStream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Coming::Nothing => SizeHint::with_exact(0),
            Coming::OnConnection(body) => body.size_hint(),
            Coming::OnStream(body) => body.size_hint(),
        }
    }
}

/// The body of one request, over all its attempts.
pub struct ClientBody(Rc<RefCell<Source>>);

struct Source {
    incoming: Coming,
    /// that the client's connection waits for it; dropped after it
    _reading: Option<Reading>,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    /// documented contract: larger bodies are not sent twice
    kept_max: usize,
    trailers: Option<HeaderMap>,
    ended: bool,
    lost: bool,
    failed: Option<String>,
    /// an older attempt must not take what belongs to the present one
    attempt: u32,
    /// of the present attempt, while it waits for the client: the next one has it look, and end
    waiting: Option<Waker>,
}

impl ClientBody {
    pub fn none() -> ClientBody {
        ClientBody::new(Coming::Nothing, 0, None)
    }

    /// `reading`: of the connection that it comes on, if that may be parked.
    pub fn new(incoming: Coming, kept_max: usize, reading: Option<Reading>) -> ClientBody {
        let ended = incoming.is_end_stream();
        ClientBody(Rc::new(RefCell::new(Source {
            incoming,
            _reading: reading,
            kept: Vec::new(),
            kept_bytes: 0,
            kept_max,
            trailers: None,
            ended,
            lost: false,
            failed: None,
            attempt: 0,
            waiting: None,
        })))
    }

    pub fn attempt(&self) -> AttemptBody {
        let mut source = self.0.borrow_mut();
        source.attempt += 1;
        if let Some(waiting) = source.waiting.take() {
            waiting.wake();
        }
        let total = if source.kept.is_empty() && !source.ended {
            source.incoming.size_hint().exact()
        } else {
            None
        };
        let empty = source.ended && source.kept.is_empty() && source.trailers.is_none();
        AttemptBody {
            source: self.0.clone(),
            attempt: source.attempt,
            next: 0,
            trailers_sent: false,
            total,
            empty,
            sent: 0,
            held: None,
        }
    }

    pub fn state(&self) -> retry::Body {
        let source = self.0.borrow();
        match () {
            () if source.lost => retry::Body::Lost,
            () if source.kept.is_empty() => retry::Body::Unread,
            () => retry::Body::Kept,
        }
    }

    /// All of it has come.
    pub fn ended(&self) -> bool {
        self.0.borrow().ended
    }

    /// Why the client's side ended badly, if it did.
    pub fn failed(&self) -> Option<String> {
        self.0.borrow().failed.clone()
    }
}

/// What one attempt sends: first what is kept, then what comes.
pub struct AttemptBody {
    source: Rc<RefCell<Source>>,
    attempt: u32,
    next: usize,
    trailers_sent: bool,
    total: Option<u64>,
    empty: bool,
    sent: u64,
    /// until the app asks for it (`Expect: 100-continue`)
    held: Option<Held>,
}

impl AttemptBody {
    pub fn hold(&mut self, held: Held) {
        self.held = Some(held);
    }
}

impl Body for AttemptBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(held) = &mut this.held {
            if let Err(unwanted) = std::task::ready!(held.poll_open(cx)) {
                return Poll::Ready(Some(Err(unwanted.into())));
            }
            this.held = None;
        }
        // Whoever could make another attempt holds the other end.
        let alone = Rc::strong_count(&this.source) == 1;
        let mut source = this.source.borrow_mut();
        if source.attempt != this.attempt {
            return Poll::Ready(Some(Err("this attempt was given up".into())));
        }
        if let Some(kept) = source.kept.get(this.next) {
            this.next += 1;
            this.sent += kept.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(kept.clone()))));
        }
        if source.ended {
            let trailers = if this.trailers_sent {
                None
            } else {
                source.trailers.clone()
            };
            this.trailers_sent = true;
            return Poll::Ready(trailers.map(|t| Ok(Frame::trailers(t))));
        }
        let Poll::Ready(frame) = Pin::new(&mut source.incoming).poll_frame(cx) else {
            source.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        };
        match frame {
            None => {
                source.ended = true;
                Poll::Ready(None)
            }
            Some(Err(error)) => {
                source.failed = Some(error.to_string());
                source.ended = true;
                source.lost = true;
                Poll::Ready(Some(Err(error)))
            }
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    if !alone {
                        source.keep(&data);
                    }
                    this.next = source.kept.len();
                    this.sent += data.len() as u64;
                    Poll::Ready(Some(Ok(Frame::data(data))))
                }
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        source.trailers = Some(trailers.clone());
                        this.trailers_sent = true;
                        return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                    }
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.empty
    }

    fn size_hint(&self) -> SizeHint {
        match self.total {
            _ if self.empty => SizeHint::with_exact(0),
            Some(total) => SizeHint::with_exact(total.saturating_sub(self.sent)),
            None => SizeHint::default(),
        }
    }
}

impl Source {
    fn keep(&mut self, data: &Bytes) {
        if self.lost {
            return;
        }
        self.kept_bytes += data.len();
        if self.kept_bytes > self.kept_max {
            self.lost = true;
            self.kept = Vec::new();
        } else {
            self.kept.push(data.clone());
        }
    }
}

// -- to the client --------------------------------------------------------------------------------------------------

pub enum OutBody {
    Full(Full<Bytes>),
    /// Streamed from upstream. At its end the connection is kept for the next request; dropped before, it is closed.
    Upstream(Box<Upstream>),
    Compressed(Box<Compressed>),
    /// read from a bucket
    Object(Box<Streamed>),
}

/// An answer on a client's connection, which counts as busy until this is dropped.
pub struct Tracked {
    body: OutBody,
    _busy: Busy,
}

impl Tracked {
    pub fn new(body: OutBody, busy: Busy) -> Tracked {
        Tracked { body, _busy: busy }
    }
}

impl Body for Tracked {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

pub struct Upstream {
    pub incoming: Coming,
    pub lease: Option<Lease>,
    pub slot: Option<Slot>,
    pub answering: Answering,
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let whole = self.incoming.is_end_stream();
        let now = self.answering.over(whole);
        if let (Some(lease), true) = (self.lease.take(), whole) {
            lease.give_back(now);
        }
    }
}

impl Body for OutBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            OutBody::Full(full) => Pin::new(full).poll_frame(cx).map_err(|never| match never {}),
            OutBody::Compressed(compressed) => compressed.poll(cx),
            OutBody::Object(object) => object.poll(cx),
            OutBody::Upstream(upstream) => {
                let frame = std::task::ready!(Pin::new(&mut upstream.incoming).poll_frame(cx));
                if let (Some(Err(_)), Some(slot)) = (&frame, &upstream.slot) {
                    slot.broke_off(upstream.answering.id);
                }
                if frame.is_none() {
                    let now = upstream.answering.over(true);
                    if let Some(lease) = upstream.lease.take() {
                        lease.give_back(now);
                    }
                    upstream.slot = None;
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            OutBody::Full(full) => full.is_end_stream(),
            OutBody::Compressed(compressed) => compressed.is_end_stream(),
            OutBody::Object(object) => object.is_end_stream(),
            OutBody::Upstream(upstream) => upstream.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            OutBody::Full(full) => full.size_hint(),
            OutBody::Compressed(_) => SizeHint::default(),
            OutBody::Object(object) => object.size_hint(),
            OutBody::Upstream(upstream) => upstream.incoming.size_hint(),
        }
    }
}
