//! Headers on both ways: as Fly.io's page on request headers names them.

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderName, HeaderValue, SERVER, TE, TRANSFER_ENCODING, UPGRADE, VIA,
};
use hyper::{HeaderMap, Version};
use pantala_route::prefer::Wishes;
use pantala_wire::feed::HTTPResponseOptions;
use serde_json::Value;

use crate::expect;
use crate::ids::RequestId;
use crate::request::Checked;

const CLIENT_IP: HeaderName = HeaderName::from_static("fly-client-ip");
const FLY_PORT: HeaderName = HeaderName::from_static("fly-forwarded-port");
const REGION: HeaderName = HeaderName::from_static("fly-region");
const REQUEST_ID: HeaderName = HeaderName::from_static("fly-request-id");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_SSL: HeaderName = HeaderName::from_static("x-forwarded-ssl");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const REQUEST_START: HeaderName = HeaderName::from_static("x-request-start");
const UNAVAILABLE: HeaderName = HeaderName::from_static("fly-preferred-instance-unavailable");
/// Set by the proxy on redelivery only: a client that sends them would pass for it.
const PROXY_ONLY: [HeaderName; 4] = [
    HeaderName::from_static("fly-replay-src"),
    HeaderName::from_static("fly-replay-failed"),
    HeaderName::from_static("fly-replay-cache-status"),
    UNAVAILABLE,
];
const HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("proxy-authenticate"),
    HeaderName::from_static("http2-settings"),
];
/// `Fly/<build> (<date>)`
const SERVER_NAME: &str = concat!("Fly/", env!("CARGO_PKG_VERSION"), " (", env!("PANTALA_BUILD_DATE"), ")");

/// All that starts so is between proxies and apps.
const FLY: &str = "fly-";
/// Of a usual request's values in one piece.
const VALUES_BYTES: usize = 256;

/// The values that one request's headers get here, each a part of one piece of memory: to clone them copies nothing.
pub struct Values {
    room: BytesMut,
    /// what the request is called
    id: Option<HeaderValue>,
}

impl Values {
    pub fn of(id: &str) -> Values {
        let mut values = Values {
            room: BytesMut::with_capacity(VALUES_BYTES),
            id: None,
        };
        values.id = values.write(format_args!("{id}")).map(unlike);
        values
    }

    /// None where it cannot be a header's value.
    fn write(&mut self, text: std::fmt::Arguments<'_>) -> Option<HeaderValue> {
        let written = self.room.write_fmt(text);
        let value = self.room.split().freeze();
        written.ok()?;
        HeaderValue::from_maybe_shared(value).ok()
    }
}

/// No other request has the same value, so that HTTP/2 is not to keep it for the next: each would push out one that repeats.
fn unlike(mut value: HeaderValue) -> HeaderValue {
    value.set_sensitive(true);
    value
}

/// What the connection of a client says about each of its requests.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    pub peer: SocketAddr,
    pub local: SocketAddr,
    pub tls: bool,
    /// by a Flycast address, from a machine
    pub private: bool,
    /// nothing but `Host` says whose connection it is
    pub by_host: bool,
}

pub fn to_app(
    headers: &mut HeaderMap,
    values: &mut Values,
    checked: &Checked,
    client: &Client,
    version: Version,
    region: &str,
) {
    let trailers = headers.contains_key(TE) && takes_trailers(headers);
    remove_hop_by_hop(headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    expect::keep(headers, version, checked.bodiless);
    unmark(headers);
    join_cookies(headers);
    if headers.get(HOST).is_none_or(|host| host != &checked.authority) {
        put(headers, HOST, &checked.authority);
    }
    let (peer, local) = (client.peer.ip().to_canonical(), client.local.ip().to_canonical());
    set(headers, CLIENT_IP, values.write(format_args!("{peer}")));
    let chain = forwarded_for(headers, values, peer, local);
    set(headers, FORWARDED_FOR, chain);
    let (proto, ssl) = if client.tls { ("https", "on") } else { ("http", "off") };
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static(proto));
    headers.insert(FORWARDED_SSL, HeaderValue::from_static(ssl));
    let port = values.write(format_args!("{}", client.local.port()));
    if !headers.contains_key(FORWARDED_PORT) {
        set(headers, FORWARDED_PORT, port.clone());
    }
    set(headers, FLY_PORT, port);
    set(headers, REGION, values.write(format_args!("{region}")));
    set(headers, REQUEST_ID, values.id.clone());
    set(
        headers,
        REQUEST_START,
        values.write(format_args!("t={}", now_us())).map(unlike),
    );
    append_via(headers, version);
    if let Some(token) = &checked.upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        put(headers, UPGRADE, token);
    }
}

/// The one word of TE that goes further: the client can take what follows a body (gRPC).
fn takes_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(TE).iter().filter_map(|value| value.to_str().ok());
    let mut words = values.flat_map(|value| value.split(','));
    words.any(|word| word.trim().eq_ignore_ascii_case("trailers"))
}

