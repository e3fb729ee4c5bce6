//! Rows to snapshots: set aside, deltas, epochs, wakes ahead of their row.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use std::collections::BTreeMap;
use std::net::IpAddr;

use pantala_route::matching::Matched;
use pantala_route::snapshot::{App, Machine, Offer, Phase, Target};
use pantala_route::table::Table;
use pantala_wire::feed::FeedRow;
use proptest::prelude::*;
use serde_json::{Value, json};

fn row(key: &str, value: Value) -> FeedRow {
    let stream = if key.starts_with("cert/") { "certs" } else { "routes" };
    FeedRow {
        stream: stream.into(),
        key: key.into(),
        value: (!value.is_null()).then(|| (&value).into()),
    }
}

fn machine(state: &str, instance: &str) -> FeedRow {
    row(
        "m/m1",
        json!({"id": "m1", "app": "web", "region": "iad", "node": "n1", "instance_id": instance, "generation": 1,
            "state": state, "ip4": "10.0.0.2", "ip6": "", "services": ["d"], "passing": [true]}),
    )
}

fn service(port: u16) -> FeedRow {
    row(
        "svc/web/d",
        json!({"app": "web", "protocol": "tcp", "internal_port": port, "ports": [{"port": 80, "handlers": ["http"]},
            {"start_port": 1000, "end_port": 2000}], "concurrency": {}}),
    )
}

fn set_aside(table: &Table) -> Vec<String> {
    table.set_aside().map(|(key, _)| key.to_owned()).collect()
}

#[test]
fn the_order_of_rows_does_not_matter() {
    let rows = [
        machine("started", "a"),
        service(8080),
        row("host/web.test", json!({"app": "web"})),
    ];
    for first in 0..rows.len() {
        let mut table = Table::new("n1");
        let mut rows = rows.to_vec();
        rows.rotate_left(first);
        for one in rows {
            table.apply(1, vec![one]);
        }
        let snapshot = table.snapshot();
        let Matched::App(app) = snapshot.find("10.0.0.1".parse().unwrap(), Some("web.test")) else {
            panic!()
        };
        assert_eq!(
            app.offer(80).unwrap().targets[0].socket(),
            Some("10.0.0.2:8080".parse().unwrap())
        );
        assert_eq!(app.offer(1500).unwrap().targets.len(), 1);
        assert!(app.offer(81).is_none());
    }
}

#[test]
fn unreadable_rows_are_set_aside_and_older_ones_stay() {
    let mut table = Table::new("n1");
    table.apply(1, vec![machine("started", "a"), service(8080)]);
    for (key, value) in [
        ("m/m1", json!({"id": "m1"})),
        ("m/other", json!({"id": "not the key"})),
        (
            "svc/web/d",
            json!({"app": "web", "protocol": "tcp", "internal_port": 1, "ports": [{}], "concurrency": {}}),
        ),
        ("host/a b", json!({"app": "web"})),
        ("host/both.test", json!({"app": "web", "backend": "10.0.0.1:5"})),
        ("host/name.test", json!({"backend": "registry:5000"})),
        ("addr/10.0.0.9", json!({"kind": "dedicated"})),
        ("addr/nowhere", json!({"kind": "shared"})),
        ("cert/x", json!({"names": [], "chain_pem": "", "not_after_ms": 0})),
    ] {
        table.apply(2, vec![row(key, value)]);
        assert!(set_aside(&table).contains(&key.to_owned()), "{key}");
    }
    assert_eq!(set_aside(&table).len(), 9);
    let app = table.snapshot().apps["web"].clone();
    assert_eq!(app.machines[0].phase, Phase::Running);
    assert_eq!(app.offer(80).unwrap().targets[0].service.internal_port, 8080);
    table.replace(3, vec![machine("started", "a"), service(8080)]);
    assert!(set_aside(&table).is_empty());
}

