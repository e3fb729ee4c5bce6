//! Properties of the choice over random fleets, asked through rows as the proxy asks.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use std::collections::HashSet;
use std::net::IpAddr;

use pantala_route::choose::{Choice, Failure, Knowledge, Reach, Waiting, choose};
use pantala_route::matching::Matched;
use pantala_route::prefer::Wishes;
use pantala_route::snapshot::{App, Machine, Phase};
use pantala_route::table::Table;
use pantala_wire::feed::FeedRow;
use proptest::prelude::*;
use serde_json::{Value, json};

const STATES: [&str; 14] = [
    "created",
    "started",
    "started",
    "started",
    "stopped",
    "suspended",
    "failed",
    "starting",
    "stopping",
    "restarting",
    "updating",
    "replacing",
    "destroyed",
    "a later word",
];
const SOFT: u32 = 2;
const HARD: u32 = 4;

#[derive(Clone, Debug)]
struct One {
    state: &'static str,
    load: u32,
    cordoned: bool,
    passing: bool,
    draining: bool,
    here: bool,
    tried: bool,
    waking: bool,
}

fn machine() -> impl Strategy<Value = One> {
    let flags = (any::<bool>(), 0..8u8, 0..8u8, 0..8u8, 0..8u8, 0..8u8, any::<bool>());
    (prop::sample::select(STATES.to_vec()), 0..=HARD, flags).prop_map(|(state, load, flags)| One {
        state,
        load: if state == "started" { load } else { 0 },
        cordoned: flags.1 == 0,
        passing: flags.2 != 0,
        draining: flags.3 == 0 && state == "started",
        here: flags.4 != 0,
        tried: flags.5 == 0,
        waking: flags.6 && flags.0,
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
    let mut table = Table::new("n1");
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
        rows.push(row(
            format!("m/m{index}"),
            json!({"id": format!("m{index}"), "app": "web", "region": "iad", "node": if one.here { "n1" } else { "n2" },
                "instance_id": "01A", "generation": 1, "state": one.state, "ip4": "10.0.0.1", "ip6": "", "services": ["d"],
                "passing": [one.passing], "cordoned": one.cordoned}),
        ));
    }
    table.apply(1, rows);
    for (index, one) in machines.iter().enumerate() {
        let gauge = table.gauge(&format!("m{index}")).unwrap();
        (0..one.load).for_each(|_| assert!(gauge.acquire(HARD)));
        if one.draining {
            assert!(gauge.drain(None));
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

struct Knows<'a>(&'a [One]);

impl Knows<'_> {
    fn one(&self, machine: &Machine) -> &One {
        &self.0[machine.id[1..].parse::<usize>().unwrap()]
    }
}

impl Knowledge for Knows<'_> {
    fn tried(&self, machine: &Machine) -> bool {
        self.one(machine).tried
    }
    fn waking(&self, machine: &Machine) -> bool {
        self.one(machine).waking
    }
    fn reach(&self, machine: &Machine) -> Reach {
        if machine.local { Reach::Here } else { Reach::Never }
    }
    fn distance(&self, _region: &str) -> u32 {
        0
    }
    fn now_ms(&self) -> u64 {
        0
    }
}

fn serves(one: &One) -> bool {
    one.state == "started" && one.here && !one.cordoned && one.passing && !one.draining && !one.tried
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn the_choice_keeps_every_rule(machines in prop::collection::vec(machine(), 0..14), autostart in any::<bool>()) {
        let table = fleet(&machines, autostart);
        let app = app(&table);
        let Some(offer) = app.offer(80) else {
            prop_assert!(machines.is_empty());
            return Ok(());
        };
        let knows = Knows(&machines);
        let fit: Vec<&One> = machines.iter().filter(|one| serves(one)).collect();
        let least = fit.iter().map(|one| one.load).min();
        match choose(&offer.targets, &knows) {
            Choice::Use(target) => {
                let one = knows.one(&target.machine);
                prop_assert!(serves(one), "{one:?}");
                prop_assert!(one.load < HARD);
                // at or above the soft limit only if nobody is below
                prop_assert!(one.load < SOFT || least >= Some(SOFT));
                if machines.len() <= 8 {
                    prop_assert_eq!(Some(one.load), least);
                }
                prop_assert!(target.machine.gauge.acquire(target.service.hard));
            }
            Choice::Wake(target, meanwhile) => {
                let one = knows.one(&target.machine);
                prop_assert!(autostart && one.here && !one.cordoned && !one.tried);
                // asleep, or on its way already: then its wake is joined
                prop_assert!(one.waking || matches!(Phase::of(one.state), Phase::Asleep(_)));
                // never while somebody is below the soft limit
                prop_assert!(least.is_none_or(|load| load >= SOFT));
                if let Some(target) = meanwhile {
                    prop_assert!(serves(knows.one(&target.machine)) && knows.one(&target.machine).load < HARD);
                }
            }
            Choice::Queue(_) => prop_assert!(!fit.is_empty() && fit.iter().all(|one| one.load >= HARD)),
            Choice::Wait(_) | Choice::Exhausted | Choice::Fail(_) => {
                // nobody could have served
                prop_assert!(fit.iter().all(|one| one.load >= HARD));
            }
        }
    }

    /// Whatever a client or an app wishes, the rules hold, and its conditions do.
    #[test]
    fn wishes_keep_every_rule(
        machines in prop::collection::vec(machine(), 1..12),
        prefer in prop::option::of(0..12usize),
        force in prop::option::of(0..12usize),
        exclude in prop::option::of(0..12usize),
        region in prop::sample::select(vec!["", "iad", "us", "any", "lhr", "eu"]),
        forced: bool,
    ) {
        let table = fleet(&machines, true);
        let app = app(&table);
        let knows = Knows(&machines);
        let id = |index: Option<usize>| index.map(|index| format!("m{index}"));
        let regions = |on: bool| if on && !region.is_empty() { vec![region.to_owned()] } else { Vec::new() };
        let wishes = Wishes {
            prefer_instance: id(prefer),
            force_instance: id(force),
            exclude: id(exclude),
            prefer_region: regions(!forced),
            force_region: regions(forced),
        };
        let wished = wishes.choose(&app.offer(80).unwrap().targets, &knows);
        let elsewhere = forced && matches!(region, "lhr" | "eu");
        let meant = |id: &str| {
            wishes.force_instance.as_deref().is_none_or(|wanted| wanted == id)
                && wishes.exclude.as_deref() != Some(id)
                && !elsewhere
        };
        match &wished.choice {
            Some(Choice::Use(target)) => {
                prop_assert!(meant(&target.machine.id));
                prop_assert!(serves(knows.one(&target.machine)) && knows.one(&target.machine).load < HARD);
            }
            Some(Choice::Wake(target, _) | Choice::Queue(target)) => {
                prop_assert!(meant(&target.machine.id) && !knows.one(&target.machine).cordoned);
            }
            Some(_) => {}
            None => prop_assert!(elsewhere || force.is_some() || exclude.is_some()),
        }
        if let (Some(unavailable), Some(Choice::Use(target))) = (&wished.unavailable, &wished.choice) {
            prop_assert!(**unavailable != *target.machine.id, "the preferred one is not both used and away");
        }
    }

    #[test]
    fn all_slots_are_taken_and_none_twice(machines in prop::collection::vec(machine(), 1..12)) {
        let table = fleet(&machines, false);
        let app = app(&table);
        let offer = app.offer(80).unwrap();
        let knows = Knows(&machines);
        let free: u32 = machines.iter().filter(|one| serves(one)).map(|one| HARD - one.load).sum();
        let mut taken = 0;
        while let Choice::Use(target) = choose(&offer.targets, &knows) {
            prop_assert!(target.machine.gauge.acquire(target.service.hard));
            taken += 1;
        }
        prop_assert_eq!(taken, free);
    }
}

fn chosen(machines: &[One]) -> Choice {
    let table = fleet(machines, true);
    choose(&app(&table).offer(80).unwrap().targets, &Knows(machines))
}

fn of(state: &'static str, load: u32) -> One {
    let no = false;
    One {
        state,
        load,
        cordoned: no,
        passing: true,
        draining: no,
        here: true,
        tried: no,
        waking: no,
    }
}

#[test]
fn a_single_sleeper_is_woken_and_the_quickest_first() {
    let Choice::Wake(target, None) = chosen(&[of("created", 0), of("stopped", 0), of("suspended", 0)]) else {
        panic!()
    };
    assert_eq!(&*target.machine.id, "m2");
}

#[test]
fn a_full_fleet_wakes_one_more_but_not_two() {
    assert!(matches!(
        chosen(&[of("started", SOFT), of("stopped", 0)]),
        Choice::Wake(_, Some(_))
    ));
    let waking = One {
        waking: true,
        ..of("stopped", 0)
    };
    assert!(matches!(
        chosen(&[of("started", SOFT), waking.clone(), of("stopped", 0)]),
        Choice::Use(_)
    ));
    let Choice::Wake(target, None) = chosen(&[of("started", HARD), waking, of("stopped", 0)]) else {
        panic!()
    };
    assert_eq!(&*target.machine.id, "m1", "the one on its way is joined");
}

#[test]
fn a_machine_whose_row_is_ahead_of_its_wake_is_joined_and_no_other_woken() {
    let woken = One {
        waking: true,
        passing: false,
        ..of("started", 0)
    };
    let Choice::Wake(target, None) = chosen(&[of("stopped", 0), woken]) else {
        panic!()
    };
    assert_eq!(&*target.machine.id, "m1");
}

/// The first machine was full when its host was asked, whatever its row says.
struct Heard<'a>(Knows<'a>);

