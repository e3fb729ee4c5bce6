//! The asking end of HTTP/2: connections to other hosts' proxies ([`crate::mesh::pool`]) and to apps ([`crate::h2c`]). A request
//! is carried by the task of whoever asks; its body has one of its own only if the answer overtakes it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use hyper::body::Body;
use hyper::header::{CONTENT_LENGTH, HeaderValue};
use hyper::{Method, Request, Response};
use pantala_route::retry::Fault;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::Instant;

use super::alive::lost;
use super::received::Received;
use super::stream::pass;
use super::tunnel::Tunnel;
use crate::body::{AttemptBody, Coming};
use crate::expect::Asked;
use crate::hints::Ears;
use crate::watched::Watched;

/// What distinguishes connections to apps and to hosts.
pub struct Manner {
    /// of what one stream may hold unread, and all of a connection
    pub window: u32,
    pub connection_window: u32,
    pub head_bytes_max: u32,
    /// of what comes
    pub frame_bytes_max: u32,
    /// beyond it another connection is opened; the other end may allow fewer
    pub streams_max: u32,
    /// a connection with open streams that is silent for so long is asked for a sign, and how long that is waited for
    pub alive: (Duration, Duration),
}

pub struct Connection {
    sender: RefCell<SendRequest<Bytes>>,
    state: Rc<State>,
    streams_max: u32,
    used: Cell<Instant>,
}

#[derive(Default)]
struct State {
    streams: Cell<u32>,
    heard: Cell<bool>,
    over: Cell<bool>,
}

/// `cut` ends the connection, whatever it carries.
pub async fn open<S>(
    stream: S,
    manner: &Manner,
    cut: impl Future<Output = ()> + 'static,
) -> Result<Rc<Connection>, h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let state = Rc::new(State::default());
    let listening = state.clone();
    let stream = Watched::new(stream, move |_: &[u8]| listening.heard.set(true));
    let mut builder = Builder::new();
    builder
        .initial_window_size(manner.window)
        .initial_connection_window_size(manner.connection_window)
        .initial_max_send_streams(manner.streams_max as usize)
        .max_header_list_size(manner.head_bytes_max)
        .max_frame_size(manner.frame_bytes_max)
        .max_send_buffer_size(manner.window as usize)
        .enable_push(false);
    let (sender, mut connection) = builder.handshake(stream).await?;
    let (pings, alive, carried) = (connection.ping_pong(), manner.alive, state.clone());
    // Its errors reach the streams that it carries.
    let mut carrying = spawn_local(async move { drop(connection.await) });
    // Beside it, so that what passes need not look at the clock.
    spawn_local(async move {
        tokio::select! {
            _ = &mut carrying => {}
            () = lost(pings, &carried.heard, alive, || carried.streams.get() > 0) => carrying.abort(),
            () = cut => carrying.abort(),
        }
        carried.over.set(true);
    });
    Ok(Rc::new(Connection {
        sender: RefCell::new(sender),
        state,
        streams_max: manner.streams_max,
        used: Cell::new(Instant::now()),
    }))
}

impl Connection {
    /// It ended, or the other end said goodbye.
    pub fn is_closed(&self) -> bool {
        let mut sender = self.sender.borrow_mut();
        match sender.poll_ready(&mut Context::from_waker(Waker::noop())) {
            _ if self.state.over.get() => true,
            Poll::Ready(Ok(())) => false,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => {
                // A handle waits for the stream that it asked for above what the other end allows, a new one does not.
                let another = sender.clone();
                *sender = another;
                false
            }
        }
    }

    pub fn has_room(&self) -> bool {
        let allowed = self.sender.borrow().current_max_send_streams();
        (self.streams() as usize) < allowed.min(self.streams_max as usize)
    }

    pub fn streams(&self) -> u32 {
        self.state.streams.get()
    }

    /// Since the last of its streams ended.
    pub fn idle(&self) -> Duration {
        match self.streams() {
            0 => self.used.get().elapsed(),
            _ => Duration::ZERO,
        }
    }
}

/// One request's share of a connection; counts as open until dropped.
pub struct Share(Rc<Connection>);

impl Share {
    pub fn new(connection: &Rc<Connection>) -> Share {
        let streams = &connection.state.streams;
        streams.set(streams.get() + 1);
        Share(connection.clone())
    }

    fn begin(&self, head: Request<()>, whole: bool) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        if self.0.is_closed() {
            return Err(Reason::NO_ERROR.into());
        }
        self.0.sender.borrow_mut().send_request(head, whole)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let streams = &self.0.state.streams;
        streams.set(streams.get() - 1);
        self.0.used.set(Instant::now());
    }
}

