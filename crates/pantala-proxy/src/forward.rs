//! Phases 5 to 7 in a loop: take a slot, connect, send, and once the head of an answer is there hand it on. What failed
//! before that is tried again where `pantala_route::retry` allows it. A machine of another host is one attempt across the
//! mesh; what comes across the mesh to this host uses [`Exchange::here`] alone.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use hyper::body::Body;
use hyper::header::{CONNECTION, HeaderValue, UPGRADE};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use pantala_route::retry::{Attempt, Fault, Verdict, judge};
use pantala_route::snapshot::Machine;
use pantala_route::turn::Reason;
use tokio::time::Instant;

use crate::body::{AttemptBody, ClientBody, Coming, OutBody, Upstream};
use crate::expect;
use crate::hints::Ears;
use crate::mesh::edge::{self, Across, Answered};
use crate::mesh::pool::MeshPool;
use crate::mesh::wire::{Call, Kind, Switch};
use crate::pool::{Lease, Pool, Route};
use crate::respond::Refusal;
use crate::select::Selection;
use crate::service::Worker;
use crate::shared::Shared;
use crate::slot::Slot;
use crate::trace::{Span, Trail};
use crate::upgrade::{self, Held, Upgrade};
use crate::{h2c, headers, statics};

pub struct Exchange {
    pub shared: Arc<Shared>,
    pool: Rc<Pool>,
    mesh: Option<Rc<MeshPool>>,
    /// none: a request of another host, which goes no further
    client: Option<SocketAddr>,
    /// headers as the app is to see them
    pub parts: Parts,
    pub body: ClientBody,
    client_upgrade: Option<Upgrade>,
    pub span: Span,
}

/// One attempt that came to nothing.
pub struct Failed {
    pub fault: Fault,
    /// in the words of the machine's host, if it is another and answered
    pub reason: Option<Reason>,
    pub refusal: Refusal,
}

impl Failed {
    fn here(fault: Fault, refusal: Refusal) -> Failed {
        Failed {
            fault,
            reason: None,
            refusal,
        }
    }
}

impl Exchange {
    pub fn new(
        worker: &Worker,
        client: Option<SocketAddr>,
        parts: Parts,
        body: ClientBody,
        client_upgrade: Option<Upgrade>,
        trail: Option<Trail>,
    ) -> Exchange {
        Exchange {
            shared: worker.shared.clone(),
            pool: worker.pool.clone(),
            mesh: worker.mesh.clone(),
            client,
            parts,
            body,
            client_upgrade,
            span: Span::new(trail, worker.recorder.as_ref()),
        }
    }

    /// Answers with the machine that did, as well.
    pub async fn with_app(&mut self, selection: &mut Selection) -> Result<(Response<OutBody>, Arc<Machine>), Refusal> {
        let mut fresh = self.client_upgrade.is_some();
        loop {
            let before = selection.waited;
            let slot = selection.slot().await?;
            self.span.chosen(selection.waited.since(&before));
            if selection.wishes.prefer_instance.is_some() {
                headers::unavailable(&mut self.parts.headers, selection.unavailable.as_deref());
            }
            selection.attempts += 1;
            let (machine, attempt) = (slot.target.machine.clone(), slot.attempt);
            let tried = if machine.local {
                self.here(slot, fresh, Some(selection.reach_by)).await
            } else {
                let call = selection.call(&slot, self.client);
                // In a room of its own, several times as large as what a request here needs.
                Box::pin(self.across(slot, call)).await
            };
            let failed = match tried {
                Ok(response) => return Ok((selection.timed(response, &machine), machine)),
                Err(failed) => failed,
            };
            self.span.failed(&machine, &failed);
            selection.deaths += u32::from(failed.fault == Fault::Died);
            failed
                .refusal
                .waited
                .iter()
                .for_each(|there| selection.waited.merge(there));
            let waited = selection.waited;
            let refusal = self.judge(&failed, selection.attempts, selection.deaths);
            let refusal = refusal.map_err(|why| why.after(waited))?;
            fresh = fresh || failed.fault == Fault::Stale;
            match failed.fault {
                Fault::Stale => {} // the machine is fine, the connection was not
                _ if machine.local => selection.failed(&machine.id, refusal),
                _ => {
                    let turned = selection.turned(&machine, attempt, failed.reason, refusal);
                    turned.map_err(|why| why.after(waited))?;
                }
            }
        }
    }

