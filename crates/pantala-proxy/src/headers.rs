//! Headers on both ways: as Fly.io's page on request headers names them.

use std::net::{IpAddr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

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

pub fn to_app(headers: &mut HeaderMap, checked: &Checked, client: &Client, version: Version, region: &str, id: &str) {
    let trailers = headers.contains_key(TE) && takes_trailers(headers);
    remove_hop_by_hop(headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    expect::keep(headers, version, checked.bodiless);
    unmark(headers);
    join_cookies(headers);
    put(headers, HOST, &checked.authority);
    let (peer, local) = (client.peer.ip().to_canonical(), client.local.ip().to_canonical());
    put(headers, CLIENT_IP, &peer.to_string());
    let chain = forwarded_for(headers, peer, local);
    put(headers, FORWARDED_FOR, &chain);
    let (proto, ssl) = if client.tls { ("https", "on") } else { ("http", "off") };
    put(headers, FORWARDED_PROTO, proto);
    put(headers, FORWARDED_SSL, ssl);
    let port = HeaderValue::from(client.local.port());
    headers.entry(FORWARDED_PORT).or_insert(port.clone());
    headers.insert(FLY_PORT, port);
    put(headers, REGION, region);
    put(headers, REQUEST_ID, id);
    put(headers, REQUEST_START, &format!("t={}", now_us()));
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
    PROXY_ONLY.iter().for_each(|name| drop(headers.remove(name)));
}

/// `upgraded`: the `Upgrade` token of a 101 stays.
pub fn to_client(
    headers: &mut HeaderMap,
    options: Option<&HTTPResponseOptions>,
    version: Version,
    id: &str,
    upgraded: bool,
) {
    let token = upgraded.then(|| headers.get(UPGRADE).cloned()).flatten();
    remove_hop_by_hop(headers);
    if options.and_then(|o| o.pristine) != Some(true) {
        headers.insert(SERVER, HeaderValue::from_static(SERVER_NAME));
        append_via(headers, version);
        put(headers, REQUEST_ID, id);
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
            .filter_map(|name| HeaderName::try_from(name.trim()).ok())
            .filter(|name| *name != CONTENT_LENGTH && *name != HOST)
            .collect();
        listed.iter().for_each(|name| drop(headers.remove(name)));
    }
    HOP_BY_HOP.iter().for_each(|name| drop(headers.remove(name)));
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

fn forwarded_for(headers: &HeaderMap, peer: IpAddr, local: IpAddr) -> String {
    let chain = headers
        .get_all(FORWARDED_FOR)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let ends = [peer.to_string(), local.to_string()];
    chain
        .chain(ends.iter().map(String::as_str))
        .collect::<Vec<_>>()
        .join(", ")
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
    match HeaderValue::from_str(value) {
        Ok(value) => drop(headers.insert(name, value)),
        // A value that cannot be written must not leave the client's in its place.
        Err(_) => drop(headers.remove(name)),
    }
}

fn now_us() -> u128 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_micros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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
        to_app(&mut map, &checked, &client, Version::HTTP_2, "iad", "01J-iad");
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
        to_client(&mut plain, None, Version::HTTP_11, "01J-iad", false);
        assert_eq!(plain.get("server").unwrap(), SERVER_NAME);
        assert_eq!(plain.get("via").unwrap(), "1.1 fly.io");
        assert!(!plain.contains_key("connection"));

        let options: HTTPResponseOptions = serde_json::from_value(json!({"pristine": true, "headers":
            {"X-One": "1", "X-Two": ["a", "b"], "X-Gone": false, "Transfer-Encoding": "chunked"}}))
        .unwrap();
        let mut pristine = headers(&[("server", "gunicorn"), ("x-gone", "1")]);
        to_client(&mut pristine, Some(&options), Version::HTTP_11, "01J-iad", false);
        assert_eq!(pristine.get("server").unwrap(), "gunicorn");
        assert_eq!(pristine.get("x-one").unwrap(), "1");
        assert_eq!(pristine.get_all("x-two").iter().count(), 2);
        for gone in ["x-gone", "via", "fly-request-id", "transfer-encoding"] {
            assert!(!pristine.contains_key(gone), "{gone}");
        }
    }
}
