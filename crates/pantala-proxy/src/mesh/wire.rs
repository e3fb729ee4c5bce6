//! What two proxies say to each other beside the app's request and answer: headers of one HTTP/2 stream. A request and its
//! answer are an ordinary stream; an upgrade (WebSocket) and a TCP connection are CONNECT streams. All headers here begin
//! with `pantala-mesh-` and end at the receiving proxy.
//!
//! What each request needs is said in one of two [`Form`]s. Which one a connection carries is agreed on in its handshake
//! ([`super::tls`]); an answer comes in the form of its request.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use pantala_route::turn::{Attempt, Reason};
use serde::{Deserialize, Serialize};

use crate::respond::Refusal;
use crate::timing::Waited;

const PREFIX: &str = "pantala-mesh-";
/// All of a usual call in one value, which is the same from one request to the next: HPACK then says it in a byte.
const CALL: HeaderName = HeaderName::from_static("pantala-mesh-call");
/// All of a usual answer: what the machine has in flight for others than the asking host.
const OTHERS: HeaderName = HeaderName::from_static("pantala-mesh-others");
const APP: HeaderName = HeaderName::from_static("pantala-mesh-app");
const MACHINE: HeaderName = HeaderName::from_static("pantala-mesh-machine");
const PORT: HeaderName = HeaderName::from_static("pantala-mesh-port");
const ATTEMPT: HeaderName = HeaderName::from_static("pantala-mesh-attempt");
const ONLY: HeaderName = HeaderName::from_static("pantala-mesh-only");
const DEADLINE_MS: HeaderName = HeaderName::from_static("pantala-mesh-deadline-ms");
const CLIENT: HeaderName = HeaderName::from_static("pantala-mesh-client");
const HOPS: HeaderName = HeaderName::from_static("pantala-mesh-hops");
const KIND: HeaderName = HeaderName::from_static("pantala-mesh-kind");
const TARGET: HeaderName = HeaderName::from_static("pantala-mesh-target");
const METHOD: HeaderName = HeaderName::from_static("pantala-mesh-method");
const UPGRADE: HeaderName = HeaderName::from_static("pantala-mesh-upgrade");
const STATUS: HeaderName = HeaderName::from_static("pantala-mesh-status");
const IN_FLIGHT: HeaderName = HeaderName::from_static("pantala-mesh-in-flight");
const YOURS: HeaderName = HeaderName::from_static("pantala-mesh-yours");
const WAITED: HeaderName = HeaderName::from_static("pantala-mesh-waited");
const REFUSED: HeaderName = HeaderName::from_static("pantala-mesh-refused");

/// Of a usual call's value.
const CALL_BYTES: usize = 64;

/// Edge to the machine's host, never further.
pub const HOPS_MAX: u32 = 1;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// a field for each: every proxy reads it
    #[default]
    Long,
    /// one field: only between proxies that have both said that they read it
    Brief,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Http,
    /// with the method, the path and the token of the client's request
    Upgrade(Switch),
    Tcp,
    Ping,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    pub method: String,
    pub target: String,
    pub token: String,
}

/// What the receiving proxy has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    pub app: Arc<str>,
    pub machine: Arc<str>,
    /// as the client sees it
    pub port: u16,
    pub attempt: Attempt,
    /// no other machine of the host will do
    pub only: bool,
    /// for everything that precedes the first byte on the machine
    pub deadline_ms: u64,
    /// nobody has asked for it yet, so that the brief form leaves it out
    pub client: Option<SocketAddr>,
    pub hops: u32,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0} is not right")]
pub struct Malformed(HeaderName);

impl Call {
    pub fn write(&self, form: Form, kind: &Kind, headers: &mut HeaderMap) {
        strip(headers);
        match form {
            Form::Long => self.write_long(headers),
            Form::Brief => self.write_brief(headers),
        }
        match kind {
            Kind::Http => {}
            Kind::Tcp => drop(headers.insert(KIND, HeaderValue::from_static("tcp"))),
            Kind::Ping => drop(headers.insert(KIND, HeaderValue::from_static("ping"))),
            Kind::Upgrade(switch) => {
                headers.insert(KIND, HeaderValue::from_static("upgrade"));
                put(headers, METHOD, &switch.method);
                put(headers, TARGET, &switch.target);
                put(headers, UPGRADE, &switch.token);
            }
        }
    }

