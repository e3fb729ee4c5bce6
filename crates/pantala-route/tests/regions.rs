//! The choice over several regions and hosts, asked through rows as the proxy asks.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use std::collections::HashMap;
use std::net::IpAddr;

use pantala_route::choose::{Choice, Failure, Knowledge, Reach, Waiting, choose};
use pantala_route::matching::Matched;
use pantala_route::prefer::Wishes;
use pantala_route::snapshot::{App, Machine, Phase};
use pantala_route::table::Table;
use pantala_wire::feed::FeedRow;
use proptest::prelude::*;
use serde_json::{Value, json};

const REGIONS: [&str; 3] = ["iad", "lhr", "nrt"];
const SOFT: u32 = 2;
const HARD: u32 = 4;
const NOW_MS: u64 = 10_000;

#[derive(Clone, Debug)]
struct One {
    region: usize,
    state: &'static str,
    /// as its host's proxy last said
    load: u32,
    passing: bool,
    away: bool,
    tried: bool,
}

fn of(region: usize, state: &'static str, load: u32) -> One {
    One {
        region,
        state,
        load,
        passing: true,
        away: false,
        tried: false,
    }
}

fn machine() -> impl Strategy<Value = One> {
    let states = prop::sample::select(vec![
        "started", "started", "started", "stopped", "starting", "updating", "failed",
    ]);
    (0..3usize, states, 0..=HARD, 0..8u8, 0..8u8, 0..8u8).prop_map(|(region, state, load, passing, away, tried)| One {
        region,
        state,
        load: if state == "started" { load } else { 0 },
        passing: passing != 0,
        away: away == 0 && region != 0,
        tried: tried == 0,
    })
}

fn row(key: String, value: Value) -> FeedRow {
    FeedRow {
        stream: "routes".into(),
        key,
        value: Some((&value).into()),
    }
}

fn fleet(machines: &[One], autostart: bool) -> Table {
    let mut table = Table::new("node-iad");
    let mut rows = vec![
        row("app/web".into(), json!({"app": "web", "org": "o", "network": 1})),
        row("host/web.test".into(), json!({"app": "web"})),
        row(
            "svc/web/d".into(),
            json!({"app": "web", "protocol": "tcp", "internal_port": 8080, "autostart": autostart,
                "ports": [{"port": 80, "handlers": ["http"]}],
                "concurrency": {"type": "requests", "soft_limit": SOFT, "hard_limit": HARD}}),
        ),
    ];
    for (index, one) in machines.iter().enumerate() {
        let region = REGIONS[one.region];
        rows.push(row(
            format!("m/m{index}"),
            json!({"id": format!("m{index}"), "app": "web", "region": region, "node": format!("node-{region}"),
                "instance_id": "01A", "generation": 1, "state": one.state, "ip4": "10.0.0.1", "ip6": "", "services": ["d"],
                "passing": [one.passing]}),
        ));
    }
    table.apply(1, rows);
    for (index, one) in machines.iter().enumerate() {
        let gauge = table.gauge(&format!("m{index}")).unwrap();
        if one.region == 0 {
            (0..one.load).for_each(|_| assert!(gauge.acquire(HARD)));
        } else {
            gauge.report(one.load, NOW_MS);
        }
    }
    table
}

fn app(table: &Table) -> std::sync::Arc<App> {
    let any: IpAddr = "127.0.0.1".parse().unwrap();
    match table.snapshot().find(any, Some("web.test")) {
        Matched::App(app) => app,
        other => panic!("{other:?}"),
    }
}

/// This edge is in the first region; the others are as far as `distances` says.
struct Edge<'a> {
    machines: &'a [One],
    distances: [u32; 3],
    waking: Vec<String>,
}

impl<'a> Edge<'a> {
    fn new(machines: &'a [One]) -> Edge<'a> {
        Edge {
            machines,
            distances: [0, 75_000, 160_000],
            waking: Vec::new(),
        }
    }

    fn one(&self, machine: &Machine) -> &One {
        &self.machines[machine.id[1..].parse::<usize>().unwrap()]
    }
}

impl Knowledge for Edge<'_> {
    fn tried(&self, machine: &Machine) -> bool {
        self.one(machine).tried
    }
    fn waking(&self, machine: &Machine) -> bool {
        self.waking.iter().any(|id| **id == *machine.id)
    }
    fn reach(&self, machine: &Machine) -> Reach {
        match self.one(machine) {
            one if one.away => Reach::Away,
            _ if machine.local => Reach::Here,
            _ => Reach::There,
        }
    }
    fn distance(&self, region: &str) -> u32 {
        self.distances[REGIONS.iter().position(|known| *known == region).unwrap()]
    }
    fn now_ms(&self) -> u64 {
        NOW_MS
    }
}

fn serves(one: &One) -> bool {
    one.state == "started" && one.passing && !one.away && !one.tried
}