#[test]
fn a_whole_view_removes_what_it_does_not_name() {
    let mut table = Table::new("n1");
    table.apply(
        1,
        vec![
            machine("started", "a"),
            service(8080),
            row("host/web.test", json!({"app": "web"})),
        ],
    );
    table.apply(
        1,
        vec![row("addr/10.0.0.9", json!({"kind": "dedicated", "app": "web"}))],
    );
    table.replace(2, vec![row("app/new", json!({"app": "new", "org": "o", "network": 1}))]);
    let snapshot = table.snapshot();
    assert_eq!(snapshot.apps.keys().map(|k| &**k).collect::<Vec<_>>(), ["new"]);
    assert!(snapshot.hosts.is_empty() && snapshot.addresses.is_empty());
    assert_eq!(table.rows().len(), 1);
}

#[test]
fn an_epoch_ends_with_the_process_it_led_to() {
    let mut table = Table::new("n1");
    table.apply(1, vec![machine("started", "a"), service(8080)]);
    let gauge = table.gauge("m1").unwrap().clone();
    let mut epoch = gauge.epoch();
    for (state, instance, moves) in [
        ("started", "a", false),
        ("stopping", "a", true),
        ("stopped", "a", false),
        ("started", "a", false),
        ("started", "b", true),
        ("updating", "b", true),
    ] {
        table.apply(2, vec![machine(state, instance)]);
        assert_eq!(gauge.epoch() != epoch, moves, "{state} {instance}");
        epoch = gauge.epoch();
        assert_eq!(table.snapshot().apps["web"].machines[0].epoch, epoch);
    }
    table.apply(3, vec![row("m/m1", Value::Null)]);
    assert!(gauge.epoch() != epoch);
}

#[test]
fn a_drain_ends_when_the_row_moves_on() {
    let mut table = Table::new("n1");
    table.apply(1, vec![machine("started", "a"), service(8080)]);
    for (state, instance, ends) in [("started", "a", false), ("stopping", "a", true), ("started", "b", true)] {
        table.gauge("m1").unwrap().drain(None);
        let changes = table.apply(2, vec![machine(state, instance)]);
        assert_eq!(!changes.undrained.is_empty(), ends, "{state} {instance}");
        assert_eq!(table.gauge("m1").unwrap().read().draining, !ends);
    }
}

#[test]
fn a_wake_is_ahead_of_its_row() {
    let mut table = Table::new("n1");
    table.apply(1, vec![machine("stopped", "a"), service(8080)]);
    table.woken("m1", "10.0.0.7");
    let woken = table.snapshot().apps["web"].machines[0].clone();
    assert_eq!(
        (woken.phase, woken.ip4),
        (Phase::Running, Some("10.0.0.7".parse::<IpAddr>().unwrap()))
    );
    table.apply(2, vec![machine("stopped", "a")]);
    assert_eq!(
        table.snapshot().apps["web"].machines[0].phase,
        Phase::Asleep(1),
        "the same row again counts"
    );
}

proptest! {
    /// Whatever comes as JSON: nothing panics, and a good row beside it is in force.
    #[test]
    fn no_row_stops_another(key in "(app|host|addr|svc|m|cert|x)/[a-z0-9./]{0,12}", value in any_json()) {
        let mut table = Table::new("n1");
        table.apply(1, vec![row(&key, value), row("host/good.test", json!({"app": "good"}))]);
        prop_assert!(table.snapshot().hosts.contains_key("good.test"));
        table.apply(2, vec![row(&key, Value::Null)]);
        prop_assert!(set_aside(&table).is_empty());
    }

    /// The view follows from the rows in force, however they came to be so.
    #[test]
    fn many_changes_and_one_whole_view_are_the_same(changes in prop::collection::vec(change(), 1..24)) {
        let mut table = Table::new("n1");
        let mut rows = BTreeMap::new();
        for (revision, (key, value)) in changes.into_iter().enumerate() {
            table.apply(revision as u64, vec![row(&key, value.clone())]);
            rows.insert(key, value);
        }
        let mut fresh = Table::new("n1");
        let rows = rows.into_iter().filter(|(_, value)| !value.is_null());
        fresh.replace(1, rows.map(|(key, value)| row(&key, value)).collect());
        prop_assert_eq!(set_aside(&table).len() + set_aside(&fresh).len(), 0);
        prop_assert_eq!(told(&table), told(&fresh));
    }
}

