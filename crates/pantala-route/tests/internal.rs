//! The table of `.internal` names, asked by members of two networks.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use pantala_route::internal::{Network, Records, Wanted, network_of};
use pantala_route::snapshot::Snapshot;
use pantala_route::table::Table;
use pantala_wire::feed::FeedRow;
use serde_json::{Value, json};

fn row(key: &str, value: Value) -> FeedRow {
    FeedRow {
        stream: "routes".to_owned(),
        key: key.to_owned(),
        value: Some((&value).into()),
    }
}

fn machine(id: &str, app: &str, region: &str, state: &str, last: &str, more: Value) -> FeedRow {
    let mut value = json!({"id": id, "app": app, "region": region, "node": format!("{region}-1"), "instance_id": "01",
        "generation": 1, "state": state, "ip4": "172.19.0.2", "ip6": format!("fdaa:0:1::{last}"), "services": [],
        "passing": [], "group": "web"});
    for (name, one) in more.as_object().unwrap() {
        value[name] = one.clone();
    }
    row(&format!("m/{id}"), value)
}

fn view() -> Snapshot {
    let mut table = Table::new("iad-1");
    let app = |name: &str, network: u64| {
        row(
            &format!("app/{name}"),
            json!({"app": name, "org": "acme", "network": network}),
        )
    };
    let rows = vec![
        app("shop", 1),
        app("empty", 1),
        app("theirs", 2),
        machine(
            "m1",
            "shop",
            "iad",
            "started",
            "11",
            json!({"metadata": {"Role": "leader"}}),
        ),
        machine("m2", "shop", "lhr", "started", "12", json!({"group": "worker"})),
        machine("m3", "shop", "nrt", "started", "13", json!({"cordoned": true})),
        machine("m4", "shop", "nrt", "stopped", "14", json!({})),
        machine("m5", "shop", "iad", "started", "15", json!({"dns": false})),
        machine("m6", "shop", "iad", "destroyed", "16", json!({})),
        machine("m7", "theirs", "iad", "started", "17", json!({})),
        row("addr/fdaa:0:1::f", json!({"kind": "private", "app": "shop"})),
        row("addr/fdaa:0:2::f", json!({"kind": "private", "app": "theirs"})),
        row(
            "addr/fdaa:0:2::e",
            json!({"kind": "private", "app": "theirs", "network": 1}),
        ),
        row("addr/203.0.113.7", json!({"kind": "dedicated", "app": "empty"})),
    ];
    let changes = table.apply(1, rows);
    assert!(changes.undrained.is_empty());
    table.snapshot()
}

fn ask(network: u64, name: &str, wanted: Wanted) -> Option<String> {
    let snapshot = view();
    let distance = |region: &str| match region {
        "lhr" => 0,
        "iad" => 75_000,
        _ => 220_000,
    };
    let network = Network {
        id: network,
        snapshot: &snapshot,
        distance: &distance,
    };
    network.answer(name, wanted).map(|records| match records {
        Records::Addresses(all) => {
            let last: Vec<String> = all.iter().map(|ip| format!("{:x}", ip.segments()[7])).collect();
            last.join(" ")
        }
        Records::Text(text) => text,
    })
}

#[test]
fn addresses_are_those_of_started_machines_nearest_first() {
    for (name, wanted) in [
        ("shop", Some("12 11 13")),
        ("global.shop", Some("12 11 13")),
        ("empty", Some("")),
        ("nobody", None),
        ("theirs", None),
        ("top1.nearest.of.shop", Some("12")),
        ("top2.nearest.of.shop", Some("12 11")),
        ("top9.nearest.of.shop", Some("12 11 13")),
        ("top0.nearest.of.shop", None),
        ("first.nearest.of.shop", None),
        ("m1.vm.shop", Some("11")),
        ("m4.vm.shop", Some("")),
        ("m5.vm.shop", None),
        ("m7.vm.shop", None),
        ("worker.process.shop", Some("12")),
        ("cron.process.shop", Some("")),
        ("nrt.shop", Some("13")),
        ("syd.shop", Some("")),
        ("iad.theirs", None),
        ("leader.role.kv._metadata.shop", Some("11")),
        ("follower.role.kv._metadata.shop", Some("")),
        ("role.kv._metadata.shop", None),
        ("vms.shop", Some("")),
        ("_apps", Some("")),
        ("me._peer", None),
        ("far.too.many.labels.shop", None),
    ] {
        assert_eq!(ask(1, name, Wanted::Addresses).as_deref(), wanted, "{name}");
    }
}

