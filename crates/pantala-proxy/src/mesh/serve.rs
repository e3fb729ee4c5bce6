//! The receiving side of one request: its machine is on this host, or the sender is told to retry elsewhere. The slot is
//! taken here, so the limit holds however many edges send; a sleeping machine is woken here, once for all who wait.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, UPGRADE};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use pantala_route::choose::machine;
use pantala_route::retry::{self, Fault};
use pantala_route::snapshot::Machine;
use pantala_route::turn::Reason;
use tokio::task::spawn_local;

use super::wire::{self, Call, Form, HOPS_MAX, Kind, Load, Said, Switch, Told};
use super::{Mesh, is_member};
use crate::body::{ClientBody, Coming, OutBody};
use crate::forward::Exchange;
use crate::respond::Refusal;
use crate::select::{ADVICE, Selection};
use crate::service::Worker;
use crate::slot::Slot;
use crate::trace::{Outcome, Role, Trail};
use crate::upgrade::Upgrade;
use crate::{headers, log, raw};

/// Kept connections that the app had closed, in a row, before a request counts as lost.
const STALE_MAX: u32 = 4;

/// While requests come and go, for a count of one moment.
const READ_AGAIN: u32 = 3;

struct Refused {
    reason: Reason,
    refusal: Refusal,
}

/// Whose count an answer says, to whom and in which form.
struct Count {
    mesh: Arc<Mesh>,
    node: Arc<str>,
    form: Form,
}

impl Count {
    /// Both numbers of one moment. A guest is counted a little longer than its slot, so in doubt too few are others'.
    fn said(&self, machine: &Machine) -> Said {
        let guests = self.mesh.guests.of(&machine.id, &self.node);
        let yours = || guests.as_ref().map_or(0, |count| count.load(Relaxed));
        let read = || (machine.gauge.here(), yours());
        let (mut in_flight, mut yours) = read();
        for _ in 0..READ_AGAIN {
            let before = (in_flight, yours);
            (in_flight, yours) = read();
            if before == (in_flight, yours) {
                break;
            }
        }
        let others = in_flight.saturating_sub(yours);
        Said {
            load: Some(Load { others, yours }),
            ..Said::default()
        }
    }
}

pub async fn serve(
    worker: Rc<Worker>,
    mesh: Arc<Mesh>,
    node: Arc<str>,
    request: Request<Coming>,
    upgrade: Option<Upgrade>,
) -> Response<OutBody> {
    let kind = wire::kind(request.headers());
    if kind == Ok(Kind::Ping) {
        return Response::new(OutBody::Full(Full::default()));
    }
    mesh.metrics.served.fetch_add(1, Relaxed);
    let (mut asked, (form, call)) = (None, Call::read(request.headers()));
    let count = Count {
        mesh: mesh.clone(),
        node,
        form,
    };
    let served = match (kind, call) {
        (Ok(kind), Ok(call)) if call.hops <= HOPS_MAX && is_member(&worker.shared.view().snapshot, &count.node) => {
            asked = Some((call.app.clone(), call.machine.clone()));
            answer(&worker, &count, call, kind, request, upgrade).await
        }
        (kind, call) => Err(not_understood(kind.err().or(call.err()))),
    };
    // The count is read last: it is the one that the sender learns.
    served.unwrap_or_else(|refused| {
        mesh.metrics.refused(refused.reason);
        let known = asked.and_then(|(app, machine)| machine_of(&worker, &app, &machine));
        told(
            &refused,
            known.map(|known| count.said(&known)).unwrap_or_default(),
            form,
        )
    })
}

fn not_understood(why: Option<wire::Malformed>) -> Refused {
    let happened = match why {
        Some(why) => format!("The request of another host was not understood: {why}."),
        None => "The request of another host came too far.".to_owned(),
    };
    Refused {
        reason: Reason::Malformed,
        refusal: Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "PU04", happened, ADVICE),
    }
}

fn machine_of(worker: &Worker, app: &str, id: &str) -> Option<Arc<Machine>> {
    let view = worker.shared.view();
    machine(view.snapshot.apps.get(app)?, id).cloned()
}

async fn answer(
    worker: &Rc<Worker>,
    count: &Count,
    call: Call,
    kind: Kind,
    request: Request<Coming>,
    upgrade: Option<Upgrade>,
) -> Result<Response<OutBody>, Refused> {
    let selection = Selection::of_peer(&worker.shared, &count.node, &call);
    let trail = headers::request_id(request.headers()).map(|id| Trail::begin(id, Role::Worker));
    match (kind, upgrade) {
        (Kind::Tcp, Some(upgrade)) => tunnel(count, selection, upgrade).await,
        (Kind::Upgrade(switch), Some(client)) => {
            let (mut parts, _) = request.into_parts(); // what comes later belongs to the tunnel
            wire::strip(&mut parts.headers);
            let wrong = |_| not_understood(None);
            parts.method = Method::from_bytes(switch.method.as_bytes()).map_err(|_| wrong(()))?;
            parts.uri = Uri::try_from(&switch.target).map_err(|_| wrong(()))?;
            let token = HeaderValue::from_str(&switch.token).map_err(|_| wrong(()))?;
            parts.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            parts.headers.insert(UPGRADE, token);
            let exchange = Exchange::new(worker, None, parts, ClientBody::none(), Some(client), trail);
            exchange_with_app(count, selection, exchange, Some(switch)).await
        }
        (Kind::Http, None) => {
            let (mut parts, body) = request.into_parts();
            wire::strip(&mut parts.headers);
            let exchange = Exchange::new(
                worker,
                None,
                parts,
                ClientBody::new(body, worker.shared.settings.wire.replay_body_bytes_max, None),
                None,
                trail,
            );
            exchange_with_app(count, selection, exchange, None).await
        }
        _ => Err(not_understood(None)),
    }
}

