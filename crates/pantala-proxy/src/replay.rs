//! Phase 7b: an app answered that its request is to be answered elsewhere. The answer is dropped, the request with its kept
//! body goes to the next machine, and so on until one answers itself. All of it happens at the edge that the client is
//! connected to: a machine's host passes such an answer on like any other. What an app may say: `pantala_route::replay`.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{Response, StatusCode, Uri};
use pantala_route::prefer::Wishes;
use pantala_route::replay::{
    self, Caching, Course, Denied, Ended, Failure, Fallback, Invalid, REPLAYS_MAX, Reason, Replay, Transform,
};
use pantala_route::replay_cache::{Asked, Remembered};
use pantala_route::retry::Body;
use pantala_route::snapshot::{App, Machine};
use pantala_wire::feed::ProxyLog;
use tokio::time::{Instant, timeout};

use crate::body::OutBody;
use crate::forward::Exchange;
use crate::headers;
use crate::instruction::{read, wanted};
use crate::log;
use crate::respond::Refusal;
use crate::select::Selection;

const SOURCE: HeaderName = HeaderName::from_static("fly-replay-src");
const FAILED: HeaderName = HeaderName::from_static("fly-replay-failed");
const CACHE_STATUS: HeaderName = HeaderName::from_static("fly-replay-cache-status");

/// The answer of the last machine, and whose it is.
pub struct Served {
    pub response: Response<OutBody>,
    pub app: Arc<App>,
}

/// One request on its way from machine to machine.
pub struct Journey<'a> {
    pub exchange: Exchange,
    /// the app that the client's request is for, and the port by which all are reached
    pub origin: Arc<App>,
    pub port: u16,
    pub id: &'a str,
    pub asked: Asked,
    /// what is remembered was passed over, as the client wished
    pub bypassed: bool,
    /// as the client sent it, once something was changed
    original: Option<(Uri, HeaderMap)>,
    course: Course,
}

/// One machine to be asked, and why.
struct Delivery {
    app: Arc<App>,
    selection: Selection,
    by: By,
}

enum By {
    /// the client's own request
    Match,
    Memory,
    Replay {
        replay: Box<Replay>,
        issuer: Arc<Machine>,
        began: Instant,
    },
    /// to the one that asked for a replay which came to nothing; it must answer itself
    Fallback,
}

