//! Files of an app that are objects in a bucket (`statics` with `tigris_bucket`): read from the operator's store by the edge
//! itself, without a machine. Where there is no such object the app is asked; where the store fails, PR05.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LENGTH,
    CONTENT_RANGE, CONTENT_TYPE, ETAG, EXPIRES, HOST, HeaderName, HeaderValue, IF_MATCH, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, LAST_MODIFIED, RANGE, USER_AGENT,
};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use pantala_route::buckets::{self, Object};
use pantala_route::snapshot::App;
use pantala_wire::feed::{ProxyLog, Static};
use pantala_wire::media;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_rustls::rustls::pki_types::ServerName;
use url::{Position, Url};

use crate::body::{BodyError, OutBody};
use crate::respond::Refusal;
use crate::service::Worker;
use crate::shared::Shared;
use crate::store::Store;

const CODE: &str = "PR05";
/// Objects that one thread has under way.
const AT_ONCE_MAX: usize = 256;
const KEPT_FOR: Duration = Duration::from_secs(20);
/// Of a store's words about what went wrong.
const WORDS_BYTES_MAX: usize = 16 * 1024;
const ASKED: [HeaderName; 6] = [
    RANGE,
    IF_RANGE,
    IF_MATCH,
    IF_NONE_MATCH,
    IF_MODIFIED_SINCE,
    IF_UNMODIFIED_SINCE,
];
/// A store says much more of an object, and that is nobody's business.
const TOLD: [HeaderName; 11] = [
    ACCEPT_RANGES,
    CACHE_CONTROL,
    CONTENT_DISPOSITION,
    CONTENT_ENCODING,
    CONTENT_LANGUAGE,
    CONTENT_LENGTH,
    CONTENT_RANGE,
    CONTENT_TYPE,
    ETAG,
    EXPIRES,
    LAST_MODIFIED,
];

type Sender = SendRequest<Empty<Bytes>>;

/// Connections to the store of one thread. One that is still busy with an answer stands here too: hyper knows which are.
#[derive(Default)]
pub struct Pool {
    kept: RefCell<HashMap<String, Vec<(Sender, Instant)>>>,
    busy: Rc<Cell<usize>>,
}

/// What an object may be asked by: the request has no body and does not become another protocol.
fn wanted<'a>(statics: &'a [Static], parts: &Parts) -> impl Iterator<Item = Object<'a>> {
    let asked = [Method::GET, Method::HEAD].contains(&parts.method);
    let statics = if asked { statics } else { &[] };
    buckets::objects(statics, parts.uri.path())
}

/// The first of them that is there, or none.
pub async fn fetch_any(
    worker: &Worker,
    app: &App,
    statics: &[Static],
    parts: &Parts,
) -> Result<Option<Response<OutBody>>, Refusal> {
    for object in wanted(statics, parts) {
        if let Some(response) = fetch(worker, app, &object, parts).await? {
            return Ok(Some(response));
        }
    }
    Ok(None)
}

/// The object, or none if there is no such one.
async fn fetch(
    worker: &Worker,
    app: &App,
    object: &Object<'_>,
    parts: &Parts,
) -> Result<Option<Response<OutBody>>, Refusal> {
    let shared = &worker.shared;
    let failed = |why: String| failure(&app.name, object, &why);
    let Some(store) = &shared.settings.buckets else {
        return Err(failed(
            "this platform has no store (proxy.buckets of its settings)".to_owned(),
        ));
    };
    let Some(place) = Place::take(&worker.objects.busy) else {
        let refusal = failed(format!("{AT_ONCE_MAX} objects are under way at once"));
        let status = StatusCode::SERVICE_UNAVAILABLE;
        return Err(Refusal { status, ..refusal }.retry_after(1));
    };
    let url = store.url(object, app.org.as_deref(), &parts.method);
    let url = url.map_err(|why| failed(why.to_string()))?;
    let asking = ask(&worker.objects, store, &url, parts);
    let answer = match timeout(store.answer_timeout, asking).await {
        Err(_) => return Err(failed(format!("no answer in {:?}", store.answer_timeout))),
        Ok(answer) => answer.map_err(|why| failed(why.to_string()))?,
    };
    match answer.status() {
        StatusCode::OK | StatusCode::PARTIAL_CONTENT => {}
        StatusCode::NOT_MODIFIED | StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE => {
            return Ok(Some(bare(&answer, parts)));
        }
        StatusCode::FORBIDDEN => {
            // Who may not list a bucket is told this of objects that are not there, too.
            if let Some(count) = shared.limits.worth_telling(&app.name, CODE) {
                let why = "refused (403): it is not there, or not to be read by strangers. Store it, make it public, or \
                           have the operator open the bucket to the organisation (proxy.buckets.readers). The app was asked";
                tell(
                    shared,
                    &app.name,
                    &format!("{} ({count} like this.)", failed(why.to_owned()).happened),
                );
            }
            return Ok(None);
        }
        status => {
            let code = error_code(store, answer).await;
            return match (status, code.as_deref()) {
                (StatusCode::NOT_FOUND, Some("NoSuchBucket")) => Err(failed("there is no such bucket".to_owned())),
                (StatusCode::NOT_FOUND, _) => Ok(None),
                (_, code) => Err(failed(format!(
                    "the store answered {status} {}",
                    code.unwrap_or_default()
                ))),
            };
        }
    }
    let (head, incoming) = answer.into_parts();
    let mut response = Response::new(());
    *response.status_mut() = head.status;
    *response.headers_mut() = told(&head.headers);
    say_type(response.headers_mut(), &object.key);
    let body = Streamed {
        incoming,
        silent_at: Box::pin(sleep_until(Instant::now() + store.silence_timeout)),
        silence: store.silence_timeout,
        shared: shared.clone(),
        about: failed(String::new()),
        _place: place,
    };
    Ok(Some(response.map(|()| OutBody::Object(Box::new(body)))))
}

