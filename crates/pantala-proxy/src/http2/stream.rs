//! One stream: its request goes to [`crate::service`], or of another host to [`crate::mesh::serve`]; early hints and the answer come
//! back. A sender that resets it has nothing more done for it: whatever is under way for the request is dropped at once.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use hyper::body::{Body, Frame};
use hyper::header::{CONTENT_LENGTH, DATE, Entry, HeaderValue};
use hyper::{Method, Request, Response};
use tokio::sync::oneshot;

use super::received::Received;
use super::tunnel::Tunnel;
use crate::body::{BodyError, Coming, OutBody};
use crate::conversation::{Conversation, Limits, Reading};
use crate::headers::Client;
use crate::hints::{self, Early, Hints};
use crate::service::{self, Worker};
use crate::upgrade::Upgrade;
use crate::{dates, expect};

/// Of a client's connection.
pub async fn serve(
    worker: Rc<Worker>,
    client: Client,
    conversation: Arc<Conversation>,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    let _busy = conversation.request();
    let by_host = client.by_host.then(|| conversation.clone());
    let of = conversation.clone();
    let served = |request, upgrade| async move {
        let mut response = service::serve(worker, client, by_host, request, upgrade).await;
        if let Some(limits) = response.extensions_mut().remove::<Limits>() {
            conversation.limit(limits);
        }
        if let Entry::Vacant(date) = response.headers_mut().entry(DATE) {
            date.insert(dates::now());
        }
        response
    };
    carry(request, respond, Some(&of), served).await;
}

/// `serve` makes the answer, of which nothing is about connections. `conversation`: the client's, where it is one.
pub async fn carry<F: Future<Output = Response<OutBody>>>(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    conversation: Option<&Arc<Conversation>>,
    serve: impl FnOnce(Request<Coming>, Option<Upgrade>) -> F,
) {
    let of_head = request.method() == Method::HEAD;
    let hinted = hints::wanted(&request);
    let waits = !request.body().is_end_stream() && expect::wanted(request.headers());
    let early = (hinted || waits).then(Early::new);
    let (mut request, opening) = opened(request, early.as_ref().filter(|_| waits), conversation);
    if let Some(early) = early.as_ref().filter(|_| hinted) {
        request.extensions_mut().insert(Hints::OnStream(early.clone()));
    }
    let (upgrade, opening) = opening.unzip();
    // Boxed: its room is given back before the body, which may take its time.
    let served = Box::pin(serve(request, upgrade));
    let Some(response) = answer(served, early.as_deref(), &mut respond).await else {
        return;
    };
    let (parts, body) = response.into_parts();
    let mut head = Response::from_parts(parts, ());
    if let Some(opening) = opening
        && head.status().is_success()
    {
        head.headers_mut().remove(CONTENT_LENGTH); // a tunnel has none
        if let Some(send) = send(&mut respond, head, false) {
            opening.open(send);
        }
        return;
    }
    let bodiless = body.is_end_stream();
    if let (false, Some(length)) = (bodiless, body.size_hint().exact()) {
        let headers = head.headers_mut();
        headers
            .entry(CONTENT_LENGTH)
            .or_insert_with(|| HeaderValue::from(length));
    }
    let whole = bodiless || of_head;
    if let (Some(to), false) = (send(&mut respond, head, whole), whole) {
        drop(respond);
        pass(body, to).await;
    }
}

/// The other half of a CONNECT: what becomes a tunnel once it is answered.
struct Opening {
    receive: RecvStream,
    reading: Option<Reading>,
    promise: oneshot::Sender<Tunnel>,
}

impl Opening {
    fn open(self, send: SendStream<Bytes>) {
        // Whoever waited may have given up; the stream ends then.
        let _ = self.promise.send(Tunnel::new(send, self.receive, self.reading));
    }
}

/// `waits`: the client sends its body once it is told to.
fn opened(
    request: Request<RecvStream>,
    waits: Option<&Arc<Early>>,
    conversation: Option<&Arc<Conversation>>,
) -> (Request<Coming>, Option<(Upgrade, Opening)>) {
    let (parts, receive) = request.into_parts();
    if parts.method == Method::CONNECT {
        let (promise, promised) = oneshot::channel();
        let opening = Opening {
            receive,
            reading: conversation.map(Conversation::body),
            promise,
        };
        return (
            Request::from_parts(parts, Coming::Nothing),
            Some((Upgrade::OfStream(promised), opening)),
        );
    }
    let body = match receive.is_end_stream() {
        true => Coming::Nothing,
        false => Coming::OnStream(Received::new(
            receive,
            &parts.headers,
            waits.cloned(),
            conversation.map(Conversation::body),
        )),
    };
    (Request::from_parts(parts, body), None)
}

/// None: the sender gave the request up.
async fn answer<F: Future<Output = Response<OutBody>>>(
    mut served: Pin<Box<F>>,
    early: Option<&Early>,
    respond: &mut SendResponse<Bytes>,
) -> Option<Response<OutBody>> {
    poll_fn(|cx| {
        let answered = served.as_mut().poll(cx).map(Some);
        if answered.is_ready() && early.is_none() {
            return answered;
        }
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(None);
        }
        for head in early.into_iter().flat_map(|early| early.take(cx)) {
            let _ = respond.send_informational(head); // a hint more or less
        }
        answered
    })
    .await
}

fn send(respond: &mut SendResponse<Bytes>, head: Response<()>, whole: bool) -> Option<SendStream<Bytes>> {
    let sent = respond.send_response(head, whole);
    sent.inspect_err(|_| respond.send_reset(Reason::INTERNAL_ERROR)).ok()
}

/// A body, as fast as the other end takes it. Nothing is reserved for data that has not come yet: it would be missing to others.
pub async fn pass<B: Body<Data = Bytes, Error = BodyError> + Unpin>(mut body: B, mut to: SendStream<Bytes>) {
    while let Some(frame) = poll_fn(|cx| next(&mut body, &mut to, cx)).await {
        let passed = match frame {
            Ok(frame) => match frame.into_data() {
                Ok(data) => {
                    let last = body.is_end_stream();
                    if !data.is_empty() {
                        to.reserve_capacity(1); // h2 asks for the rest once it has the data
                        if poll_fn(|cx| room(&mut to, cx)).await.is_none() {
                            return;
                        }
                    }
                    to.send_data(data, last).map(|()| last)
                }
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => to.send_trailers(trailers).map(|()| true),
                    Err(_) => Ok(false),
                },
            },
            Err(error) => return to.send_reset(super::reason(&*error)),
        };
        match passed {
            Ok(false) => {}
            Ok(true) | Err(_) => return,
        }
    }
}

/// None: the stream is over.
fn next<B: Body<Data = Bytes, Error = BodyError> + Unpin>(
    body: &mut B,
    to: &mut SendStream<Bytes>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
    if to.poll_reset(cx).is_ready() {
        return Poll::Ready(None);
    }
    let frame = ready!(Pin::new(body).poll_frame(cx));
    if frame.is_none() {
        let _ = to.send_data(Bytes::new(), true); // refused where it is over anyway
    }
    Poll::Ready(frame)
}

/// Returns once some of the other end's window is ours. None: the stream is over.
pub fn room(to: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<Option<usize>> {
    loop {
        match to.capacity() {
            0 => match ready!(to.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(None),
            },
            free => return Poll::Ready(Some(free)),
        }
    }
}