// -- one request ------------------------------------------------------------------------------------------------------

/// What came back of a request. The share of the connection is in the body, or in the tunnel that a CONNECT became.
pub struct Answer {
    pub response: Response<Coming>,
    pub tunnel: Option<Tunnel>,
}

/// A request that had no answer.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Unanswered {
    pub error: h2::Error,
    /// nothing of it left this process
    pub unsent: bool,
}

impl Unanswered {
    /// `REFUSED_STREAM`, and a goodbye in good order, mean that the other end has not looked at the request.
    pub fn fault(&self) -> Fault {
        let error = &self.error;
        match error.reason() {
            _ if self.unsent => Fault::NotSent,
            Some(Reason::REFUSED_STREAM) => Fault::NotSent,
            Some(Reason::NO_ERROR) if error.is_go_away() && error.is_remote() => Fault::Stale,
            _ => Fault::Died,
        }
    }
}

/// Up to the head of the answer. Without a `body` it is a CONNECT.
pub async fn ask(
    share: Share,
    mut head: Request<()>,
    body: Option<AttemptBody>,
    ears: Ears,
) -> Result<Answer, Unanswered> {
    let connects = body.is_none();
    let body = body.filter(|body| !body.is_end_stream());
    announce(&mut head, body.as_ref());
    let begun = share.begin(head, body.is_none() && !connects);
    let (mut coming, send) = begun.map_err(|error| Unanswered { error, unsent: true })?;
    let (mut send, mut upload) = match body {
        Some(body) => (None, Some(Box::pin(pass(body, send)))),
        None => (Some(send).filter(|_| connects), None),
    };
    let answered = poll_fn(|cx| {
        if upload
            .as_mut()
            .is_some_and(|upload| upload.as_mut().poll(cx).is_ready())
        {
            upload = None;
        }
        hear(&mut coming, &ears, cx);
        Pin::new(&mut coming).poll(cx)
    });
    let answered = answered.await;
    let response = answered.map_err(|error| Unanswered { error, unsent: false })?;
    let (head, receive) = response.into_parts();
    if let Some(send) = send.take().filter(|_| head.status.is_success()) {
        let tunnel = Some(Tunnel::new(send, receive, None).on(share));
        let response = Response::from_parts(head, Coming::Nothing);
        return Ok(Answer { response, tunnel });
    }
    let rest = Rest {
        share: Some(share),
        upload: upload.map(alongside),
        _asked: ears.asked,
    };
    let body = Received::of_answer(receive, &head.headers, rest);
    Ok(Answer {
        response: Response::from_parts(head, Coming::OnStream(body)),
        tunnel: None,
    })
}

/// How long the body is, where that is known and means something.
fn announce(head: &mut Request<()>, body: Option<&AttemptBody>) {
    let length = match body {
        Some(body) => body.size_hint().exact(),
        None => [Method::POST, Method::PUT, Method::PATCH]
            .contains(head.method())
            .then_some(0),
    };
    if let Some(length) = length {
        let headers = head.headers_mut();
        headers
            .entry(CONTENT_LENGTH)
            .or_insert_with(|| HeaderValue::from(length));
    }
}

/// What the other end says ahead of its answer.
fn hear(coming: &mut ResponseFuture, ears: &Ears, cx: &mut Context<'_>) {
    if ears.deaf() {
        return;
    }
    while let Poll::Ready(Some(Ok(informational))) = coming.poll_informational(cx) {
        ears.hear(informational.status(), informational.headers());
    }
}

/// The answer overtook the body: it goes on beside, until it ends or whoever reads the answer lets go of it early.
fn alongside(upload: Pin<Box<impl Future<Output = ()> + 'static>>) -> oneshot::Sender<Share> {
    let (answered, over) = oneshot::channel();
    spawn_local(async move {
        let (mut upload, mut over) = (upload, over);
        tokio::select! {
            biased;
            () = upload.as_mut() => {}
            // Dropped with the rest of the stream it is a reset.
            share = &mut over => if let Ok(_share) = share { upload.await },
        }
    });
    answered
}

/// What a stream keeps while its answer comes.
pub struct Rest {
    share: Option<Share>,
    upload: Option<oneshot::Sender<Share>>,
    /// an app that never asked for the body is not sent it once it has answered
    _asked: Option<Asked>,
}

impl Rest {
    /// The answer is whole, its request may not be.
    pub fn over(mut self) {
        if let (Some(upload), Some(share)) = (self.upload.take(), self.share.take()) {
            drop(upload.send(share)); // unless it ended meanwhile
        }
    }
}
