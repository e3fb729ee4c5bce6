//! Phases 5 to 7 in a loop: take a slot, connect, send, and once the head of an answer is there hand it on. What failed
//! before that is tried again where `pantala_route::retry` allows it.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_LENGTH, HeaderValue, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use pantala_route::retry::{Attempt, Fault, Verdict, judge};
use tokio::time::Instant;

use crate::body::{ClientBody, OutBody, Upstream};
use crate::headers;
use crate::pool::{Lease, Pool, Route};
use crate::respond::Refusal;
use crate::select::{Selection, Slot};
use crate::shared::Shared;
use crate::upgrade;

/// Whom a request goes to.
pub enum Upstreams {
    App(Box<Selection>),
    Backend(SocketAddr),
}

impl Upstreams {
    fn reach_by(&self) -> Option<Instant> {
        match self {
            Upstreams::App(selection) => Some(selection.reach_by),
            Upstreams::Backend(_) => None,
        }
    }
}

pub struct Exchange {
    pub shared: Arc<Shared>,
    pub pool: Rc<Pool>,
    /// headers as the app is to see them
    pub parts: Parts,
    pub body: ClientBody,
    pub client_upgrade: Option<OnUpgrade>,
}

struct Failed {
    fault: Fault,
    refusal: Refusal,
}

impl Exchange {
    pub async fn run(mut self, mut upstreams: Upstreams) -> Result<Response<OutBody>, Refusal> {
        let (mut attempts, mut deaths) = (0, 0);
        let mut fresh = self.client_upgrade.is_some();
        loop {
            let (route, slot) = self.route(&mut upstreams).await?;
            if let Upstreams::App(selection) = &upstreams
                && let Some(machine) = &selection.unavailable
            {
                headers::unavailable(&mut self.parts.headers, machine);
            }
            attempts += 1;
            let failed = match self.attempt(&route, slot, fresh, upstreams.reach_by()).await {
                Ok(response) => return Ok(response),
                Err(failed) => failed,
            };
            deaths += u32::from(failed.fault == Fault::Died);
            let attempt = Attempt {
                fault: failed.fault,
                attempts,
                deaths,
                idempotent: idempotent(&self.parts.method),
                body: self.body.state(),
                response_started: false,
            };
            if let Some(why) = self.body.failed() {
                return Err(Refusal::malformed(format!(
                    "The body of the request could not be read: {why}."
                )));
            }
            if let Verdict::GiveUp(code) = judge(attempt) {
                let code = if failed.refusal.code.is_empty() || code == "PA01" {
                    code
                } else {
                    failed.refusal.code
                };
                return Err(Refusal { code, ..failed.refusal });
            }
            self.shared.metrics.retries.fetch_add(1, Relaxed);
            fresh = fresh || failed.fault == Fault::Stale;
            match &mut upstreams {
                Upstreams::App(_) if failed.fault == Fault::Stale => {} // the machine is fine, the connection was not
                Upstreams::App(selection) => {
                    selection.failed(&Arc::from(failed.refusal.machine.as_str()), failed.refusal)
                }
                Upstreams::Backend(_) if failed.fault == Fault::Stale => {}
                Upstreams::Backend(_) => return Err(failed.refusal),
            }
        }
    }

    async fn route(&self, upstreams: &mut Upstreams) -> Result<(Route, Option<Slot>), Refusal> {
        let selection = match upstreams {
            Upstreams::Backend(socket) => {
                return Ok((
                    Route {
                        socket: *socket,
                        gauge: None,
                        epoch: 0,
                        pooled: true,
                    },
                    None,
                ));
            }
            Upstreams::App(selection) => selection,
        };
        let slot = selection.slot().await?;
        let machine = &slot.target.machine;
        let socket = slot.target.socket().ok_or_else(|| {
            Refusal::new(
                StatusCode::BAD_GATEWAY,
                "PM05",
                "The machine has no address.",
                "Try again in a moment.",
            )
        })?;
        let (gauge, pooled) = (Some(machine.gauge.clone()), slot.target.service.pooled);
        Ok((
            Route {
                socket,
                gauge,
                epoch: machine.epoch,
                pooled,
            },
            Some(slot),
        ))
    }

    async fn attempt(
        &mut self,
        route: &Route,
        slot: Option<Slot>,
        fresh: bool,
        by: Option<Instant>,
    ) -> Result<Response<OutBody>, Failed> {
        let mut lease = match self.pool.connect(route, fresh, by).await {
            Ok(lease) => lease,
            Err(error) => {
                let happened = match slot {
                    Some(_) => format!("The app does not answer on port {}: {error}.", route.socket.port()),
                    None => format!("The service does not answer: {error}."),
                };
                return Err(Failed {
                    fault: Fault::Connect,
                    refusal: bad_gateway(error.code(), happened, slot.as_ref()),
                });
            }
        };
        if !lease.reused {
            self.shared.metrics.upstream_connects.fetch_add(1, Relaxed);
        }
        match lease.sender.try_send_request(self.request()).await {
            Ok(response) => Ok(self.answer(response, lease, slot)),
            Err(mut error) => {
                let unsent = error.take_message().is_some();
                let error = error.into_error();
                let fault = match () {
                    () if unsent && !lease.reused => Fault::NotSent,
                    () if lease.reused && !error.is_parse() => Fault::Stale,
                    () => Fault::Died,
                };
                let (code, happened) = match error.is_parse() {
                    true => ("PU02", "The app's answer is not valid HTTP.".to_owned()),
                    false => (
                        "PU02",
                        "The app took the request and closed the connection without an answer.".to_owned(),
                    ),
                };
                Err(Failed {
                    fault,
                    refusal: bad_gateway(code, happened, slot.as_ref()),
                })
            }
        }
    }

    fn request(&self) -> Request<crate::body::AttemptBody> {
        let body = self.body.attempt();
        let mut request = Request::new(body);
        *request.method_mut() = self.parts.method.clone();
        *request.uri_mut() = origin_form(&self.parts.uri);
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = self.parts.headers.clone();
        let framed = self.parts.headers.contains_key(CONTENT_LENGTH);
        if !framed && !request.body().is_end_stream() {
            // Said explicitly, since hyper assumes that a GET has no body.
            request
                .headers_mut()
                .insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        request
    }

    fn answer(&mut self, response: Response<Incoming>, lease: Lease, slot: Option<Slot>) -> Response<OutBody> {
        if response.status() == StatusCode::SWITCHING_PROTOCOLS
            && let Some(client) = self.client_upgrade.take()
        {
            return upgrade::switch(&self.shared, response, client, slot);
        }
        let (parts, incoming) = response.into_parts();
        Response::from_parts(
            parts,
            OutBody::Upstream(Box::new(Upstream {
                incoming,
                lease: Some(lease),
                slot,
            })),
        )
    }
}

fn bad_gateway(code: &'static str, happened: String, slot: Option<&Slot>) -> Refusal {
    let advice = "Try again in a moment. If you run this app: it must listen on 0.0.0.0 and its internal_port; look at its logs.";
    let refusal = Refusal::new(StatusCode::BAD_GATEWAY, code, happened, advice);
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