fn failure(app: &str, object: &Object, why: &str) -> Refusal {
    let happened = format!(
        "The file {} could not be read from the bucket {}: {why}.",
        object.key, object.bucket
    );
    Refusal::new(StatusCode::BAD_GATEWAY, CODE, happened, "").of_app(app)
}

fn tell(shared: &Shared, app: &str, message: &str) {
    shared.tell_agent(ProxyLog {
        app: app.to_owned(),
        code: CODE.to_owned(),
        message: message.to_owned(),
        machine: String::new(),
        request_id: String::new(),
    });
}

// -- asking -----------------------------------------------------------------------------------------------------------

#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("the store cannot be reached: {0}")]
    Socket(#[from] std::io::Error),
    #[error("TLS to the store failed: {0}")]
    Tls(String),
    #[error("the store does not speak HTTP as expected: {0}")]
    Http(#[from] hyper::Error),
    #[error("the name of the object cannot be asked for: {0}")]
    Request(#[from] hyper::http::Error),
}

async fn ask(pool: &Pool, store: &Store, url: &Url, parts: &Parts) -> Result<Response<Incoming>, AskError> {
    let place = url[Position::BeforeScheme..Position::AfterPort].to_owned();
    // A kept connection may end while it is taken; an object is asked for again at no risk.
    while let Some(mut sender) = pool.take(&place) {
        if let Ok(answer) = sender.send_request(request(url, parts)?).await {
            pool.keep(place, sender);
            return Ok(answer);
        }
    }
    let mut sender = connect(store, url).await?;
    let answer = sender.send_request(request(url, parts)?).await?;
    pool.keep(place, sender);
    Ok(answer)
}

async fn connect(store: &Store, url: &Url) -> Result<Sender, AskError> {
    let host = url.host_str().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((bare, url.port_or_known_default().unwrap_or(443))).await?;
    stream.set_nodelay(true)?;
    if url.scheme() == "http" {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::task::spawn_local(connection);
        return Ok(sender);
    }
    let name = ServerName::try_from(bare.to_owned()).map_err(|why| AskError::Tls(why.to_string()))?;
    let connector = store.tls().map_err(|why| AskError::Tls(why.to_string()))?;
    let stream = connector.connect(name, stream).await?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    Ok(sender)
}

fn request(url: &Url, parts: &Parts) -> Result<Request<Empty<Bytes>>, hyper::http::Error> {
    let mut request = Request::builder()
        .method(&parts.method)
        .uri(&url[Position::BeforePath..Position::AfterQuery])
        .header(HOST, &url[Position::BeforeHost..Position::AfterPort])
        .header(USER_AGENT, "pantala")
        .body(Empty::new())?;
    for name in ASKED {
        if let Some(value) = parts.headers.get(&name) {
            request.headers_mut().insert(name, strong(value));
        }
    }
    Ok(request)
}

/// What was compressed on the way out carries its tag as a weak one; stores compare the texts.
fn strong(value: &HeaderValue) -> HeaderValue {
    let bare = value.as_bytes().strip_prefix(b"W/");
    bare.and_then(|bare| HeaderValue::from_bytes(bare).ok())
        .unwrap_or_else(|| value.clone())
}

impl Pool {
    fn take(&self, place: &str) -> Option<Sender> {
        let mut all = self.kept.borrow_mut();
        let kept = all.get_mut(place)?;
        kept.retain(|(sender, since)| !sender.is_closed() && (!sender.is_ready() || since.elapsed() < KEPT_FOR));
        let ready = kept.iter().position(|(sender, _)| sender.is_ready())?;
        Some(kept.swap_remove(ready).0)
    }

    fn keep(&self, place: String, sender: Sender) {
        let mut all = self.kept.borrow_mut();
        all.retain(|_, kept| {
            kept.retain(|(sender, _)| !sender.is_closed());
            !kept.is_empty()
        });
        let kept = all.entry(place).or_default();
        if kept.len() < AT_ONCE_MAX {
            kept.push((sender, Instant::now()));
        }
    }
}

struct Place(Rc<Cell<usize>>);

impl Place {
    fn take(busy: &Rc<Cell<usize>>) -> Option<Place> {
        if busy.get() >= AT_ONCE_MAX {
            return None;
        }
        busy.set(busy.get() + 1);
        Some(Place(busy.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

// -- answering --------------------------------------------------------------------------------------------------------

fn told(headers: &hyper::HeaderMap) -> hyper::HeaderMap {
    let mut out = hyper::HeaderMap::new();
    for name in TOLD {
        if let Some(value) = headers.get(&name) {
            out.insert(name, value.clone());
        }
    }
    out
}

/// By its name, where whoever stored it said nothing.
fn say_type(headers: &mut hyper::HeaderMap, key: &str) {
    let known = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if known.is_none_or(|kind| media::UNKNOWN.contains(&kind)) {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media::content_type(key)));
    }
}

/// The head alone: what a store writes under it is not for browsers.
fn bare(answer: &Response<Incoming>, parts: &Parts) -> Response<OutBody> {
    let mut response = Response::new(OutBody::Full(Full::new(Bytes::new())));
    *response.status_mut() = answer.status();
    let mut headers = told(answer.headers());
    headers.remove(CONTENT_LENGTH);
    headers.remove(CONTENT_TYPE);
    // Not every store repeats the tag, which is then the one that was asked about.
    let asked = parts.headers.get(IF_NONE_MATCH).map(strong);
    if let Some(tag) = asked.filter(|tag| answer.status() == StatusCode::NOT_MODIFIED && one_tag(tag)) {
        headers.entry(ETAG).or_insert(tag);
    }
    *response.headers_mut() = headers;
    response
}

fn one_tag(value: &HeaderValue) -> bool {
    let inside = value
        .as_bytes()
        .strip_prefix(b"\"")
        .and_then(|rest| rest.strip_suffix(b"\""));
    inside.is_some_and(|inside| !inside.contains(&b'"'))
}

/// `NoSuchKey` of `<Error><Code>NoSuchKey</Code>…`; an answer to HEAD has no words.
async fn error_code(store: &Store, answer: Response<Incoming>) -> Option<String> {
    let words = Limited::new(answer.into_body(), WORDS_BYTES_MAX).collect();
    let words = timeout(store.answer_timeout, words).await.ok()?.ok()?.to_bytes();
    let text = String::from_utf8_lossy(&words);
    let code = text.split_once("<Code>")?.1.split_once("</Code>")?.0;
    let plain = code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric());
    plain.then(|| code.to_owned())
}

pub struct Streamed {
    incoming: Incoming,
    silent_at: Pin<Box<Sleep>>,
    silence: Duration,
    shared: Arc<Shared>,
    about: Refusal,
    _place: Place,
}

impl Streamed {
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let why = match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.silent_at.as_mut().reset(Instant::now() + self.silence);
                return Poll::Ready(Some(Ok(frame)));
            }
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Ready(Some(Err(error))) => format!("the store broke off: {error}"),
            Poll::Pending => {
                std::task::ready!(self.silent_at.as_mut().poll(cx));
                format!("the store was silent for {:?} in the middle of it", self.silence)
            }
        };
        tell(
            &self.shared,
            &self.about.app,
            &format!("{} {why}.", self.about.happened),
        );
        Poll::Ready(Some(Err(why.into())))
    }

    pub fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    pub fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