    fn write_long(&self, headers: &mut HeaderMap) {
        put(headers, APP, &self.app);
        put(headers, MACHINE, &self.machine);
        headers.insert(PORT, HeaderValue::from(self.port));
        headers.insert(ATTEMPT, HeaderValue::from_static(self.attempt.word()));
        if self.only {
            headers.insert(ONLY, HeaderValue::from_static("1"));
        }
        headers.insert(DEADLINE_MS, HeaderValue::from(self.deadline_ms));
        if let Some(client) = self.client {
            put(headers, CLIENT, &client.to_string());
        }
        headers.insert(HOPS, HeaderValue::from(self.hops));
    }

    /// `web m1 443 take 10000 1 only`: neither app nor machine has a space in its name.
    fn write_brief(&self, headers: &mut HeaderMap) {
        let mut text = BytesMut::with_capacity(CALL_BYTES);
        let (app, machine, attempt) = (&self.app, &self.machine, self.attempt.word());
        let only = if self.only { " only" } else { "" };
        let (port, deadline_ms, hops) = (self.port, self.deadline_ms, self.hops);
        // Writing to memory cannot fail.
        let _ = write!(text, "{app} {machine} {port} {attempt} {deadline_ms} {hops}{only}");
        if let Ok(value) = HeaderValue::from_maybe_shared(text.freeze()) {
            headers.insert(CALL, value);
        }
    }

    /// With the form in which it came, which is that of the answer.
    pub fn read(headers: &HeaderMap) -> (Form, Result<Call, Malformed>) {
        match headers.get(CALL) {
            Some(value) => (Form::Brief, Call::read_brief(value).ok_or(Malformed(CALL))),
            None => (Form::Long, Call::read_long(headers)),
        }
    }

    fn read_long(headers: &HeaderMap) -> Result<Call, Malformed> {
        let attempt = Attempt::of(text(headers, &ATTEMPT)?).ok_or(Malformed(ATTEMPT))?;
        Ok(Call {
            app: text(headers, &APP)?.into(),
            machine: text(headers, &MACHINE)?.into(),
            port: parsed(headers, &PORT)?,
            attempt,
            only: headers.contains_key(ONLY),
            deadline_ms: parsed(headers, &DEADLINE_MS)?,
            client: Some(parsed(headers, &CLIENT)?),
            hops: parsed(headers, &HOPS)?,
        })
    }

    /// Words that a later version adds are skipped.
    fn read_brief(value: &HeaderValue) -> Option<Call> {
        let mut words = value.to_str().ok()?.split(' ');
        let mut word = || words.next().filter(|word| !word.is_empty());
        Some(Call {
            app: word()?.into(),
            machine: word()?.into(),
            port: word()?.parse().ok()?,
            attempt: Attempt::of(word()?)?,
            deadline_ms: word()?.parse().ok()?,
            hops: word()?.parse().ok()?,
            only: words.any(|word| word == "only"),
            client: None,
        })
    }
}

pub fn kind(headers: &HeaderMap) -> Result<Kind, Malformed> {
    if !headers.contains_key(KIND) {
        return Ok(Kind::Http);
    }
    match text(headers, &KIND)? {
        "tcp" => Ok(Kind::Tcp),
        "ping" => Ok(Kind::Ping),
        "upgrade" => Ok(Kind::Upgrade(Switch {
            method: text(headers, &METHOD)?.to_owned(),
            target: text(headers, &TARGET)?.to_owned(),
            token: text(headers, &UPGRADE)?.to_owned(),
        })),
        _ => Err(Malformed(KIND)),
    }
}

pub fn ping(headers: &mut HeaderMap) {
    headers.insert(KIND, HeaderValue::from_static("ping"));
}

/// Neither an app nor a client may speak in our name.
pub fn strip(headers: &mut HeaderMap) {
    // A usual head has none, or one.
    while let Some(name) = headers.keys().find(|name| is_ours(name)).cloned() {
        headers.remove(name);
    }
}

fn is_ours(name: &HeaderName) -> bool {
    name.as_str().starts_with(PREFIX)
}

// -- the answer -----------------------------------------------------------------------------------------------------