async fn take(selection: &mut Selection) -> Result<Slot, Refused> {
    selection.slot().await.map_err(|refusal| Refused {
        reason: selection.reason,
        refusal,
    })
}

async fn exchange_with_app(
    count: &Count,
    mut selection: Selection,
    mut exchange: Exchange,
    switch: Option<Switch>,
) -> Result<Response<OutBody>, Refused> {
    let (mut stale, mut fresh) = (0, switch.is_some());
    loop {
        let before = selection.waited;
        let taken = take(&mut selection).await;
        exchange.span.chosen(selection.waited.since(&before));
        let slot = taken.inspect_err(|refused| {
            let machine = selection.asked_for();
            let outcome = Outcome::Turned(refused.reason);
            exchange.span.turned(machine.as_ref(), outcome, &refused.refusal);
            tell(count, &exchange, refused);
        })?;
        let machine = slot.target.machine.clone();
        match exchange.here(slot, fresh, Some(selection.reach_by)).await {
            Ok(response) => {
                let said = Said {
                    waited: Some(selection.waited),
                    ..count.said(&machine)
                };
                return Ok(answered(response, said, count.form, switch.is_some()));
            }
            Err(failed)
                if failed.fault == Fault::Stale && exchange.body.state() != retry::Body::Lost && stale < STALE_MAX =>
            {
                exchange.span.failed(&machine, &failed);
                (stale, fresh) = (stale + 1, true);
            }
            Err(failed) => {
                let reached = matches!(failed.fault, Fault::Died | Fault::Stale);
                let reason = if reached { Reason::Died } else { Reason::Connect };
                exchange.span.failed(&machine, &failed);
                let refused = Refused {
                    reason,
                    refusal: failed.refusal,
                };
                tell(count, &exchange, &refused);
                return Err(refused);
            }
        }
    }
}

/// To this host's own log, as far as a flood leaves room: the app's log has it from the edge.
fn tell(count: &Count, exchange: &Exchange, refused: &Refused) {
    if let Some(request) = exchange.span.id()
        && exchange.shared.mesh_lines.take()
    {
        let (reason, refusal) = (refused.reason.word(), &refused.refusal);
        log::info(
            "request turned away",
            &[
                ("app", &refusal.app),
                ("machine", &refusal.machine),
                ("code", &refusal.code),
                ("reason", &reason),
                ("from", &count.node),
                ("request_id", &request),
            ],
        );
    }
}

fn answered(mut response: Response<OutBody>, mut said: Said, form: Form, upgrade: bool) -> Response<OutBody> {
    let (status, headers) = (response.status(), response.headers_mut());
    let token = headers
        .get(UPGRADE)
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    headers::remove_hop_by_hop(headers);
    if upgrade {
        // A CONNECT stream knows only yes and no; the app's own word travels beside.
        (said.status, said.upgrade) = (Some(status.as_u16()), token);
        let switched = status == StatusCode::SWITCHING_PROTOCOLS;
        if switched {
            headers.remove(CONTENT_LENGTH);
        }
        said.write(form, headers);
        *response.status_mut() = if switched { StatusCode::OK } else { StatusCode::CONFLICT };
    } else {
        said.write(form, headers);
    }
    response
}

fn told(refused: &Refused, said: Said, form: Form) -> Response<OutBody> {
    // Writing a struct of strings cannot fail; an empty text would be read as one without details.
    let text = serde_json::to_vec(&Told::of(&refused.refusal)).unwrap_or_default();
    let mut response = Response::new(OutBody::Full(Full::new(Bytes::from(text))));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let (waited, refused) = (refused.refusal.waited.as_deref().copied(), Some(refused.reason));
    Said {
        refused,
        waited,
        ..said
    }
    .write(form, headers);
    response
}

/// Bytes both ways until one side ends or the machine drains.
async fn tunnel(count: &Count, mut selection: Selection, client: Upgrade) -> Result<Response<OutBody>, Refused> {
    let slot = take(&mut selection).await?;
    let mut upstream = raw::connect_here(&slot).await.map_err(|refusal| Refused {
        reason: Reason::Connect,
        refusal,
    })?;
    let shared = selection.shared();
    let said = Said {
        waited: Some(selection.waited),
        ..count.said(&slot.target.machine)
    };
    spawn_local(async move {
        if let Some(mut client) = client.made().await {
            raw::couple(&shared, &slot, &mut client, &mut upstream).await;
        }
        drop(slot);
    });
    let mut response = Response::new(OutBody::Full(Full::default()));
    said.write(count.form, response.headers_mut());
    Ok(response)
}