impl<'a> Journey<'a> {
    pub fn new(
        exchange: Exchange,
        origin: Arc<App>,
        port: u16,
        id: &'a str,
        asked: Asked,
        bypassed: bool,
    ) -> Journey<'a> {
        Journey {
            exchange,
            origin,
            port,
            id,
            asked,
            bypassed,
            original: None,
            course: Course::default(),
        }
    }

    /// The app's first machine answered with a replay.
    pub async fn follow(mut self, answer: Response<OutBody>, issuer: Arc<Machine>) -> Result<Served, Refusal> {
        let next = self.next(answer, issuer, &By::Match).await?;
        self.go(next).await
    }

    /// An earlier replay says where; with `plain` the app is asked if that leads nowhere.
    pub async fn recall(mut self, remembered: &Remembered, plain: Selection) -> Result<Served, Refusal> {
        let Some(delivery) = self.remembered(remembered) else {
            return self.forget_and_ask(plain).await;
        };
        self.exchange.shared.metrics.replay_cache_hits.fetch_add(1, Relaxed);
        let (answered, delivery) = self.deliver(delivery).await;
        let may_ask = delivery.selection.deaths == 0 && self.exchange.body.state() != Body::Lost;
        match answered {
            Ok((answer, machine)) if wanted(&answer) => {
                let next = self.next(answer, machine, &delivery.by).await?;
                self.go(next).await
            }
            Ok((response, _)) => Ok(Served {
                response,
                app: delivery.app,
            }),
            Err(_) if may_ask => self.forget_and_ask(plain).await,
            Err((refusal, _)) => Err(refusal),
        }
    }

    async fn forget_and_ask(mut self, plain: Selection) -> Result<Served, Refusal> {
        self.exchange
            .shared
            .replays
            .forget(&self.origin.name, &self.asked, |_| true);
        self.restore();
        let plain = Delivery {
            app: self.origin.clone(),
            selection: plain,
            by: By::Match,
        };
        self.go(plain).await
    }

    async fn go(&mut self, mut delivery: Delivery) -> Result<Served, Refusal> {
        loop {
            let (answered, tried) = self.deliver(delivery).await;
            delivery = match answered {
                Ok((answer, machine)) if wanted(&answer) => self.next(answer, machine, &tried.by).await?,
                Ok((response, _)) => {
                    let app = tried.app;
                    return Ok(Served { response, app });
                }
                Err((refusal, reason)) => self.fall_back(tried, refusal, reason)?,
            };
        }
    }

    async fn deliver(
        &mut self,
        mut delivery: Delivery,
    ) -> (Result<(Response<OutBody>, Arc<Machine>), Unanswered>, Delivery) {
        let limit = match &delivery.by {
            By::Replay { replay, began, .. } => replay.timeout.map(|limit| limit.saturating_sub(began.elapsed())),
            _ => None,
        };
        let selection = &mut delivery.selection;
        let answering = self.exchange.with_app(selection);
        let answered = match limit {
            Some(limit) => timeout(limit, answering).await,
            None => Ok(answering.await),
        };
        let answered = match answered {
            Ok(Ok(answered)) => Ok(answered),
            Ok(Err(refusal)) => Err((refusal, reason(selection))),
            Err(_) => Err((late(selection), Reason::Timeout)),
        };
        (answered, delivery)
    }

    /// Reads what the app says and prepares the request for the machine that it names.
    async fn next(&mut self, answer: Response<OutBody>, issuer: Arc<Machine>, by: &By) -> Result<Delivery, Refusal> {
        self.exchange.span.replayed();
        let kept = self.exchange.body.state() != Body::Lost;
        let said = read(answer, self.exchange.body.ended()).await;
        self.course.follow().map_err(|ended| match ended {
            Ended::FellBack => {
                let happened = "A request whose replay failed came back to the app, and it asked for another replay.";
                self.refuse(&issuer, "PA03", happened)
            }
            Ended::TooMany => {
                let happened = format!("The request was replayed {REPLAYS_MAX} times and nobody answered it.");
                self.refuse(&issuer, "PA02", happened)
            }
        })?;
        let replay = said.map_err(|why| self.invalid(&issuer, &why))?;
        if !kept {
            let limit = self.exchange.shared.settings.wire.replay_body_bytes_max;
            let happened = format!("The app asked for a replay, but the request's body is larger than {limit} bytes.");
            let refusal = self.refuse(&issuer, "PA01", happened);
            return Err(Refusal {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                ..refusal
            });
        }
        let target = replay.app.as_deref().unwrap_or(&issuer.app).to_owned();
        let app = self.app(&issuer, &target)?;
        self.exchange.shared.metrics.replays.fetch_add(1, Relaxed);
        let status = self.remember(&replay, &issuer, &target, by);
        self.restore();
        self.mark(&replay, &issuer, status)?;
        let wishes = replay.wishes(&issuer.id);
        let began = Instant::now();
        let replay = Box::new(replay);
        Ok(self.delivery(app, wishes, By::Replay { replay, issuer, began }))
    }

    fn app(&self, issuer: &Machine, target: &str) -> Result<Arc<App>, Refusal> {
        let view = self.exchange.shared.view();
        replay::authorise(&issuer.app, target, &view.snapshot).map_err(|denied| {
            let source = &issuer.app;
            let happened = match denied {
                Denied::SourceApp => format!("The app {source}, which asked for a replay, is gone."),
                Denied::SourceOrg => format!("The org of the app {source}, which asked for a replay, is not known."),
                Denied::TargetApp => format!("The app {source} asked for a replay to {target}, which does not exist."),
                Denied::Network => format!(
                    "The app {source} may not replay to {target}, which is in another network. An admin of the org can \
                     allow it: pantala orgs cross-network-replays enable."
                ),
                Denied::Org => format!(
                    "The app {source} may not replay to {target}, which belongs to another org. An admin there can allow \
                     it: pantala orgs replay-sources add."
                ),
            };
            self.refuse(issuer, denied.code(), happened)
        })?;
        let missing = || {
            self.refuse(
                issuer,
                "PA04",
                format!("The app {target} has nothing that could serve yet."),
            )
        };
        view.snapshot.apps.get(target).cloned().ok_or_else(missing)
    }

    fn delivery(&self, app: Arc<App>, wishes: Wishes, by: By) -> Delivery {
        let selection = Selection::new(&self.exchange.shared, &app.name, self.port, Instant::now()).with_wishes(wishes);
        Delivery { app, selection, by }
    }

    /// Where an earlier replay leads now, if it still leads anywhere.
    fn remembered(&mut self, remembered: &Remembered) -> Option<Delivery> {
        let (view, replay) = (self.exchange.shared.view(), &remembered.replay);
        let target = replay.app.as_deref().unwrap_or(&self.origin.name);
        replay::authorise(&self.origin.name, target, &view.snapshot).ok()?;
        let app = view.snapshot.apps.get(target)?.clone();
        self.restore();
        headers::put(&mut self.exchange.parts.headers, CACHE_STATUS, "hit");
        let mut delivery = self.delivery(app, replay.wishes(&remembered.issuer), By::Memory);
        delivery.selection.impatient = true;
        Some(delivery)
    }

    /// The word for the next machine, where anything is remembered of this request.
    fn remember(&self, replay: &Replay, issuer: &Arc<Machine>, target: &str, by: &By) -> Option<&'static str> {
        let (memory, now_ms) = (&self.exchange.shared.replays, self.exchange.shared.elapsed_ms());
        let origin = &self.origin.name;
        if replay.cache == Some(Caching::Invalidate) {
            // The app itself, and whoever was led to by mistake.
            let leads_to = |known: &Remembered| known.replay.app.as_deref().unwrap_or(origin) == &*issuer.app;
            memory.forget(origin, &self.asked, |known| issuer.app == *origin || leads_to(known));
            return None;
        }
        // One step is remembered: from the app that the client's request is for.
        if issuer.app != *origin {
            return None;
        }
        let status = if self.bypassed { "bypass" } else { "miss" };
        let Some(Caching::Keep(keep)) = &replay.cache else {
            let first = matches!(by, By::Match | By::Memory) && replay.uncacheable().is_none();
            let kept = first && memory.keep_session(origin, &self.asked, replay, &issuer.id, now_ms);
            return kept.then_some(status);
        };
        let kept = match replay.uncacheable() {
            Some(field) => Err(Invalid(format!("a replay with {field} cannot be cached"))),
            None => {
                let remembered = Remembered {
                    replay: Replay {
                        cache: None,
                        ..replay.clone()
                    },
                    issuer: issuer.id.clone(),
                    allow_bypass: keep.allow_bypass,
                };
                memory.keep_path(origin, &self.asked, keep, remembered, now_ms)
            }
        };
        if let Err(why) = kept {
            self.tell(
                issuer,
                format!("A replay to {target} was carried out but not cached: {why}."),
            );
            return None;
        }
        Some(status)
    }

    /// The original request again, without what an earlier machine was told.
    fn restore(&mut self) {
        let parts = &mut self.exchange.parts;
        match &self.original {
            Some((uri, headers)) => (parts.uri, parts.headers) = (uri.clone(), headers.clone()),
            None => {
                headers::unmark(&mut parts.headers);
                self.original = Some((parts.uri.clone(), parts.headers.clone()));
            }
        }
    }

    fn mark(&mut self, replay: &Replay, issuer: &Machine, status: Option<&str>) -> Result<(), Refusal> {
        transform(&mut self.exchange, &replay.transform).map_err(|why| self.invalid(issuer, &why))?;
        let source = replay::source(&issuer.id, &issuer.region, now_us(), replay.state.as_deref());
        let headers = &mut self.exchange.parts.headers;
        if let Ok(source) = HeaderValue::from_bytes(source.as_bytes()) {
            headers.insert(SOURCE, source);
        }
        if let Some(status) = status {
            headers::put(headers, CACHE_STATUS, status);
        }
        Ok(())
    }

    /// A replay came to nothing: back to who asked for it, if it said so.
    fn fall_back(&mut self, tried: Delivery, refusal: Refusal, reason: Reason) -> Result<Delivery, Refusal> {
        let By::Replay { replay, issuer, began } = &tried.by else {
            return Err(refusal);
        };
        let fallback = replay.fallback.filter(|_| self.exchange.body.state() != Body::Lost);
        let Some(fallback) = fallback.filter(|_| self.course.fall_back()) else {
            return Err(refusal);
        };
        let view = self.exchange.shared.view();
        let Some(app) = view.snapshot.apps.get(&issuer.app).cloned() else {
            return Err(refusal);
        };
        let wanted = replay.instance.as_deref().or(replay.prefer_instance.as_deref());
        let failure = Failure {
            instance: Some(&*refusal.machine)
                .filter(|id| !id.is_empty())
                .or(wanted)
                .unwrap_or_default(),
            app: &tried.app.name,
            region: replay.regions.first().map_or("", String::as_str),
            source: &issuer.id,
            reason,
            elapsed_ms: began.elapsed().as_millis(),
        };
        self.restore();
        headers::put(&mut self.exchange.parts.headers, FAILED, &failure.text());
        log::info(
            "replay failed",
            &[
                ("app", &tried.app.name),
                ("request_id", &self.id),
                ("failure", &failure.text()),
            ],
        );
        let wishes = Fallback::wishes(fallback, &issuer.id);
        Ok(self.delivery(app, wishes, By::Fallback))
    }

    fn invalid(&self, issuer: &Machine, why: &Invalid) -> Refusal {
        self.refuse(
            issuer,
            "PA03",
            format!("The app's replay cannot be carried out: {why}."),
        )
    }

    fn refuse(&self, issuer: &Machine, code: &'static str, happened: impl Into<String>) -> Refusal {
        let refusal = Refusal::new(StatusCode::BAD_GATEWAY, code, happened, "");
        refusal.of_app(&issuer.app).of_machine(&issuer.id)
    }

    fn tell(&self, issuer: &Machine, message: String) {
        self.exchange.shared.tell_agent(ProxyLog {
            app: issuer.app.to_string(),
            code: "PA03".to_owned(),
            message,
            machine: issuer.id.to_string(),
            request_id: self.id.to_owned(),
        });
    }
}