#[test]
fn texts() {
    for (name, wanted) in [
        ("vms.shop", Some("m1 iad,m2 lhr,m3 nrt")),
        ("all.vms.shop", Some("m1 iad,m2 lhr,m3 nrt,m4 nrt")),
        ("regions.shop", Some("iad,lhr,nrt")),
        ("regions.empty", Some("")),
        ("_apps", Some("empty,shop")),
        ("_peer", Some("")),
        ("shop", Some("")),
        (
            "_instances",
            Some(
                "instance=m1,app=shop,ip=fdaa:0:1::11,region=iad;instance=m2,app=shop,ip=fdaa:0:1::12,region=lhr;\
                 instance=m3,app=shop,ip=fdaa:0:1::13,region=nrt",
            ),
        ),
        ("vms.theirs", None),
    ] {
        assert_eq!(ask(1, name, Wanted::Text).as_deref(), wanted, "{name}");
    }
    assert!(ask(1, "all._instances", Wanted::Text).unwrap().contains("instance=m4"));
}

#[test]
fn another_network_sees_its_own_apps_only() {
    assert_eq!(ask(2, "_apps", Wanted::Text).as_deref(), Some("theirs"));
    assert_eq!(ask(2, "theirs", Wanted::Addresses).as_deref(), Some("17"));
    assert_eq!(ask(2, "shop", Wanted::Addresses), None);
    assert_eq!(ask(3, "theirs", Wanted::Addresses), None);
}

#[test]
fn other_types_are_empty_where_the_name_exists() {
    assert_eq!(ask(1, "shop", Wanted::Other).as_deref(), Some(""));
    assert_eq!(ask(1, "nobody", Wanted::Other), None);
}

#[test]
fn the_network_is_read_from_the_askers_address() {
    for (ip, wanted) in [
        ("fdaa:0:1:a7b:7d:f066:b83b:2", Some(1)),
        ("fdaa:1:2::2", Some(0x1_0002)),
        ("fdaa::3", None),
        ("fd00:0:1::2", None),
        ("10.0.0.1", None),
    ] {
        assert_eq!(network_of(ip.parse().unwrap()), wanted, "{ip}");
    }
}

#[test]
fn flycast_names_lead_to_addresses_that_the_asker_may_use() {
    let view = view();
    for (network, app, wanted, found) in [
        (1, "shop", Wanted::Addresses, Some(&["fdaa:0:1::f"][..])),
        (2, "shop", Wanted::Addresses, None),
        (1, "theirs", Wanted::Addresses, Some(&["fdaa:0:2::e"])),
        (2, "theirs", Wanted::Addresses, Some(&["fdaa:0:2::f"])),
        // There is such an app, and it has no such address.
        (1, "empty", Wanted::Addresses, Some(&[])),
        (1, "shop", Wanted::Text, Some(&[])),
        (1, "nobody", Wanted::Addresses, None),
        (1, "www.shop", Wanted::Addresses, None),
    ] {
        let network = Network {
            id: network,
            snapshot: &view,
            distance: &|_| 0,
        };
        let wanted_addresses = found.map(|found| found.iter().map(|ip| ip.parse().unwrap()).collect());
        let answered = network.flycast(app, wanted);
        assert_eq!(
            answered,
            wanted_addresses.map(Records::Addresses),
            "{app} in {}",
            network.id
        );
    }
}