/// Of two apps with two services each and three machines, which may move between them.
fn change() -> impl Strategy<Value = (String, Value)> {
    let app = || prop::sample::select(vec!["api", "web"]);
    let digest = || prop::sample::select(vec!["d", "e"]);
    let of_app = (app(), 1..4u8).prop_map(|(app, network)| {
        let value = json!({"app": app, "org": format!("o{network}"), "network": network});
        (format!("app/{app}"), value)
    });
    let of_service = (app(), digest(), 1..4u16, any::<bool>()).prop_map(|(app, digest, port, h2)| {
        let ports = json!([
            {"port": 80, "handlers": ["http"], "http_options": {"h2_backend": h2}},
            {"start_port": 1000 * port, "end_port": 3000, "force_https": h2},
        ]);
        let value = json!({"app": app, "protocol": "tcp", "internal_port": port, "ports": ports, "concurrency": {}});
        (format!("svc/{app}/{digest}"), value)
    });
    let machine = (
        app(),
        0..3u8,
        prop::collection::vec((digest(), any::<bool>()), 0..3),
        0..4u8,
    );
    let of_machine = machine.prop_map(|(app, number, services, kind)| {
        let (digests, passing): (Vec<_>, Vec<_>) = services.into_iter().unzip();
        let id = format!("m{number}");
        let value = json!({"id": id, "app": app, "region": format!("r{}", kind % 2), "node": format!("n{}", kind % 3),
            "instance_id": kind.to_string(), "generation": 1, "state": (if kind < 2 { "started" } else { "stopped" }),
            "ip4": format!("10.0.0.{kind}"), "ip6": "", "services": digests, "passing": passing,
            "group": format!("g{kind}"), "cordoned": kind == 3, "metadata": {"k": kind.to_string()}});
        (format!("m/{id}"), value)
    });
    let change = prop_oneof![of_app, of_service, of_machine];
    (change, 0..5u8).prop_map(|((key, value), fate)| (key, if fate == 0 { Value::Null } else { value }))
}

/// All that a request reads of it.
fn told(table: &Table) -> BTreeMap<String, Value> {
    let of_machine = |m: &Machine| {
        json!([
            *m.id,
            *m.app,
            *m.region,
            *m.node,
            format!("{:?}", m.phase),
            m.ip4,
            m.cordoned,
            *m.group,
            m.metadata,
            m.local
        ])
    };
    let of_app = |app: &App| {
        let machines: Vec<Value> = app.machines.iter().map(|m| of_machine(m)).collect();
        let of_offer = |offer: &Offer| {
            let of_target = |t: &Target| json!([*t.machine.id, t.service.internal_port, t.passing, t.h2]);
            let targets: Vec<Value> = offer.targets.iter().map(of_target).collect();
            json!([offer.start, offer.end, *offer.port, offer.http.as_deref(), targets])
        };
        let offers: Vec<Value> = app.offers.iter().map(of_offer).collect();
        json!([app.network, app.org.as_deref(), machines, offers])
    };
    let snapshot = table.snapshot();
    let apps = snapshot.apps.iter();
    apps.map(|(name, app)| (name.to_string(), of_app(app))).collect()
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!(7)),
        Just(json!(-1)),
        Just(json!("web")),
        Just(json!("10.0.0.1")),
        Just(json!(true)),
        Just(json!([])),
    ];
    let names = [
        "id",
        "app",
        "backend",
        "kind",
        "state",
        "ip4",
        "ports",
        "services",
        "passing",
        "names",
        "internal_port",
    ];
    prop::collection::hash_map(prop::sample::select(names.to_vec()), leaf, 0..6).prop_map(|map| json!(map))
}