/// As an app's HTTP/1.1 connection needs it beside.
pub fn for_http_1(headers: &mut HeaderMap, body: bool) {
    if body && !headers.contains_key(CONTENT_LENGTH) {
        // Said explicitly, since hyper assumes that a GET has no body.
        headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    if headers.contains_key(TE) && !headers.contains_key(CONNECTION) {
        headers.insert(CONNECTION, HeaderValue::from_static("TE"));
    }
}

/// Of a request that another proxy sends on.
pub fn request_id(headers: &HeaderMap) -> Option<RequestId> {
    RequestId::read(headers.get(REQUEST_ID)?.to_str().ok()?)
}

/// What the client says about the machine it wants.
pub fn wishes(headers: &HeaderMap) -> Wishes {
    if !any_of_ours(headers) {
        return Wishes::default();
    }
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let one = |name| text(name).filter(|value| !value.is_empty()).map(str::to_owned);
    let list = |name| {
        let parts = text(name).into_iter().flat_map(|value| value.split(','));
        parts
            .map(|part| part.trim().to_ascii_lowercase())
            .filter(|part| !part.is_empty())
            .collect()
    };
    Wishes {
        prefer_instance: one("fly-prefer-instance-id"),
        force_instance: one("fly-force-instance-id"),
        prefer_region: list("fly-prefer-region"),
        force_region: list("fly-force-region"),
        ..Wishes::default()
    }
}

/// Tells the app which machine was preferred and does not serve.
pub fn unavailable(headers: &mut HeaderMap, machine: Option<&str>) {
    match machine {
        Some(machine) => put(headers, UNAVAILABLE, machine),
        None => drop(headers.remove(UNAVAILABLE)),
    }
}

/// Takes away what a delivery before this one was told.
pub fn unmark(headers: &mut HeaderMap) {
    if any_of_ours(headers) {
        PROXY_ONLY.iter().for_each(|name| drop(headers.remove(name)));
    }
}

/// Most requests have none, which is cheaper to see than to look for each.
fn any_of_ours(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| name.as_str().starts_with(FLY))
}

/// `upgraded`: the `Upgrade` token of a 101 stays.
pub fn to_client(
    headers: &mut HeaderMap,
    options: Option<&HTTPResponseOptions>,
    version: Version,
    values: &Values,
    upgraded: bool,
) {
    let token = upgraded.then(|| headers.get(UPGRADE).cloned()).flatten();
    remove_hop_by_hop(headers);
    if options.and_then(|o| o.pristine) != Some(true) {
        headers.insert(SERVER, HeaderValue::from_static(SERVER_NAME));
        append_via(headers, version);
        set(headers, REQUEST_ID, values.id.clone());
    }
    if let Some(wanted) = options.and_then(|o| o.headers.as_ref()) {
        wanted
            .iter()
            .for_each(|(name, value)| override_header(headers, name, value));
    }
    if let Some(token) = token {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, token);
    }
}

/// `false` removes, a text sets, a list sets several. Framing stays ours.
fn override_header(headers: &mut HeaderMap, name: &str, value: &Value) {
    let Ok(name) = HeaderName::try_from(name) else { return };
    if HOP_BY_HOP.contains(&name) || name == CONTENT_LENGTH {
        return;
    }
    let one = |value: &Value| match value {
        Value::String(text) => HeaderValue::from_str(text).ok(),
        Value::Number(number) => HeaderValue::from_str(&number.to_string()).ok(),
        Value::Bool(true) => Some(HeaderValue::from_static("true")),
        _ => None,
    };
    match value {
        Value::Bool(false) => drop(headers.remove(name)),
        Value::Array(values) => {
            headers.remove(&name);
            for value in values.iter().filter_map(one) {
                headers.append(&name, value);
            }
        }
        value => {
            if let Some(value) = one(value) {
                headers.insert(name, value);
            }
        }
    }
}

/// What `Connection` names goes first, so that nobody can have one of ours removed.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        let listed: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter(|name| !goes_anyway(name.trim()))
            .filter_map(|name| HeaderName::try_from(name.trim()).ok())
            .filter(|name| *name != CONTENT_LENGTH && *name != HOST)
            .collect();
        listed.iter().for_each(|name| drop(headers.remove(name)));
    }
    HOP_BY_HOP.iter().for_each(|name| drop(headers.remove(name)));
}

/// The usual words of `Connection`: no header, or one of those that never go further.
fn goes_anyway(word: &str) -> bool {
    ["keep-alive", "close", "upgrade"]
        .iter()
        .any(|known| word.eq_ignore_ascii_case(known))
}