    /// A platform service: one place, no slots.
    pub async fn with_backend(&mut self, socket: SocketAddr) -> Result<Response<OutBody>, Refusal> {
        let (mut attempts, mut fresh) = (0, self.client_upgrade.is_some());
        loop {
            attempts += 1;
            let route = Route {
                socket,
                gauge: None,
                epoch: 0,
                pooled: true,
                h2: false,
            };
            let failed = match self.attempt(&route, None, fresh, None).await {
                Ok(response) => return Ok(response),
                Err(failed) => failed,
            };
            let deaths = u32::from(failed.fault == Fault::Died);
            let refusal = self.judge(&failed, attempts, deaths)?;
            if failed.fault != Fault::Stale {
                return Err(refusal);
            }
            fresh = true;
        }
    }

    /// Answers with why it failed where another attempt is allowed, fails with it where none is.
    fn judge(&self, failed: &Failed, attempts: u32, deaths: u32) -> Result<Refusal, Refusal> {
        if let Some(why) = self.body.failed() {
            return Err(Refusal::malformed(format!(
                "The body of the request could not be read: {why}."
            )));
        }
        let attempt = Attempt {
            fault: failed.fault,
            attempts,
            deaths,
            idempotent: idempotent(&self.parts.method),
            body: self.body.state(),
            response_started: false,
        };
        let refusal = failed.refusal.clone();
        if let Verdict::GiveUp(code) = judge(attempt) {
            if code == "PR03" {
                let happened = format!("No machine took the request in {attempts} tries. {}", refusal.happened);
                return Err(Refusal { happened, ..refusal }.with_code(code));
            }
            let code = if refusal.code.is_empty() || code == "PA01" {
                code
            } else {
                refusal.code
            };
            return Err(refusal.with_code(code));
        }
        self.shared.metrics.retries.fetch_add(1, Relaxed);
        Ok(refusal)
    }

    /// One attempt at a machine of this host.
    pub async fn here(&mut self, slot: Slot, fresh: bool, by: Option<Instant>) -> Result<Response<OutBody>, Failed> {
        let machine = &slot.target.machine;
        let Some(socket) = slot.target.socket() else {
            let refusal = bad_gateway("PM05", "The machine has no address.".to_owned(), Some(&slot));
            return Err(Failed::here(Fault::Connect, refusal));
        };
        let route = Route {
            socket,
            gauge: Some(machine.gauge.clone()),
            epoch: machine.epoch,
            pooled: slot.target.service.pooled,
            // What is to become another protocol begins as HTTP/1.1 everywhere.
            h2: slot.target.h2 && self.client_upgrade.is_none(),
        };
        if statics::concerns(statics::of(&slot), &self.parts)
            && let Some((response, lease)) = Box::pin(statics::fetch(&self.pool, &route, &self.parts)).await
        {
            return Ok(self.answer(response, lease, Some(slot)));
        }
        self.attempt(&route, Some(slot), fresh, by).await
    }

    /// One attempt at a machine of another host.
    async fn across(&mut self, slot: Slot, call: Call) -> Result<Response<OutBody>, Failed> {
        let Some(mesh) = &self.mesh else {
            let refusal = bad_gateway("PU03", "This host has no way to other hosts.".to_owned(), Some(&slot));
            return Err(Failed::here(Fault::Connect, refusal));
        };
        let (kind, request) = self.across_request();
        let machine = slot.target.machine.clone();
        let Answered {
            mut response,
            tunnel,
            said,
            slot,
        } = edge::send(mesh, &self.shared, slot, &call, &kind, request).await?;
        if let Some(status) = said.status.and_then(|status| StatusCode::from_u16(status).ok()) {
            *response.status_mut() = status;
        }
        if let Some(waited) = said.waited {
            response.extensions_mut().insert(waited);
        }
        if let Some(token) = said.upgrade.and_then(|token| HeaderValue::try_from(token).ok()) {
            response.headers_mut().insert(UPGRADE, token);
        }
        let answering = self.span.answered(Some(&machine), response.status().as_u16());
        if let Some(tunnel) = tunnel
            && let Some(client) = self.client_upgrade.take()
        {
            let slot = Some(slot);
            let held = Held { slot, answering };
            let upstream = Upgrade::Made(tunnel);
            return Ok(upgrade::switch(&self.shared, response, client, upstream, held));
        }
        let (parts, incoming) = response.into_parts();
        let upstream = Upstream {
            incoming,
            lease: None,
            slot: Some(slot),
            answering,
        };
        Ok(Response::from_parts(parts, OutBody::Upstream(Box::new(upstream))))
    }

    fn across_request(&self) -> (Kind, Across) {
        let (method, path, mut headers) = (
            &self.parts.method,
            self.parts.uri.path_and_query(),
            self.parts.headers.clone(),
        );
        let token = headers.get(UPGRADE).and_then(|token| token.to_str().ok());
        if let (Some(token), Some(_)) = (token, &self.client_upgrade) {
            let switch = Switch {
                method: method.as_str().to_owned(),
                target: path.map_or("/", |path| path.as_str()).to_owned(),
                token: token.to_owned(),
            };
            return (Kind::Upgrade(switch), edge::connect(headers));
        }
        headers.remove(UPGRADE);
        headers.remove(CONNECTION);
        let mut body = self.body.attempt();
        let ears = self.ears(&headers, &mut body);
        (Kind::Http, edge::request(method, path, headers, body, ears))
    }