#[test]
fn names_of_users_and_addresses_of_apps() {
    let mut table = Table::new("n1");
    table.apply(
        1,
        vec![
            machine("started", "a"),
            service(8080),
            row("host/*.shop.test", json!({"app": "web"})),
            row("host/blog.shop.test", json!({"backend": "10.0.0.9:1"})),
            row("addr/192.0.2.2", json!({"kind": "dedicated", "app": "web"})),
            row("addr/192.0.2.1", json!({"kind": "dedicated", "app": "web"})),
            row(
                "addr/fdaa:0:1::1:3",
                json!({"kind": "private", "app": "web", "network": 1}),
            ),
            row("addr/192.0.2.9", json!({"kind": "shared"})),
            row("acme/token", json!({"authorization": "token.print"})),
            row("txt/_acme.shop.test", json!({"values": ["a"]})),
        ],
    );
    assert!(set_aside(&table).is_empty());
    let snapshot = table.snapshot();
    let find = |host: &str| snapshot.find("10.0.0.1".parse().unwrap(), Some(host));
    assert!(matches!(find("any.shop.test"), Matched::App(_)));
    assert!(
        matches!(find("blog.shop.test"), Matched::Backend(_)),
        "exact before wildcard"
    );
    assert!(matches!(find("a.b.shop.test"), Matched::Unknown), "one label only");
    assert!(matches!(find("shop.test"), Matched::Unknown));
    let public: Vec<String> = snapshot.own_addresses["web"].iter().map(ToString::to_string).collect();
    assert_eq!(public, ["192.0.2.1", "192.0.2.2"]);
    assert_eq!(&*snapshot.acme["token"], "token.print");
    let gone = [
        "host/*.shop.test",
        "addr/192.0.2.1",
        "addr/192.0.2.2",
        "acme/token",
        "txt/_acme.shop.test",
    ];
    table.apply(2, gone.map(|key| row(key, Value::Null)).to_vec());
    let snapshot = table.snapshot();
    assert!(matches!(
        snapshot.find("10.0.0.1".parse().unwrap(), Some("any.shop.test")),
        Matched::Unknown
    ));
    assert!(snapshot.own_addresses.is_empty() && snapshot.acme.is_empty() && snapshot.texts.is_empty());
}

proptest! {
    /// What the names of apps lead to is kept up change by change; it has to be what all addresses together say.
    #[test]
    fn the_addresses_of_apps_are_those_of_all_changes_so_far(steps in prop::collection::vec((0..6u8, 0..5u8, 0..3u8), 1..60)) {
        let mut table = Table::new("n1");
        for (revision, (ip, kind, app)) in steps.into_iter().enumerate() {
            let value = match kind {
                0 => Value::Null,
                1 => json!({"kind": "shared"}),
                2 => json!({"kind": "private", "app": "a0"}),
                _ => json!({"kind": "dedicated", "app": format!("a{app}")}),
            };
            table.apply(revision as u64, vec![row(&format!("addr/192.0.2.{ip}"), value)]);
            let snapshot = table.snapshot();
            let mut wanted = BTreeMap::<String, Vec<IpAddr>>::new();
            for (ip, address) in snapshot.addresses.iter().filter(|(_, address)| !address.private) {
                wanted.entry(address.app.to_string()).or_default().push(*ip);
            }
            wanted.values_mut().for_each(|all| all.sort_unstable());
            let kept = snapshot.own_addresses.iter();
            let kept: BTreeMap<_, _> = kept.map(|(app, all)| (app.to_string(), all.to_vec())).collect();
            prop_assert_eq!(kept, wanted);
        }
    }
}
