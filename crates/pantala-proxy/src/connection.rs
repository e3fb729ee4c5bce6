//! Phase 2: where a connection enters and what it speaks. The address it came to tells the app, or the client's own words do
//! (`pantala_route::entry` decides); TLS is ended as that app's port wants it; the rest is left to [`crate::http`] or
//! [`crate::raw`].

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use pantala_route::entry::{Closed, Entry, Named, Opening, Speech, Way};
use pantala_route::matching::Matched;
use pantala_route::names::normalise;
use pantala_route::rates::is_power_of_ten;
use pantala_wire::feed::ProxyLog;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;

use crate::headers::Client;
use crate::hello::{self, Failed, HANDSHAKE_RECORD, Heard};
use crate::http::http_1;
use crate::http2::http_2;
use crate::limits::Place;
use crate::service::Worker;
use crate::settings::Expects;
use crate::{codes, postgres, raw};

/// From the accept to the end of the ClientHello and its turn.
const HELLO_MAX: Duration = Duration::from_secs(10);
/// The rest: at the usual rates one range of clients cannot hold all turns for so long.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
const GOODBYE_MAX: Duration = Duration::from_secs(1);
const GOODBYE_BYTES_MAX: u64 = 64 * 1024;
/// Where a name that leads nowhere gets a page that says so.
const HTTPS_PORT: u16 = 443;
/// Postgres' questions begin with their length.
const POSTGRES_FIRST: u8 = 0;

const SPEAKS_HTTPS: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 60\r\n\
    connection: close\r\n\r\nThis port speaks HTTPS. Ask again with https:// before it.\r\n";

pub async fn serve(worker: Rc<Worker>, expects: Expects, stream: TcpStream, peer: SocketAddr) {
    worker.shared.metrics.connections_open.fetch_add(1, Relaxed);
    converse(&worker, expects, stream, peer).await;
    worker.shared.metrics.connections_open.fetch_sub(1, Relaxed);
}

/// Errors end the connection and concern nobody but its client, who sees it end.
async fn converse(worker: &Rc<Worker>, expects: Expects, stream: TcpStream, peer: SocketAddr) {
    let Ok(local) = stream.local_addr() else { return };
    let client = Client {
        peer,
        local,
        tls: false,
        private: false,
        by_host: false,
    };
    let entry = worker.shared.view().snapshot.entry(peer, local);
    match entry {
        Entry::Way(way) => by_address(worker, client, way, stream).await,
        Entry::Shared => by_words(worker, client, expects, stream).await,
        Entry::Closed(why) => closed(worker, local, None, why), // after the accept, as every port is open
    }
}

/// The address belongs to one app: its port says what is spoken.
async fn by_address(worker: &Rc<Worker>, client: Client, way: Way, mut stream: TcpStream) {
    let Some(_place) = place(worker, &way.app.name) else {
        return;
    };
    let client = Client {
        private: way.private,
        ..client
    };
    match way.speech {
        Speech::Http => Box::pin(http_1(worker, client, stream)).await,
        Speech::Raw => Box::pin(raw::carry(worker, client, &way, stream)).await,
        Speech::Https | Speech::Tls => Box::pin(secure(worker, client, stream, Origin::Address(way))).await,
        Speech::Postgres => {
            let by = Instant::now() + HELLO_MAX;
            let asked = match first_byte(&stream, by).await {
                Some(first) => postgres::ask(&mut stream, first, by).await,
                None => return,
            };
            match asked {
                Ok(()) => Box::pin(secure(worker, client, stream, Origin::Address(way))).await,
                Err(failed) => unsecured(worker, Some(&way.app.name), &failed),
            }
        }
    }
}

/// The address says nothing, so the client has to: SNI, or `Host` in plain HTTP.
async fn by_words(worker: &Rc<Worker>, client: Client, expects: Expects, mut stream: TcpStream) {
    let by_host = Client {
        by_host: true,
        ..client
    };
    match expects {
        Expects::Http => return Box::pin(http_1(worker, by_host, stream)).await,
        Expects::Bytes => return,
        Expects::Tls | Expects::Anything => {}
    }
    let mut opening = Opening::ClientHello;
    if expects == Expects::Anything {
        let by = Instant::now() + HELLO_MAX;
        match first_byte(&stream, by).await {
            None => return,
            Some(HANDSHAKE_RECORD) => {}
            Some(first @ POSTGRES_FIRST) => match postgres::ask(&mut stream, first, by).await {
                Ok(()) => opening = Opening::Postgres,
                Err(failed) => return unsecured(worker, None, &failed),
            },
            Some(_) => return Box::pin(http_1(worker, by_host, stream)).await,
        }
    }
    let pages = expects == Expects::Tls || client.local.port() == HTTPS_PORT;
    Box::pin(secure(worker, client, stream, Origin::Words(opening, pages))).await;
}

