//! Who gets a connection and what is spoken on it, before a byte of a request: the destination address decides where it
//! belongs to one app (dedicated, Flycast), the client's own words elsewhere (SNI, `Host`). What is spoken follows from the
//! handlers of the app's port.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use pantala_wire::feed::{Port, TLSOptions};

use crate::internal::network_of;
use crate::matching::Matched;
use crate::snapshot::{App, Offer, Snapshot};

/// What clients speak on a port of an app. Handlers may stand in any order; unknown ones mean nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speech {
    /// bytes, and what they mean is the app's business
    Raw,
    Http,
    /// TLS ends here, the rest is bytes
    Tls,
    Https,
    /// TLS as Postgres asks for it, then bytes
    Postgres,
}

impl Speech {
    pub fn of(port: &Port) -> Speech {
        let handles = |wanted: &str| port.handlers.iter().flatten().any(|handler| handler == wanted);
        match (
            handles("pg_tls"),
            handles("tls"),
            handles("http") || handles("edge_http"),
        ) {
            (true, ..) => Speech::Postgres,
            (false, true, true) => Speech::Https,
            (false, true, false) => Speech::Tls,
            (false, false, true) => Speech::Http,
            (false, false, false) => Speech::Raw,
        }
    }

    pub fn ends_tls(self) -> bool {
        matches!(self, Speech::Tls | Speech::Https | Speech::Postgres)
    }

    pub fn is_http(self) -> bool {
        matches!(self, Speech::Http | Speech::Https)
    }
}

/// A PROXY header that the app gets before the client's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announce {
    Text,
    Binary,
}

impl Announce {
    pub fn of(port: &Port) -> Option<Announce> {
        let wanted = port.handlers.iter().flatten().any(|handler| handler == "proxy_proto");
        let version = || {
            port.proxy_proto_options
                .as_ref()
                .and_then(|options| options.version.as_deref())
        };
        wanted.then(|| match version() {
            Some("v2") => Announce::Binary,
            _ => Announce::Text,
        })
    }
}

/// A connection's way to a port of an app.
#[derive(Clone, Debug)]
pub struct Way {
    pub app: Arc<App>,
    pub port: u16,
    pub speech: Speech,
    pub announce: Option<Announce>,
    /// by a Flycast address: from a machine, never redirected to HTTPS
    pub private: bool,
    offer: usize,
}

impl Way {
    fn to(app: &Arc<App>, port: u16, private: bool) -> Option<Way> {
        let offer = app.offer_index(port)?;
        let declared = &app.offers[offer].port;
        Some(Way {
            speech: Speech::of(declared),
            announce: Announce::of(declared),
            app: app.clone(),
            port,
            private,
            offer,
        })
    }

    pub fn offer(&self) -> &Offer {
        &self.app.offers[self.offer]
    }

    pub fn tls_options(&self) -> Option<&TLSOptions> {
        self.offer().port.tls_options.as_ref()
    }
}

/// Why nobody is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// neither address nor name leads to an app
    NoApp,
    /// the app serves something else, not this port
    NoService,
    /// a Flycast address of another private network
    OtherNetwork,
    /// the port ends TLS, which a Flycast address has no certificate for
    TlsOnFlycast,
    /// the port speaks no TLS, or another one; on a shared address only TLS tells the app
    OtherSpeech,
}

/// What the addresses of a connection say.
#[derive(Clone, Debug)]
pub enum Entry {
    Way(Way),
    /// the client's own words tell the app
    Shared,
    Closed(Closed),
}

/// How a client on a shared address began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    ClientHello,
    /// a ClientHello after Postgres' own question for it
    Postgres,
}

/// What a name in a ClientHello on a shared address leads to.
#[derive(Clone, Debug)]
pub enum Named {
    Way(Way),
    /// HTTPS without a port of an app: a platform service, or a page that says what is missing
    Page,
    Closed(Closed),
}

