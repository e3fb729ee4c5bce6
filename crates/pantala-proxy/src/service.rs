//! Phases 3 to 8 of one request, in order: check, match, redirect, read from a bucket, recall, forward, replay, respond.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use hyper::body::Body;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode, Version};
use pantala_route::matching::Matched;
use pantala_route::replay_cache::{Asked, Remembered};
use pantala_route::snapshot::{App, Offer, Snapshot};
use pantala_wire::feed::{HTTPOptions, ProxyLog};

use crate::body::{ClientBody, Coming, OutBody};
use crate::compress::{self, Wanted};
use crate::conversation::{Conversation, Limits, Reading};
use crate::forward::Exchange;
use crate::headers::{self, Client, Values};
use crate::ids::RequestId;
use crate::mesh::pool::MeshPool;
use crate::pool::Pool;
use crate::remember;
use crate::replay::Journey;
use crate::request::{self, Checked};
use crate::respond::{self, Accept, Refusal};
use crate::select::Selection;
use crate::shared::Shared;
use crate::trace::{Recorder, Role, Trail, Who};
use crate::upgrade::Upgrade;
use crate::{connection, instruction, log, objects, timing, upgrade};

/// RFC 8555, section 8.3.
const ACME_CHALLENGE: &str = "/.well-known/acme-challenge/";

/// One worker thread's view of the world.
pub struct Worker {
    pub shared: Arc<Shared>,
    pub pool: Rc<Pool>,
    pub mesh: Option<Rc<MeshPool>>,
    /// none: nothing is kept of requests
    pub recorder: Option<Rc<Recorder>>,
    pub objects: objects::Pool,
}

