//! Phase 7 for paths that a machine's `statics` name: its own file server (`pantala-init`) is asked first, on the machine's
//! IPv4. Where it has no such file, or does not answer, the app is asked as for any other path.

use std::net::SocketAddr;

use hyper::body::Body;
use hyper::header::{HOST, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, RANGE};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, Uri};
use pantala_wire::feed::Static;
use pantala_wire::guest::{STATICS_MISSING, STATICS_PORT};

use tokio::time::Instant;

use crate::body::{AttemptBody, ClientBody, Coming};
use crate::hints::Ears;
use crate::pool::{Lease, Pool, Route};
use crate::slot::Slot;

/// A request for a file, perhaps.
pub fn concerns(statics: &[Static], parts: &Parts) -> bool {
    let path = parts.uri.path();
    let under = |one: &Static| {
        if one.tigris_bucket.is_some() {
            return false; // read before a machine was chosen
        }
        let rest = path.strip_prefix(one.url_prefix.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.len() > 1 && rest.starts_with('/'))
    };
    [Method::GET, Method::HEAD].contains(&parts.method) && statics.iter().any(under)
}

/// The file, if there is one.
pub async fn fetch(pool: &std::rc::Rc<Pool>, route: &Route, parts: &Parts) -> Option<(Response<Coming>, Lease)> {
    let route = Route {
        socket: SocketAddr::new(route.socket.ip(), STATICS_PORT),
        pooled: true,
        h2: false,
        ..route.clone()
    };
    // A kept connection may have ended with the machine's patience; files are asked for again at no risk.
    for fresh in [false, true] {
        let mut lease = pool.connect(&route, fresh, Instant::now(), None).await.ok()?;
        let reused = lease.reused;
        match lease.send(request(parts), Ears::default()).await {
            Ok(response) if response.headers().contains_key(STATICS_MISSING) => {
                if response.body().is_end_stream() {
                    lease.give_back(Instant::now());
                }
                return None;
            }
            Ok(response) => return Some((response, lease)),
            Err(_) if reused => {}
            Err(_) => return None,
        }
    }
    None
}

fn request(parts: &Parts) -> Request<AttemptBody> {
    let mut request = Request::new(ClientBody::none().attempt());
    *request.method_mut() = parts.method.clone();
    let path = parts.uri.path_and_query().cloned();
    *request.uri_mut() = path.map_or_else(|| Uri::from_static("/"), Uri::from);
    request.headers_mut().insert(HOST, HeaderValue::from_static("statics"));
    for name in [RANGE, IF_RANGE, IF_NONE_MATCH, IF_MODIFIED_SINCE] {
        if let Some(value) = parts.headers.get(&name) {
            request.headers_mut().insert(name, value.clone());
        }
    }
    request
}

/// Where the machine of this slot has any.
pub fn of(slot: &Slot) -> &[Static] {
    &slot.target.service.statics
}
