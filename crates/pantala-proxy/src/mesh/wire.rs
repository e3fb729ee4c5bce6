//! What two proxies say to each other beside the app's request and answer: headers of one HTTP/2 stream. A request and its
//! answer are an ordinary stream; an upgrade (WebSocket) and a TCP connection are CONNECT streams. All headers here begin
//! with `pantala-mesh-` and end at the receiving proxy.

use std::net::SocketAddr;

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use pantala_route::turn::{Attempt, Reason};
use serde::{Deserialize, Serialize};

use crate::respond::Refusal;
use crate::timing::Waited;

const PREFIX: &str = "pantala-mesh-";
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

/// Edge to the machine's host, never further.
pub const HOPS_MAX: u32 = 1;

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
    pub app: String,
    pub machine: String,
    /// as the client sees it
    pub port: u16,
    pub attempt: Attempt,
    /// no other machine of the host will do
    pub only: bool,
    /// for everything that precedes the first byte on the machine
    pub deadline_ms: u64,
    pub client: SocketAddr,
    pub hops: u32,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0} is not right")]
pub struct Malformed(HeaderName);

impl Call {
    pub fn write(&self, kind: &Kind, headers: &mut HeaderMap) {
        strip(headers);
        put(headers, APP, &self.app);
        put(headers, MACHINE, &self.machine);
        headers.insert(PORT, HeaderValue::from(self.port));
        headers.insert(ATTEMPT, HeaderValue::from_static(self.attempt.word()));
        if self.only {
            headers.insert(ONLY, HeaderValue::from_static("1"));
        }
        headers.insert(DEADLINE_MS, HeaderValue::from(self.deadline_ms));
        put(headers, CLIENT, &self.client.to_string());
        headers.insert(HOPS, HeaderValue::from(self.hops));
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

    pub fn read(headers: &HeaderMap) -> Result<Call, Malformed> {
        let attempt = Attempt::of(text(headers, &ATTEMPT)?).ok_or(Malformed(ATTEMPT))?;
        Ok(Call {
            app: text(headers, &APP)?.to_owned(),
            machine: text(headers, &MACHINE)?.to_owned(),
            port: parsed(headers, &PORT)?,
            attempt,
            only: headers.contains_key(ONLY),
            deadline_ms: parsed(headers, &DEADLINE_MS)?,
            client: parsed(headers, &CLIENT)?,
            hops: parsed(headers, &HOPS)?,
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
    let ours: Vec<HeaderName> = headers
        .keys()
        .filter(|n| n.as_str().starts_with(PREFIX))
        .cloned()
        .collect();
    ours.iter().for_each(|name| drop(headers.remove(name)));
}

// -- the answer -----------------------------------------------------------------------------------------------------

/// What the machine's host says with each answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// exact, with the answered request
    pub in_flight: Option<u32>,
    /// of these, how many came from the asking host
    pub yours: Option<u32>,
    pub refused: Option<Reason>,
    /// of an upgrade's answer: the app's own status and token
    pub status: Option<u16>,
    pub upgrade: Option<String>,
    /// before the request reached a machine there
    pub waited: Option<Waited>,
}

impl Said {
    pub fn write(&self, headers: &mut HeaderMap) {
        strip(headers);
        if let Some(in_flight) = self.in_flight {
            headers.insert(IN_FLIGHT, HeaderValue::from(in_flight));
        }
        if let Some(yours) = self.yours {
            headers.insert(YOURS, HeaderValue::from(yours));
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
        let said = Said {
            in_flight: parsed(headers, &IN_FLIGHT).ok(),
            yours: parsed(headers, &YOURS).ok(),
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
            client: "[2001:db8::1]:5".parse().unwrap(),
            hops: 1,
        }
    }

    #[test]
    fn a_call_comes_across_whole() {
        let switch = Switch {
            method: "GET".into(),
            target: "/chat?x=1".into(),
            token: "websocket".into(),
        };
        for sent in [Kind::Http, Kind::Tcp, Kind::Upgrade(switch)] {
            let mut headers = HeaderMap::new();
            call().write(&sent, &mut headers);
            assert_eq!(Call::read(&headers).unwrap(), call());
            assert_eq!(kind(&headers).unwrap(), sent);
            strip(&mut headers);
            assert!(headers.is_empty());
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut headers = HeaderMap::new();
        call().write(&Kind::Http, &mut headers);
        headers.insert(PORT, HeaderValue::from_static("70000"));
        assert_eq!(
            Call::read(&headers).unwrap_err().to_string(),
            "pantala-mesh-port is not right"
        );
        headers.remove(ATTEMPT);
        assert_eq!(Call::read(&headers).unwrap_err(), Malformed(ATTEMPT));
    }

    #[test]
    fn neither_client_nor_app_speaks_in_our_name() {
        let mut headers = HeaderMap::new();
        headers.insert(REFUSED, HeaderValue::from_static("full"));
        headers.insert(KIND, HeaderValue::from_static("tcp"));
        call().write(&Kind::Http, &mut headers);
        assert_eq!(kind(&headers).unwrap(), Kind::Http);
        let said = Said {
            in_flight: Some(3),
            yours: Some(1),
            ..Said::default()
        };
        headers.insert(REFUSED, HeaderValue::from_static("full"));
        said.write(&mut headers);
        assert_eq!(Said::take(&mut headers), said);
        assert!(headers.is_empty());
    }
}