/// Where the app of a handshake is known from.
enum Origin {
    Address(Way),
    Words(Opening, bool),
}

impl Origin {
    fn speaks_http(&self) -> bool {
        match self {
            Origin::Address(way) => way.speech == Speech::Https,
            Origin::Words(_, pages) => *pages,
        }
    }
}

/// TLS ends here; what is inside is HTTP or the app's own. Like everywhere here, each stage has its room for itself: an idle
/// connection holds that of its last one alone.
async fn secure(worker: &Rc<Worker>, client: Client, stream: TcpStream, origin: Origin) {
    let Some((stream, way, _place)) = Box::pin(shake(worker, client, stream, origin)).await else {
        return;
    };
    let client = Client { tls: true, ..client };
    match way {
        Some(way) if way.speech != Speech::Https => Box::pin(raw::carry(worker, client, &way, stream)).await,
        _ if stream.get_ref().1.alpn_protocol() == Some(b"h2") => Box::pin(http_2(worker, client, stream)).await,
        _ => Box::pin(http_1(worker, client, stream)).await,
    }
}

/// The handshake; certificate, protocols and versions are those of the port that the ClientHello leads to.
async fn shake(
    worker: &Rc<Worker>,
    client: Client,
    mut stream: TcpStream,
    origin: Origin,
) -> Option<(Box<TlsStream<TcpStream>>, Option<Way>, Option<Place>)> {
    let shared = &worker.shared;
    let by = Instant::now() + HELLO_MAX;
    let of_address = match &origin {
        Origin::Address(way) => Some(way.app.name.clone()),
        Origin::Words(..) => None,
    };
    let accepted = match hello::listen(&mut stream, by).await {
        Ok(Heard::Hello(accepted)) => accepted,
        Ok(Heard::Other) if origin.speaks_http() => {
            shared.metrics.handshakes_failed.fetch_add(1, Relaxed);
            refuse_plain(&mut stream).await;
            return None;
        }
        Ok(Heard::Other) => return missed(worker, of_address.as_ref(), &not_tls()),
        Err(failed) => return missed(worker, of_address.as_ref(), &failed),
    };
    let hello = accepted.client_hello();
    if hello::wants_validation(&hello) {
        let config = shared.tls.challenge.clone();
        let by = Instant::now() + HANDSHAKE_MAX;
        if let Ok(mut proven) = hello::finish(*accepted, config, stream, by).await {
            let _ = timeout(GOODBYE_MAX, proven.shutdown()).await;
        }
        return None;
    }
    let name = hello.server_name().and_then(normalise);
    let way = match origin {
        Origin::Address(way) => Some(way),
        Origin::Words(opening, pages) => {
            let named = shared
                .view()
                .snapshot
                .named(client.local, name.as_deref(), opening, pages);
            match named {
                Named::Way(way) => Some(way),
                Named::Page => None,
                Named::Closed(why) => {
                    closed(worker, client.local, name.as_deref(), why);
                    return None;
                }
            }
        }
    };
    let app = way.as_ref().map(|way| way.app.name.clone());
    let place = match (&app, &of_address) {
        (Some(app), None) => Some(place(worker, app)?),
        _ => None, // by the address it has one already
    };
    let ready = match allowed(worker, client.peer, name.as_deref().or(app.as_deref())) {
        Ok(()) => config(worker, way.as_ref()),
        Err(failed) => Err(failed),
    };
    let config = match ready {
        Ok(config) => config,
        Err(failed) => return missed(worker, app.as_ref(), &failed),
    };
    let Ok(Ok(_turn)) = timeout_at(by, shared.limits.handshakes.acquire()).await else {
        shared.metrics.handshakes_failed.fetch_add(1, Relaxed);
        return None;
    };
    match hello::finish(*accepted, config, stream, Instant::now() + HANDSHAKE_MAX).await {
        Ok(stream) => Some((Box::new(stream), way, place)),
        Err(failed) => missed(worker, app.as_ref(), &failed),
    }
}

fn config(worker: &Worker, way: Option<&Way>) -> Result<Arc<ServerConfig>, Failed> {
    let (speech, options) = way.map_or((Speech::Https, None), |way| (way.speech, way.tls_options()));
    let made = worker.shared.tls.config(speech, options);
    made.map_err(|error| Failed {
        code: "PT09",
        why: error.to_string(),
    })
}