/// HTTP/2 clients may send a cookie per line; HTTP/1.1 knows one.
fn join_cookies(headers: &mut HeaderMap) {
    let mut cookies = headers.get_all(COOKIE).iter();
    if let (Some(first), Some(second)) = (cookies.next(), cookies.next()) {
        let all = [first, second].into_iter().chain(cookies);
        let joined = all.map(HeaderValue::as_bytes).collect::<Vec<_>>().join(&b"; "[..]);
        if let Ok(joined) = HeaderValue::from_bytes(&joined) {
            headers.insert(COOKIE, joined);
        }
    }
}

fn forwarded_for(headers: &HeaderMap, values: &mut Values, peer: IpAddr, local: IpAddr) -> Option<HeaderValue> {
    let mut chain = headers
        .get_all(FORWARDED_FOR)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .peekable();
    if chain.peek().is_none() {
        return values.write(format_args!("{peer}, {local}"));
    }
    let before = chain.collect::<Vec<_>>().join(", ");
    values.write(format_args!("{before}, {peer}, {local}"))
}

fn append_via(headers: &mut HeaderMap, version: Version) {
    let via = match version {
        Version::HTTP_2 => "2 fly.io",
        Version::HTTP_10 => "1.0 fly.io",
        _ => "1.1 fly.io",
    };
    headers.append(VIA, HeaderValue::from_static(via));
}

pub fn put(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    set(headers, name, HeaderValue::from_str(value).ok());
}

/// A value that cannot be written must not leave the client's in its place.
fn set(headers: &mut HeaderMap, name: HeaderName, value: Option<HeaderValue>) {
    match value {
        Some(value) => drop(headers.insert(name, value)),
        None => drop(headers.remove(name)),
    }
}

fn now_us() -> u64 {
    let passed = SystemTime::now().duration_since(UNIX_EPOCH);
    passed.map_or(0, |passed| passed.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ID: &str = "01J-iad";

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        map
    }

    fn sent(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = headers(pairs);
        let checked = Checked {
            authority: "web.test".into(),
            host: "web.test".into(),
            upgrade: None,
            bodiless: true,
        };
        let client = Client {
            peer: "10.0.0.9:5".parse().unwrap(),
            local: "10.0.0.1:443".parse().unwrap(),
            tls: true,
            private: false,
            by_host: false,
        };
        to_app(&mut map, &mut Values::of(ID), &checked, &client, Version::HTTP_2, "iad");
        map
    }

    #[test]
    fn what_an_app_sees() {
        let map = sent(&[
            ("x-forwarded-for", "1.1.1.1"),
            ("fly-client-ip", "6.6.6.6"),
            ("x-forwarded-port", "81"),
        ]);
        for (name, value) in [
            ("fly-client-ip", "10.0.0.9"),
            ("x-forwarded-for", "1.1.1.1, 10.0.0.9, 10.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-ssl", "on"),
            ("x-forwarded-port", "81"),
            ("fly-forwarded-port", "443"),
            ("fly-region", "iad"),
            ("fly-request-id", "01J-iad"),
            ("via", "2 fly.io"),
            ("host", "web.test"),
        ] {
            assert_eq!(map.get(name).unwrap(), value, "{name}");
        }
    }

    #[test]
    fn connection_cannot_remove_ours() {
        let map = sent(&[
            ("connection", "x-secret, fly-client-ip, close"),
            ("x-secret", "1"),
            ("keep-alive", "9"),
            ("te", "gzip"),
        ]);
        assert_eq!(map.get("fly-client-ip").unwrap(), "10.0.0.9");
        for gone in ["x-secret", "connection", "keep-alive", "te"] {
            assert!(!map.contains_key(gone), "{gone}");
        }
    }

    #[test]
    fn cookies_become_one() {
        assert_eq!(
            sent(&[("cookie", "a=1"), ("cookie", "b=2")]).get("cookie").unwrap(),
            "a=1; b=2"
        );
    }

    #[test]
    fn what_a_client_sees() {
        let mut plain = headers(&[("server", "gunicorn"), ("connection", "close")]);
        to_client(&mut plain, None, Version::HTTP_11, &Values::of(ID), false);
        assert_eq!(plain.get("server").unwrap(), SERVER_NAME);
        assert_eq!(plain.get("via").unwrap(), "1.1 fly.io");
        assert!(!plain.contains_key("connection"));

        let options: HTTPResponseOptions = serde_json::from_value(json!({"pristine": true, "headers":
            {"X-One": "1", "X-Two": ["a", "b"], "X-Gone": false, "Transfer-Encoding": "chunked"}}))
        .unwrap();
        let mut pristine = headers(&[("server", "gunicorn"), ("x-gone", "1")]);
        to_client(&mut pristine, Some(&options), Version::HTTP_11, &Values::of(ID), false);
        assert_eq!(pristine.get("server").unwrap(), "gunicorn");
        assert_eq!(pristine.get("x-one").unwrap(), "1");
        assert_eq!(pristine.get_all("x-two").iter().count(), 2);
        for gone in ["x-gone", "via", "fly-request-id", "transfer-encoding"] {
            assert!(!pristine.contains_key(gone), "{gone}");
        }
    }
}
