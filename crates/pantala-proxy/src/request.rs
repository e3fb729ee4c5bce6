//! Phase 3: what a client sent, judged before anything acts on it. hyper has refused broken framing already; left to us are
//! the ambiguities by which a request could mean one thing here and another to the app.

use std::net::IpAddr;

use h2::ext::Protocol;
use hyper::header::{CONNECTION, HOST, HeaderName, HeaderValue, SEC_WEBSOCKET_KEY, UPGRADE};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, StatusCode, Version};
use pantala_route::names::normalise;

use crate::respond::Refusal;
use crate::websocket;

/// A request that may go on.
#[derive(Debug)]
pub struct Checked {
    /// as the client wrote it, for the app
    pub authority: String,
    /// as we look it up
    pub host: String,
    /// `Upgrade` token of a request that wants another protocol
    pub upgrade: Option<String>,
    pub bodiless: bool,
}

pub fn check(parts: &Parts, body_empty: bool) -> Result<Checked, Refusal> {
    if parts.method == Method::CONNECT {
        let advice = "This server is no forward proxy.";
        let refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "", "CONNECT is not served.", advice);
        return Err(Refusal { close: true, ..refusal });
    }
    if let Some(name) = parts.headers.keys().find(|name| aliases_ours(name)) {
        return Err(Refusal::malformed(format!(
            "The header {name} would pass for another one."
        )));
    }
    let authority = authority(parts)?;
    let host = normalise(&authority).ok_or_else(|| Refusal::malformed("The host name is not valid."))?;
    Ok(Checked {
        authority,
        host,
        upgrade: upgrade(parts, body_empty),
        bodiless: body_empty,
    })
}

/// HTTP/1.0 knows requests without a name: they are for the address that they came to.
pub fn name_of_old(parts: &mut Parts, local: IpAddr) {
    if parts.version == Version::HTTP_10 && !parts.headers.contains_key(HOST) && parts.uri.authority().is_none() {
        let host = match local.to_canonical() {
            IpAddr::V6(ip) => format!("[{ip}]"),
            IpAddr::V4(ip) => ip.to_string(),
        };
        if let Ok(host) = HeaderValue::from_str(&host) {
            parts.headers.insert(HOST, host);
        }
    }
}

/// A WebSocket over HTTP/2 (RFC 8441) as HTTP/1.1 asks for it. h2 has refused `Connection` and `Upgrade` of HTTP/2
/// clients, so these two are ours.
pub fn from_extended_connect(parts: &mut Parts) {
    let websocket = |protocol: &Protocol| protocol.as_str().eq_ignore_ascii_case("websocket");
    if parts.method == Method::CONNECT && parts.extensions.get().is_some_and(websocket) {
        parts.method = Method::GET;
        let headers = &mut parts.headers;
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        // HTTP/2 clients send none; what the app makes of it is not shown to them.
        if let Ok(key) = HeaderValue::from_str(&websocket::key(fastrand::u128(..))) {
            headers.insert(SEC_WEBSOCKET_KEY, key);
        }
    }
}

fn authority(parts: &Parts) -> Result<String, Refusal> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => return Err(Refusal::malformed("The request has more than one Host.")),
        (Some(host), None) => Some(
            host.to_str()
                .map_err(|_| Refusal::malformed("The Host is not readable."))?,
        ),
        (None, _) => None,
    };
    let target = parts.uri.authority().map(|authority| authority.as_str());
    if target.is_some_and(|target| target.contains('@')) {
        return Err(Refusal::malformed("The address carries user information."));
    }
    match (host, target) {
        (Some(host), Some(target)) if !host.eq_ignore_ascii_case(target) => {
            Err(Refusal::malformed("Host and the address of the request differ."))
        }
        // HTTP/2 carries the name in the address; HTTP/1.1 must send Host even with an absolute address.
        (None, Some(target)) if parts.version == Version::HTTP_2 => Ok(target.to_owned()),
        (Some(host), _) => Ok(host.to_owned()),
        (None, _) => Err(Refusal::malformed("The request has no Host.")),
    }
}

/// Apps that map `-` and `_` to one character (CGI, WSGI) would take such a header for one that we vouch for.
fn aliases_ours(name: &HeaderName) -> bool {
    let name = name.as_str();
    if !name.contains('_') {
        return false;
    }
    let name = name.replace('_', "-");
    const OURS: [&str; 8] = [
        "via",
        "host",
        "connection",
        "content-length",
        "transfer-encoding",
        "x-request-start",
        "forwarded",
        "x-real-ip",
    ];
    name.starts_with("fly-") || name.starts_with("x-forwarded-") || OURS.contains(&name.as_str())
}

fn upgrade(parts: &Parts, body_empty: bool) -> Option<String> {
    if parts.version == Version::HTTP_10 || !body_empty || !lists(&parts.headers, "upgrade") {
        return None;
    }
    let token = parts.headers.get(UPGRADE)?.to_str().ok()?;
    // h2c would carry requests past every rule of this proxy.
    (!token.to_ascii_lowercase().contains("h2c")).then(|| token.to_owned())
}

/// `Connection` lists the token.
pub fn lists(headers: &HeaderMap, token: &str) -> bool {
    let values = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|one| one.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::Request;

    fn parts(uri: &str, headers: &[(&'static str, &str)]) -> Parts {
        let mut builder = Request::builder().uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    #[test]
    fn exactly_one_host() {
        assert_eq!(
            check(&parts("/", &[("host", "Web.test:80")]), true).unwrap().host,
            "web.test"
        );
        for bad in [
            parts("/", &[]),
            parts("/", &[("host", "a.test"), ("host", "a.test")]),
            parts("/", &[("host", "a b")]),
            parts("http://b.test/", &[("host", "a.test")]),
            parts("http://u@a.test/", &[("host", "u@a.test")]),
            parts("http://a.test/", &[]),
        ] {
            assert_eq!(
                check(&bad, true).unwrap_err().status,
                StatusCode::BAD_REQUEST,
                "{bad:?}"
            );
        }
    }

    #[test]
    fn the_name_of_http_2_is_its_address() {
        let mut request = parts("https://web.test/", &[]);
        request.version = Version::HTTP_2;
        assert_eq!(check(&request, true).unwrap().authority, "web.test");
    }

    #[test]
    fn aliases_are_refused() {
        for name in [
            "fly_client_ip",
            "x_forwarded_for",
            "x-forwarded_proto",
            "content_length",
            "transfer_encoding",
        ] {
            assert!(
                check(&parts("/", &[("host", "a.test"), (name, "1")]), true).is_err(),
                "{name}"
            );
        }
        assert!(check(&parts("/", &[("host", "a.test"), ("my_header", "1")]), true).is_ok());
    }

    #[test]
    fn h2c_is_no_upgrade() {
        let of = |token| {
            let headers = [
                ("host", "a.test"),
                ("connection", "keep-alive, Upgrade"),
                ("upgrade", token),
            ];
            check(&parts("/", &headers), true).unwrap().upgrade
        };
        assert_eq!(of("websocket").as_deref(), Some("websocket"));
        assert_eq!(of("h2c"), None);
    }

    #[test]
    fn connect_is_refused() {
        let mut request = parts("/", &[("host", "a.test")]);
        request.method = Method::CONNECT;
        assert_eq!(
            check(&request, true).unwrap_err().status,
            StatusCode::METHOD_NOT_ALLOWED
        );
    }
}
