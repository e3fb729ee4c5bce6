//! Phase 7b, its beginning: an answer that is an instruction to the proxy. It is read, and what is left of it dropped without
//! holding up the request.

use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::body::Body;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName};
use hyper::{Response, StatusCode};
use pantala_route::replay::header::{self, CacheHeaders};
use pantala_route::replay::{Invalid, Replay, json};
use tokio::time::timeout;

use crate::body::{OutBody, Upstream};

const REPLAY: HeaderName = HeaderName::from_static("fly-replay");
const CACHE: HeaderName = HeaderName::from_static("fly-replay-cache");
const CACHE_TTL: HeaderName = HeaderName::from_static("fly-replay-cache-ttl-secs");
const CACHE_BYPASS: HeaderName = HeaderName::from_static("fly-replay-cache-allow-bypass");

/// What is left of an answer that is not wanted is read so far and so long, to keep its connection.
const DRAINED_BYTES_MAX: usize = 64 * 1024;
const DRAINED_WITHIN: Duration = Duration::from_secs(1);
const INSTRUCTION_WITHIN: Duration = Duration::from_secs(5);

/// The answer is no answer but asks for a replay. For all others this is what replays cost.
pub fn wanted(response: &Response<OutBody>) -> bool {
    let headers = response.headers();
    (headers.contains_key(REPLAY) || is_json(headers)) && response.status() != StatusCode::SWITCHING_PROTOCOLS
}

fn is_json(headers: &HeaderMap) -> bool {
    let wanted = json::CONTENT_TYPE.as_bytes();
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.as_bytes().get(..wanted.len()));
    kind.is_some_and(|kind| kind.eq_ignore_ascii_case(wanted))
}

/// What the answer says; the rest of it is of no use.
pub async fn read(answer: Response<OutBody>, request_ended: bool) -> Result<Replay, Invalid> {
    let (parts, body) = answer.into_parts();
    if is_json(&parts.headers) {
        let limited = Limited::new(body, json::BYTES_MAX).collect();
        return match timeout(INSTRUCTION_WITHIN, limited).await {
            Ok(Ok(body)) => json::read(&body.to_bytes()),
            Ok(Err(error)) => Err(Invalid(format!("its JSON could not be read: {error}"))),
            Err(_) => Err(Invalid("its JSON did not come in time".to_owned())),
        };
    }
    discard(body, request_ended);
    let mut replays = parts.headers.get_all(REPLAY).iter();
    let (Some(replay), None) = (replays.next(), replays.next()) else {
        return Err(Invalid("the answer has more than one fly-replay".to_owned()));
    };
    let unreadable = |_| Invalid("fly-replay is not readable".to_owned());
    let text = std::str::from_utf8(replay.as_bytes()).map_err(unreadable)?;
    let one = |name: HeaderName| parts.headers.get(name).and_then(|value| value.to_str().ok());
    let cache = CacheHeaders {
        rule: one(CACHE),
        ttl: one(CACHE_TTL),
        allow_bypass: one(CACHE_BYPASS),
    };
    header::read(text, cache)
}

/// The machine's slot is free at once; its connection is kept when little is left on it.
fn discard(body: OutBody, request_ended: bool) {
    let OutBody::Upstream(mut upstream) = body else { return };
    upstream.slot = None;
    if !request_ended {
        upstream.lease = None; // the rest of the request belongs to the next machine
    }
    if upstream.lease.is_some() && !upstream.incoming.is_end_stream() {
        tokio::task::spawn_local(drain(upstream));
    }
}

async fn drain(upstream: Box<Upstream>) {
    let rest = Limited::new(OutBody::Upstream(upstream), DRAINED_BYTES_MAX).collect();
    // More than that: the connection is closed with the body.
    let _ = timeout(DRAINED_WITHIN, rest).await;
}