    async fn attempt(
        &mut self,
        route: &Route,
        slot: Option<Slot>,
        fresh: bool,
        by: Option<Instant>,
    ) -> Result<Response<OutBody>, Failed> {
        let connected = self.pool.connect(route, fresh, self.span.now(), by).await;
        self.span.connected(connected.as_ref().is_ok_and(|lease| lease.reused));
        let mut lease = match connected {
            Ok(lease) => lease,
            Err(error) => {
                let happened = match slot {
                    Some(_) => format!("The app does not answer on port {}: {error}.", route.socket.port()),
                    None => format!("The service does not answer: {error}."),
                };
                let refusal = bad_gateway(error.code(), happened, slot.as_ref());
                return Err(Failed::here(Fault::Connect, refusal));
            }
        };
        if !lease.reused {
            self.shared.metrics.upstream_connects.fetch_add(1, Relaxed);
        }
        let (request, ears) = self.request(route.h2);
        match lease.send(request, ears).await {
            Ok(response) => Ok(self.answer(response, lease, slot)),
            Err(failed) => {
                let (code, happened) = match failed.malformed {
                    true => ("PU02", "The app's answer is not valid HTTP.".to_owned()),
                    false => (
                        "PU02",
                        "The app took the request and closed the connection without an answer.".to_owned(),
                    ),
                };
                Err(Failed::here(failed.fault, bad_gateway(code, happened, slot.as_ref())))
            }
        }
    }

    fn request(&self, h2: bool) -> (Request<AttemptBody>, Ears) {
        let mut body = self.body.attempt();
        let ears = self.ears(&self.parts.headers, &mut body);
        let mut request = Request::new(body);
        *request.method_mut() = self.parts.method.clone();
        *request.headers_mut() = self.parts.headers.clone();
        if h2 {
            *request.uri_mut() = h2c::translate(self.parts.uri.path_and_query(), request.headers_mut());
            *request.version_mut() = Version::HTTP_2;
            return (request, ears);
        }
        *request.uri_mut() = origin_form(&self.parts.uri);
        *request.version_mut() = Version::HTTP_11;
        let body = !request.body().is_end_stream();
        headers::for_http_1(request.headers_mut(), body);
        (request, ears)
    }

    /// A body that is to be asked for waits until then.
    fn ears(&self, headers: &HeaderMap, body: &mut AttemptBody) -> Ears {
        Ears {
            hints: self.parts.extensions.get().cloned(),
            asked: expect::wanted(headers).then(|| expect::hold(body)),
        }
    }

    fn answer(&mut self, mut response: Response<Coming>, lease: Lease, slot: Option<Slot>) -> Response<OutBody> {
        let machine = slot.as_ref().map(|slot| &slot.target.machine);
        let answering = self.span.answered(machine, response.status().as_u16());
        if response.status() == StatusCode::SWITCHING_PROTOCOLS
            && let Some(client) = self.client_upgrade.take()
        {
            let upstream = Upgrade::OfConnection(hyper::upgrade::on(&mut response));
            return upgrade::switch(&self.shared, response, client, upstream, Held { slot, answering });
        }
        let (parts, incoming) = response.into_parts();
        Response::from_parts(
            parts,
            OutBody::Upstream(Box::new(Upstream {
                incoming,
                lease: Some(lease),
                slot,
                answering,
            })),
        )
    }
}

pub const LISTEN: &str =
    "Try again in a moment. If you run this app: it must listen on 0.0.0.0 and its internal_port; look at its logs.";

fn bad_gateway(code: &'static str, happened: String, slot: Option<&Slot>) -> Refusal {
    let refusal = Refusal::new(StatusCode::BAD_GATEWAY, code, happened, LISTEN);
    match slot {
        Some(slot) => refusal
            .of_app(&slot.target.machine.app)
            .of_machine(&slot.target.machine.id),
        None => refusal,
    }
}

fn idempotent(method: &Method) -> bool {
    [
        Method::GET,
        Method::HEAD,
        Method::OPTIONS,
        Method::TRACE,
        Method::PUT,
        Method::DELETE,
    ]
    .contains(method)
}

fn origin_form(uri: &Uri) -> Uri {
    match uri.path_and_query() {
        Some(path) => Uri::from(path.clone()),
        None => Uri::from_static("/"),
    }
}