impl Snapshot {
    pub fn entry(&self, peer: SocketAddr, local: SocketAddr) -> Entry {
        let Some(address) = self.addresses.get(&local.ip().to_canonical()) else {
            return Entry::Shared;
        };
        let Some(app) = self.apps.get(&address.app) else {
            return Entry::Closed(Closed::NoApp);
        };
        if address.private && !self.may_use(app, address.network, peer.ip()) {
            return Entry::Closed(Closed::OtherNetwork);
        }
        match Way::to(app, local.port(), address.private) {
            None => Entry::Closed(Closed::NoService),
            Some(way) if way.private && way.speech.ends_tls() => Entry::Closed(Closed::TlsOnFlycast),
            Some(way) => Entry::Way(way),
        }
    }

    fn may_use(&self, app: &App, network: Option<u64>, peer: IpAddr) -> bool {
        let wanted = network.or(app.network);
        wanted.is_some() && network_of(peer) == wanted
    }

    /// `name` as [`crate::names::normalise`] spells it. `pages`: the port is one where HTTPS is spoken whatever the app.
    pub fn named(&self, local: SocketAddr, name: Option<&str>, opening: Opening, pages: bool) -> Named {
        let nobody = |why| if pages { Named::Page } else { Named::Closed(why) };
        if opening == Opening::Postgres {
            return match self.find(local.ip(), name) {
                Matched::App(app) => match Way::to(&app, local.port(), false) {
                    Some(way) if way.speech == Speech::Postgres => Named::Way(way),
                    Some(_) => Named::Closed(Closed::OtherSpeech),
                    None => Named::Closed(Closed::NoService),
                },
                _ => Named::Closed(Closed::NoApp),
            };
        }
        match self.find(local.ip(), name) {
            Matched::Backend(_) => nobody(Closed::NoService),
            Matched::Bare(_) => nobody(Closed::NoService),
            Matched::Unknown => nobody(Closed::NoApp),
            Matched::App(app) => match Way::to(&app, local.port(), false) {
                None => nobody(Closed::NoService),
                Some(way) if way.speech.ends_tls() => Named::Way(way),
                Some(_) => nobody(Closed::OtherSpeech),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;
    use pantala_wire::feed::FeedRow;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn row(key: &str, value: Value) -> FeedRow {
        FeedRow {
            stream: "routes".to_owned(),
            key: key.to_owned(),
            value: Some((&value).into()),
        }
    }

    fn socket(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    const HANDLERS: [&str; 6] = ["tls", "http", "edge_http", "pg_tls", "proxy_proto", "udp?"];

    /// The app `web` in network 7: a port of each kind, on 192.0.2.1 (dedicated) and fdaa:0:7::f (Flycast).
    fn view(ports: Vec<Value>, flycast_network: Option<u64>) -> Snapshot {
        let mut table = Table::new("n1");
        let mut flycast = json!({"kind": "private", "app": "web"});
        if let Some(network) = flycast_network {
            flycast["network"] = json!(network);
        }
        let service = json!({"app": "web", "protocol": "tcp", "internal_port": 80, "ports": ports, "concurrency": {}});
        table.apply(
            1,
            vec![
                row("app/web", json!({"app": "web", "org": "o", "network": 7})),
                row("host/web.test", json!({"app": "web"})),
                row("host/api.test", json!({"backend": "127.0.0.1:1"})),
                row("host/bare.test", json!({"app": "bare"})),
                row("addr/192.0.2.1", json!({"kind": "dedicated", "app": "web"})),
                row("addr/192.0.2.2", json!({"kind": "dedicated", "app": "bare"})),
                row("addr/fdaa:0:7::f", flycast),
                row("svc/web/d", service),
                row(
                    "m/m1",
                    json!({"id": "m1", "app": "web", "region": "iad", "node": "n1", "instance_id": "1", "generation": 1,
                        "state": "started", "ip4": "127.0.0.1", "ip6": "fdaa::2", "services": ["d"], "passing": [true]}),
                ),
            ],
        );
        assert_eq!(table.set_aside().count(), 0);
        table.snapshot()
    }

    fn usual_ports() -> Vec<Value> {
        vec![
            json!({"port": 80, "handlers": ["http"], "force_https": true}),
            json!({"port": 443, "handlers": ["http", "tls"]}),
            json!({"port": 8883, "handlers": ["tls", "proxy_proto"], "tls_options": {"alpn": ["mqtt"]}}),
            json!({"port": 5432, "handlers": ["pg_tls", "proxy_proto"], "proxy_proto_options": {"version": "v2"}}),
            json!({"port": 25}),
            json!({"start_port": 20, "end_port": 30, "handlers": ["tls"]}),
        ]
    }

    fn speech(entry: Entry) -> Result<Speech, Closed> {
        match entry {
            Entry::Way(way) => Ok(way.speech),
            Entry::Shared => panic!("shared"),
            Entry::Closed(why) => Err(why),
        }
    }

    #[test]
    fn a_dedicated_address_has_the_ports_of_its_app() {
        let view = view(usual_ports(), None);
        for (port, wanted) in [
            (80, Ok(Speech::Http)),
            (443, Ok(Speech::Https)),
            (8883, Ok(Speech::Tls)),
            (5432, Ok(Speech::Postgres)),
            (25, Ok(Speech::Raw)),
            (20, Ok(Speech::Tls)),
            (22, Ok(Speech::Tls)),
            (31, Err(Closed::NoService)),
        ] {
            let local = SocketAddr::new("192.0.2.1".parse().unwrap(), port);
            assert_eq!(speech(view.entry(socket("1.2.3.4:5"), local)), wanted, "{port}");
        }
        let bare = view.entry(socket("1.2.3.4:5"), socket("192.0.2.2:80"));
        assert_eq!(speech(bare), Err(Closed::NoApp));
        assert!(matches!(
            view.entry(socket("1.2.3.4:5"), socket("192.0.2.9:80")),
            Entry::Shared
        ));
        let mapped = view.entry(socket("[::ffff:1.2.3.4]:5"), socket("[::ffff:192.0.2.1]:25"));
        assert_eq!(speech(mapped), Ok(Speech::Raw));
    }

    #[test]
    fn flycast_is_for_its_network_and_has_no_tls() {
        let own = view(usual_ports(), None);
        let (inside, outside) = (socket("[fdaa:0:7:1::2]:5"), socket("[fdaa:0:8:1::2]:5"));
        assert_eq!(speech(own.entry(inside, socket("[fdaa:0:7::f]:80"))), Ok(Speech::Http));
        assert_eq!(speech(own.entry(inside, socket("[fdaa:0:7::f]:25"))), Ok(Speech::Raw));
        assert_eq!(
            speech(own.entry(inside, socket("[fdaa:0:7::f]:443"))),
            Err(Closed::TlsOnFlycast)
        );
        for peer in [outside, socket("[fdaa::3]:5"), socket("127.0.0.1:5")] {
            assert_eq!(
                speech(own.entry(peer, socket("[fdaa:0:7::f]:80"))),
                Err(Closed::OtherNetwork)
            );
        }
        let lent = view(usual_ports(), Some(8));
        assert_eq!(
            speech(lent.entry(outside, socket("[fdaa:0:7::f]:80"))),
            Ok(Speech::Http)
        );
        assert_eq!(
            speech(lent.entry(inside, socket("[fdaa:0:7::f]:80"))),
            Err(Closed::OtherNetwork)
        );
    }

    #[test]
    fn a_shared_address_goes_by_the_name() {
        let view = view(usual_ports(), None);
        let ask = |port: u16, name: &str, opening, pages| {
            let local = SocketAddr::new("192.0.2.9".parse().unwrap(), port);
            match view.named(local, Some(name), opening, pages) {
                Named::Way(way) => Ok(Some(way.speech)),
                Named::Page => Ok(None),
                Named::Closed(why) => Err(why),
            }
        };
        use Opening::{ClientHello, Postgres};
        for (port, name, opening, pages, wanted) in [
            (443, "web.test", ClientHello, true, Ok(Some(Speech::Https))),
            (8883, "web.test", ClientHello, false, Ok(Some(Speech::Tls))),
            (5432, "web.test", Postgres, false, Ok(Some(Speech::Postgres))),
            // Newer clients of Postgres begin with TLS at once.
            (5432, "web.test", ClientHello, false, Ok(Some(Speech::Postgres))),
            (8883, "web.test", Postgres, false, Err(Closed::OtherSpeech)),
            (25, "web.test", ClientHello, false, Err(Closed::OtherSpeech)),
            (25, "web.test", Postgres, false, Err(Closed::OtherSpeech)),
            (9, "web.test", ClientHello, false, Err(Closed::NoService)),
            (9, "web.test", ClientHello, true, Ok(None)),
            (443, "nobody.test", ClientHello, true, Ok(None)),
            (9, "nobody.test", ClientHello, false, Err(Closed::NoApp)),
            (443, "api.test", ClientHello, true, Ok(None)),
            (8883, "api.test", ClientHello, false, Err(Closed::NoService)),
            (443, "bare.test", ClientHello, true, Ok(None)),
        ] {
            assert_eq!(ask(port, name, opening, pages), wanted, "{port} {name} {opening:?}");
        }
    }

    #[test]
    fn what_the_app_is_told_of_the_client() {
        let view = view(usual_ports(), None);
        for (port, wanted) in [(8883, Some(Announce::Text)), (5432, Some(Announce::Binary)), (25, None)] {
            let local = SocketAddr::new("192.0.2.1".parse().unwrap(), port);
            let Entry::Way(way) = view.entry(socket("1.2.3.4:5"), local) else {
                panic!("no way")
            };
            assert_eq!(way.announce, wanted);
        }
    }

    proptest! {
        #[test]
        fn the_order_of_handlers_means_nothing(
            chosen in proptest::sample::subsequence(HANDLERS.to_vec(), 0..=HANDLERS.len()),
            turned in any::<prop::sample::Index>(),
        ) {
            let port = |handlers: &[&str]| Port {
                handlers: Some(handlers.iter().map(|h| (*h).to_owned()).collect()),
                ..Port::default()
            };
            let mut other = chosen.clone();
            if !other.is_empty() {
                let by = turned.index(other.len());
                other.rotate_left(by);
            }
            prop_assert_eq!(Speech::of(&port(&chosen)), Speech::of(&port(&other)));
            prop_assert_eq!(Announce::of(&port(&chosen)), Announce::of(&port(&other)));
        }

        /// Whatever is declared and whoever asks: a shared address gives only what ends TLS, Flycast only what does not
        /// and only to its network, and the port is always one that the app declares.
        #[test]
        fn nobody_gets_in_where_nothing_is(
            start in 1u16..100, length in 0u16..20,
            handlers in proptest::sample::subsequence(HANDLERS.to_vec(), 0..=HANDLERS.len()),
            asked in 1u16..130, peer_network in 0u16..10, lent in proptest::option::of(6u64..9),
            postgres: bool, pages: bool,
        ) {
            let ports = vec![json!({"start_port": start, "end_port": start + length, "handlers": handlers})];
            let view = view(ports, lent);
            let declared = (start..=start + length).contains(&asked);
            let peer: SocketAddr = format!("[fdaa:0:{peer_network:x}:1::2]:5").parse().unwrap();
            let at = |ip: &str| SocketAddr::new(ip.parse().unwrap(), asked);

            let dedicated = view.entry(peer, at("192.0.2.1"));
            prop_assert_eq!(matches!(dedicated, Entry::Way(_)), declared);
            if let Entry::Way(way) = view.entry(peer, at("fdaa:0:7::f")) {
                prop_assert!(declared && way.private && !way.speech.ends_tls());
                prop_assert_eq!(u64::from(peer_network), lent.unwrap_or(7));
            }
            let opening = if postgres { Opening::Postgres } else { Opening::ClientHello };
            match view.named(at("192.0.2.9"), Some("web.test"), opening, pages) {
                Named::Way(way) => {
                    prop_assert!(declared && way.speech.ends_tls() && !way.private);
                    prop_assert!(!postgres || way.speech == Speech::Postgres);
                }
                Named::Page => prop_assert!(pages && !postgres),
                Named::Closed(_) => prop_assert!(!pages || postgres),
            }
        }
    }
}