/// Never fails: what goes wrong is a page. `by_host`: the connection belongs to whom the request names. `upgrade`: it may
/// become a tunnel.
pub async fn serve(
    worker: Rc<Worker>,
    client: Client,
    by_host: Option<Arc<Conversation>>,
    request: Request<Coming>,
    upgrade: Option<Upgrade>,
) -> Response<OutBody> {
    let shared = &worker.shared;
    shared.metrics.requests.fetch_add(1, Relaxed);
    let trail = Trail::begin(RequestId::new(&shared.settings.wire.region), Role::Edge);
    let id = trail.id.text();
    let mut named = Named {
        id: &id,
        values: Values::of(&id),
        trail,
    };
    let (version, accept) = (request.version(), Accept::of(request.headers()));
    let mut manner = Manner::default();
    let (mut response, upgraded) =
        match answer(&worker, &client, by_host, &mut named, (request, upgrade), &mut manner).await {
            Ok(response) => {
                if let Some(who) = manner.unasked.take() {
                    trail.end(worker.recorder.as_ref(), who, response.status().as_u16(), None);
                }
                let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
                (response, upgraded)
            }
            Err(refusal) => {
                trail.refused(worker.recorder.as_ref(), &refusal);
                (refused(shared, &refusal, &id, accept), false)
            }
        };
    let close = respond::asks_to_close(&response);
    let options = manner.options.as_deref();
    if let Some(wanted) = manner.wanted {
        response = compress::compress(response, wanted);
    }
    timing::finish(shared, &mut response, options, &id);
    headers::to_client(
        response.headers_mut(),
        options.and_then(|o| o.response.as_ref()),
        version,
        &named.values,
        upgraded,
    );
    if upgraded && version == Version::HTTP_2 {
        upgrade::as_extended_connect(&mut response);
    }
    if let Some(limits) = options.and_then(Limits::of) {
        response.extensions_mut().insert(limits);
    }
    *response.version_mut() = Version::HTTP_11; // an app's HTTP/1.0 ends here; hyper says it to clients that speak it
    if !upgraded && version != Version::HTTP_2 && (close || shared.leaving()) {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// What a request is called: in headers and lines, and in records.
struct Named<'a> {
    id: &'a str,
    values: Values,
    trail: Trail,
}

/// How the port wants answers made, once it is known.
#[derive(Default)]
struct Manner {
    options: Option<Arc<HTTPOptions>>,
    wanted: Option<Wanted>,
    /// whose request was answered without a machine
    unasked: Option<Who>,
}

impl Manner {
    fn of(&mut self, offer: &Offer, parts: &Parts) {
        self.options.clone_from(&offer.http);
        self.wanted = self
            .options
            .as_ref()
            .and_then(|options| compress::wanted(options, parts));
    }

    /// The app that answers in the end; `said` by the client.
    fn of_another(&mut self, offer: Option<&Offer>, said: Wanted) {
        self.options = offer.and_then(|offer| offer.http.clone());
        let compress = self.options.as_ref().is_some_and(|o| o.compress == Some(true));
        self.wanted = compress.then_some(said);
    }
}

async fn answer(
    worker: &Rc<Worker>,
    client: &Client,
    by_host: Option<Arc<Conversation>>,
    named: &mut Named<'_>,
    (request, upgrade): (Request<Coming>, Option<Upgrade>),
    manner: &mut Manner,
) -> Result<Response<OutBody>, Refusal> {
    let shared = &worker.shared;
    let (mut parts, body) = request.into_parts();
    request::name_of_old(&mut parts, client.local.ip());
    request::from_extended_connect(&mut parts);
    let checked = request::check(&parts, body.is_end_stream())?;
    let view = shared.view();
    if let Some(authorization) = acme_authorization(&view.snapshot, parts.uri.path()) {
        manner.unasked = Some(Who::Nobody);
        return Ok(respond::text(authorization));
    }
    let found = view.snapshot.find(client.local.ip(), Some(&checked.host));
    drop(view);
    let port = client.local.port();
    let (app, wishes) = match found {
        Matched::Unknown => return Err(unknown_host(&checked)),
        Matched::Bare(app) => return Err(nothing_serves(&app)),
        Matched::Backend(backend) => {
            let mut exchange = prepare(worker, client, named, &checked, parts, body, upgrade);
            return exchange.with_backend(backend).await;
        }
        Matched::App(app) => {
            if let Some(conversation) = by_host
                && !conversation.belong(&app.name, || connection::place(worker, &app.name))
            {
                return Err(crowded(&app.name));
            }
            let offer = app.offer(port).ok_or_else(|| no_service(&app.name, port))?;
            if !client.tls && !client.private && offer.force_https() {
                manner.unasked = Some(Who::App(app.name.clone()));
                return respond::redirect(&https_address(&checked, &parts));
            }
            if !offer.handles("http") {
                return Err(no_service(&app.name, port));
            }
            manner.of(offer, &parts);
            if let Some(statics) = &offer.buckets
                && checked.bodiless
                && let Some(response) = Box::pin(objects::fetch_any(worker, &app, statics, &parts)).await?
            {
                return Ok(response);
            }
            let wishes = headers::wishes(&parts.headers);
            (app, wishes)
        }
    };
    let mut exchange = prepare(worker, client, named, &checked, parts, body, upgrade);
    let mut selection = Selection::new(shared, &app.name, port, named.trail.began).with_wishes(wishes);
    let mut bypassed = false;
    if let Some((asked, found)) = recall(shared, &app, port, &checked, &exchange) {
        bypassed = found.allow_bypass && remember::skips(&exchange.parts.headers);
        if !bypassed {
            let said = compress::said(&exchange.parts);
            let journey = Journey::new(exchange, app, port, named.id, asked, false);
            let served = Box::pin(journey.recall(&found, selection)).await?;
            manner.of_another(served.app.offer(port), said);
            return Ok(served.response);
        }
    }
    let (response, machine) = exchange.with_app(&mut selection).await?;
    if !instruction::wanted(&response) {
        return Ok(response);
    }
    let asked = app
        .offer(port)
        .map(|offer| remember::asked(&checked.host, &exchange.parts, offer));
    let Some(asked) = asked else { return Ok(response) };
    let said = compress::said(&exchange.parts);
    let journey = Journey::new(exchange, app, port, named.id, asked, bypassed);
    let served = Box::pin(journey.follow(response, machine)).await?;
    manner.of_another(served.app.offer(port), said);
    Ok(served.response)
}

/// Looks only where an app has said something, or its service has a rule.
fn recall(
    shared: &Shared,
    app: &App,
    port: u16,
    checked: &Checked,
    exchange: &Exchange,
) -> Option<(Asked, Arc<Remembered>)> {
    if shared.replays.len() == 0 {
        return None;
    }
    let asked = remember::asked(&checked.host, &exchange.parts, app.offer(port)?);
    let found = shared.replays.find(&app.name, &asked, shared.elapsed_ms())?;
    Some((asked, found))
}

/// The request as the app is to see it.
fn prepare(
    worker: &Rc<Worker>,
    client: &Client,
    named: &mut Named<'_>,
    checked: &Checked,
    mut parts: Parts,
    body: Coming,
    upgrade: Option<Upgrade>,
) -> Exchange {
    let wire = &worker.shared.settings.wire;
    headers::to_app(
        &mut parts.headers,
        &mut named.values,
        checked,
        client,
        parts.version,
        &wire.region,
    );
    let client_upgrade = checked.upgrade.as_ref().and(upgrade);
    let reading = match body.is_end_stream() {
        true => None,
        false => parts.extensions.remove::<Reading>(),
    };
    let body = ClientBody::new(body, wire.replay_body_bytes_max, reading);
    Exchange::new(
        worker,
        Some(client.peer),
        parts,
        body,
        client_upgrade,
        Some(named.trail),
    )
}

/// While certificates are ordered the authority asks any edge, by any name.
fn acme_authorization<'a>(snapshot: &'a Snapshot, path: &str) -> Option<&'a str> {
    if snapshot.acme.is_empty() {
        return None;
    }
    let token = path.strip_prefix(ACME_CHALLENGE)?;
    snapshot.acme.get(token).map(|authorization| &**authorization)
}

