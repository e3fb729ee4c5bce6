//! What an app says ahead of its answer: early hints (103) on their way to its client, and a 100 that asks for the body; to clients of
//! HTTP/2, and to other hosts, a 100 of ours goes the same way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use hyper::header::{ACCEPT, CONTENT_LENGTH};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Version};

use crate::body::AttemptBody;
use crate::conversation::Conversation;
use crate::expect::{Asked, Gate};
use crate::headers::remove_hop_by_hop;

/// Of one connection of HTTP/1 that wait to be written, or of one request of HTTP/2; more are left out.
pub const HINTS_BYTES_MAX: usize = 16 * 1024;
/// What one weighs beside its fields.
const HINT_BYTES: usize = 32;

/// Early hints are for pages; requests of other kinds need not pay for listening.
pub fn wanted<B>(request: &Request<B>) -> bool {
    let accepts = || request.headers().get(ACCEPT).map_or(&b""[..], |value| value.as_bytes());
    request.version() >= Version::HTTP_11
        && request.method() == Method::GET
        && accepts().windows(9).any(|part| part == b"text/html")
}

/// Of a request whose client may be given early hints.
#[derive(Clone)]
pub enum Hints {
    /// by HTTP/1
    OnConnection(Arc<Conversation>),
    /// by HTTP/2
    OnStream(Arc<Early>),
}

impl Hints {
    fn pass_on(&self, headers: &HeaderMap) {
        match self {
            Hints::OnConnection(conversation) => conversation.hint(headers),
            Hints::OnStream(early) => early.hint(headers),
        }
    }
}

/// Who hears what comes ahead of one attempt's answer.
#[derive(Default)]
pub struct Ears {
    pub hints: Option<Hints>,
    pub asked: Option<Asked>,
}

impl Ears {
    pub fn deaf(&self) -> bool {
        self.hints.is_none() && self.asked.is_none()
    }

    pub fn hear(&self, status: StatusCode, headers: &HeaderMap) {
        hear(
            self.hints.as_ref(),
            self.asked.as_ref().map(Asked::gate),
            status,
            headers,
        );
    }

    /// Of an attempt by HTTP/1.
    pub fn listen(&self, request: &mut Request<AttemptBody>) {
        if self.deaf() {
            return;
        }
        let (hints, gate) = (self.hints.clone(), self.asked.as_ref().map(Asked::gate).cloned());
        hyper::ext::on_informational(request, move |informational| {
            hear(
                hints.as_ref(),
                gate.as_ref(),
                informational.status(),
                informational.headers(),
            );
        });
    }
}

fn hear(hints: Option<&Hints>, gate: Option<&Arc<Gate>>, status: StatusCode, headers: &HeaderMap) {
    match (status, hints, gate) {
        (StatusCode::EARLY_HINTS, Some(hints), _) => hints.pass_on(headers),
        (StatusCode::CONTINUE, _, Some(gate)) => gate.open(),
        _ => {}
    }
}

/// What of an app's 103 is for its client.
pub fn for_client(headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    remove_hop_by_hop(&mut headers);
    headers.remove(CONTENT_LENGTH);
    headers
}

/// What comes before the answer on one stream of HTTP/2.
#[derive(Default)]
pub struct Early(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    heads: Vec<Response<()>>,
    /// of all that this request had
    bytes: usize,
    /// of the stream
    waker: Option<Waker>,
}

impl Early {
    pub fn new() -> Arc<Early> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hint(&self, headers: &HeaderMap) {
        let headers = for_client(headers);
        let bytes = headers.iter().map(|(name, value)| name.as_str().len() + value.len());
        self.push(StatusCode::EARLY_HINTS, HINT_BYTES + bytes.sum::<usize>(), headers);
    }

    /// The client is to send its body.
    pub fn go_on(&self) {
        self.push(StatusCode::CONTINUE, 0, HeaderMap::new());
    }

    fn push(&self, status: StatusCode, bytes: usize, headers: HeaderMap) {
        let mut waiting = self.lock();
        if bytes > 0 && waiting.bytes >= HINTS_BYTES_MAX {
            return;
        }
        waiting.bytes += bytes;
        let mut head = Response::new(());
        (*head.status_mut(), *head.headers_mut()) = (status, headers);
        waiting.heads.push(head);
        let waker = waiting.waker.take();
        drop(waiting);
        waker.into_iter().for_each(Waker::wake);
    }

    /// What came since; whoever asks is woken for the next.
    pub fn take(&self, cx: &Context<'_>) -> Vec<Response<()>> {
        let mut waiting = self.lock();
        if !waiting.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            waiting.waker = Some(cx.waker().clone());
        }
        std::mem::take(&mut waiting.heads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderName;

    fn linked(link: &str) -> HeaderMap {
        let fields = [("link", link), ("content-length", "7"), ("connection", "x")];
        let parsed = fields.map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        parsed.into_iter().collect()
    }

    #[test]
    fn hints_come_in_order_without_framing_and_within_a_bound() {
        let early = Early::new();
        let taken = || early.take(&Context::from_waker(Waker::noop()));
        (0..2).for_each(|n| early.hint(&linked(&format!("<{n}>"))));
        let heads: Vec<HeaderMap> = taken().into_iter().map(|head| head.into_parts().0.headers).collect();
        assert_eq!(heads.iter().map(HeaderMap::len).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(
            (&heads[0]["link"], &heads[1]["link"]),
            (&"<0>".parse().unwrap(), &"<1>".parse().unwrap())
        );
        assert!(taken().is_empty());
        early.hint(&linked(&"a".repeat(HINTS_BYTES_MAX)));
        assert_eq!(taken().len(), 1);
        early.hint(&linked("<2>"));
        assert!(taken().is_empty());
        early.go_on();
        assert_eq!(taken()[0].status(), StatusCode::CONTINUE);
    }

    #[test]
    fn pages_alone_are_hinted() {
        let asks = |method, version, accept: &str| {
            let request = Request::builder()
                .method(method)
                .version(version)
                .header(ACCEPT, accept);
            wanted(&request.body(()).unwrap())
        };
        let html = "text/html,*/*";
        assert!(asks(Method::GET, Version::HTTP_11, html) && asks(Method::GET, Version::HTTP_2, html));
        assert!(!asks(Method::GET, Version::HTTP_10, html) && !asks(Method::POST, Version::HTTP_2, html));
        assert!(!asks(Method::GET, Version::HTTP_2, "*/*"));
    }
}