impl Knowledge for Heard<'_> {
    fn tried(&self, machine: &Machine) -> bool {
        self.0.tried(machine)
    }
    fn waking(&self, machine: &Machine) -> bool {
        self.0.waking(machine)
    }
    fn runs(&self, machine: &Machine) -> bool {
        *machine.id == *"m0"
    }
    fn reach(&self, machine: &Machine) -> Reach {
        self.0.reach(machine)
    }
    fn distance(&self, region: &str) -> u32 {
        self.0.distance(region)
    }
    fn now_ms(&self) -> u64 {
        self.0.now_ms()
    }
}

#[test]
fn a_machine_that_was_full_is_awake_before_its_row_says_so() {
    let hearing = |machines: &[One]| {
        let table = fleet(machines, true);
        choose(&app(&table).offer(80).unwrap().targets, &Heard(Knows(machines)))
    };
    let woken = |load| One {
        passing: false,
        waking: true,
        ..of("stopped", load)
    };
    assert!(matches!(hearing(&[woken(HARD)]), Choice::Queue(_)));
    assert!(matches!(hearing(&[woken(HARD - 1)]), Choice::Use(_)));
    let Choice::Wake(target, None) = hearing(&[woken(HARD), of("stopped", 0)]) else {
        panic!()
    };
    assert_eq!(&*target.machine.id, "m1", "one more, as when all are full");
}

