//! Phases 3 to 8 of one request, in order: check, match, redirect, forward, respond.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode, Version};
use pantala_route::matching::Matched;
use pantala_wire::feed::{HTTPResponseOptions, ProxyLog};

use crate::body::{ClientBody, OutBody};
use crate::forward::{Exchange, Upstreams};
use crate::headers::{self, Client};
use crate::mesh::pool::MeshPool;
use crate::pool::Pool;
use crate::request::{self, Checked};
use crate::respond::{self, Accept, Refusal};
use crate::select::Selection;
use crate::shared::Shared;
use crate::{ids, log};

/// One worker thread's view of the world.
pub struct Worker {
    pub shared: Arc<Shared>,
    pub pool: Rc<Pool>,
    pub mesh: Option<Rc<MeshPool>>,
}

/// Never fails: what goes wrong is a page.
pub async fn serve(worker: Rc<Worker>, client: Client, request: Request<Incoming>) -> Response<OutBody> {
    let shared = &worker.shared;
    shared.metrics.requests.fetch_add(1, Relaxed);
    let id = ids::request_id(&shared.settings.wire.region);
    let (version, accept) = (request.version(), Accept::of(request.headers()));
    let mut options = None;
    let (mut response, upgraded) = match answer(&worker, &client, &id, request, &mut options).await {
        Ok(response) => {
            let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
            (response, upgraded)
        }
        Err(refusal) => (refused(shared, &refusal, &id, accept), false),
    };
    let close = respond::asks_to_close(&response);
    headers::to_client(response.headers_mut(), options.as_ref(), version, &id, upgraded);
    if !upgraded && version != Version::HTTP_2 && (close || shared.leaving()) {
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

async fn answer(
    worker: &Rc<Worker>,
    client: &Client,
    id: &str,
    mut request: Request<Incoming>,
    options: &mut Option<HTTPResponseOptions>,
) -> Result<Response<OutBody>, Refusal> {
    let shared = &worker.shared;
    let on_upgrade = request.extensions_mut().remove::<hyper::upgrade::OnUpgrade>();
    let (mut parts, body) = request.into_parts();
    let checked = request::check(&parts, body.is_end_stream())?;
    let found = shared.view().snapshot.find(client.local.ip(), Some(&checked.host));
    let port = client.local.port();
    let upstreams = match found {
        Matched::Unknown => return Err(unknown_host(&checked)),
        Matched::Bare(app) => return Err(nothing_serves(&app)),
        Matched::Backend(backend) => Upstreams::Backend(backend),
        Matched::App(app) => {
            let offer = app.offer(port).ok_or_else(|| no_service(&app.name, port))?;
            if !client.tls && !client.private && offer.force_https() {
                return respond::redirect(&https_address(&checked, &parts));
            }
            if !offer.handles("http") {
                return Err(no_service(&app.name, port));
            }
            *options = offer.port.http_options.as_ref().and_then(|o| o.response.clone());
            let selection = Selection::new(shared, &app.name, port);
            Upstreams::App(Box::new(selection.with_wishes(headers::wishes(&parts.headers))))
        }
    };
    headers::to_app(
        &mut parts.headers,
        &checked,
        client,
        parts.version,
        &shared.settings.wire.region,
        id,
    );
    let client_upgrade = checked.upgrade.as_ref().and(on_upgrade);
    let exchange = Exchange::new(worker, client.peer, parts, ClientBody::new(body), client_upgrade);
    exchange.run(upstreams).await
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
            message: refusal.happened.clone(),
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

fn no_service(app: &str, port: u16) -> Refusal {
    let happened = format!("The app {app} does not serve HTTP on port {port}.");
    let advice = "If you run this app: look at the services in its fly.toml.";
    let refusal = Refusal::new(StatusCode::NOT_FOUND, "", happened, advice);
    Refusal {
        close: true,
        ..refusal.of_app(app)
    }
}