fn allowed(worker: &Worker, peer: SocketAddr, name: Option<&str>) -> Result<(), Failed> {
    let (limits, now_ms) = (&worker.shared.limits, worker.shared.elapsed_ms());
    let wire = &worker.shared.settings.wire;
    if !limits.allows_range(peer.ip(), now_ms) {
        let why = format!(
            "more than {} a second came from the range of {}; reuse connections",
            wire.handshakes_per_range_per_s_max,
            peer.ip().to_canonical()
        );
        return Err(Failed { code: "PT01", why });
    }
    if let Some(name) = name
        && !limits.allows_name(name, now_ms)
    {
        let most = wire.handshakes_per_name_per_s_max;
        let why = format!("more than {most} a second asked for {name}; let clients reuse connections");
        return Err(Failed { code: "PT02", why });
    }
    Ok(())
}

fn not_tls() -> Failed {
    Failed {
        code: "PT04",
        why: "the client did not begin with TLS, which this port ends; let it use TLS, or remove the tls handler"
            .to_owned(),
    }
}

fn missed<T>(worker: &Worker, app: Option<&Arc<str>>, failed: &Failed) -> Option<T> {
    unsecured(worker, app, failed);
    None
}

/// In the app's log, if it is known whose handshake it was: the first, the tenth, the hundredth of a minute.
fn unsecured(worker: &Worker, app: Option<&Arc<str>>, failed: &Failed) {
    let shared = &worker.shared;
    shared.metrics.handshakes_failed.fetch_add(1, Relaxed);
    let Some((app, count)) = app.and_then(|app| Some((app, shared.limits.worth_telling(app, failed.code)?))) else {
        return;
    };
    let times = if count > 1 {
        format!(" ({count} times within a minute)")
    } else {
        String::new()
    };
    let advice = codes::find(failed.code).map_or("", |code| code.advice);
    shared.tell_agent(ProxyLog {
        app: app.to_string(),
        code: failed.code.to_owned(),
        message: format!("A TLS handshake failed: {}{times}. {advice}", failed.why),
        machine: String::new(),
        request_id: String::new(),
    });
}

/// Nobody is there. What its owner would wonder about is said in the app's log; who knocks at random is not.
fn closed(worker: &Worker, local: SocketAddr, name: Option<&str>, why: Closed) {
    let failed = |code, why: String| {
        if let Matched::App(app) = worker.shared.view().snapshot.find(local.ip(), name) {
            unsecured(worker, Some(&app.name), &Failed { code, why });
        }
    };
    let port = local.port();
    match why {
        Closed::TlsOnFlycast => failed(
            "PT06",
            format!(
                "port {port} ends TLS, and there is no certificate for a Flycast address; let clients use a port \
                 without the tls handler"
            ),
        ),
        Closed::OtherSpeech => failed(
            "PT04",
            format!(
                "port {port} was asked for by name at a shared address, where only the tls handler (pg_tls for Postgres) \
                 tells the app; add it, or allocate an address of the app's own"
            ),
        ),
        Closed::NoApp | Closed::NoService | Closed::OtherNetwork => {}
    }
}

/// One of the connections that the app may have at this edge.
pub fn place(worker: &Worker, app: &Arc<str>) -> Option<Place> {
    let shared = &worker.shared;
    match shared.limits.enter(app) {
        Ok(place) => Some(place),
        Err(dropped) => {
            if is_power_of_ten(dropped) {
                let most = shared.settings.wire.connections_per_app_max;
                let happened = format!(
                    "{dropped} connections were dropped: the app has {most} at this edge already. Let clients reuse \
                     connections, or ask the operator for more (connections_per_app_max)."
                );
                shared.tell_agent(ProxyLog {
                    app: app.to_string(),
                    code: String::new(), // Fly Proxy has none for it
                    message: happened,
                    machine: String::new(),
                    request_id: String::new(),
                });
            }
            None
        }
    }
}

/// Seen, not taken. None when the client left or said nothing.
async fn first_byte(stream: &TcpStream, by: Instant) -> Option<u8> {
    let mut first = [0];
    match timeout_at(by, stream.peek(&mut first)).await {
        Ok(Ok(1)) => Some(first[0]),
        _ => None,
    }
}

/// What was sent is read to its end, or a reset would overtake the answer.
async fn refuse_plain(stream: &mut TcpStream) {
    let goodbye = async {
        stream.write_all(SPEAKS_HTTPS).await?;
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(GOODBYE_BYTES_MAX), &mut tokio::io::sink()).await
    };
    let _ = timeout(GOODBYE_MAX, goodbye).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_plain_http_says_its_length() {
        let text = std::str::from_utf8(SPEAKS_HTTPS).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("content-length: {}", body.len())),
            "{}",
            body.len()
        );
    }
}