#[test]
fn what_comes_back_by_itself_is_waited_for() {
    assert!(matches!(chosen(&[of("starting", 0)]), Choice::Wait(Waiting::Start)));
    for state in ["updating", "replacing", "restarting", "stopping"] {
        assert!(
            matches!(chosen(&[of(state, 0)]), Choice::Wait(Waiting::Change)),
            "{state}"
        );
    }
    let draining = One {
        draining: true,
        ..of("started", 0)
    };
    assert!(matches!(
        chosen(std::slice::from_ref(&draining)),
        Choice::Wait(Waiting::Change)
    ));
    assert!(
        matches!(chosen(&[draining, of("stopped", 0)]), Choice::Wake(..)),
        "a sleeper serves sooner"
    );
    assert!(matches!(
        chosen(&[One {
            passing: false,
            ..of("started", 0)
        }]),
        Choice::Wait(Waiting::Checks)
    ));
}

#[test]
fn why_nothing_serves() {
    assert!(matches!(
        chosen(&[One {
            cordoned: true,
            ..of("started", 0)
        }]),
        Choice::Fail(Failure::Cordoned)
    ));
    assert!(matches!(
        chosen(&[One {
            here: false,
            ..of("started", 0)
        }]),
        Choice::Fail(Failure::Elsewhere)
    ));
    assert!(matches!(chosen(&[of("failed", 0)]), Choice::Fail(Failure::Unstartable)));
    assert!(matches!(
        chosen(&[One {
            tried: true,
            ..of("started", 0)
        }]),
        Choice::Exhausted
    ));
}

#[test]
fn ties_are_spread() {
    let machines = [of("started", 0), of("started", 0), of("started", 0)];
    let table = fleet(&machines, true);
    let app = app(&table);
    let mut seen = HashSet::new();
    for _ in 0..200 {
        if let Choice::Use(target) = choose(&app.offer(80).unwrap().targets, &Knows(&machines)) {
            seen.insert(target.machine.id.to_string());
        }
    }
    assert_eq!(seen.len(), 3);
}