/// What the machine has in flight, exact and of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// for others than the asking host
    pub others: u32,
    /// for the asking host, with the answered request. It knows that well enough: the brief form says it with refusals only
    pub yours: u32,
}

/// What the machine's host says with each answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    pub load: Option<Load>,
    pub refused: Option<Reason>,
    /// of an upgrade's answer: the app's own status and token
    pub status: Option<u16>,
    pub upgrade: Option<String>,
    /// before the request reached a machine there
    pub waited: Option<Waited>,
}

impl Said {
    pub fn write(&self, form: Form, headers: &mut HeaderMap) {
        strip(headers);
        match (form, self.load) {
            // Others' requests change less often than how many are under way.
            (Form::Brief, Some(load)) if self.refused.is_none() => {
                headers.insert(OTHERS, HeaderValue::from(load.others));
            }
            (_, Some(load)) => {
                headers.insert(IN_FLIGHT, HeaderValue::from(load.others.saturating_add(load.yours)));
                headers.insert(YOURS, HeaderValue::from(load.yours));
            }
            (_, None) => {}
        }
        if let Some(reason) = self.refused {
            headers.insert(REFUSED, HeaderValue::from_static(reason.word()));
        }
        if let Some(waited) = self.waited.filter(Waited::any) {
            put(headers, WAITED, &waited.written());
        }
        if let Some(status) = self.status {
            headers.insert(STATUS, HeaderValue::from(status));
        }
        if let Some(token) = &self.upgrade {
            put(headers, UPGRADE, token);
        }
    }

    /// Takes what is ours out of an answer.
    pub fn take(headers: &mut HeaderMap) -> Said {
        let others = headers.remove(OTHERS);
        let others = others.and_then(|others| others.to_str().ok()?.parse().ok());
        let brief = others.map(|others| Load { others, yours: 0 });
        if !headers.keys().any(is_ours) {
            return Said {
                load: brief,
                ..Said::default()
            };
        }
        let long = || {
            let (in_flight, yours): (u32, u32) = (parsed(headers, &IN_FLIGHT).ok()?, parsed(headers, &YOURS).ok()?);
            let others = in_flight.saturating_sub(yours);
            Some(Load { others, yours })
        };
        let said = Said {
            load: brief.or_else(long),
            refused: text(headers, &REFUSED).ok().map(Reason::of),
            status: parsed(headers, &STATUS).ok(),
            upgrade: text(headers, &UPGRADE).ok().map(str::to_owned),
            waited: text(headers, &WAITED).ok().map(Waited::read),
        };
        strip(headers);
        said
    }
}

/// The body of a refusal: what the edge's page says.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Told {
    pub code: String,
    pub happened: String,
    pub machine: String,
}

impl Told {
    pub fn of(refusal: &Refusal) -> Told {
        Told {
            code: refusal.code.to_owned(),
            happened: refusal.happened.clone(),
            machine: refusal.machine.clone(),
        }
    }

    /// Only codes that are ours are shown.
    pub fn code(&self) -> &'static str {
        crate::codes::find(&self.code).map_or("PR04", |code| code.name)
    }
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    // Names of apps and machines and paths that came as such are writable as they are.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a str, Malformed> {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.ok_or_else(|| Malformed(name.clone()))
}