fn chosen_by(edge: &Edge<'_>) -> Choice {
    let table = fleet(edge.machines, true);
    choose(
        &app(&table)
            .offer(80)
            .map(|offer| offer.targets.clone())
            .unwrap_or_default(),
        edge,
    )
}

fn chosen(machines: &[One]) -> Choice {
    chosen_by(&Edge::new(machines))
}

fn used(choice: Choice) -> String {
    match choice {
        Choice::Use(target) => target.machine.id.to_string(),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn the_choice_keeps_every_rule(
        machines in prop::collection::vec(machine(), 0..24),
        far in prop::array::uniform2(1u32..300_000),
        autostart in any::<bool>(),
    ) {
        let edge = Edge { distances: [0, far[0], far[1]], ..Edge::new(&machines) };
        let table = fleet(&machines, autostart);
        let app = app(&table);
        let targets = app.offer(80).map(|offer| offer.targets.clone()).unwrap_or_default();
        let distance = |one: &One| edge.distances[one.region];
        let nearer = |one: &One| machines.iter().filter(|other| distance(other) < distance(one)).cloned().collect::<Vec<_>>();
        let free = |one: &One| serves(one) && one.load < HARD;
        match choose(&targets, &edge) {
            Choice::Use(target) => {
                let one = edge.one(&target.machine);
                prop_assert!(free(one), "{one:?}");
                // a nearer machine that serves is at its hard limit: soft limits move nothing between regions
                prop_assert!(nearer(one).iter().all(|other| !free(other)));
                let here: Vec<&One> = machines.iter().filter(|other| other.region == one.region && serves(other)).collect();
                prop_assert!(one.load < SOFT || here.iter().all(|other| other.load >= SOFT));
                if targets.iter().filter(|t| t.machine.region == target.machine.region).count() <= 8 {
                    prop_assert_eq!(one.load, here.iter().map(|other| other.load).min().unwrap());
                }
                // a nearer sleeper would have been woken, unless something starts there already
                let sleeps = |other: &One| autostart && other.state == "stopped" && !other.away && !other.tried;
                let starts = nearer(one).iter().any(|other| other.state == "starting" && !other.away && !other.tried);
                prop_assert!(starts || !nearer(one).iter().any(sleeps));
            }
            Choice::Wake(target, meanwhile) => {
                let one = edge.one(&target.machine);
                prop_assert!(autostart && one.state == "stopped" && !one.away && !one.tried);
                prop_assert!(nearer(one).iter().all(|other| !free(other)));
                let same = |other: &&One| other.region == one.region && serves(other);
                prop_assert!(machines.iter().filter(same).all(|other| other.load >= SOFT));
                if let Some(target) = meanwhile {
                    prop_assert!(free(edge.one(&target.machine)));
                } else {
                    prop_assert!(!machines.iter().any(free));
                }
            }
            Choice::Queue(target) => {
                let one = edge.one(&target.machine);
                prop_assert!(serves(one) && one.load >= HARD);
                prop_assert!(!machines.iter().any(free));
                prop_assert!(nearer(one).iter().all(|other| !serves(other)));
            }
            Choice::Wait(_) | Choice::Exhausted | Choice::Fail(_) => prop_assert!(!machines.iter().any(free)),
        }
    }

    #[test]
    fn without_load_all_go_to_the_nearest_region(far in prop::array::uniform2(1u32..300_000), here in any::<bool>()) {
        let machines = [of(0, if here { "started" } else { "failed" }, 0), of(1, "started", 0), of(2, "started", 0)];
        let edge = Edge { distances: [0, far[0], far[1]], ..Edge::new(&machines) };
        prop_assume!(far[0] != far[1]);
        let nearest = if here { "m0" } else if far[0] < far[1] { "m1" } else { "m2" };
        for _ in 0..20 {
            prop_assert_eq!(used(chosen_by(&edge)), nearest);
        }
    }
}

#[test]
fn over_the_hard_limit_the_next_nearest() {
    assert_eq!(used(chosen(&[of(0, "started", HARD - 1), of(1, "started", 0)])), "m0");
    assert_eq!(
        used(chosen(&[
            of(0, "started", HARD),
            of(2, "started", 0),
            of(1, "started", 3)
        ])),
        "m2"
    );
    let Choice::Queue(target) = chosen(&[of(2, "started", HARD), of(1, "started", HARD)]) else {
        panic!()
    };
    assert_eq!(&*target.machine.id, "m1");
}

#[test]
fn a_sleeper_near_by_is_woken_though_one_runs_far_away() {
    let Choice::Wake(target, Some(meanwhile)) = chosen(&[of(1, "stopped", 0), of(2, "started", 0)]) else {
        panic!()
    };
    assert_eq!((&*target.machine.id, &*meanwhile.machine.id), ("m0", "m1"));
    let tried = One {
        tried: true,
        ..of(1, "stopped", 0)
    };
    assert_eq!(
        used(chosen(&[tried, of(2, "started", 0)])),
        "m1",
        "its wake was refused"
    );
}

#[test]
fn a_running_machine_near_by_spares_the_sleepers_far_away() {
    assert_eq!(used(chosen(&[of(1, "started", SOFT), of(2, "stopped", 0)])), "m0");
    let Choice::Wake(target, None) = chosen(&[of(1, "started", HARD), of(2, "stopped", 0)]) else {
        panic!()
    };
    assert_eq!(&*target.machine.id, "m1");
}

#[test]
fn a_wake_on_its_way_is_joined_wherever_it_is() {
    let machines = [of(1, "stopped", 0), of(1, "stopped", 0), of(2, "stopped", 0)];
    let edge = Edge {
        waking: vec!["m1".into()],
        ..Edge::new(&machines)
    };
    let Choice::Wake(target, None) = chosen_by(&edge) else {
        panic!()
    };
    assert_eq!(&*target.machine.id, "m1");
}

#[test]
fn what_changes_near_by_is_not_waited_for_while_another_region_serves() {
    for state in ["updating", "starting", "stopping"] {
        assert_eq!(used(chosen(&[of(0, state, 0), of(2, "started", 0)])), "m1", "{state}");
    }
    let failing = One {
        passing: false,
        ..of(0, "started", 0)
    };
    assert_eq!(used(chosen(&[failing, of(2, "started", 0)])), "m1");
    assert!(matches!(
        chosen(&[of(0, "starting", 0), of(2, "stopped", 0)]),
        Choice::Wait(Waiting::Start)
    ));
    assert!(matches!(
        chosen(&[of(0, "updating", 0), of(2, "stopped", 0)]),
        Choice::Wake(..)
    ));
}

#[test]
fn hosts_that_do_not_answer_are_skipped() {
    let away = One {
        away: true,
        ..of(1, "started", 0)
    };
    assert_eq!(used(chosen(&[away.clone(), of(2, "started", 3)])), "m1");
    assert!(matches!(
        chosen(std::slice::from_ref(&away)),
        Choice::Wait(Waiting::Away)
    ));
    assert!(matches!(
        chosen(&[away, of(2, "failed", 0)]),
        Choice::Wait(Waiting::Away)
    ));
    assert!(matches!(
        chosen(&[of(2, "failed", 0)]),
        Choice::Fail(Failure::Unstartable)
    ));
}

#[test]
fn what_a_host_said_of_its_load_is_forgotten_after_a_while() {
    let machines = [of(1, "started", HARD), of(2, "started", 0)];
    let table = fleet(&machines, true);
    let edge = Edge::new(&machines);
    let app = app(&table);
    assert_eq!(used(choose(&app.offer(80).unwrap().targets, &edge)), "m1");
    let gauge = table.gauge("m0").unwrap();
    gauge.report(0, NOW_MS + 2_000); // what was said before is too old to count
    assert_eq!(used(choose(&app.offer(80).unwrap().targets, &edge)), "m0");
}

#[test]
fn wishes_reach_over_regions() {
    let machines = [of(0, "started", 0), of(1, "started", 0), of(2, "stopped", 0)];
    let table = fleet(&machines, true);
    let app = app(&table);
    let targets = &app.offer(80).unwrap().targets;
    let edge = Edge::new(&machines);
    let ask = |wishes: Wishes| match wishes.choose(targets, &edge).choice {
        Some(Choice::Use(target) | Choice::Wake(target, _)) => target.machine.id.to_string(),
        other => format!("{other:?}"),
    };
    let of_region = |region: &str| vec![region.to_owned()];
    let expected: HashMap<&str, Wishes> = [
        (
            "m1",
            Wishes {
                prefer_region: of_region("lhr"),
                ..Wishes::default()
            },
        ),
        (
            "m2",
            Wishes {
                force_region: of_region("nrt"),
                ..Wishes::default()
            },
        ),
        (
            "m0",
            Wishes {
                prefer_region: of_region("fra"),
                ..Wishes::default()
            },
        ),
    ]
    .into();
    for (machine, wishes) in expected {
        assert_eq!(ask(wishes), machine);
    }
    let forced = Wishes {
        force_instance: Some("m1".into()),
        ..Wishes::default()
    };
    assert_eq!(ask(forced), "m1");
}

#[test]
fn targets_of_a_region_stand_together() {
    let machines = [
        of(2, "started", 0),
        of(0, "started", 0),
        of(2, "started", 0),
        of(1, "started", 0),
        of(0, "started", 0),
    ];
    let table = fleet(&machines, true);
    let regions: Vec<String> = app(&table)
        .offer(80)
        .unwrap()
        .targets
        .iter()
        .map(|t| t.machine.region.to_string())
        .collect();
    assert_eq!(regions, ["iad", "iad", "lhr", "nrt", "nrt"]);
    assert_eq!(Phase::of("started"), Phase::Running);
}