fn refused(shared: &Shared, refusal: &Refusal, id: &str, accept: Accept) -> Response<OutBody> {
    let counter = if refusal.status.is_server_error() {
        &shared.metrics.failed
    } else {
        &shared.metrics.refused
    };
    counter.fetch_add(1, Relaxed);
    if !refusal.app.is_empty() && !refusal.code.is_empty() {
        shared.tell_agent(ProxyLog {
            app: refusal.app.clone(),
            code: refusal.code.to_owned(),
            message: refusal.line("request"),
            machine: refusal.machine.clone(),
            request_id: id.to_owned(),
        });
    }
    if refusal.status.is_server_error() {
        let (status, code, app) = (refusal.status.as_u16(), refusal.code, &refusal.app);
        log::info(
            "request failed",
            &[("app", app), ("code", &code), ("status", &status), ("request_id", &id)],
        );
    }
    respond::page(refusal, id, accept)
}

fn https_address(checked: &Checked, parts: &Parts) -> String {
    let host = if checked.host.contains(':') {
        format!("[{}]", checked.host)
    } else {
        checked.host.clone()
    };
    format!(
        "https://{host}{}",
        parts.uri.path_and_query().map_or("/", |path| path.as_str())
    )
}

fn unknown_host(checked: &Checked) -> Refusal {
    let happened = format!("No app is at {}.", checked.host);
    Refusal::new(
        StatusCode::NOT_FOUND,
        "",
        happened,
        "Check the name. A new name may take a moment to be known here.",
    )
}

fn nothing_serves(app: &str) -> Refusal {
    let happened = format!("The app {app} has nothing that could serve yet.");
    let advice = "Deploy the app, or wait until its deployment is through.";
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "PR01", happened, advice)
        .of_app(app)
        .retry_after(5)
}

/// Told in the app's log with the number of those dropped, like connections by address or SNI.
fn crowded(app: &str) -> Refusal {
    let happened = "The app has as many connections at this edge as it may have.";
    let advice = "Try again in a moment, on a connection that is kept open.";
    let refusal = Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "", happened, advice);
    Refusal {
        close: true,
        ..refusal.of_app(app).retry_after(1)
    }
}

fn no_service(app: &str, port: u16) -> Refusal {
    let happened = format!("The app {app} does not serve HTTP on port {port}.");
    let advice = "If you run this app: look at the services in its fly.toml.";
    let refusal = Refusal::new(StatusCode::NOT_FOUND, "", happened, advice);
    Refusal {
        close: true,
        ..refusal.of_app(app)
    }
}