fn parsed<T: std::str::FromStr>(headers: &HeaderMap, name: &HeaderName) -> Result<T, Malformed> {
    text(headers, name)?.parse().map_err(|_| Malformed(name.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        Call {
            app: "web".into(),
            machine: "m1".into(),
            port: 443,
            attempt: Attempt::Wake,
            only: true,
            deadline_ms: 1500,
            client: Some("[2001:db8::1]:5".parse().unwrap()),
            hops: 1,
        }
    }

    const FORMS: [Form; 2] = [Form::Long, Form::Brief];

    #[test]
    fn a_call_comes_across_whole() {
        let switch = Switch {
            method: "GET".into(),
            target: "/chat?x=1".into(),
            token: "websocket".into(),
        };
        for sent in [Kind::Http, Kind::Tcp, Kind::Upgrade(switch)] {
            for (form, only) in FORMS.into_iter().flat_map(|form| [(form, true), (form, false)]) {
                let call = Call { only, ..call() };
                let mut headers = HeaderMap::new();
                call.write(form, &sent, &mut headers);
                let client = call.client.filter(|_| form == Form::Long);
                assert_eq!(Call::read(&headers), (form, Ok(Call { client, ..call })));
                assert_eq!(kind(&headers).unwrap(), sent);
                strip(&mut headers);
                assert!(headers.is_empty());
            }
        }
    }

    #[test]
    fn the_brief_form_is_one_field_that_repeats() {
        let said = || {
            let mut headers = HeaderMap::new();
            call().write(Form::Brief, &Kind::Http, &mut headers);
            headers
        };
        assert_eq!(said().len(), 1);
        assert_eq!(said(), said());
        assert_eq!(said()[CALL], "web m1 443 wake 1500 1 only");
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut headers = HeaderMap::new();
        call().write(Form::Long, &Kind::Http, &mut headers);
        headers.insert(PORT, HeaderValue::from_static("70000"));
        let wrong = |headers: &HeaderMap| Call::read(headers).1.unwrap_err();
        assert_eq!(wrong(&headers).to_string(), "pantala-mesh-port is not right");
        headers.remove(ATTEMPT);
        assert_eq!(wrong(&headers), Malformed(ATTEMPT));
    }

    #[test]
    fn a_brief_call_is_whole_or_malformed() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(CALL, HeaderValue::from_static(text));
            Call::read(&headers)
        };
        let more = read("web m1 443 wake 1500 1 later only words");
        assert_eq!(more, (Form::Brief, Ok(Call { client: None, ..call() })));
        for wrong in [
            "",
            "web",
            "web m1 443 wake 1500",
            "web  443 wake 1500 1",
            "web m1 70000 wake 1500 1",
            "web m1 443 sleep 1500 1",
            "web m1 443 wake soon 1",
        ] {
            assert_eq!(read(wrong), (Form::Brief, Err(Malformed(CALL))), "{wrong:?}");
        }
    }

    #[test]
    fn neither_client_nor_app_speaks_in_our_name() {
        for form in FORMS {
            let mut headers = HeaderMap::new();
            for (name, value) in [
                (REFUSED, "full"),
                (KIND, "tcp"),
                (CALL, "api m2 80 queue 1 1"),
                (APP, "api"),
            ] {
                headers.insert(name, HeaderValue::from_static(value));
            }
            call().write(form, &Kind::Http, &mut headers);
            assert_eq!(kind(&headers).unwrap(), Kind::Http);
            let (read, came) = Call::read(&headers);
            assert_eq!((read, &*came.unwrap().app), (form, "web"));
            headers.clear();
            for (name, value) in [(REFUSED, "full"), (OTHERS, "9"), (YOURS, "9"), (IN_FLIGHT, "9")] {
                headers.insert(name, HeaderValue::from_static(value));
            }
            let (said, taken) = said(form, None);
            said.write(form, &mut headers);
            assert_eq!(Said::take(&mut headers), taken);
            assert!(headers.is_empty());
        }
    }

    /// What is said, and what comes across of it.
    fn said(form: Form, refused: Option<Reason>) -> (Said, Said) {
        let load = Some(Load { others: 2, yours: 1 });
        let said = Said {
            load,
            refused,
            ..Said::default()
        };
        let yours = u32::from(form == Form::Long || refused.is_some());
        let load = Some(Load { others: 2, yours });
        (said.clone(), Said { load, ..said })
    }

    #[test]
    fn an_answer_says_the_load_in_both_forms() {
        for (form, refused) in FORMS
            .into_iter()
            .flat_map(|form| [(form, None), (form, Some(Reason::Full))])
        {
            let (mut said, mut taken) = said(form, refused);
            for rare in [false, true] {
                if rare {
                    let waited = Waited::read("cold=812,queue=3");
                    (said.waited, said.status, said.upgrade) = (Some(waited), Some(101), Some("websocket".into()));
                    (taken.waited, taken.status, taken.upgrade) = (Some(waited), Some(101), Some("websocket".into()));
                }
                let mut headers = HeaderMap::new();
                said.write(form, &mut headers);
                assert_eq!(Said::take(&mut headers), taken);
                assert!(headers.is_empty());
            }
        }
    }
}
