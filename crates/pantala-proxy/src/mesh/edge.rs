//! The sending side: one attempt at a machine of another host. What its proxy says of the machine's load is kept whether it
//! served or not; a refusal is an attempt that reached no app, a host that falls silent one that may have.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use http_body_util::{BodyExt, Limited};
use hyper::header::{CONNECTION, CONTENT_LENGTH, UPGRADE};
use hyper::http::uri::{self, Authority, PathAndQuery, Scheme};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use pantala_route::retry::Fault;
use pantala_route::turn::Reason;
use tokio::time::{Duration, timeout};

use super::peers::Peer;
use super::pool::{MeshPool, Way};
use super::wire::{Call, Kind, Load, Said, Told};
use crate::body::{AttemptBody, Coming};
use crate::forward::Failed;
use crate::hints::Ears;
use crate::http2::client::{self, Answer, Share};
use crate::http2::tunnel::Tunnel;
use crate::raw::Wire;
use crate::respond::Refusal;
use crate::shared::Shared;
use crate::slot::Slot;
use crate::timing::Waited;

const TOLD_BYTES_MAX: usize = 16 * 1024;
const TOLD_MAX: Duration = Duration::from_secs(2);

/// What goes to the other side.
pub struct Across {
    head: Request<()>,
    /// none: a CONNECT, whose bytes come later
    body: Option<AttemptBody>,
    ears: Ears,
}

/// The head of an answer from the other side.
pub struct Answered {
    pub response: Response<Coming>,
    /// what a CONNECT became
    pub tunnel: Option<Tunnel>,
    pub said: Said,
    pub slot: Slot,
}

/// An app's request as it goes over the mesh.
pub fn request(
    method: &Method,
    path: Option<&PathAndQuery>,
    headers: HeaderMap,
    body: AttemptBody,
    ears: Ears,
) -> Across {
    let mut request = Request::new(());
    *request.method_mut() = method.clone();
    let mut uri = uri::Parts::default();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(Authority::from_static("mesh"));
    uri.path_and_query = Some(path.cloned().unwrap_or_else(|| PathAndQuery::from_static("/")));
    // Parts that were parsed before go together again.
    *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = headers;
    let body = Some(body);
    Across {
        head: request,
        body,
        ears,
    }
}

/// A stream that carries bytes both ways once it is answered.
pub fn connect(mut headers: HeaderMap) -> Across {
    for name in [UPGRADE, CONNECTION, CONTENT_LENGTH] {
        headers.remove(name);
    }
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = Uri::from_static("mesh:80");
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = headers;
    Across {
        head: request,
        body: None,
        ears: Ears::default(),
    }
}

pub async fn send(
    pool: &MeshPool,
    shared: &Shared,
    mut slot: Slot,
    call: &Call,
    kind: &Kind,
    mut request: Across,
) -> Result<Answered, Failed> {
    let node = slot.target.machine.node.clone();
    let peer = pool
        .mesh
        .peers
        .find(&node)
        .ok_or_else(|| lost(&slot, "it is no peer any more", Fault::Connect))?;
    peer.used(shared.elapsed_ms());
    let Way { share, form, first } = pool
        .share(&peer)
        .await
        .map_err(|e| lost(&slot, &e.to_string(), Fault::Connect))?;
    pool.mesh.metrics.sent.fetch_add(1, Relaxed);
    let headers = request.head.headers_mut();
    call.write(form, kind, headers);
    if first {
        // So that the other end knows the names of values that do not repeat.
        headers.values_mut().for_each(|value| value.set_sensitive(false));
    }
    let answered = answer(share, &peer, request).await;
    let Answer { mut response, tunnel } = answered.map_err(|(why, fault)| lost(&slot, &why, fault))?;
    let said = Said::take(response.headers_mut());
    let (gauge, hard) = (&slot.target.machine.gauge, slot.target.service.hard);
    if let Some(Load { others, yours }) = said.load {
        // A full machine stays full for a while even if its count is below: others wait there in order.
        let now_ms = shared.elapsed_ms();
        match said.refused {
            Some(Reason::Full) => gauge.report_full(others.max(hard.saturating_sub(yours)), now_ms),
            _ => gauge.report(others, now_ms),
        }
    }
    match said.refused {
        Some(reason) => Err(turned(reason, response, &slot, said.waited).await),
        None => {
            slot.arrived();
            Ok(Answered {
                response,
                tunnel,
                said,
                slot,
            })
        }
    }
}

async fn answer(share: Share, peer: &Arc<Peer>, request: Across) -> Result<Answer, (String, Fault)> {
    let answered = client::ask(share, request.head, request.body, request.ears);
    tokio::select! {
        biased;
        answered = answered => answered.map_err(|why| {
            let fault = match why.fault() {
                Fault::Stale => Fault::NotSent, // it left in good order without a look at the request
                fault => fault,
            };
            (why.to_string(), fault)
        }),
        () = peer.down() => Err(("it fell silent while the request was there".to_owned(), Fault::Died)),
    }
}

fn lost(slot: &Slot, why: &str, fault: Fault) -> Failed {
    let machine = &slot.target.machine;
    let happened = format!("The host {} of the machine cannot be reached: {why}.", machine.node);
    let advice = "Try again in a moment. If you run this platform: look at that host and at the network between.";
    let refusal = Refusal::new(StatusCode::BAD_GATEWAY, "PU03", happened, advice);
    Failed {
        fault,
        reason: None,
        refusal: refusal.of_app(&machine.app).of_machine(&machine.id),
    }
}

async fn turned(reason: Reason, response: Response<Coming>, slot: &Slot, waited: Option<Waited>) -> Failed {
    let told = timeout(TOLD_MAX, Limited::new(response.into_body(), TOLD_BYTES_MAX).collect()).await;
    let told: Told = match told {
        Ok(Ok(body)) => serde_json::from_slice(&body.to_bytes()).unwrap_or_default(),
        // The reason is known all the same.
        _ => Told::default(),
    };
    let machine = &slot.target.machine;
    let (status, advice, fault) = match reason {
        Reason::Connect => (StatusCode::BAD_GATEWAY, crate::forward::LISTEN, Fault::Turned),
        Reason::Died => (StatusCode::BAD_GATEWAY, crate::forward::LISTEN, Fault::Died),
        _ => (StatusCode::SERVICE_UNAVAILABLE, crate::select::ADVICE, Fault::Turned),
    };
    let happened = match told.happened.is_empty() {
        true => format!(
            "The host {} of the machine refused the request ({}).",
            machine.node,
            reason.word()
        ),
        false => told.happened.clone(),
    };
    let refusal = Refusal::new(status, told.code(), happened, advice).after(waited.unwrap_or_default());
    let refusal = refusal.of_app(&machine.app).of_machine(&machine.id);
    Failed {
        fault,
        reason: Some(reason),
        refusal: if fault == Fault::Turned && status == StatusCode::SERVICE_UNAVAILABLE {
            refusal.retry_after(1)
        } else {
            refusal
        },
    }
}

/// A TCP connection to the machine through its host, and how long it waited there.
pub async fn tunnel(pool: &MeshPool, shared: &Shared, slot: Slot, call: &Call) -> Result<(Slot, Wire, Waited), Failed> {
    let answered = send(pool, shared, slot, call, &Kind::Tcp, connect(HeaderMap::new())).await?;
    let Answered { tunnel, said, slot, .. } = answered;
    match tunnel {
        Some(tunnel) => Ok((slot, Wire::There(tunnel), said.waited.unwrap_or_default())),
        None => Err(lost(
            &slot,
            "it answered without a word about the connection",
            Fault::Died,
        )),
    }
}