/// Why a delivery has no answer.
type Unanswered = (Refusal, Reason);

fn reason(selection: &Selection) -> Reason {
    match selection.attempts {
        0 => Reason::NoCandidate,
        _ => Reason::RetriesExhausted,
    }
}

fn late(selection: &Selection) -> Refusal {
    let happened = "The replay got no answer within the time that the app allowed.";
    let code = if selection.attempts > 0 { "PU02" } else { "PR04" };
    selection.refuse(code, happened).retry_after(1)
}

fn transform(exchange: &mut Exchange, transform: &Transform) -> Result<(), Invalid> {
    let parts = &mut exchange.parts;
    let target = parts.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    if let Some(target) = transform.target(target) {
        let wrong = |_| Invalid(format!("transform.path: {target:?} is no path"));
        parts.uri = Uri::from(PathAndQuery::try_from(target.as_str()).map_err(wrong)?);
    }
    for name in &transform.delete_headers {
        parts.headers.remove(name.as_str());
    }
    for (name, value) in &transform.set_headers {
        let wrong = || Invalid(format!("transform.set_headers: {name:?} is no header"));
        let value = HeaderValue::from_bytes(value.as_bytes()).map_err(|_| wrong())?;
        let name = HeaderName::try_from(name.as_str()).map_err(|_| wrong())?;
        parts.headers.insert(name, value);
    }
    Ok(())
}

fn now_us() -> u128 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_micros())
}
